"""The specification: dequantize both, then one product."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt, UInt8

from jaxquant.kernels.dequant_matmul.reference import dequantize


def integer_matmul(
    x: UInt8[Array, "rows in"],
    x_scale: Float[Array, "rows x_groups"],
    x_lo: Float[Array, "rows x_groups"],
    words: UInt[Array, "blocks words out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    *,
    x_bits: int,
    bits: int,
    block: int,
) -> Float[Array, "rows out"]:
    """`y = (x_lo + x_scale * x) @ (scale * (code - zero))` in float32 at highest precision."""
    grouped = x.reshape(*x_scale.shape, -1).astype(jnp.float32)
    values = (x_lo[..., None] + x_scale[..., None] * grouped).reshape(x.shape)
    return jnp.matmul(values, dequantize(words, scale, zero, bits=bits, block=block), precision="highest")
