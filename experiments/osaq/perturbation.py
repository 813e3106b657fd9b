"""What OSAQ's step alone does to SmolLM2-135M: weights moved, nothing rounded.

    python experiments/osaq/perturbation.py --data DIR [--etas 300 1000 3000] [--bits 2 3]

First every column takes the step, at the prices `--etas`; then, at the price of the named recipe
`osaq-gptq` for `--bits`, those columns that take it there, because they are rounded with less error. The
moments are those of the original model on the calibration windows of table.py, all blocks in one compiled
pass. `range` is the root mean square over the groups of a linear of their ranges after over before, mean over
linears; `widest` the largest ratio of one group; `energy` the relative output energy of the step,
`tr(D^T H D) / tr(W^T H W)`, mean over linears. Writes results/perturbation.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from windows import Bench

from jaxquant.calibrate.collect import model_moments
from jaxquant.evaluate import perplexity
from jaxquant.io import load_params
from jaxquant.methods import Problem, layer_error, osaq
from jaxquant.models.config import LINEARS
from jaxquant.named import named
from jaxquant.quant import Grid

RESULTS = Path(__file__).parent / "results"
GROUP_SIZE = 64

Step = Callable[[Problem], jax.Array]


def everywhere(problem: Problem, *, eta: float) -> jax.Array:
    return osaq(problem, eta=eta).weight


def where_chosen(problem: Problem) -> jax.Array:
    best, rounding = named("osaq-gptq", problem.grid).stages
    return best.round(problem, rounding)[0].weight  # pyright: ignore[reportAttributeAccessIssue]


def ranges(w: jax.Array) -> jax.Array:
    grouped = w.reshape(w.shape[0] // GROUP_SIZE, GROUP_SIZE, w.shape[1])
    return jnp.maximum(grouped.max(axis=1), 0) - jnp.minimum(grouped.min(axis=1), 0)


def moved(params: Any, moments: Any, grid: Grid, step: Step) -> tuple[Any, dict[str, float]]:
    """The model after the step, and what it did to the linears."""

    @jax.jit
    def every_block(kernels: jax.Array, moments: Any) -> tuple[jax.Array, ...]:
        def one(operand: tuple) -> tuple[jax.Array, ...]:
            weight, own = operand
            new = step(Problem.of(weight, own, grid))
            before, after = ranges(weight), ranges(new)
            narrower = jnp.sqrt(jnp.mean(after**2) / jnp.mean(before**2))
            return new, narrower, jnp.max(after / before), layer_error(new, weight, own.second)

        return jax.lax.map(one, (kernels, moments))

    blocks = {**params["blocks"], **{part: dict(params["blocks"][part]) for part in ("attn", "mlp")}}
    found = []
    for tap, path in [(tap, path) for tap, paths in LINEARS for path in paths]:
        part, name = path.split(".")
        kernel, *facts = every_block(blocks[part][name]["kernel"], moments[tap])
        blocks[part][name] = {**blocks[part][name], "kernel": kernel}
        found.append(np.stack(facts))
    narrower, widest, energy = np.concatenate(found, axis=1)
    facts = {"range": narrower.mean(), "widest": widest.max(), "energy": energy.mean()}
    return {**params, "blocks": blocks}, {name: float(value) for name, value in facts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--etas", type=float, nargs="+", default=[300.0, 1e3, 3e3])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    arguments = parser.parse_args()
    bench = Bench(arguments.data, RESULTS / "table.json")
    config, params = bench.source.config, load_params(bench.source, "float32")
    moments = model_moments(params, config, bench.calibration(0))

    def grid(bits: int) -> Grid:
        return Grid(bits=bits, group_size=GROUP_SIZE, clip="mse")

    tried: list[tuple[dict, Grid, Step]] = [
        ({"columns": "all", "eta": eta}, grid(2), functools.partial(everywhere, eta=eta))
        for eta in arguments.etas
    ]
    for bits in arguments.bits:
        tried.append(({"columns": f"chosen at {bits} bits"}, grid(bits), where_chosen))
    rows = []
    for key, own, step in tried:
        model, facts = moved(params, moments, own, step)
        found = {n: perplexity(model, config, batch).perplexity for n, batch in bench.windows.items()}
        change = {name: value / bench.protocol["original"][name] - 1 for name, value in found.items()}
        rows.append({**key, "perplexity": found, "change": change, **facts})
        print(rows[-1], flush=True)
        report = {"protocol": bench.protocol, "rows": rows}
        (RESULTS / "perturbation.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
