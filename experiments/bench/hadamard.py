"""Times the Hadamard transform that quantizes against the transform and then the grid: in turn, in one run.

    python experiments/bench/hadamard.py [--repeats 15]

The inputs of `down` of SmolLM2-135M and Llama-3-8B in float32, as OffQ (blocks and groups of 64) and QuaRot
(one block, one range a token) quantize them at 4 bits. "two_passes" is XLA's program, which writes the
transformed x and reads it again; "transform" is its first half alone. Ratios are medians of paired times,
two passes over the side named. Writes results/hadamard.json and prints a table of milliseconds.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from decode import interleaved, run_jax, write_report

from jaxquant.kernels.hadamard import hadamard_quantize
from jaxquant.linalg import hadamard_transform
from jaxquant.quant import ActivationGrid

WIDTHS = {"SmolLM2-135M": 1536, "Llama-3-8B": 14336}
SIZES = (64, None)
ROWS = (1, 16, 512)
BASE = "two_passes"
RESULTS = Path(__file__).parent / "results" / "hadamard.json"


def sides(n: int, size: int | None, rows: int) -> dict[str, Callable[[], Any]]:
    x = jax.random.normal(jax.random.key(0), (rows, n))
    both = functools.partial(hadamard_quantize, grid=ActivationGrid(bits=4, group_size=size), block=size or n)
    return {
        BASE: run_jax(functools.partial(both, backend="portable"), x),
        "kernel": run_jax(functools.partial(both, backend="kernel"), x),
        "transform": run_jax(hadamard_transform, x.reshape(rows, -1, size or n)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    before, cases = os.getloadavg(), {}
    print("| channels, block and group, rows | transform | transform, quantize | kernel | ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for model, n in WIDTHS.items():
        for size in SIZES:
            for rows in ROWS:
                times = interleaved(sides(n, size, rows), args.repeats, base=BASE)
                cases[f"{model}, {size or n}, {rows} rows"] = times
                told = (f"{times[side]['milliseconds']:.3g}" for side in ("transform", BASE, "kernel"))
                row = [f"{n}, {size or n}, {rows}", *told, f"{times['kernel']['ratio']:.1f}"]
                print(f"| {' | '.join(row)} |", flush=True)
    write_report(args.out, {"bits": 4, "dtype": "float32", "repeats": args.repeats}, cases, before)


if __name__ == "__main__":
    main()
