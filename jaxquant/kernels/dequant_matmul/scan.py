"""The portable implementation: a scan over row blocks; only a tile of the weight is ever dequantized."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

from jaxquant.kernels.platform import varying_alike
from jaxquant.quant.grid import working_dtype
from jaxquant.quant.packing import unpack, unpair

# Rows dequantized at once. A tile of 512 x out stays in the last-level cache, and with many rows of x the
# accumulator is read and written once per tile, not once per group.
_TILE_ROWS = 512


def dequant_matmul(
    x: Float[Array, "rows in"],
    words: UInt[Array, "blocks words out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    *,
    bits: int,
    block: int,
) -> Float[Array, "rows out"]:
    """`y = sum_t x[:, t] @ (scale_t * (code_t - zero_t))` over tiles t; shapes as in `reference`."""
    wide = working_dtype(x.dtype)
    blocks, _, out = words.shape
    per_tile = max(d for d in range(1, blocks + 1) if blocks % d == 0 and (d == 1 or d * block <= _TILE_ROWS))
    tiles = blocks // per_tile
    group_of_block = jnp.arange(blocks) // (blocks // scale.shape[0])

    # Else the backward pass would keep the dequantized tiles, which together are the whole weight.
    @jax.checkpoint
    def add_tile(acc: Array, tile: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x_tile, words_tile, group = tile
        shift, step = (a[group].astype(wide)[:, None, :] for a in (zero, scale))
        weight = (unpack(words_tile, bits, block).astype(wide) - shift) * step
        weight = weight.reshape(per_tile * block, out).astype(x.dtype)
        return acc + jnp.matmul(x_tile, weight, preferred_element_type=wide), None

    x_tiles = jnp.moveaxis(x.reshape(x.shape[0], tiles, per_tile * block), 1, 0)
    tiled = (
        x_tiles,
        words.reshape(tiles, per_tile, *words.shape[1:]),
        group_of_block.reshape(tiles, per_tile),
    )
    start, *_ = varying_alike(jnp.zeros((x.shape[0], out), wide), x, words, scale, zero)
    acc, _ = jax.lax.scan(add_tile, start, tiled)
    return acc.astype(x.dtype)


def paired_matmul(
    x: Float[Array, "rows in"],
    words: UInt[Array, "blocks words out"],
    pairs: UInt[Array, "groups 1 out"],
    *,
    bits: int,
    block: int,
) -> Float[Array, "rows out"]:
    """`dequant_matmul` with scales and zeros as `quant.packing.pair` packs them."""
    return dequant_matmul(x, words, *unpair(pairs), bits=bits, block=block)
