"""Is OSAQ + GPTQ ever worse than GPTQ on a linear? All 210 of SmolLM2-135M, on the inputs of the original.

    python experiments/osaq/linears.py --data DIR [--bits 2 3] [--seeds 0]

DIR and the grids are those of table.py: groups of 64, clip search, GPTQ with act-order. The step is chosen
per linear on a held-out quarter of the windows, as the named recipe does it (by 32 of the loudest columns and
32 that stand for the others), by the 64 loudest, and by 64 at equal distances. The error of a linear, `tr(D^T
H D) / tr(W^T H W)`, is that on the calibration tokens, which the rounding saw, and on 12 x 512 tokens of
WikiText-2 test, which nothing saw. "Taken": linears for which the step was chosen; the others are GPTQ's.
Rows are added to results/linears.json one by one; results/linears.md is made from them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from table import TRIED, tried_on
from windows import Bench, table

from jaxquant.calibrate.collect import merge_taps, model_moments
from jaxquant.io import load_params
from jaxquant.methods import Problem, layer_error
from jaxquant.models.config import LINEARS
from jaxquant.named import named
from jaxquant.quant import Grid
from jaxquant.recipe import Recipe

RESULTS = Path(__file__).parent / "results"
PLAIN = "GPTQ alone"


def recipes(bits: int) -> dict[str, Recipe]:
    grid = Grid(bits=bits, group_size=64, clip="mse")
    chosen = named("osaq-gptq", grid)
    return {PLAIN: named("gptq", grid), **{tried: tried_on(tried, chosen) for tried in TRIED}}


def errors_of(original: Any, config: Any, tokens: np.ndarray, fresh: np.ndarray) -> Callable[[Recipe], dict]:
    """A function that rounds all linears and gives their errors on both texts, and which took the step."""
    judges = np.arange(len(tokens)) % 4 == 3
    seen, held_out = (model_moments(original, config, tokens[part]) for part in (~judges, judges))
    together, new = merge_taps(seen, held_out), model_moments(original, config, fresh)

    def errors(recipe: Recipe) -> dict:
        @jax.jit
        def every_block(*operands: Any) -> tuple[jax.Array, ...]:
            def one(operand: tuple) -> tuple[jax.Array, ...]:
                weight, seen, held_out, together, new = operand
                problem = Problem.of(
                    weight,
                    seen if recipe.holds_out else together,
                    recipe.grid,
                    held_out=held_out if recipe.holds_out else None,
                )
                rounded = recipe(problem)
                values = rounded.values(weight.dtype)
                choice = rounded.stats.choice
                return (
                    *(layer_error(values, weight, own.second) for own in (together, new)),
                    jnp.asarray(0) if choice is None else choice,
                )

            return jax.lax.map(one, operands)

        found: dict[str, list] = {"calibration": [], "test": [], "choice": []}
        for tap, paths in LINEARS:
            for path in paths:
                part, name = path.split(".")
                kernel = original["blocks"][part][name]["kernel"]
                operands = (kernel, seen[tap], held_out[tap], together[tap], new[tap])
                for text, values in zip(found, every_block(*operands), strict=True):
                    found[text] += np.asarray(values).tolist()
        return found

    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    bench = Bench(arguments.data, RESULTS / "linears.json")
    original, config = load_params(bench.source, "float32"), bench.source.config
    for seed in arguments.seeds:
        errors = errors_of(original, config, bench.calibration(seed), bench.windows["wikitext2"])
        for bits in arguments.bits:
            for name, recipe in recipes(bits).items():
                key = {"bits": bits, "tried": name, "seed": seed}
                if not bench.has(key):
                    bench.keep({**key, "recipe": str(recipe), **errors(recipe)})
                    write(bench)


def write(bench: Bench) -> None:
    plain = {(row["bits"], row["seed"]): row for row in bench.rows if row["tried"] == PLAIN}
    lines = []
    for row in bench.rows:
        if row["tried"] == PLAIN:
            continue
        cells = []
        for text in ("calibration", "test"):
            ratio = np.asarray(row[text]) / np.asarray(plain[row["bits"], row["seed"]][text])
            worse = ratio > 1
            geometric = np.exp(np.mean(np.log(ratio)))
            cells += [f"{geometric:.3f}", f"{worse.sum()} of {ratio.size}", f"{ratio.max():.3f}"]
        lines.append([str(row["bits"]), row["tried"], str(row["seed"]), str(sum(row["choice"])), *cells])
    columns = [f"{text}: {c}" for text in ("calibration", "test") for c in ("mean ratio", "worse", "worst")]
    columns = ["bits", "tried on", "seed", "taken", *columns]
    text = [
        "# Error of every linear of SmolLM2-135M over that of GPTQ",
        "",
        "On the inputs that linears have in the original: geometric mean over 210 linears, how many are over "
        "1, the largest. Groups of 64, clip search, act-order; calibrated on 24 x 512 tokens of WikiText-2 "
        "train, test: 12 x 512 of its test part. Taken: linears for which the step was chosen, on held-out "
        "calibration tokens; the others are GPTQ's. Tried on: the columns that the choice goes by, "
        "32 loudest and 32 others that stand for the rest unless a row says otherwise.",
        "",
        table(columns, lines),
    ]
    bench.path.with_suffix(".md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
