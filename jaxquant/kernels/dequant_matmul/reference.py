"""The specification: dequantize everything, then one product in float32."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

from jaxquant.quant.packing import unpack


def dequantize(
    words: UInt[Array, "blocks words out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    *,
    bits: int,
    block: int,
) -> Float[Array, "in out"]:
    """The float32 weight `scale * (code - zero)`; every block of `block` rows lies inside one group."""
    codes = unpack(words, bits, block).astype(jnp.float32)
    repeat = words.shape[0] // scale.shape[0]
    scale = jnp.repeat(scale.astype(jnp.float32), repeat, axis=0)[:, None, :]
    zero = jnp.repeat(zero.astype(jnp.float32), repeat, axis=0)[:, None, :]
    return ((codes - zero) * scale).reshape(-1, words.shape[-1])


def dequant_matmul(
    x: Float[Array, "rows in"],
    words: UInt[Array, "blocks words out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    *,
    bits: int,
    block: int,
) -> Float[Array, "rows out"]:
    """`y = x @ (scale * (code - zero))` in the dtype of `x`, accumulated in float32 at highest precision."""
    weight = dequantize(words, scale, zero, bits=bits, block=block)
    y = jnp.matmul(x.astype(jnp.float32), weight, precision="highest")
    return y.astype(x.dtype)
