"""Times the jitted GPTQ solve against a plain torch GPTQ on the CPU: same Hessians, same grids, interleaved.

    python experiments/bench/gptq.py [--repeats 7] [--threads 2]

The torch side is the published algorithm (arXiv 2210.17323) in its usual form: `[out, in]` weights, column
after column, lazy updates of 128 columns, Cholesky -> inverse -> upper Cholesky factor. Both sides fit their
own min-max grids, use act-order, static groups and the same damping, and get contiguous float32 input. Timed
is the solve: input to codes, scales and zeros. `report` is the same with the statistics that ours also gives
(the layer error: two products with H), which torch does not compute. The torch side runs with --threads
threads and once more with one, since a busy machine slows its small parallel regions down.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from pathlib import Path

# Before JAX loads its LAPACK: OpenBLAS threads wait by spinning, and a Cholesky factorization of 1 ms takes
# 500 ms where another process holds a core. Torch's CPU build does not read this variable.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxquant.calibrate.moments import Moments
from jaxquant.methods import gptq
from jaxquant.quant import Grid

SHAPES = [(576, 576), (576, 1536), (1536, 576), (2048, 2048)]
BITS, GROUP, PERCDAMP, BLOCK = 4, 64, 0.01, 128
RESULTS = Path(__file__).parent / "results" / "gptq.json"


def layer(rows: int, out: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the second moments of 2 `rows` correlated tokens with uneven channels."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((rows, rows)) / rows**0.5 + np.eye(rows)
    x = rng.standard_normal((2 * rows, rows)) @ mix * rng.lognormal(0, 1, rows)
    return rng.standard_normal((rows, out)).astype(np.float32), (x.T @ x).astype(np.float32)


@torch.inference_mode()
def torch_gptq(w_t: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The published algorithm on `[out, in]`; returns integers and the dequantized weight."""
    w, h = w_t.clone(), h.clone()
    out, rows = w.shape
    top = 2**BITS - 1
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0

    groups = w.reshape(out, rows // GROUP, GROUP)
    lo, hi = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((hi - lo) / top).half().float()
    zero = torch.round(-lo / scale).clamp(0, top)

    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(PERCDAMP * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)

    codes, values = torch.zeros_like(w), torch.zeros_like(w)
    group_of = (order // GROUP).tolist()
    for start in range(0, rows, BLOCK):
        stop = min(start + BLOCK, rows)
        w_block = w[:, start:stop].clone()
        errors = torch.zeros_like(w_block)
        upper_block = upper[start:stop, start:stop]
        for k in range(stop - start):
            column = w_block[:, k]
            s, z = scale[:, group_of[start + k]], zero[:, group_of[start + k]]
            q = torch.clamp(torch.round(column / s) + z, 0, top)
            value = s * (q - z)
            codes[:, start + k], values[:, start + k] = q, value
            error = (column - value) / upper_block[k, k]
            w_block[:, k:] -= error[:, None] @ upper_block[k, k:][None]
            errors[:, k] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    inverse = torch.argsort(order)
    return codes[:, inverse].to(torch.uint8), values[:, inverse]


def relative_error(values: np.ndarray, w: np.ndarray, h: np.ndarray) -> float:
    values, w, h = (a.astype(np.float64) for a in (values, w, h))
    d = values - w
    return float(np.sum(d * (h @ d)) / np.sum(w * (h @ w)))


def bench(rows: int, out: int, repeats: int, threads: int) -> dict:
    w, h = layer(rows, out)
    grid = Grid(bits=BITS, group_size=GROUP)
    weight = jnp.asarray(w)
    moments = Moments(jnp.asarray(h), jnp.asarray(2 * rows, jnp.int32), jnp.zeros(rows))
    w_t, h_t = torch.from_numpy(w.T.copy()), torch.from_numpy(h)

    @jax.jit
    def solve(weight: jax.Array, moments: Moments) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        rounded = gptq(weight, moments, grid, percdamp=PERCDAMP, block=BLOCK)
        return rounded.codes, rounded.scale, rounded.zero

    start = time.perf_counter()
    compiled = solve.lower(weight, moments).compile()
    compile_seconds = time.perf_counter() - start

    def ours():
        return jax.block_until_ready(compiled(weight, moments))

    def report():
        return jax.block_until_ready(gptq(weight, moments, grid, percdamp=PERCDAMP, block=BLOCK))

    def torch_with(count: int):
        torch.set_num_threads(count)
        return torch_gptq(w_t, h_t)

    sides = {
        "jaxquant": ours,
        "jaxquant_report": report,
        "torch": lambda: torch_with(threads),
        "torch_1_thread": lambda: torch_with(1),
    }
    (codes_t, values_t), result = torch_with(threads), report()
    ours()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)

    def ratio(name: str) -> float:
        return statistics.median(t / j for t, j in zip(seconds[name], seconds["jaxquant"], strict=True))

    values = np.asarray(grid.dequantize(result.codes, result.scale, result.zero))
    return {
        "in": rows,
        "out": out,
        **{f"{name}_seconds": statistics.median(v) for name, v in seconds.items()},
        "ratio": ratio("torch"),
        "ratio_1_thread": ratio("torch_1_thread"),
        "ratio_of_fastest": min(seconds["torch"] + seconds["torch_1_thread"]) / min(seconds["jaxquant"]),
        "compile_seconds": compile_seconds,
        "jaxquant_error": relative_error(values, w, h),
        "torch_error": relative_error(values_t.numpy().T, w, h),
        "integer_mismatch": float(np.mean(np.asarray(result.codes) != codes_t.numpy().T)),
        "all_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    print(
        "Medians in seconds; ratio = torch / ours, paired; 1T = one torch thread; best = fastest / fastest."
    )
    print(
        "    in x out     ours   report    torch torch 1T  ratio ratio 1T   best  compile  error ours/torch"
        "  mismatch"
    )
    rows = []
    for shape in SHAPES:
        r = bench(*shape, args.repeats, args.threads)
        rows.append(r)
        print(
            f"{r['in']:>5} x{r['out']:>5} {r['jaxquant_seconds']:8.4f} {r['jaxquant_report_seconds']:8.4f} "
            f"{r['torch_seconds']:8.4f} {r['torch_1_thread_seconds']:8.4f} {r['ratio']:6.2f} "
            f"{r['ratio_1_thread']:8.2f} {r['ratio_of_fastest']:6.2f} {r['compile_seconds']:8.2f}  "
            f"{r['jaxquant_error']:.6f}/{r['torch_error']:.6f}  {r['integer_mismatch']:8.1e}",
            flush=True,
        )
    report = {
        "setting": {
            "bits": BITS, "group_size": GROUP, "percdamp": PERCDAMP, "block": BLOCK, "act_order": True,
            "groups": "static", "grid": str(Grid(bits=BITS, group_size=GROUP)), "repeats": args.repeats,
            "torch_threads": args.threads,
        },
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "torch", "numpy")}
        | {"python": platform.python_version()},
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()},
        "rows": rows,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
