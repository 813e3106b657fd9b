"""The portable implementation: a scan over row blocks; only a tile of the weight is ever dequantized."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

from jaxquant.kernels.platform import varying_alike
from jaxquant.quant.grid import working_dtype
from jaxquant.quant.packing import unpack, unpair
from jaxquant.quant.parts import by_parts

#: Rows dequantized at once. A tile of 512 x out stays in the last-level cache, and with many rows of x the
#: accumulator is read and written once per tile, not once per group.
TILE_ROWS = 512
# Of a tile: a product needs some.
_LEAST_COLUMNS = 64


def by_columns(
    compute: Callable[[Array, Array, Array], Array], words: Array, scale: Array, zero: Array, largest: int
) -> Array:
    """`compute(words, scale, zero)` from parts of no more than `largest` outputs, or a few."""
    out, largest = words.shape[2], max(largest, _LEAST_COLUMNS)
    if out <= largest:
        return compute(words, scale, zero)

    def part(start: Array, width: int) -> Array:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=width, axis=-1)
        return compute(*map(cut, (words, scale, zero)))

    return by_parts(part, out, largest)


def product_zeros(x: Array, scale: Array, dtype: jax.typing.DTypeLike) -> Array:
    """Zeros `[rows, out]`, on a mesh of explicit axes laid out as the product is."""
    return jnp.zeros_like(
        jnp.sum(x, axis=1, keepdims=True) * jnp.sum(scale, axis=0, keepdims=True).astype(x.dtype), dtype
    )


def dequant_matmul(
    x: Float[Array, "rows in"],
    words: UInt[Array, "blocks words out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    *,
    bits: int,
    block: int,
) -> Float[Array, "rows out"]:
    """`y = sum_t x[:, t] @ (scale_t * (code_t - zero_t))` over tiles t; shapes as in `reference`.

    Where a block has more rows than a tile, parts of the outputs follow each other.
    """
    wide = working_dtype(x.dtype)
    blocks = words.shape[0]
    per_tile = max(d for d in range(1, blocks + 1) if blocks % d == 0 and (d == 1 or d * block <= TILE_ROWS))
    tiles = blocks // per_tile
    group_of_block = jnp.arange(blocks) // (blocks // scale.shape[0])
    x_tiles = jnp.moveaxis(x.reshape(x.shape[0], tiles, per_tile * block), 1, 0)

    def columns(words: Array, scale: Array, zero: Array) -> Array:
        # Else the backward pass would keep the dequantized tiles, which together are the whole weight.
        @jax.checkpoint
        def add_tile(acc: Array, tile: tuple[Array, Array, Array]) -> tuple[Array, None]:
            x_tile, words_tile, group = tile
            shift, step = (a[group].astype(wide)[:, None, :] for a in (zero, scale))
            weight = (unpack(words_tile, bits, block).astype(wide) - shift) * step
            weight = weight.reshape(per_tile * block, -1).astype(x.dtype)
            return acc + jnp.matmul(x_tile, weight, preferred_element_type=wide), None

        tiled = (
            x_tiles,
            words.reshape(tiles, per_tile, *words.shape[1:]),
            group_of_block.reshape(tiles, per_tile),
        )
        start, *_ = varying_alike(product_zeros(x, scale, wide), x, words, scale, zero)
        acc, _ = jax.lax.scan(add_tile, start, tiled)
        return acc.astype(x.dtype)

    return by_columns(columns, words, scale, zero, TILE_ROWS * words.shape[2] // block)


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
