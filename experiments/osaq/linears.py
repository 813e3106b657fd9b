"""Is OSAQ + GPTQ ever worse than GPTQ on a linear? All 210 of SmolLM2-135M, on the inputs of the original.

    python experiments/osaq/linears.py --data DIR [--bits 2 3] [--seeds 0]

DIR and the grids are those of table.py: groups of 64, clip search, GPTQ with act-order. OSAQ or nothing is
chosen column by column, as the named recipe does it; "two tries" is the same choice between the weight and
the weight with noise. The error of a linear, `tr(D^T H D) / tr(W^T H W)`, is that on the calibration tokens,
which the rounding saw, and on 12 x 512 tokens of WikiText-2 test, which nothing saw. "Taken": the mean
share of columns that took the other try. The flatness of a spectrum is the geometric over the arithmetic mean
of the eigenvalues of the inputs' second moment: the lower, the more it decays, and the rank correlation with
the ratio of errors tells whether OSAQ gains where its premise holds. Rows are added to results/linears.json
one by one; results/linears.md is made from them.
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
import scipy.stats
from table import recipe_of
from windows import Bench, table

from jaxquant.calibrate.collect import model_moments
from jaxquant.io import load_params
from jaxquant.methods import Problem, layer_error
from jaxquant.models.config import LINEARS
from jaxquant.recipe import Recipe

RESULTS = Path(__file__).parent / "results"
PLAIN = "GPTQ"
METHODS = (PLAIN, "GPTQ, two tries", "OSAQ + GPTQ")


def errors_of(original: Any, config: Any, tokens: np.ndarray, fresh: np.ndarray) -> Callable[[Recipe], dict]:
    """A function that rounds all linears: their errors on both texts, and the share of columns that moved."""
    seen, new = (model_moments(original, config, text) for text in (tokens, fresh))
    flatness = {tap: spectral_flatness(own.second) for tap, own in seen.items()}

    def errors(recipe: Recipe) -> dict:
        @jax.jit
        def every_block(*operands: Any) -> tuple[jax.Array, ...]:
            def one(operand: tuple) -> tuple[jax.Array, ...]:
                weight, seen, new = operand
                rounded = recipe(Problem.of(weight, seen, recipe.grid))
                values, choices = rounded.values(weight.dtype), rounded.stats.choices
                moved = jnp.asarray(0.0) if choices is None else choices[1] / jnp.sum(choices)
                return (*(layer_error(values, weight, own.second) for own in (seen, new)), moved)

            return jax.lax.map(one, operands)

        found: dict[str, list] = {"calibration": [], "test": [], "moved": [], "flatness": []}
        for tap, paths in LINEARS:
            for path in paths:
                part, name = path.split(".")
                kernel = original["blocks"][part][name]["kernel"]
                operands = (kernel, seen[tap], new[tap])
                for fact, values in zip(found, (*every_block(*operands), flatness[tap]), strict=True):
                    found[fact] += np.asarray(values).tolist()
        return found

    return errors


def spectral_flatness(second: jax.Array) -> np.ndarray:
    """Geometric over arithmetic mean of the eigenvalues, by block; none counts less than float32's noise."""
    found = np.linalg.eigvalsh(np.asarray(second, np.float64))
    noise = second.shape[-1] * np.finfo(np.float32).eps * found[:, -1:]
    found = np.maximum(found, noise)
    return np.exp(np.mean(np.log(found), axis=1)) / np.mean(found, axis=1)


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
            for method in METHODS:
                key = {"bits": bits, "method": method, "seed": seed}
                if not bench.has(key):
                    recipe = recipe_of(method, bits, 64)
                    bench.keep({**key, "recipe": str(recipe), **errors(recipe)})
                    write(bench)


def write(bench: Bench) -> None:
    plain = {(row["bits"], row["seed"]): row for row in bench.rows if row["method"] == PLAIN}
    lines = []
    for row in bench.rows:
        if row["method"] == PLAIN:
            continue
        cells = []
        for text in ("calibration", "test"):
            ratio = np.asarray(row[text]) / np.asarray(plain[row["bits"], row["seed"]][text])
            worse = ratio > 1
            geometric = np.exp(np.mean(np.log(ratio)))
            cells += [f"{geometric:.3f}", f"{worse.sum()} of {ratio.size}", f"{ratio.max():.3f}"]
        taken = f"{100 * np.mean(row['moved']):.0f} %"
        ratio = np.asarray(row["test"]) / np.asarray(plain[row["bits"], row["seed"]]["test"])
        correlation = f"{scipy.stats.spearmanr(row['flatness'], ratio)[0]:.2f}"
        lines.append([str(row["bits"]), row["method"], str(row["seed"]), taken, *cells, correlation])
    columns = [f"{text}: {c}" for text in ("calibration", "test") for c in ("mean ratio", "worse", "worst")]
    columns = ["bits", "method", "seed", "taken", *columns, "test: correlation"]
    text = [
        "# Error of every linear of SmolLM2-135M over that of GPTQ",
        "",
        "On the inputs that linears have in the original: geometric mean over 210 linears, how many are over "
        "1, the largest. Groups of 64, clip search, act-order; calibrated on 24 x 512 tokens of WikiText-2 "
        "train, test: 12 x 512 of its test part. Taken: share of a linear's columns, in the mean, that "
        "took the step, or the weight with 1 % noise; the others are GPTQ's. Correlation: Spearman's, over "
        "linears, between the flatness of the spectrum of the inputs and the ratio of errors.",
        "",
        table(columns, lines),
    ]
    bench.path.with_suffix(".md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
