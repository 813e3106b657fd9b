"""Times decode attention over a packed 4-bit cache against float caches: in turn, in one run.

    python experiments/bench/attention.py [--repeats 15]

One token attends to a full cache of 4096 places, in the shapes of a block of SmolLM2-135M and of Llama-3-8B.
Keys and values are random. A float cache is attended to as the decoder does; "packed_dequantized" is the
packed one dequantized as a whole first. Ratios are medians of paired times, the bfloat16 cache over the side
named. Writes results/attention.json.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Else LAPACK's threads spin beside those of JAX.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
from decode import interleaved, run_jax, write_report

from jaxquant.kernels.cache_attention import cache_attention
from jaxquant.models.attention import attention
from jaxquant.quant import ActivationGrid, PackedHeads

GRID = ActivationGrid(bits=4, clip=0.95, scale_dtype="float16")
PLACES = 4096
# Heads, heads of the cache, and their size.
SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}
BASE = "bfloat16_cache"
RESULTS = Path(__file__).parent / "results" / "attention.json"


def sides(heads: int, kv_heads: int, head_dim: int) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """What is timed, and the bytes of each cache."""
    draw = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 3)
    q = draw(keys[0], (1, 1, heads, head_dim)) * head_dim**-0.5
    k, v = (draw(key, (1, PLACES, kv_heads, head_dim)) for key in keys[1:])
    start = jnp.int32(PLACES - 1)
    plain = functools.partial(attention, window=None, sliding=False)
    packed = [PackedHeads.of(heads, GRID) for heads in (k, v)]
    wide = [a.astype(jnp.float32) for a in (q, k, v)]

    def dequantized(q: jax.Array, k: PackedHeads, v: PackedHeads, start: jax.Array) -> jax.Array:
        return plain(q, k.dequantize(q.dtype), v.dequantize(q.dtype), start=start)

    def packed_by(backend: Any) -> Callable[..., jax.Array]:
        return lambda q, k, v, start: cache_attention(q, k, v, start=start, backend=backend)

    runs = {
        BASE: run_jax(lambda q, k, v, start: plain(q, k, v, start=start), q, k, v, start),
        "float32_cache": run_jax(lambda q, k, v, start: plain(q, k, v, start=start), *wide, start),
        "packed_kernel": run_jax(packed_by("kernel"), q, *packed, start),
        "packed_portable": run_jax(packed_by("portable"), q, *packed, start),
        "packed_dequantized": run_jax(dequantized, q, *packed, start),
    }
    held = {BASE: (k, v), "float32_cache": wide[1:], "packed": packed}
    return runs, {name: sum(a.nbytes for a in jax.tree.leaves(pair)) for name, pair in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    before, cases = os.getloadavg(), {}
    for name, shape in SHAPES.items():
        runs, nbytes = sides(*shape)
        times = interleaved(runs, args.repeats, base=BASE)
        share = nbytes["packed"] / nbytes[BASE]
        cases[name] = {"shape": shape, "bytes": nbytes, "share_of_bfloat16": share, "times": times}
        told = (f"{side} {r['milliseconds']:.3f} ms ({r['ratio']:.2f}x)" for side, r in times.items())
        print(f"{name}: {share:.1%} of the bytes in bfloat16; {', '.join(told)}", flush=True)
    write_report(
        args.out,
        {"grid": f"{GRID}, {GRID.scale_dtype}", "places": PLACES, "repeats": args.repeats},
        cases,
        before,
    )


if __name__ == "__main__":
    main()
