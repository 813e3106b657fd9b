"""The portable implementation: a scan over blocks, each unpacked alone, of int8 products summed in int32."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt, UInt8

from jaxquant.kernels.dequant_matmul.scan import TILE_ROWS, by_columns, product_zeros
from jaxquant.kernels.platform import varying_alike
from jaxquant.quant.packing import unpack


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
    """With tiles t of channels inside one block of words and one group of x, and codes p, q with middle 0:

        y = sum_t s_t S_t (p_t . q_t) + sum_t c_t S_t (sum q_t - n Z_t) - sum_t s_t (sum p_t) S_t Z_t

    s, c: scale of x and its value at p = 0; S, Z: scale of the weight and its code of value 0; n: channels of
    a tile. Shapes as in `reference`. Centred codes of up to 8 bits are int8; the sums are exact in int32.
    Where a block has many rows, parts of the outputs follow each other.
    """
    rows, channels = x.shape
    blocks = words.shape[0]
    wide = x_scale.dtype
    size = math.gcd(block, channels // x_scale.shape[1])
    tiles = channels // size

    def spread(a: Array, axis: int) -> Array:
        return jnp.repeat(a.astype(wide), tiles // a.shape[axis], axis=axis)

    def by_block(a: Array) -> Array:
        return a.reshape(blocks, tiles // blocks, *a.shape[1:])

    p = _centred(x, x_bits).reshape(rows, tiles, size).swapaxes(0, 1)
    s = spread(x_scale, 1)
    c = spread(x_lo, 1) + s * 2 ** (x_bits - 1)
    sums_p = jnp.sum(p, axis=-1, dtype=jnp.int32).T.astype(wide)
    left = jnp.concatenate([c, -s * sums_p], axis=1)

    def columns(words: Array, scale: Array, zero: Array) -> Array:
        out = words.shape[2]
        big_s, big_z = spread(scale, 0), spread(zero, 0) - 2 ** (bits - 1)

        # Else the backward pass would keep a product of every block.
        @jax.checkpoint
        def add_block(acc: Array, block_of: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
            own_words, p, s, big_s = block_of
            q = _centred(unpack(own_words, bits, block), bits).reshape(block // size, size, out)
            product = jnp.einsum("tri,tio->tro", p, q, preferred_element_type=jnp.int32).astype(wide)
            weighted = s[:, :, None] * product * big_s[:, None]
            return acc + jnp.sum(weighted, axis=0), jnp.sum(q, axis=1, dtype=jnp.int32)

        start, *_ = varying_alike(product_zeros(x_scale, scale, wide), x, x_scale, words, scale)
        acc, sums_q = jax.lax.scan(add_block, start, (words, *map(by_block, (p, s.T, big_s))))
        sums_q = sums_q.reshape(tiles, out).astype(wide)
        right = jnp.concatenate([big_s * (sums_q - size * big_z), big_s * big_z])
        return acc + jnp.matmul(left, right, precision="highest")

    return by_columns(columns, words, scale, zero, TILE_ROWS * words.shape[2] // block)


def _centred(codes: Array, bits: int) -> Array:
    return (codes.astype(jnp.int16) - 2 ** (bits - 1)).astype(jnp.int8)
