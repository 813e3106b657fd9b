"""The choice of an implementation of attention over a packed cache."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxquant.errors import InputError
from jaxquant.kernels.cache_attention import cpu, gpu, scan, tpu
from jaxquant.kernels.platform import Backend, by_platform
from jaxquant.quant import PackedHeads
from jaxquant.quant.packing import packed_rows

_cache_attention = by_platform(
    scan.cache_attention, {"cpu": [cpu.KERNEL], "tpu": [tpu.KERNEL], "cuda": [gpu.KERNEL]}, rows=9
)


def cache_attention(
    q: Float[Array, "batch tokens heads n"],
    keys: PackedHeads,
    values: PackedHeads,
    *,
    start: Int[Array, "*batch"] | int,
    window: Int[Array, "*batch"] | int | None = None,
    backend: Backend | None = None,
) -> Float[Array, "batch tokens heads n"]:
    """`softmax(q k^T + mask) v` in the dtype of `q`, without materializing dequantized keys or values.

    Token t is at place `start + t` of the cache and sees places s, `start + t - window < s <= start + t`.
    Chunks of places are dequantized and multiplied in float32 (float64 for float64 `q`) and added up by an
    online softmax (arXiv 1805.02867), so that the work follows the places in use, not the size of the cache
    (but for scales and offsets on GPUs, which are copied as a whole).
    Derivatives of any order, in `q`, scales and offsets, are those of the portable implementation.

    Args:
      q: queries, scaled and rotated as the keys are; head h reads `h // (heads / kv_heads)`.
      keys, values: `[batch, places, kv_heads, n]`, each on its own grid.
      start: place of the first query, one for all or one a row; `0 <= start <= places - tokens`.
      window: how many places a token sees, itself included, one for all or one a row; `None`: all.
      backend: `"portable"` scans over chunks, everywhere; `"kernel"` is C++ on CPUs, Pallas on TPUs and, for
        bfloat16 and float16 `q`, on Hopper GPUs. `None`: as `kernels.use_backend` says, else the kernel,
        where the program is lowered for such a device and it takes these arrays.

    Raises:
      InputError: heads that cannot share the heads of the cache, or other shapes that do not agree; a number
        as `start` or `window` that is out of range.
      UsageError: an unknown backend, or `"kernel"` where there is none.
    """
    if q.ndim != 4 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise InputError(f"queries {q.shape} of {q.dtype} are no floats of (batch, tokens, heads, head_dim)")
    batch, tokens, heads, n = q.shape
    shape = (*keys.words.shape[:3], keys.head_dim)
    if shape != (*values.words.shape[:3], values.head_dim):
        raise InputError(f"keys {shape} and values {(*values.words.shape[:3], values.head_dim)} differ")
    if (batch, n) != (shape[0], shape[3]) or heads % max(shape[2], 1) or tokens > shape[1]:
        raise InputError(
            f"queries {q.shape} do not fit keys {shape}: batch and head_dim are to be equal, {heads} heads a "
            f"multiple of {shape[2]}, {tokens} tokens no more than {shape[1]} places"
        )
    for heads_of, name in ((keys, "keys"), (values, "values")):
        parts = [heads_of.scale] if heads_of.lo is None else [heads_of.scale, heads_of.lo]
        grouped = (*shape[:3], heads_of.grid.groups(n))
        depth = packed_rows(n, heads_of.grid.bits, jnp.iinfo(heads_of.words.dtype).bits)
        if heads_of.words.shape[3] != depth or any(part.shape != grouped for part in parts):
            raise InputError(
                f"{name}: words {heads_of.words.shape} and scales or offsets "
                f"{[part.shape for part in parts]} are not {(*shape[:3], depth)} and {grouped}"
            )
    if isinstance(window, int | np.integer) and not 0 < window < 2**31:
        raise InputError(f"window={window}: a token sees itself; give 1 or more, below 2^31, or None for all")
    if isinstance(start, int | np.integer) and not 0 <= start <= shape[1] - tokens:
        raise InputError(f"start={start}: {tokens} tokens from there on do not fit {shape[1]} places")
    if 0 in q.shape:
        return q
    seen = shape[1] if window is None else window
    rows = [jnp.broadcast_to(jnp.asarray(a, jnp.int32), (batch,)) for a in (start, seen)]
    stores = [
        array
        for heads in (keys, values)
        # Nothing reads the offsets of a symmetric grid.
        for array in (heads.words, heads.scale, heads.scale if heads.lo is None else heads.lo)
    ]
    return _cache_attention(q, *rows, *stores, backend=backend, k_grid=keys.grid, v_grid=values.grid)
