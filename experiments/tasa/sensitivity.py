"""What every block of SmolLM2-135M loses alone, on GSM8K and on WikiText-2, and how alike both rankings are.

    python experiments/tasa/sensitivity.py --data DIR

DIR holds gsm8k/gsm8k_train_1000.jsonl and wikitext2/wiki.train.part.raw. Blocks are quantized one at a time
to 2, 3 and 4 bits by GPTQ (groups of 64, clip search, act-order) on the searched mixture of both texts;
losses are those of the first 64 gold solutions, less the few of more than 256 tokens with their questions,
and of 64 windows of 128 tokens, none of which calibrate.
results/sensitivity.json is the table, from which curve.py allocates; an interrupted run goes on, and
results/seconds.json adds up what all runs took. Then Kendall's tau between the two domains' rankings, with
bootstrap intervals over blocks: results/rankings.json, rankings.md, rankings.png.

The table keeps no loss of a single text, so halves cannot be compared. How well a ranking repeats is
simulated from the standard errors of the divergences: tau between a ranking and that of as many other
texts, whose divergences are normal around the measured ones with sqrt(2) of those errors. The errors of
blocks count as independent, though all share their texts: rankings repeat better than that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import matplotlib
import numpy as np

from jaxquant.allocation import Texts, measure
from jaxquant.errors import InputError
from jaxquant.folder import versions
from jaxquant.io import Source, open_model
from jaxquant.methods import kendall_interval
from jaxquant.named import named
from jaxquant.quant import Grid
from jaxquant.sensitivity import Sensitivity, read_sensitivity

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
TABLE = RESULTS / "sensitivity.json"
GRIDS = {bits: Grid(bits=bits, group_size=64, clip="mse") for bits in (2, 3, 4)}
ITEMS, REDRAWS = 64, 200
#: Relative to DIR.
TEXTS = (
    Texts(name="gsm8k", source="gsm8k/gsm8k_train_1000.jsonl", task=True),
    Texts(name="wikitext2", source="wikitext2/wiki.train.part.raw", task=False),
)
COLORS = {"gsm8k": "#ff725c", "wikitext2": "#4269d0"}


def table_of(source: Source, data: Path) -> Sensitivity:
    """The table, measured as far as it is not there."""
    with contextlib.suppress(InputError):
        return read_sensitivity(TABLE, source)
    RESULTS.mkdir(exist_ok=True)
    recipes = {bits: named("gptq", grid) for bits, grid in GRIDS.items()}
    # The table names its texts; which folder they lie in is no fact about it.
    with contextlib.chdir(data):
        return measure(
            source, recipes, TEXTS, TABLE, items=ITEMS, on_cell=stopwatch(RESULTS / "seconds.json")
        )


def stopwatch(path: Path) -> Callable[[int, int], None]:
    """Adds the time since now to what `path` holds, cell by cell."""
    before = json.loads(path.read_text())["seconds"] if path.exists() else 0.0
    started = time.monotonic()

    def on_cell(done: int, total: int) -> None:
        seconds = before + time.monotonic() - started
        path.write_text(json.dumps({"seconds": seconds, "cells": done, "of": total}) + "\n")
        print(f"{done} of {total} cells, {seconds:.0f} s", flush=True)

    return on_cell


def rankings(table: Sensitivity) -> list[dict]:
    rows = []
    for column, bits in enumerate(table.bits):
        for metric in ("kl", "nll"):
            losses = {name: values[:, column] for name, values in getattr(table, metric).items()}
            tau, low, high = kendall_interval(*losses.values(), seed=0)
            row = {"bits": bits, "metric": metric, "tau": tau, "low": low, "high": high}
            if metric == "kl":
                row["repeats"] = {
                    name: repeats(own, table.kl_stderr[name][:, column]) for name, own in losses.items()
                }
            row["most"] = {name: np.argsort(-own)[:5].tolist() for name, own in losses.items()}
            rows.append(row)
    return rows


def repeats(values: np.ndarray, stderr: np.ndarray) -> float:
    from scipy.stats import kendalltau

    draws = np.random.default_rng(0).normal(values, 2**0.5 * stderr, (REDRAWS, len(values)))
    return float(np.mean([kendalltau(values, draw)[0] for draw in draws]))


def write(table: Sensitivity, rows: list[dict]) -> None:
    facts = {key: table.facts[key] for key in ("model", "domains", "calibration", "notes")}
    spent = json.loads((RESULTS / "seconds.json").read_text())
    report = {**facts, "versions": versions(), "measurement": spent, "rows": rows}
    (RESULTS / "rankings.json").write_text(json.dumps(report, indent=1) + "\n")
    shares = ", ".join(f"{share:.0%} {name}" for name, share in facts["notes"]["shares"].items())
    lines = []
    for row in rows:
        repeat = [f"{row['repeats'][name]:.2f}" if "repeats" in row else "" for name in table.kl]
        most = [", ".join(map(str, row["most"][name])) for name in table.kl]
        interval = f"{row['tau']:.2f} ({row['low']:.2f} .. {row['high']:.2f})"
        lines.append([str(row["bits"]), row["metric"], interval, *repeat, *most])
    text = [
        f"# {facts['model']['name']}: do a task and general text rank blocks alike?",
        "",
        f"Kendall's tau-b over {len(table.units)} blocks between GSM8K (gold solutions of {ITEMS} "
        f"training rows) and WikiText-2 ({ITEMS} windows of 128 tokens of the train part), one block "
        "quantized at a time by GPTQ in groups of 64; 95 % bootstrap intervals over blocks. \"Repeats\": "
        "tau between a ranking and a fresh one, simulated from the standard errors of the divergences; "
        "no tau between domains can be expected above it. NLL: growth of the loss, whose errors are not "
        f"kept. Weights are dequantized Q4_1 and lie on a 4-bit grid already. Calibration: {shares}. The "
        f"table took {spent['seconds']:.0f} s.",
        "",
        "| bits | loss | tau (interval) | repeats: GSM8K | repeats: WikiText-2 | GSM8K feels most | "
        "WikiText-2 feels most |",
        "| ---: | --- | ---: | ---: | ---: | --- | --- |",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]  # fmt: skip
    (RESULTS / "rankings.md").write_text("\n".join(text) + "\n")


def draw(table: Sensitivity) -> None:
    figure, axes = plt.subplots(1, len(table.bits), figsize=(4 * len(table.bits), 3.2))
    blocks = np.arange(len(table.units))
    for column, (axis, bits) in enumerate(zip(axes, table.bits, strict=True)):
        for name, color in COLORS.items():
            axis.errorbar(
                blocks, table.kl[name][:, column], yerr=table.kl_stderr[name][:, column], fmt="o-", ms=3,
                lw=1, color=color, label=name,
            )  # fmt: skip
        axis.set(title=f"{bits} bits", xlabel="block", yscale="log")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("KL(original || one block quantized), nats")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "rankings.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    table = table_of(open_model("smollm2-135m"), parser.parse_args().data)
    rows = rankings(table)
    for row in rows:
        print(row, flush=True)
    write(table, rows)
    draw(table)


if __name__ == "__main__":
    main()
