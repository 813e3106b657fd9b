"""Times products of quantized activations and packed weights by each backend: in turn, in one run.

    python experiments/bench/integer_matmul.py [--repeats 15]

Sides: dense float32; the integer matmul of given codes (W4A4 and W4A8, one range a token) by its kernel and
by the scan; the dequantizing matmul of the same weight with float32 activations. Ratios are medians of
paired times, dense float32 over the side named. Writes results/integer_matmul.json.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from decode import interleaved, run_jax, write_report

from jaxquant.kernels.dequant_matmul import dequant_matmul
from jaxquant.kernels.integer_matmul import integer_matmul
from jaxquant.quant import ActivationGrid, Grid, QActivation, quantize

GRID = Grid(bits=4, group_size=64)
LINEARS = [(4096, 4096), (576, 1536), (1536, 576)]
ROWS = (1, 16, 256)
RESULTS = Path(__file__).parent / "results" / "integer_matmul.json"


def sides(inputs: int, outputs: int, rows: int) -> dict[str, Callable[[], Any]]:
    w = jax.random.normal(jax.random.key(0), (inputs, outputs)) / inputs**0.5
    x = jax.random.normal(jax.random.key(1), (rows, inputs))
    q = quantize(w, GRID)
    weight, layout = (q.words, q.scale, q.zero), {"bits": GRID.bits, "block": q.block}
    runs = {
        "dense_float32": run_jax(jnp.matmul, x, w),
        "w4_float32": run_jax(functools.partial(dequant_matmul, **layout), x, *weight),
    }
    for bits, backend in ((4, "kernel"), (8, "kernel"), (4, "portable")):
        a = QActivation.of(x, ActivationGrid(bits=bits))
        multiply = functools.partial(integer_matmul, x_bits=bits, backend=backend, **layout)
        runs[f"w4a{bits}_{backend}"] = run_jax(multiply, a.codes, a.scale, a.lo, *weight)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    before, results = os.getloadavg(), {}
    for inputs, outputs in LINEARS:
        for rows in ROWS:
            name = f"{inputs}x{outputs}, {rows} rows"
            results[name] = interleaved(sides(inputs, outputs, rows), args.repeats)
            times = (
                f"{side} {r['milliseconds']:.3f} ms ({r['ratio']:.2f}x)" for side, r in results[name].items()
            )
            print(f"{name}: {', '.join(times)}", flush=True)
    write_report(args.out, {"grid": str(GRID), "repeats": args.repeats}, results, before)


if __name__ == "__main__":
    main()
