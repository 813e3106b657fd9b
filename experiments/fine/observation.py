"""What quantization does to gradients, token candidates and decoding trees of SmolLM2-135M, bit by bit.

    python experiments/fine/observation.py --data DIR [--bits 8 4 3 2] [--methods NAME ...] [--blocks N ...]

DIR as for experiments/osaq/table.py, whose pipeline, grids and windows these are. (a) Every method at every
width, against the original: all of `jaxquant smoothness`, and candidates by two more rules, on 8 windows of
256 tokens of WikiText-2 test. (b) Does what the gradients lose foretell what the candidates lose? Rank
correlations over those models, and over models of which one block alone is quantized (`--blocks`, at 4 bits
and less; without a number none), whose trees are not grown. Rows are added to results/observation.json one by
one; those already there are kept. results/observation.md and .png are made from the JSON.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import matplotlib
import numpy as np
import scipy.stats
from windows import Bench, table

from jaxquant.calibrate.collect import model_moments
from jaxquant.io import load_params
from jaxquant.methods import Problem
from jaxquant.models.config import LINEARS
from jaxquant.named import named
from jaxquant.quant import Grid
from jaxquant.recipe import Recipe
from jaxquant.smoothness import candidate_estimates, gradient_comparison, smoothness_comparison

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
METHODS = {"RTN": "rtn", "GPTQ": "gptq", "OSAQ + GPTQ": "osaq-gptq"}
WINDOWS, TOKENS = 8, 256
# What is kept of every window, for paired differences.
BY_WINDOW = ("gradient_ratio", "gradient_cosine", "candidate_retention", "tree_retention", "tree_sparsity")
PANELS = {
    "gradient_ratio": "gradient ratio",
    "gradient_cosine": "gradient cosine",
    "candidates": "candidates, p >= 1e-3",
    "candidate_retention": "candidates kept",
    "tree_nodes": "nodes of the tree",
    "tree_retention": "tree kept",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--blocks", type=int, nargs="*", default=[1, 10, 20, 28])
    arguments = parser.parse_args()
    bench = Bench(arguments.data, RESULTS / "observation.json")
    original, config = load_params(bench.source), bench.source.config
    windows = bench.windows["wikitext2"].reshape(-1, TOKENS)[:WINDOWS]
    tokens = bench.calibration(0)

    def also(params: Any, own: Any) -> dict:
        return measured((params, own), (original, config), windows)

    for bits in arguments.bits:
        for method in arguments.methods:
            bench.run({"method": method, "bits": bits, "block": None}, recipe_of(method, bits), tokens, also)
            write(bench)

    keys = [
        {"method": method, "bits": bits, "block": block}
        for block in arguments.blocks
        for bits in arguments.bits
        for method in arguments.methods
        if bits <= 4
    ]
    if all(map(bench.has, keys)):
        return
    quantize_one = one_block(original, config, tokens)
    for key in keys:
        if bench.has(key):
            continue
        params = quantize_one(recipe_of(key["method"], key["bits"]), key["block"])
        bench.add(key, params, config, at_positions((params, config), (original, config), windows))
        write(bench)


def recipe_of(method: str, bits: int) -> Recipe:
    return named(METHODS[method], Grid(bits=bits, group_size=64, clip="mse"))


def measured(model: Any, reference: Any, windows: np.ndarray) -> dict:
    found = smoothness_comparison(model, reference, windows, jax.random.key(0)).estimates
    for rule in ("min_p", "top_p"):
        for name, estimate in candidate_estimates(model, reference, windows, rule=rule).items():
            if not name.startswith(("candidates_entropy", "candidates_participation")):
                found[f"{rule}_{name}"] = estimate
    return {
        **{name: estimate.mean for name, estimate in found.items()},
        **{f"{name}_stderr": estimate.stderr for name, estimate in found.items()},
        "by_window": {name: found[name].by_window for name in BY_WINDOW},
    }


def at_positions(model: Any, reference: Any, windows: np.ndarray) -> dict:
    """Gradients and candidates alone, under the names that they have in `measured`."""
    gradients = gradient_comparison(model, reference, windows)
    found = candidate_estimates(model, reference, windows)
    return {
        "gradient_ratio": gradients.ratio,
        "gradient_cosine": gradients.cosine,
        **{name: estimate.mean for name, estimate in found.items()},
    }


def one_block(original: Any, config: Any, tokens: np.ndarray) -> Callable[[Recipe, int], Any]:
    """A function that quantizes one block on the inputs it has in the original."""
    moments = model_moments(original, config, tokens)

    def quantize(recipe: Recipe, block: int) -> Any:
        blocks = {
            part: dict(linears) for part, linears in original["blocks"].items() if part in ("attn", "mlp")
        }
        for tap, paths in LINEARS:
            for path in paths:
                part, name = path.split(".")
                kernel = original["blocks"][part][name]["kernel"]
                seen = jax.tree.map(lambda leaf: leaf[block], moments[tap])
                problem = Problem.of(kernel[block], seen, recipe.grid)
                values = recipe(problem).pack().dequantize().astype(kernel.dtype)
                blocks[part][name] = {**blocks[part][name], "kernel": kernel.at[block].set(values)}
        return {**original, "blocks": {**original["blocks"], **blocks}}

    return quantize


def write(bench: Bench) -> None:
    whole = [row for row in bench.rows if row["block"] is None]
    whole.sort(key=lambda row: (-row["bits"], list(METHODS).index(row["method"])))
    names = ("gradient_ratio", "gradient_cosine", "candidates", "candidates_entropy", "candidate_retention",
             "candidate_jaccard", "neighborhood_retention", "tree_nodes", "tree_sparsity", "tree_shared",
             "tree_retention", "tree_likely")  # fmt: skip
    lines = [
        [
            str(row["bits"]),
            row["method"],
            f"{row['perplexity']['wikitext2']:.2f}",
            *(cell(row, n) for n in names),
        ]
        for row in whole
    ]
    about = (
        "Asymmetric grids, groups of 64, clip search; "
        f"+- standard errors over {WINDOWS} windows of {TOKENS} tokens."
    )
    if whole:
        raw = ", ".join(
            f"{label} {cell(whole[0], f'{name}_reference')}"
            for label, name in (
                ("candidates", "candidates"),
                ("exp(entropy)", "candidates_entropy"),
                ("tree nodes", "tree_nodes"),
            )
        )
        about += f" The original's: {raw}."
    titles = ["gradient ratio", "cosine", "candidates", "exp(entropy)", "kept", "Jaccard",
              "kept in neighbourhoods", "tree nodes", "sparsity", "shared nodes", "tree kept",
              "likely to the model"]  # fmt: skip
    bench.write_table(about, ["bits", "method", "WikiText-2", *titles], lines)
    rules = [
        [str(row["bits"]), row["method"]]
        + [cell(row, f"{rule}_{name}") for rule in ("min_p", "top_p")
           for name in ("candidates", "candidates_reference", "candidate_retention", "candidate_jaccard")]
        for row in whole
    ]  # fmt: skip
    with bench.path.with_suffix(".md").open("a") as file:
        file.write("\nCandidates by other rules: p >= .05 max p; the smallest set of mass .9.\n\n")
        columns = ["candidates", "original's", "kept", "Jaccard"]
        file.write(
            table(["bits", "method", *(f"{r}: {c}" for r in ("min_p", "top_p") for c in columns)], rules)
        )
        if found := correlations(bench.rows):
            file.write(
                "\nSpearman correlation over models of what gradients lose with what candidates and trees "
                "lose, 95 % bootstrap interval over models.\n\n"
            )
            file.write(table(["models", "n", "gradients", "candidates lost", "tree lost"], found))
    if whole:
        draw(whole, bench.path.with_suffix(".png"))


def correlations(rows: list[dict]) -> list[list[str]]:
    lines = []
    for models, own in (
        ("all blocks quantized", [row for row in rows if row["block"] is None]),
        ("one block quantized", [row for row in rows if row["block"] is not None]),
    ):
        lost = [
            [1 - row[name] for row in own if name in row]
            for name in ("candidate_retention", "tree_retention")
        ]
        for label, proxy in (
            ("\\|log ratio\\|", [abs(math.log(max(row["gradient_ratio"], 1e-30))) for row in own]),
            ("1 - cosine", [1 - row["gradient_cosine"] for row in own]),
        ):
            if len(own) >= 5:
                lines.append([models, str(len(own)), label, *(spearman(proxy, y) if y else "" for y in lost)])
    return lines


def spearman(x: list[float], y: list[float]) -> str:
    pairs = np.asarray([x, y])
    rng = np.random.default_rng(0)
    draws = [pairs[:, rng.integers(0, len(x), len(x))] for _ in range(2000)]
    found = [rank_correlation(*draw) for draw in draws if np.ptp(draw, axis=1).all()]
    low, high = np.quantile(found, [0.025, 0.975])
    return f"{rank_correlation(*pairs):.2f} ({low:.2f} to {high:.2f})"


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(scipy.stats.rankdata(x), scipy.stats.rankdata(y))[0, 1])


def cell(row: dict, name: str) -> str:
    mean, error = row[name], row[f"{name}_stderr"]
    digits = 0 if abs(mean) >= 100 else 1 if abs(mean) >= 10 else 2 if abs(mean) >= 2 else 3
    return f"{mean:.{digits}f} +- {error:.{digits}f}"


def draw(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), constrained_layout=True)
    for axis, (name, title) in zip(axes.T.flat, PANELS.items(), strict=True):
        for shift, (method, marker) in enumerate(zip(METHODS, "os^", strict=True)):
            own = [row for row in rows if row["method"] == method]
            if not own:
                continue
            # Bits side by side, methods a little apart from one another.
            places = [-row["bits"] + 0.08 * (shift - 1) for row in own]
            errors = [row[f"{name}_stderr"] for row in own]
            axis.errorbar(places, [row[name] for row in own], errors, marker=marker, capsize=3, label=method)
        level = rows[0].get(f"{name}_reference", 1)
        axis.axhline(level, color="0.5", linestyle="--", linewidth=1)
        bits = sorted({row["bits"] for row in rows}, reverse=True)
        axis.set_xticks([-b for b in bits], [str(b) for b in bits])
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if name == "gradient_ratio":
            axis.set_yscale("log")
    axes[0, 0].legend()
    for axis in axes[1]:
        axis.set_xlabel("bits per weight")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
