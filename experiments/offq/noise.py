"""How far rounding noise alone moves the perplexity of SmolLM2-135M at W4A4KV4.

    python experiments/offq/noise.py --data DIR

OffQ + GPTQ as in table.py, seed 0. Every draw multiplies the embedding by 1 + 1e-6 n, n normal, which moves
codes in every block; once with packed weights (products of integers), once with the same weights as floats.
Writes results/noise.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from table import recipe_of
from windows import Bench

from jaxquant.evaluate import perplexity
from jaxquant.io import load_checkpoint
from jaxquant.pipeline import quantize_model
from jaxquant.quant import QArray

RESULTS = Path(__file__).parent / "results"
DRAWS, SIZE = 6, 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    bench = Bench(parser.parse_args().data, RESULTS / "table.json")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "q"
        quantize_model(bench.source, recipe_of("OffQ + GPTQ", "w4a4kv4", 0), bench.calibration(0), out)
        packed, config = load_checkpoint(out)
    values = jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, QArray) else leaf,
        packed,
        is_leaf=lambda leaf: isinstance(leaf, QArray),
    )
    report: dict = {"protocol": bench.protocol, "size": SIZE, "wikitext2": {}}
    for name, params in (("integers", packed), ("floats", values)):
        draws = []
        for draw in range(DRAWS):
            noise = jax.random.normal(jax.random.key(draw), params["embed"].shape)
            moved = {**params, "embed": params["embed"].astype(noise.dtype) * (1 + SIZE * noise)}
            draws.append(perplexity(moved, config, bench.windows["wikitext2"]).perplexity)
        mean, spread = statistics.fmean(draws), statistics.stdev(draws)
        report["wikitext2"][name] = {"draws": draws, "mean": mean, "standard_deviation": spread}
        print(f"{name}: {mean:.2f} +- {spread:.2f}", flush=True)
    (RESULTS / "noise.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
