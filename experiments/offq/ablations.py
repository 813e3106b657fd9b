"""What the parts of OffQ are worth: basis, sorted groups, offset, group size, clip; SmolLM2-135M, W16A4KV16.

    python experiments/offq/ablations.py --data DIR

Weights stay in 16 bits and the cache too, so that nothing but activations is quantized. Pipeline, windows and
evaluation are those of table.py, seed 0. Rows are added to results/ablations.json one by one; those already
there are kept. results/ablations.md is made from the JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import get_args

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from windows import Bench

from jaxquant.methods.offq import Basis
from jaxquant.models import Precision
from jaxquant.quant import ActivationGrid, Grid
from jaxquant.recipe import Recipe, chain
from jaxquant.stages import Keep
from jaxquant.surgery import OffQ, QuaRot, Surgery

RESULTS = Path(__file__).parent / "results"
GRID = ActivationGrid(bits=4, group_size=64, clip=0.95)


def recipe(surgery: Surgery | None, grid: ActivationGrid = GRID) -> Recipe:
    stages = (Keep(),) if surgery is None else (surgery, Keep())
    return chain(*stages, grid=Grid(), precision=Precision.uniform(grid, None))


def vary(**changes) -> ActivationGrid:
    return dataclasses.replace(GRID, **changes)


#: Varied part: recipe.
VARIANTS: dict[str, Recipe] = {
    "no rotation": recipe(None),
    "QuaRot": recipe(QuaRot()),
    "OffQ": recipe(OffQ()),
    **{f"basis: {basis}": recipe(OffQ(basis=basis)) for basis in get_args(Basis) if basis != "mixed"},
    "unsorted groups": recipe(OffQ(sort=False)),
    "no offset (symmetric grid)": recipe(OffQ(), vary(symmetric=True)),
    "QuaRot, symmetric grid": recipe(QuaRot(), vary(symmetric=True)),
    "0 kept in the range": recipe(OffQ(), vary(range="zero")),
    **{f"clip {clip:g}": recipe(OffQ(), vary(clip=clip)) for clip in (0.9, 1.0)},
    **{f"groups of {g}": recipe(OffQ(group_size=g), vary(group_size=g)) for g in (32, 192)},
    "QuaRot, groups of 192": recipe(QuaRot(), vary(group_size=192)),
    "one range a token": recipe(OffQ(), vary(group_size=None)),
    "QuaRot, one range a token": recipe(QuaRot(), vary(group_size=None)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    bench = Bench(parser.parse_args().data, RESULTS / "ablations.json")
    tokens = bench.calibration(0)
    for name, variant in VARIANTS.items():
        bench.run({"variant": name}, variant, tokens)
        write(bench)


def write(bench: Bench) -> None:
    lines = []
    for name, variant in VARIANTS.items():
        own, cells = bench.cells({"variant": name})
        if own:
            grid = variant.precision.attn_in
            assert grid is not None
            lines.append([name, f"{grid.effective_bits(576):.2f}", *cells])
    bench.write_table(
        "Activations at 4 bits, weights and cache in 16. Unless a row says otherwise OffQ with the mixed "
        "basis and sorted groups of 64; asymmetric ranges, 95 % around their middle. Bits with float32 "
        "scales and offsets, as computed.",
        ["setting", "bits", "WikiText-2", "C4"],
        lines,
    )


if __name__ == "__main__":
    main()
