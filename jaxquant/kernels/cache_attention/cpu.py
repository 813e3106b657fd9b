"""The CPU implementation for few tokens: `cpu.cc`, built on first use and called by XLA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from jaxquant.kernels import native
from jaxquant.kernels.platform import Kernel
from jaxquant.quant import ActivationGrid

#: Tokens up to which it costs less than the matrix products of `scan` (by measurement).
LARGEST_TOKENS = 16
# Channels of the widest vector; groups have to be whole ones.
_LANES = 16
_TARGET = "jaxquant_cache_attention"


def cache_attention(
    q: Float[Array, "batch tokens heads n"],
    start: Int32[Array, " batch"],
    window: Int32[Array, " batch"],
    k_words: UInt8[Array, "batch places kv_heads k_words"],
    k_scale: Float[Array, "batch places kv_heads k_groups"],
    k_lo: Float[Array, "batch places kv_heads k_groups"],
    v_words: UInt8[Array, "batch places kv_heads v_words"],
    v_scale: Float[Array, "batch places kv_heads v_groups"],
    v_lo: Float[Array, "batch places kv_heads v_groups"],
    *,
    k_grid: ActivationGrid,
    v_grid: ActivationGrid,
) -> Float[Array, "batch tokens heads n"]:
    """Attention in float32, in the dtype of `q`; threads take parts of the places and are merged.

        q k = sum_g scale_g (q_g . code_g) + lo_g sum(q_g)

    Arguments as in `reference`; `q` is a float of up to 32 bits, scales and offsets are float16 or float32.
    """
    call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct(q.shape, jnp.float32))
    y = call(
        q.astype(jnp.float32), start, window, k_words, k_scale, k_lo, v_words, v_scale, v_lo,
        k_bits=k_grid.bits, k_symmetric=int(k_grid.symmetric),
        v_bits=v_grid.bits, v_symmetric=int(v_grid.symmetric),
    )  # fmt: skip
    return y.astype(q.dtype)


def _refuses(
    q: Any, start: Any, window: Any, k_words: Any, k_scale: Any, k_lo: Any, v_words: Any, v_scale: Any,
    v_lo: Any, *, k_grid: ActivationGrid, v_grid: ActivationGrid,
) -> str:  # fmt: skip
    if q.shape[1] > LARGEST_TOKENS:
        return f"{q.shape[1]} tokens are more than {LARGEST_TOKENS}"
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"queries are {q.dtype}, not floats of up to 32 bits"
    if not k_words.dtype == v_words.dtype == jnp.uint8:
        return f"words are {k_words.dtype} and {v_words.dtype}, not uint8"
    for scale, lo in ((k_scale, k_lo), (v_scale, v_lo)):
        if scale.dtype != lo.dtype or scale.dtype not in (jnp.float16, jnp.float32):
            return f"scales and offsets are {scale.dtype} and {lo.dtype}, not both float16 or float32"
        if scale.shape[3] > 1 and q.shape[3] // scale.shape[3] % _LANES:
            return f"groups of {q.shape[3] // scale.shape[3]} channels are not multiples of {_LANES}"
    return native.missing(Path(__file__).with_suffix(".cc"), ((_TARGET, "JaxquantCacheAttention"),))


KERNEL = Kernel(cache_attention, _refuses)
