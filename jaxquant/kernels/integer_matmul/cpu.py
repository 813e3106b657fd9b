"""The CPU implementation: `cpu.cc`, built on first use and called by XLA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxquant.kernels import native
from jaxquant.kernels.platform import Kernel

# Of a block: the products of more codes of 8 bits could leave int32.
_LARGEST_BLOCK = 2**16
_TARGET = "jaxquant_integer_matmul"


def integer_matmul(
    x: UInt8[Array, "rows in"],
    x_scale: Float[Array, "rows x_groups"],
    x_lo: Float[Array, "rows x_groups"],
    words: UInt8[Array, "blocks words out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    *,
    x_bits: int,
    bits: int,
    block: int,
) -> Float[Array, "rows out"]:
    """As `scan.integer_matmul`, in float32.

    Shapes as in `reference`; `x_scale` and `x_lo` are float32, `scale` and `zero` both float16 or both
    float32.
    """
    y = jax.ShapeDtypeStruct((x.shape[0], words.shape[2]), jnp.float32)
    return jax.ffi.ffi_call(_TARGET, y)(x, x_scale, x_lo, words, scale, zero, x_bits=x_bits, bits=bits)


def _refuses(
    x: Any, x_scale: Any, x_lo: Any, words: Any, scale: Any, zero: Any, *, x_bits: int, bits: int, block: int
) -> str:
    if words.dtype != jnp.uint8:
        return f"it multiplies by uint8 words, not {words.dtype}"
    if not x_scale.dtype == x_lo.dtype == jnp.float32:
        return f"x_scale and x_lo are {x_scale.dtype} and {x_lo.dtype}, not float32"
    if scale.dtype != zero.dtype or scale.dtype not in (jnp.float16, jnp.float32):
        return f"scales and zeros are {scale.dtype} and {zero.dtype}, not both float16 or float32"
    if block > _LARGEST_BLOCK:
        return f"blocks of {block} rows are larger than {_LARGEST_BLOCK}"
    return native.missing(Path(__file__).with_suffix(".cc"), ((_TARGET, "JaxquantIntegerMatmul"),))


KERNEL = Kernel(integer_matmul, _refuses)
