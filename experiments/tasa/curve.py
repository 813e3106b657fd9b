"""Quality of SmolLM2-135M against its effective bits: who gets the bits, and what text calibrates.

    python experiments/tasa/curve.py --data DIR [--budgets 3.5 4] [--methods NAME ...] [--seeds 0 1 2]
        [--items 150]

DIR as for sensitivity.py, which comes first, with wikitext2/wiki.test.raw, c4/c4_eval.jsonl,
gsm8k/gsm8k_test_even.jsonl, and the test rows of ARC, HellaSwag, PIQA and WinoGrande. Every row runs the
whole pipeline (inputs of a block come from the quantized blocks before it) on 24 x 512 calibration tokens
drawn by `seed`, and evaluates the saved model: NLL and divergence from the original on gold solutions of
128 test rows of GSM8K, both item by item; accuracy on the first `--items` of each choice task,
WikiText-2 and C4. Rows are added to results/curve.json one by one; those already there are kept.
results/curve.md and curve.png are made from the JSON.

All allocations come from one table. "Random" shuffles TASA's bits over the blocks, so that it stores the
same. Blocks of one higher width, first ones or every n-th, are what fits the budget without a table; at 3.5
bits, which 3-bit blocks take, both would be GPTQ and are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib
import numpy as np
from judge import CHOICES, Judge, calibration, parts_of, per_token
from sensitivity import GRIDS, ITEMS, RESULTS, TABLE
from windows import Bench, mean

from jaxquant.allocation import Allocation, Metric, allocation
from jaxquant.io import load_params
from jaxquant.named import named
from jaxquant.sensitivity import Sensitivity, read_sensitivity

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True)
class Method:
    """Who gets the bits, how linears are rounded, what text calibrates, and by which loss bits are given.

    Searched text: the table's mixture.
    """

    bits: str
    recipe: str = "gptq"
    text: str = "searched"
    metric: Metric = "kl"


#: By name in the table.
METHODS = {
    "RTN": Method("uniform", "rtn"),
    "GPTQ": Method("uniform"),
    "GPTQ, WikiText-2": Method("uniform", text="wikitext2"),
    "AWQ": Method("uniform", "awq-rtn"),
    "AWQ, WikiText-2": Method("uniform", "awq-rtn", "wikitext2"),
    "TASA": Method("tasa"),
    "TASA, WikiText-2": Method("tasa", text="wikitext2"),
    "TASA, GSM8K": Method("tasa", text="gsm8k"),
    "TASA + bits by group": Method("tasa", "group-bits-gptq"),
    "TASA by NLL": Method("tasa", metric="nll"),
    "perplexity alone": Method("general"),
    "perplexity alone by NLL": Method("general", metric="nll"),
    "task alone": Method("task"),
    "random": Method("random"),
    "first blocks": Method("first"),
    "every n-th block": Method("spread"),
}
#: Equal for all seeds.
CALIBRATED_BY_NOTHING = ("original", "RTN")
BETAS = {"general": 0.0, "task": 1.0}
UNIFORM, DRAWS = (3, 4), 3
#: What rows are compared with, at the same budget or else at the reference.
BASES, REFERENCE = ("TASA", "TASA by NLL"), 3.5
#: In the picture.
COLORS = {
    "RTN": "#c9ccd1",
    "GPTQ": "#6c7178",
    "AWQ": "#3ca951",
    "TASA": "#97bbf5",
    "TASA by NLL": "#4269d0",
    "perplexity alone": "#f7dc94",
    "perplexity alone by NLL": "#efb118",
    "random": "#a463f2",
}


def allocated(table: Sensitivity, method: Method, budget: float, draw: int = 0) -> Allocation | None:
    """Bits of every block; `None` where the budget leaves no block a higher width than others."""
    recipes = {bits: named(method.recipe, GRIDS[bits]) for bits in table.bits}
    recipes = {str(bits): recipe.to_dict() for bits, recipe in recipes.items()}
    table = dataclasses.replace(table, facts={**table.facts, "recipes": recipes})
    found = allocation(table, budget, beta=BETAS.get(method.bits, 0.7), metric=method.metric)
    if method.bits in ("tasa", "general", "task"):
        return found
    if method.bits == "random":
        return dataclasses.replace(found, choice=np.random.default_rng(draw).permutation(found.choice))
    # Blocks are of one size: the budget is a number of blocks with one bit more.
    blocks, effective = np.arange(len(table.units)), table.costs[0] / table.sizes[0]
    low = int(np.flatnonzero(effective <= budget)[-1])
    if method.bits == "uniform":
        return dataclasses.replace(found, choice=np.full(len(blocks), low))
    if budget == effective[low]:
        return None
    higher = int((budget - effective[low]) / (effective[low + 1] - effective[low]) * len(blocks) + 1e-9)
    if method.bits == "first":
        return dataclasses.replace(found, choice=low + (blocks < higher))
    spread = (blocks + 1) * higher // len(blocks) - blocks * higher // len(blocks)
    return dataclasses.replace(found, choice=low + spread)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[3.0, 3.25, 3.5, 3.75, 4.0, 4.25])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--items", type=int, default=150)
    arguments = parser.parse_args()
    bench = Bench(arguments.data, RESULTS / "curve.json")
    if any(right(row, "acc").shape[1] != arguments.items for row in bench.rows):
        parser.error("the rows of results/curve.json have another number of --items")
    table = read_sensitivity(TABLE, bench.source)
    judge = Judge(bench, arguments.items)
    texts = {name: rest for name, (_, _, rest) in parts_of(bench.source, arguments.data).items()}
    searched = table.facts["notes"]["shares"]
    bench.protocol |= {"shares": searched, "sensitivity": table.facts["domains"]}
    original = {"method": "original", "budget": 16.0, "seed": 0}
    if not bench.has(original):
        params, config = load_params(bench.source), bench.source.config
        bench.add(original, params, config, {"effective_bits": 16.0, **judge(params, config)})
    for seed in arguments.seeds:
        for name in arguments.methods:
            method = METHODS[name]
            uniform = method.bits == "uniform"
            shares = searched if method.text == "searched" else {method.text: 1.0}
            tokens = calibration(bench.source, texts, shares, seed)
            budgets = [GRIDS[bits].effective_bits(64) for bits in UNIFORM] if uniform else arguments.budgets
            for budget in budgets:
                for draw in range(DRAWS if method.bits == "random" else 1):
                    if found := allocated(table, method, budget, draw):
                        key = {"method": name, "budget": budget, "seed": seed, "draw": draw}
                        bench.run(key, found.recipe(), tokens, also_of(judge, found, method))
                        write(bench)
    draw_curve(bench)


def also_of(judge: Judge, found: Allocation, method: Method) -> Callable[[Any, Any], dict]:
    facts: dict = {"bits": "".join(map(str, found.bits))}
    if method.recipe == "gptq":
        facts["predicted_kl"] = {name: found.predicted("kl", name) for name in found.table.kl}
    return lambda params, config: {**facts, **judge(params, config)}


def write(bench: Bench) -> None:
    domain = bench.protocol["domains"]["gsm8k"]
    tokens, lines = np.array(domain["tokens"]), []
    for budget in sorted({row["budget"] for row in bench.rows}, reverse=True):
        for name in ("original", *METHODS):
            own, perplexities = bench.cells({"budget": budget, "method": name})
            if not own:
                continue
            growth, kl = (per_token(average(own, solutions, metric), tokens) for metric in ("nll", "kl"))
            acc, acc_norm = (average(own, right, metric) for metric in ("acc", "acc_norm"))
            ratios = [
                row["predicted_kl"]["gsm8k"] / per_token(solutions(row, "kl"), tokens)[0]
                for row in own
                if "predicted_kl" in row
            ]
            lines.append([
                f"{own[0]['effective_bits']:.2f}",
                name,
                f"{domain['original_nll'] + growth[0]:.4f}",
                "{:z.4f} +- {:.4f}".format(*kl),
                *(cell for base in BASES for cell in differences(bench.rows, own, tokens, base)),
                "{:.1f} +- {:.1f}".format(*over_tasks(100 * acc)),
                f"{100 * acc_norm.mean():.1f}",
                " / ".join(f"{100 * task.mean():.0f}" for task in acc),
                *perplexities,
                mean(ratios) if ratios else "",
                str(len(own)),
            ])  # fmt: skip
    shares = bench.protocol["shares"]
    bench.write_table(
        "SmolLM2-135M scores near zero on GSM8K by exact match, so the primary metrics are the NLL of "
        f"gold solutions and the divergence from the original on their tokens, {len(tokens)} test rows, "
        "+- standard error over rows. Asymmetric grids in groups of 64, clip search; GPTQ with "
        "act-order, static groups. Bits are effective ones: scales and zeros take .5. TASA: beta .7, "
        "divergences (\"by NLL\": growth of the loss) where one block is quantized, on "
        f"{ITEMS} training rows of GSM8K and {ITEMS} windows "
        "of 128 tokens of the WikiText-2 train part; \"perplexity alone\" is beta 0, \"task alone\" beta "
        f"1. Delta: less TASA at the same budget, at {REFERENCE} bits where there is none, paired by row "
        "or item and averaged over seeds that both have; \"by NLL\": less TASA by NLL. Accuracy in %, mean "
        f"over {', '.join(CHOICES)}, {bench.protocol['choice_items']} items "
        "each; by task in this order. Predicted: the sum over blocks of the table's divergences on "
        "GSM8K, as a share of the realised one.",
        ["bits", "method", "GSM8K NLL", "GSM8K KL", "delta NLL", "delta KL", "delta acc",
         "delta NLL, by NLL", "delta KL, by NLL", "delta acc, by NLL", "acc", "acc_norm", "acc by task",
         "WikiText-2", "C4", "predicted / realised", "runs"],
        lines,
        calibration=", ".join(f"{share:.0%} {name}" for name, share in shares.items())
        + ", the searched shares, unless a row names one text",
    )  # fmt: skip


def solutions(row: dict, metric: str) -> np.ndarray:
    """Sums over the tokens of every gold solution."""
    return np.array(row["losses"]["gsm8k"][metric])


def right(row: dict, metric: str) -> np.ndarray:
    """Whether an item was answered right, `[tasks, items]`."""
    return np.array([list(map(float, task[metric])) for task in row["right"].values()])


def average(rows: list[dict], values: Callable[[dict, str], np.ndarray], metric: str) -> np.ndarray:
    return np.mean([values(row, metric) for row in rows], axis=0)


def over_tasks(values: np.ndarray) -> tuple[float, float]:
    """The mean over tasks of the means over items, and its standard error over items."""
    return float(values.mean()), float(
        np.sqrt(values.var(axis=1, ddof=1).sum() / values.shape[1]) / len(values)
    )


def differences(rows: list[dict], own: list[dict], tokens: np.ndarray, method: str) -> list[str]:
    """NLL, KL and accuracy less those of a method, at the rows' budget or else at `REFERENCE`."""
    by_budget = {
        budget: [row for row in rows if (row["method"], row["budget"]) == (method, budget)]
        for budget in (own[0]["budget"], REFERENCE)
    }
    base = by_budget[own[0]["budget"]] or by_budget[REFERENCE]
    if own[0]["method"] not in CALIBRATED_BY_NOTHING:
        seeds = {row["seed"] for row in own} & {row["seed"] for row in base}
        base, own = ([row for row in part if row["seed"] in seeds] for part in (base, own))
    if not base or own == base:
        return [""] * 3
    apart = [average(own, solutions, metric) - average(base, solutions, metric) for metric in ("nll", "kl")]
    accuracy = 100 * (average(own, right, "acc") - average(base, right, "acc"))
    return [
        *("{:+.4f} +- {:.4f}".format(*per_token(values, tokens)) for values in apart),
        "{:+.1f} +- {:.1f}".format(*over_tasks(accuracy)),
    ]


def draw_curve(bench: Bench) -> None:
    domain = bench.protocol["domains"]["gsm8k"]
    tokens, original = np.array(domain["tokens"]), domain["original_nll"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, metric, least in zip(axes, ("nll", "kl"), (original, 0.0), strict=True):
        for name, color in COLORS.items():
            points: dict[float, list[float]] = {}
            for row in bench.rows:
                if row["method"] == name:
                    loss = least + per_token(solutions(row, metric), tokens)[0]
                    points.setdefault(row["effective_bits"], []).append(loss)
            bits = sorted(points)
            axis.plot(bits, [np.mean(points[b]) for b in bits], "o-", ms=4, lw=1, color=color, label=name)
        axis.set(xlabel="effective bits", ylabel=f"{metric.upper()} on GSM8K solutions, nats a token")
        axis.grid(alpha=0.25)
    axes[0].axhline(original, color="black", lw=0.8, ls=":", label="original")
    axes[1].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(RESULTS / "curve.png", dpi=120)


if __name__ == "__main__":
    main()
