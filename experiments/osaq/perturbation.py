"""What OSAQ's step alone does to SmolLM2-135M: all weights moved, nothing rounded.

    python experiments/osaq/perturbation.py --data DIR [--bits 2 3] [--etas 100 300 1000 10000]

The moments are those of the original model on the calibration windows of table.py, all blocks in one compiled
pass. `range` is the root mean square over the groups of a linear of their ranges after over before, mean over
linears; `energy` the relative output energy of the step, `tr(D^T H D) / tr(W^T H W)`, likewise. Writes
results/perturbation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from windows import Bench

from jaxquant.calibrate.collect import model_moments
from jaxquant.evaluate import perplexity
from jaxquant.io import load_params
from jaxquant.methods import Problem, layer_error, osaq
from jaxquant.models.config import LINEARS
from jaxquant.quant import Grid

RESULTS = Path(__file__).parent / "results"


def ranges(w: jax.Array, grid: Grid) -> jax.Array:
    grouped = w.reshape(grid.groups(w.shape[0]), -1, w.shape[1])
    return jnp.maximum(grouped.max(axis=1), 0) - jnp.minimum(grouped.min(axis=1), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--etas", type=float, nargs="+", default=[100.0, 300.0, 1e3, 1e4])
    arguments = parser.parse_args()
    bench = Bench(arguments.data, RESULTS / "table.json")
    config, params = bench.source.config, load_params(bench.source)
    moments = model_moments(params, config, bench.calibration(0))
    rows = []
    for bits in arguments.bits:
        grid = Grid(bits=bits, group_size=64, clip="mse")
        for eta in arguments.etas:
            blocks = {**params["blocks"], "attn": dict(params["blocks"]["attn"])}
            blocks["mlp"] = dict(blocks["mlp"])
            narrower, energies = [], []
            for tap, path in [(tap, path) for tap, paths in LINEARS for path in paths]:
                part, name = path.split(".")
                linear, moved = blocks[part][name], []
                for index, w in enumerate(linear["kernel"]):
                    own = jax.tree.map(lambda leaf, i=index: leaf[i], moments[tap])
                    moved.append(osaq(Problem.of(w, own, grid), eta=eta).weight)
                    before, after = (jnp.mean(ranges(a, grid) ** 2) for a in (w, moved[-1]))
                    narrower.append(float(jnp.sqrt(after / before)))
                    energies.append(float(layer_error(moved[-1], w, own.second)))
                blocks[part][name] = {**linear, "kernel": jnp.stack(moved)}
            found = {
                name: perplexity({**params, "blocks": blocks}, config, batch).perplexity
                for name, batch in bench.windows.items()
            }
            rows.append({
                "bits": bits,
                "eta": eta,
                "perplexity": found,
                "change": {n: v / bench.protocol["original"][n] - 1 for n, v in found.items()},
                "range": sum(narrower) / len(narrower),
                "energy": sum(energies) / len(energies),
            })  # fmt: skip
            print(rows[-1], flush=True)
            report = {"protocol": bench.protocol, "rows": rows}
            (RESULTS / "perturbation.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
