"""Perplexity of SmolLM2-135M with 4-bit weights, activations and cache: rotations at equal grids.

    python experiments/offq/table.py --data DIR [--seeds 0 1 2] [--methods NAME ...] [--settings NAME ...]

DIR holds wikitext2/wiki.{train.part,test}.raw and c4/c4_eval.jsonl. Every row runs the whole pipeline with
calibration windows and random rotations drawn by `seed`, and evaluates the saved model; in the settings with
w16 the rotated float weights are evaluated, with the bases of OffQ and SpinQuant from the same windows. Rows
are added to results/table.json one by one; those already there are kept. results/table.md is made from the
JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from windows import Bench

from jaxquant.io import load_params
from jaxquant.named import named
from jaxquant.quant import Grid
from jaxquant.recipe import Recipe, chain
from jaxquant.stages import GPTQ, RTN
from jaxquant.surgery import OffQ, QuaRot, SpinQuant, Surgery, operate

RESULTS = Path(__file__).parent / "results"
GRID = Grid(bits=4, group_size=64, clip="mse")
SETTINGS = ("w16a4kv16", "w4a16kv16", "w4a4kv16", "w4a4kv4")
#: Row: the surgery, and the rounding of weights.
METHODS: dict[str, tuple[str | None, RTN | GPTQ]] = {
    "RTN": (None, RTN()),
    "GPTQ": (None, GPTQ()),
    "QuaRot + RTN": ("quarot", RTN()),
    "QuaRot + GPTQ": ("quarot", GPTQ()),
    "SpinQuant + RTN": ("spinquant", RTN()),
    "SpinQuant + GPTQ": ("spinquant", GPTQ()),
    "OffQ + RTN": ("offq", RTN()),
    "OffQ + GPTQ": ("offq", GPTQ()),
}


def recipe_of(method: str, setting: str, seed: int) -> Recipe:
    kind, rounding = METHODS[method]
    precision = named(f"rtn-{setting.replace('w16', 'w8')}", GRID).precision
    surgeries: dict[str | None, tuple[Surgery, ...]] = {
        None: (),
        "quarot": (QuaRot(seed=seed),),
        "spinquant": (SpinQuant(seed=seed),),
        "offq": (OffQ(group_size=64),),
    }
    return chain(*surgeries[kind], rounding, grid=GRID, precision=precision)


def add_float(bench: Bench, key: dict, recipe: Recipe, tokens: Any) -> None:
    """The row of the float model that `recipe` would round, with its precision."""
    if bench.has(key):
        return
    source, config = bench.source, recipe.runtime(bench.source.config)
    if recipe.surgery is not None:
        source = operate(source, recipe.surgery, config, tokens)
    facts = {"recipe": f"{recipe.surgery}, float weights, {recipe.precision}"}
    bench.add(key, load_params(source), config, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    arguments = parser.parse_args()
    bench = Bench(arguments.data, RESULTS / "table.json")
    for seed in arguments.seeds:
        tokens = bench.calibration(seed)
        for setting in arguments.settings:
            for method in arguments.methods:
                key = {"method": method, "setting": setting, "seed": seed}
                recipe = recipe_of(method, setting, seed)
                if setting.startswith("w4"):
                    bench.run(key, recipe, tokens)
                elif method.endswith("RTN"):  # float weights: one row for both roundings
                    add_float(bench, key, recipe, tokens)
                write(bench)


def write(bench: Bench) -> None:
    lines = []
    for setting in SETTINGS:
        for method in METHODS:
            own, cells = bench.cells({"setting": setting, "method": method})
            if own:
                name = method.split(" + ")[0].replace("RTN", "none") if setting.startswith("w16") else method
                lines.append([setting, name, *cells, str(len(own))])
    bench.write_table(
        "Weights: asymmetric, group 64, clip search; GPTQ with act-order, static groups, damping .01, on "
        "inputs as quantized (4.5 effective bits). Activations: asymmetric, group 64, 95 % of the range (4.5 "
        "bits). Keys and values: asymmetric, a head of a token, 95 % (4.5 bits). With w16 the weights are "
        "those of the rotated float model. Seeds are of calibration and rotation.",
        ["setting", "method", "WikiText-2", "C4", "seeds"],
        lines,
    )


if __name__ == "__main__":
    main()
