"""The CPU implementation: `cpu.cc`, built on first use and called by XLA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxquant.kernels import native
from jaxquant.kernels.platform import Kernel

#: Rows of x up to which words are unpacked for every eight of them; above, tiles of the weight are written
#: out and multiplied by XLA, which has the faster product (by measurement).
LARGEST_ROWS = 64
# Weights of a tile, which should stay in the second cache, and its columns, of which a product needs some.
_TILE, _LEAST_COLUMNS = 2**20, 64
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
    wide, out = x.astype(jnp.float32), words.shape[2]
    if x.shape[0] <= LARGEST_ROWS:
        shape = jax.ShapeDtypeStruct((x.shape[0], out), jnp.float32)
        return jax.ffi.ffi_call(_MATMUL, shape)(wide, words, scale, zero, bits=bits).astype(x.dtype)
    widths = [d for d in range(1, out + 1) if out % d == 0 and d >= min(out, _LEAST_COLUMNS)]
    width = max((d for d in widths if d * x.shape[1] <= _TILE), default=widths[0])

    def columns(start: Array) -> Array:
        tile = (jax.lax.dynamic_slice_in_dim(a, start, width, axis=-1) for a in (words, scale, zero))
        shape = jax.ShapeDtypeStruct((words.shape[0], block, width), jnp.float32)
        weight = jax.ffi.ffi_call(_DEQUANTIZE, shape)(*tile, bits=bits)
        return jnp.matmul(wide, weight.reshape(-1, width)).astype(x.dtype)

    y = jax.lax.map(columns, jnp.arange(0, out, width))
    return jnp.moveaxis(y, 0, 1).reshape(x.shape[0], out)


def _refuses(x: Any, words: Any, scale: Any, zero: Any, *, bits: int, block: int) -> str:
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) or words.dtype != jnp.uint8:
        return f"it multiplies floats of up to 32 bits by uint8 words, not {x.dtype} by {words.dtype}"
    if scale.dtype != zero.dtype or scale.dtype not in (jnp.float16, jnp.float32):
        return f"scales and zeros are {scale.dtype} and {zero.dtype}, not both float16 or float32"
    targets = {_MATMUL: "JaxquantDequantMatmul", _DEQUANTIZE: "JaxquantDequantize"}
    return native.missing(_SOURCE, tuple(targets.items()))


KERNEL = Kernel(dequant_matmul, _refuses)
