"""From task text to general text in the calibration of SmolLM2-135M: what the search sees, what it is worth.

    python experiments/tasa/mixture.py --data DIR [--budget 3.5] [--seeds 0 1 2]

DIR as for curve.py, without the choice tasks; sensitivity.py comes first. For every share of WikiText-2
among the calibration tokens, the rest being GSM8K: alignment, diversity and objective J of the search, and
the model that TASA's bits at this budget give with 24 x 512 tokens in these shares. Bits are the same in
all rows. Rows are added to results/mixture.json one by one; those already there are kept.
results/mixture.md is made from the JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from judge import Judge, calibration, parts_of, per_token
from sensitivity import RESULTS, TABLE
from windows import Bench

from jaxquant.allocation import allocation
from jaxquant.sensitivity import read_sensitivity


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=3.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    bench = Bench(arguments.data, RESULTS / "mixture.json")
    table = read_sensitivity(TABLE, bench.source)
    judge = Judge(bench, items=0)
    texts = {name: rest for name, (_, _, rest) in parts_of(bench.source, arguments.data).items()}
    search = table.facts["notes"]["search"]
    bench.protocol |= {"search": search}
    found = allocation(table, arguments.budget)
    facts = {"bits": "".join(map(str, found.bits))}
    for seed in arguments.seeds:
        for index, tried in enumerate(search["shares"]):
            shares = dict(zip(search["names"], tried, strict=True))
            key = {"wikitext2": shares["wikitext2"], "budget": arguments.budget, "seed": seed}
            terms = {name: search[name][index] for name in ("alignment", "diversity")}
            terms["objective"] = terms["alignment"] + search["nu"] * terms["diversity"]

            def also(params: Any, config: Any, terms: dict = terms) -> dict:
                return {**facts, **terms, **judge(params, config)}

            bench.run(key, found.recipe(), calibration(bench.source, texts, shares, seed), also)
            write(bench)


def write(bench: Bench) -> None:
    tokens = {name: np.array(domain["tokens"]) for name, domain in bench.protocol["domains"].items()}
    lines = []
    for budget, share in sorted({(row["budget"], row["wikitext2"]) for row in bench.rows}):
        own, perplexities = bench.cells({"budget": budget, "wikitext2": share})
        losses = {
            name: {
                metric: per_token(np.mean([row["losses"][name][metric] for row in own], axis=0), counts)
                for metric in ("nll", "kl")
            }
            for name, counts in tokens.items()
        }
        nll = bench.protocol["domains"]["gsm8k"]["original_nll"] + losses["gsm8k"]["nll"][0]
        lines.append([
            f"{own[0]['effective_bits']:.2f}",
            f"{share:.0%}",
            *(f"{own[0][name]:.4f}" for name in ("alignment", "diversity", "objective")),
            f"{nll:.4f}",
            *("{:.4f} +- {:.4f}".format(*losses[name]["kl"]) for name in tokens),
            *perplexities,
            str(len(own)),
        ])  # fmt: skip
    bench.write_table(
        "SmolLM2-135M scores near zero on GSM8K by exact match, so the primary metrics are the NLL of "
        f"gold solutions and the divergence from the original on their tokens, {len(tokens['gsm8k'])} "
        "test rows; +- standard error over texts. TASA's bits, the same in all rows; GPTQ, groups of 64, "
        "clip search, act-order. J = alignment + nu diversity, the target being the mean over both texts.",
        ["bits", "share of WikiText-2", "alignment", "diversity", "J", "GSM8K NLL", "GSM8K KL",
         "WikiText-2 KL", "WikiText-2", "C4", "runs"],
        lines,
        calibration="WikiText-2 in the given share and of GSM8K",
    )  # fmt: skip


if __name__ == "__main__":
    main()
