"""Gradients at the input of SmolLM2-135M against the original's, by bits of weights rounded to nearest.

    python experiments/fine/proxies.py --data DIR

Weights on min-max grids, asymmetric, groups of 64; 8 windows of 256 tokens of WikiText-2 test. Writes
results/proxies.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from windows import Bench

from jaxquant.io import load_params
from jaxquant.quant import Grid, quantize
from jaxquant.smoothness import gradient_comparison

RESULTS = Path(__file__).parent / "results"
WINDOWS, TOKENS = 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    bench = Bench(parser.parse_args().data, RESULTS / "ptq.json")
    params, config = load_params(bench.source), bench.source.config
    windows = bench.windows["wikitext2"].reshape(-1, TOKENS)[:WINDOWS]
    report: dict = {"protocol": bench.protocol, "windows": WINDOWS, "tokens": TOKENS, "rtn": {}}
    for bits in (8, 4, 3, 2):
        grid = Grid(bits=bits, group_size=64)
        blocks = jax.tree_util.tree_map_with_path(
            lambda path, leaf, grid=grid: quantize(leaf, grid) if path[-1].key == "kernel" else leaf,
            params["blocks"],
        )
        begun = time.monotonic()
        result = gradient_comparison(({**params, "blocks": blocks}, config), (params, config), windows)
        seconds = time.monotonic() - begun
        report["rtn"][bits] = {**dataclasses.asdict(result), "seconds": seconds}
        print(
            f"{bits} bits: ratio {result.ratio:.2f} +- {result.ratio_stderr:.2f}, "
            f"cosine {result.cosine:.3f} +- {result.cosine_stderr:.3f}, {seconds:.0f} s",
            flush=True,
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "proxies.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
