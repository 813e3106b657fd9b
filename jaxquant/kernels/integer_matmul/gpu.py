"""Pallas (Mosaic GPU) for Hopper: codes of both sides are multiplied by `wgmma` in bfloat16, exactly."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, UInt8

from jaxquant.kernels.mosaic_gpu import (
    Mosaic,
    blocks_of,
    codes_of,
    refuses_words,
    tiles_of,
    unit_of,
    without_hopper,
)
from jaxquant.kernels.platform import Kernel

# Two tiles of float32 are in registers: the sums, and a product.
_ROWS = 64


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
    interpret: Any = None,
) -> Float[Array, "rows out"]:
    """With tiles t of n channels inside one block of words and one group of x, and codes p, q from 0:

        y = sum_t S_t (s_t (p_t . q_t) + lo_t sum q_t) - sum_t S_t Z_t (s_t sum p_t + n lo_t)

    s, lo: scale and offset of x; S, Z: scale of the weight and its code of value 0. Codes of up to 8 bits are
    exact in bfloat16, and sums of up to 128 products below 2^24, so in float32. Hopper has no product of
    int4, and takes int8 only with channels next to each other, where packed words have outputs.

    A program computes a tile of y, transposed, as that of `dequant_matmul` does. Shapes as in `reference`.

    Args:
      interpret: as in `mosaic_gpu.kernel`: how to run where there is no GPU.
    """
    mosaic = Mosaic(interpret)
    plgpu, lay, product = mosaic.gpu, mosaic.lay, mosaic.product
    rows, channels = x.shape
    blocks, depth, out = words.shape
    groups, x_groups = scale.shape[0], x_scale.shape[1]
    per_group, size = blocks // groups, math.gcd(block, channels // x_groups)
    width = blocks_of(blocks, block, groups) * block
    pieces = width // size
    tiles = tiles_of(
        rows, words.shape, block, groups, bits, largest=_ROWS, itemsizes=(4, scale.dtype.itemsize),
        weights=1, kept=16 * width, row_bytes=16 * pieces,
    )  # fmt: skip
    grid = (tiles.splits, out // tiles.out, math.ceil(rows / tiles.rows))
    steps = blocks // tiles.blocks // tiles.splits
    ragged = (0, grid[2] * tiles.rows - rows)

    p = jnp.pad(x, (ragged, (0, 0)))
    sums = jnp.sum(p.reshape(p.shape[0], channels // size, size), axis=-1, dtype=jnp.int32)
    s, lo = (
        jnp.repeat(jnp.pad(a, (ragged, (0, 0))), sums.shape[1] // x_groups, axis=1) for a in (x_scale, x_lo)
    )
    offset = s * sums.astype(jnp.float32) + size * lo
    # The last one fills up: copies are multiples of 128 bytes.
    of_pieces = jnp.stack([a.T for a in (s, lo, offset, offset)], axis=1)

    layout = mosaic.words()

    def store_codes(b: int, words_ref: Any, codes_ref: Any) -> None:
        unit = unit_of(bits, block)
        for start in range(0, block, unit):
            codes = codes_of(lambda a: lay(words_ref[b, a : a + unit], layout), start, bits, block)
            first = b * block + start
            codes_ref[first : first + unit] = codes.astype(codes_ref.dtype)

    def kernel(
        p_gmem, of_pieces_gmem, ones_gmem, words_gmem, scale_gmem, zero_gmem, y_gmem, codes_smem, ones_smem,
        y_smem, barrier,
    ):  # fmt: skip
        split, j, i = (jax.lax.axis_index(name) for name in ("split", "out", "rows"))
        shape = (tiles.out, tiles.rows)
        plgpu.copy_gmem_to_smem(ones_gmem, ones_smem, barrier)
        plgpu.barrier_wait(barrier)

        def tile(k: Array) -> Array:
            return split * steps + k

        def along(a: Array, axis: int) -> Array:  # 0: of outputs, 1: of rows
            a = lay(a, plgpu.Layout.WGMMA.reduce(1 - axis)).astype(jnp.float32)
            return lay(jax.lax.broadcast_in_dim(a, shape, (axis,)), plgpu.Layout.WGMMA)

        def body(
            _: Any, p_smem: Any, of_smem: Any, words_smem: Any, scale_smem: Any, zero_smem: Any, y: Array
        ) -> Array:
            for b in range(tiles.blocks):
                store_codes(b, words_smem, codes_smem)
            plgpu.commit_smem()
            for t in range(pieces):
                own = pl.ds(t * size, size)
                q = codes_smem.at[own].T
                # Columns of ones: every one of the products is the sum of the codes.
                total = jnp.max(product(q, ones_smem.at[:, own].T), axis=1)
                g = t * size // block // per_group if tiles.blocks > per_group else 0
                s, lo, offset = (along(of_smem[t, n], 1) for n in range(3))
                part = s * product(q, p_smem.at[:, own].T) + lo * along(total, 0)
                y += along(scale_smem[g], 0) * (part - along(zero_smem[g], 0) * offset)
            # All warps have to be through before one writes the next codes, or copies the next step here.
            plgpu.commit_smem()
            return y

        own_groups = (max(1, tiles.blocks // per_group), tiles.out)
        y = plgpu.emit_pipeline(
            body,
            grid=(steps,),
            in_specs=[
                plgpu.BlockSpec(
                    (tiles.rows, width), lambda k: (i, tile(k)), transforms=mosaic.swizzled(jnp.bfloat16)
                ),
                plgpu.BlockSpec((pieces, 4, tiles.rows), lambda k: (tile(k), 0, i)),
                plgpu.BlockSpec((tiles.blocks, depth, tiles.out), lambda k: (tile(k), 0, j)),
                *[plgpu.BlockSpec(own_groups, lambda k: (tiles.group(tile(k), per_group), j))] * 2,
            ],
            max_concurrent_steps=tiles.steps,
            init_carry=lay(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA),
        )(p_gmem, of_pieces_gmem, words_gmem, scale_gmem, zero_gmem)
        y_smem.T[...] = lay(y, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        own_rows, own_out = (pl.ds(n * size, size) for n, size in ((i, tiles.rows), (j, tiles.out)))
        plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[split, own_rows, own_out])
        plgpu.wait_smem_to_gmem(0)

    y = mosaic.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiles.splits, p.shape[0], out), jnp.float32),
        grid=grid,
        grid_names=("split", "out", "rows"),
        scratch_types=[
            plgpu.SMEM((width, tiles.out), jnp.bfloat16, transforms=mosaic.swizzled(jnp.bfloat16)),
            plgpu.SMEM((8, width), jnp.bfloat16, transforms=mosaic.swizzled(jnp.bfloat16)),
            plgpu.SMEM((tiles.rows, tiles.out), jnp.float32, transforms=mosaic.swizzled(jnp.float32)),
            plgpu.Barrier(),
        ],
    )(p.astype(jnp.bfloat16), of_pieces, jnp.ones((8, width), jnp.bfloat16), words, scale, zero)
    return jnp.sum(y, axis=0)[:rows]


def _refuses(
    x: Any, x_scale: Any, x_lo: Any, words: Any, scale: Any, zero: Any, *, x_bits: int, bits: int, block: int
) -> str:
    if not x_scale.dtype == x_lo.dtype == jnp.float32:
        return f"x_scale and x_lo are {x_scale.dtype} and {x_lo.dtype}, not float32"
    if reason := refuses_words(words, scale, zero, bits=bits, block=block):
        return reason
    size = math.gcd(block, x.shape[1] // x_scale.shape[1])
    if not x.shape[0] or size not in (64, 128):
        return f"it takes nonempty x, and 64 or 128 channels that groups of x and blocks share, not {size}"
    return ""


KERNEL = Kernel(integer_matmul, _refuses, without_hopper)
