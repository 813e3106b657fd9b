"""What FINE costs after GPTQ, on the linears of one SmolLM2-shaped block: recipes in turn, in one run.

    python experiments/bench/fine.py [--repeats 5] [--bits 3]

Weights and inputs are synthetic, correlated and with uneven channels; every recipe solves all seven linears.
Not counted are the gradients of the model, which are taken once for all blocks. Times are medians, ratios
those of medians. Writes results/fine.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np

from jaxquant.calibrate.moments import observe
from jaxquant.folder import versions
from jaxquant.methods import Problem
from jaxquant.named import named
from jaxquant.quant import Grid

#: Path: inputs, outputs.
SHAPES = {
    "attn.q": (576, 576),
    "attn.k": (576, 192),
    "attn.v": (576, 192),
    "attn.o": (576, 576),
    "mlp.gate": (576, 1536),
    "mlp.up": (576, 1536),
    "mlp.down": (1536, 576),
}
RECIPES = ("gptq", "gptq-cd", "gptq-fine")
RESULTS = Path(__file__).parent / "results" / "fine.json"


def problem(rows: int, columns: int, grid: Grid) -> Problem:
    rng = np.random.default_rng(0)

    def tokens(channels: int) -> jax.Array:
        mix = rng.standard_normal((channels, channels)) / channels**0.5 + np.eye(channels)
        x = rng.standard_normal((2 * channels, channels)) @ mix * rng.lognormal(0, 1, channels)
        return jax.numpy.asarray(x, jax.numpy.float32)

    weight = jax.numpy.asarray(rng.standard_normal((rows, columns)), jax.numpy.float32)
    g = tokens(columns)
    return Problem.of(weight, observe(tokens(rows)), grid, outputs=g.T @ g)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bits", type=int, default=3)
    arguments = parser.parse_args()
    grid = Grid(bits=arguments.bits, group_size=64, clip="mse")
    problems = {path: problem(*shape, grid) for path, shape in SHAPES.items()}
    recipes = {name: named(name, grid) for name in RECIPES}
    seconds = {name: {path: [] for path in SHAPES} for name in RECIPES}
    for number in range(arguments.repeats + 1):
        for path, one in problems.items():
            for name, recipe in recipes.items():
                own = recipe.at(f"blocks.0.{path}")
                begun = time.perf_counter()
                jax.block_until_ready(own(one).codes)
                if number:  # the first compiles
                    seconds[name][path].append(time.perf_counter() - begun)
    medians = {
        name: {path: statistics.median(values) for path, values in own.items()}
        for name, own in seconds.items()
    }
    totals = {name: sum(own.values()) for name, own in medians.items()}
    report = {
        "bits": arguments.bits,
        "repeats": arguments.repeats,
        "seconds": medians,
        "block_over_gptq": {name: total / totals["gptq"] for name, total in totals.items()},
        "versions": versions(),
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["block_over_gptq"], indent=1))


if __name__ == "__main__":
    main()
