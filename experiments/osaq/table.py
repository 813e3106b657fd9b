"""Perplexity of SmolLM2-135M at 2, 3 and 4 bits: OSAQ and what it is compared with, on WikiText-2 and C4.

    python experiments/osaq/table.py --data DIR [--bits 2 3] [--group-size 64] [--seeds 0 1 2]
        [--methods NAME ...]

DIR holds wikitext2/wiki.{train.part,test}.raw and c4/c4_eval.jsonl. Every row runs the whole pipeline (inputs
of a block come from the quantized blocks before it) with calibration windows drawn from the WikiText-2 train
part by `seed`, and evaluates the saved model; `--group-size 0` is one grid per column. Rows are added to
results/table.json one by one; those already there are kept, so an interrupted run goes on. results/table.md
is made from the JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before JAX loads LAPACK, whose threads spin while others hold the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from windows import Bench

from jaxquant.kinds import Stage, Transform, register
from jaxquant.methods import Problem
from jaxquant.named import named
from jaxquant.quant import Grid
from jaxquant.recipe import Recipe, chain
from jaxquant.stages import GPTQ, OSAQ, Best, Refit, Tune

RESULTS = Path(__file__).parent / "results"
PLAIN = GPTQ(act_order=False)
#: Row: named recipe, clip rule, GPTQ's options. "strong" rows: clip search, act-order with static groups.
METHODS: dict[str, tuple[str, str, GPTQ | None]] = {
    "RTN min-max": ("rtn", "minmax", None),
    "RTN": ("rtn", "mse", None),
    "GPTQ min-max, no act-order": ("gptq", "minmax", PLAIN),
    "GPTQ clip search, no act-order": ("gptq", "mse", PLAIN),
    "GPTQ": ("gptq", "mse", None),
    "MagR + GPTQ": ("magr-gptq", "mse", None),
    "AWQ": ("awq-rtn", "mse", None),
    "OSAQ + RTN": ("osaq-rtn", "mse", None),
    "OSAQ + AWQ": ("osaq-awq", "mse", None),
    "OSAQ + GPTQ min-max, no act-order": ("osaq-gptq", "minmax", PLAIN),
    "OSAQ + GPTQ": ("osaq-gptq", "mse", None),
    "GPTQ + CD": ("gptq-cd", "mse", None),
    "OSAQ-dagger (OSAQ + GPTQ + CD)": ("osaq-dagger", "mse", None),
    "GPTQ + refit": ("gptq-refit", "mse", None),
    "OSAQ + GPTQ + refit": ("osaq-refit", "mse", None),
}


def recipe_of(method: str, bits: int, group_size: int) -> Recipe:
    if method in ROUTES:
        return ROUTES[method](Grid(bits=bits, group_size=group_size or None, clip="mse"))
    name, clip, gptq = METHODS[method]
    grid = Grid(bits=bits, group_size=group_size or None, clip=clip)  # pyright: ignore[reportArgumentType]
    return named(name, grid, gptq=gptq)


@register("jitter")
@dataclasses.dataclass(frozen=True)
class Jitter(Transform):
    """Weights times 1 + .01 noise, as good as they are and rounded otherwise: what a second try is worth."""

    def __call__(self, problem: Problem) -> Problem:
        noise = jax.random.normal(jax.random.key(0), problem.weight.shape, problem.weight.dtype)
        return dataclasses.replace(problem, weight=problem.weight * (1 + 0.01 * noise))


def _with(name: str, **facts: Any) -> Callable[[Grid], Recipe]:
    return lambda grid: dataclasses.replace(named(name, grid), **facts)


def _strengths(*etas: float, plain: bool = False, behind: tuple[Stage, ...] = ()) -> Callable[[Grid], Recipe]:
    """OSAQ with these prices of output energy to choose from, before GPTQ and what comes behind it."""

    def recipe(grid: Grid) -> Recipe:
        grid = dataclasses.replace(grid, clip="minmax") if plain else grid
        best = Best(tuple(OSAQ(eta=eta) for eta in etas))
        return chain(best, PLAIN if plain else GPTQ(), *behind, grid=grid)

    return recipe


#: Scales learned so that a block keeps its outputs: the choice that sees what comes behind a linear.
TUNED = Tune(weight=0.0, steps=96)
#: Row: what else was tried against GPTQ, on strong grids unless it says otherwise.
ROUTES: dict[str, Callable[[Grid], Recipe]] = {
    "GPTQ, two tries": lambda grid: chain(Best((Jitter(),)), GPTQ(), grid=grid),
    "OSAQ (eta 300) + GPTQ": _strengths(300.0),
    "OSAQ (eta 300 or 100) + GPTQ": _strengths(300.0, 100.0),
    "OSAQ (eta 300) + GPTQ min-max, no act-order": _strengths(300.0, plain=True),
    "OSAQ (eta 300 or 100) + GPTQ + refit": _strengths(300.0, 100.0, behind=(Refit(),)),
    "GPTQ + refit + tuned": lambda grid: chain(GPTQ(), Refit(), TUNED, grid=grid),
    "OSAQ (eta 300 or 100) + GPTQ + refit + tuned": _strengths(300.0, 100.0, behind=(Refit(), TUNED)),
    "QEP + GPTQ": _with("qep-gptq"),
    "GPTQ, Fisher": _with("gptq", hessian="fisher"),
    "OSAQ + GPTQ, Fisher": _with("osaq-gptq", hessian="fisher"),
    "GPTQ, first tokens left out": _with("gptq", mask="first"),
    "OSAQ + GPTQ, first tokens left out": _with("osaq-gptq", mask="first"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    names = [*METHODS, *ROUTES]
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=names, metavar="NAME")
    arguments = parser.parse_args()
    bench = Bench(arguments.data, RESULTS / "table.json")
    for seed in arguments.seeds:
        tokens = bench.calibration(seed)
        for bits in arguments.bits:
            for method in arguments.methods:
                key = {"method": method, "bits": bits, "group_size": arguments.group_size, "seed": seed}
                bench.run(key, recipe_of(method, bits, arguments.group_size), tokens)
                write(bench)


def write(bench: Bench) -> None:
    lines = []
    for bits, group_size in sorted({(row["bits"], row["group_size"]) for row in bench.rows}):
        for method in (*METHODS, *ROUTES):
            own, cells = bench.cells({"bits": bits, "group_size": group_size, "method": method})
            if own:
                error = statistics.fmean(row["mean_layer_error"] for row in own)
                group = str(group_size or "column")
                lines.append([str(bits), group, method, *cells, f"{error:.2e}", str(len(own))])
    bench.write_table(
        "Asymmetric grids; unless a row says otherwise with clip search (mean square error, and at 2 bits "
        "neighbouring zeros) and GPTQ with act-order, static groups, damping .01. Layer error: mean over "
        "linears, `tr(D^T H D) / tr(W^T H W)` on the calibration tokens. OSAQ, or nothing, column by column, "
        "by the error after rounding; two tries: the same between the weight and the weight with 1 % noise. "
        "Tuned: scales of a block learned on its outputs, 96 steps.",
        ["bits", "group size", "method", "WikiText-2", "C4", "layer error", "seeds"],
        lines,
    )


if __name__ == "__main__":
    main()
