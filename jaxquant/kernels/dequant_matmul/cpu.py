"""The CPU implementation for some hundred rows: `cpu.cc`, built on first use and called by XLA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxquant.kernels import native
from jaxquant.kernels.platform import Kernel

#: Rows of x up to which unpacking the words for every eight of them costs less than `scan` (by measurement).
LARGEST_ROWS = 256
_TARGET = "jaxquant_dequant_matmul"


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

    Shapes as in `reference`; `x` is float32 or bfloat16, `scale` and `zero` both float16 or both float32.
    """
    y = jax.ShapeDtypeStruct((x.shape[0], words.shape[2]), jnp.float32)
    call = jax.ffi.ffi_call(_TARGET, y)
    return call(x.astype(jnp.float32), words, scale, zero, bits=bits).astype(x.dtype)


def _refuses(x: Any, words: Any, scale: Any, zero: Any, *, bits: int, block: int) -> str:
    if x.shape[0] > LARGEST_ROWS:
        return f"{x.shape[0]} rows are more than {LARGEST_ROWS}"
    if x.dtype not in (jnp.float32, jnp.bfloat16) or words.dtype != jnp.uint8:
        return f"it multiplies float32 or bfloat16 by uint8 words, not {x.dtype} by {words.dtype}"
    if scale.dtype != zero.dtype or scale.dtype not in (jnp.float16, jnp.float32):
        return f"scales and zeros are {scale.dtype} and {zero.dtype}, not both float16 or float32"
    return native.missing(Path(__file__).with_suffix(".cc"), _TARGET, "JaxquantDequantMatmul")


KERNEL = Kernel(dequant_matmul, _refuses)
