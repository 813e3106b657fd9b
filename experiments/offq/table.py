"""Perplexity of SmolLM2-135M with 4-bit weights, activations and cache: rotations at equal grids.

    python experiments/offq/table.py --data DIR [--seeds 0 1 2] [--methods NAME ...] [--settings NAME ...]

DIR holds wikitext2/wiki.{train.part,test}.raw and c4/c4_eval.jsonl. Every row runs the whole pipeline with
calibration windows and random rotations drawn by `seed`, and evaluates the saved model, products of packed
linears in integers. Rows are added to results/table.json one by one; those already there are kept.
results/table.md is made from the JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from windows import Bench

from jaxquant.named import named
from jaxquant.quant import ActivationGrid, Grid
from jaxquant.recipe import Recipe, chain
from jaxquant.stages import GPTQ, RTN, Keep
from jaxquant.surgery import OffQ, QuaRot, SpinQuant, Surgery

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
    precision = named(f"rtn-{setting}", GRID).precision
    surgeries: dict[str | None, tuple[Surgery, ...]] = {
        None: (),
        "quarot": (QuaRot(seed=seed),),
        "spinquant": (SpinQuant(seed=seed),),
        "offq": (OffQ(group_size=64),),
    }
    last = Keep() if setting.startswith("w16") else rounding
    return chain(*surgeries[kind], last, grid=GRID, precision=precision)


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
                if setting.startswith("w4") or method.endswith("RTN"):  # w16: nothing is rounded
                    bench.run(key, recipe_of(method, setting, seed), tokens)
                    write(bench)


def write(bench: Bench) -> None:
    lines = []
    for setting in SETTINGS:
        for method in METHODS:
            own, cells = bench.cells({"setting": setting, "method": method})
            if own:
                name = method.split(" + ")[0].replace("RTN", "none") if setting.startswith("w16") else method
                precision = recipe_of(method, setting, 0).precision
                bits = [own[0]["effective_bits"], *map(_bits, (precision.attn_in, precision.keys), (576, 64))]
                shown = " / ".join(f"{value:g}" for value in bits)
                lines.append([setting, name, shown, *cells, str(len(own))])
    bench.write_table(
        "Weights: asymmetric, group 64, clip search; GPTQ with act-order, static groups, damping .01, on "
        "inputs as quantized. Activations: asymmetric, group 64, 95 % of the range. Keys and values: "
        "asymmetric, a head of a token, 95 %. SpinQuant: 100 steps on one calibration window each. Bits are "
        "effective ones of weights, activations (scales in float32, as computed; 4.5 if they were stored in "
        "float16) and cache. Seeds are of calibration and rotation.",
        ["setting", "method", "bits", "WikiText-2", "C4", "seeds"],
        lines,
    )


def _bits(grid: ActivationGrid | None, channels: int) -> float:
    return 16 if grid is None else grid.effective_bits(channels)


if __name__ == "__main__":
    main()
