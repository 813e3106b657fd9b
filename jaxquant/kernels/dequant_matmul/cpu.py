"""The CPU implementation: `cpu.cc`, built on first use and called by XLA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxquant.kernels import native
from jaxquant.kernels.dequant_matmul.scan import by_columns
from jaxquant.kernels.platform import Kernel

#: Rows of x up to which words are unpacked for every eight of them; above, tiles of the weight are written
#: out and multiplied by XLA, which has the faster product (by measurement).
LARGEST_ROWS = 64
# Weights of a tile, which should stay in the second cache.
_TILE = 2**20
_SOURCE = Path(__file__).with_suffix(".cc")
_MATMUL, _DEQUANTIZE = "jaxquant_dequant_matmul", "jaxquant_dequantize"


def dequant_matmul(
    x: Float[Array, "rows in"],
    words: UInt8[Array, "blocks words out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    *,
    bits: int,
    block: int,
) -> Float[Array, "rows out"]:
    """`y = sum_g scale_g * (x_g @ code_g - zero_g * sum(x_g))` in float32, in the dtype of `x`.

    Shapes as in `reference`; `x` are floats of up to 32 bits, `scale`, `zero` both float16 or both float32.
    Many rows are multiplied by one tile of columns of the dequantized weight after another. With few, scales
    come last: an infinity in x becomes NaN, and sums over codes have to be finite.
    """
    wide = x.astype(jnp.float32)
    if x.shape[0] <= LARGEST_ROWS:
        shape = jax.ShapeDtypeStruct((x.shape[0], words.shape[2]), jnp.float32)
        return jax.ffi.ffi_call(_MATMUL, shape)(wide, words, scale, zero, bits=bits).astype(x.dtype)

    def columns(words: Array, scale: Array, zero: Array) -> Array:
        shape = jax.ShapeDtypeStruct((words.shape[0], block, words.shape[2]), jnp.float32)
        weight = jax.ffi.ffi_call(_DEQUANTIZE, shape)(words, scale, zero, bits=bits)
        return jnp.matmul(wide, weight.reshape(x.shape[1], -1)).astype(x.dtype)

    return by_columns(columns, words, scale, zero, _TILE // x.shape[1])


def _refuses(x: Any, words: Any, scale: Any, zero: Any, *, bits: int, block: int) -> str:
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) or words.dtype != jnp.uint8:
        return f"it multiplies floats of up to 32 bits by uint8 words, not {x.dtype} by {words.dtype}"
    if scale.dtype != zero.dtype or scale.dtype not in (jnp.float16, jnp.float32):
        return f"scales and zeros are {scale.dtype} and {zero.dtype}, not both float16 or float32"
    targets = {_MATMUL: "JaxquantDequantMatmul", _DEQUANTIZE: "JaxquantDequantize"}
    return native.missing(_SOURCE, tuple(targets.items()))


KERNEL = Kernel(dequant_matmul, _refuses)
