"""Pallas (Mosaic GPU) for Hopper: tiles are dequantized from shared memory to shared memory, for `wgmma`."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, UInt8

from jaxquant.kernels.platform import Kernel
from jaxquant.quant.packing import planes

# What the 132 multiprocessors of an H100 have: shared memory that a program may ask for (two share one while
# there are few rows), programs that run at once.
_SHARED_BYTES = 232448
_PROGRAMS = 2 * 132
# Rows of x up to which waiting for memory, not multiplying, takes the time.
_DECODE_ROWS = 16
_ROWS, _WIDTH = 128, 128
# Bytes of a row of an operand of `wgmma` that lie together, swizzled against bank conflicts.
_SWIZZLE = 128
# Partial sums of a split contraction: the programs along it, and their rows in all.
_SPLITS, _PARTIAL_ROWS = 8, 128


class _Tiles(NamedTuple):
    rows: int
    out: int
    blocks: int
    splits: int
    steps: int


def dequant_matmul(
    x: Float[Array, "rows in"],
    words: UInt8[Array, "blocks words out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    *,
    bits: int,
    block: int,
    interpret: Any = None,
) -> Float[Array, "rows out"]:
    """`y = sum_t x[:, t] @ (scale_t * (code_t - zero_t))` over tiles t; shapes as in `reference`.

    A program computes a tile of y, transposed, so that its outputs fill the 64 rows of a `wgmma` however few
    rows x has. Words, x, scales and zeros of up to 128 inputs are copied ahead, dequantized in float32,
    rounded to the dtype of `x`, stored, and multiplied while the next ones are dequantized; sums are float32.
    Where tiles of y are too few for all multiprocessors, several programs divide the inputs of one.

    Args:
      interpret: as in `mosaic_gpu.kernel`: how to run where there is no GPU.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu  # slow to import

    rows, (blocks, depth, out), groups = x.shape[0], words.shape, scale.shape[0]
    per_group = blocks // groups
    tiles = _tiles(rows, blocks, block, out, groups, bits, scale.dtype.itemsize)
    width, y_dtype = tiles.blocks * block, x.dtype if tiles.splits == 1 else jnp.dtype(jnp.float32)
    grid = (tiles.splits, out // tiles.out, math.ceil(rows / tiles.rows))
    x = jnp.pad(x, ((0, grid[2] * tiles.rows - rows), (0, 0)))
    steps = blocks // tiles.blocks // tiles.splits
    # 16 threads a row, each with four neighbors in all rows: a thread needs no other scales than its own.
    tiling = plgpu.Tiling(((8, 64), (2, 64), (4,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)

    def lay(a: Array, where: Any) -> Array:  # the interpreter has no registers
        return plgpu.layout_cast(a, where) if interpret is None else a

    def swizzled(dtype: Any) -> tuple[Any, ...]:
        row = _SWIZZLE // jnp.dtype(dtype).itemsize
        return plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(_SWIZZLE)

    def dequantize(b: int, words_ref: Any, scale_ref: Any, zero_ref: Any, weight_ref: Any) -> None:
        group = b // per_group if tiles.blocks > per_group else 0
        step, shift = (lay(ref[group], layout.reduce(0)).astype(jnp.float32) for ref in (scale_ref, zero_ref))
        unit = _unit(bits, block)
        for start in range(0, block, unit):
            codes = _codes(lambda a: lay(words_ref[b, a : a + unit], layout), start, bits, block)
            step_rows, shift_rows = (
                lay(jax.lax.broadcast_in_dim(a, codes.shape, (1,)), layout) for a in (step, shift)
            )
            weight = (codes.astype(jnp.float32) - shift_rows) * step_rows
            first = b * block + start
            weight_ref[first : first + unit] = weight.astype(weight_ref.dtype)

    def kernel(x_gmem, words_gmem, scale_gmem, zero_gmem, y_gmem, weight_smem, y_smem):
        split, j, i = (jax.lax.axis_index(name) for name in ("split", "out", "rows"))

        def tile(k: Array) -> Array:
            return split * steps + k

        def group(k: Array) -> Array:
            if tiles.blocks > per_group:
                return tile(k)
            return jax.lax.div(tile(k) * tiles.blocks, np.int32(per_group))

        def multiply(sums: Any) -> Array:
            def body(index: Any, x_smem: Any, words_smem: Any, scale_smem: Any, zero_smem: Any) -> None:
                weight = weight_smem.at[jax.lax.rem(index[0], np.int32(2))]
                for b in range(tiles.blocks):
                    dequantize(b, words_smem, scale_smem, zero_smem, weight)
                # All warps have to be through with the other room before one of them writes there again.
                plgpu.wgmma_wait(0)
                plgpu.commit_smem()
                plgpu.wgmma(sums, weight.T, x_smem.T)

            own_groups = (max(1, tiles.blocks // per_group), tiles.out)
            plgpu.emit_pipeline(
                body,
                grid=(steps,),
                in_specs=[
                    plgpu.BlockSpec(
                        (tiles.rows, width),
                        lambda k: (i, tile(k)),
                        transforms=swizzled(x.dtype),
                        delay_release=1,
                    ),
                    plgpu.BlockSpec((tiles.blocks, depth, tiles.out), lambda k: (tile(k), 0, j)),
                    *[plgpu.BlockSpec(own_groups, lambda k: (group(k), j))] * 2,
                ],
                max_concurrent_steps=tiles.steps,
            )(x_gmem, words_gmem, scale_gmem, zero_gmem)
            return sums[...]

        sums = pl.run_scoped(multiply, plgpu.ACC((tiles.out, tiles.rows), jnp.float32))
        y_smem.T[...] = lay(sums.astype(y_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        own_rows, own_out = (pl.ds(n * size, size) for n, size in ((i, tiles.rows), (j, tiles.out)))
        plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[split, own_rows, own_out])
        plgpu.wait_smem_to_gmem(0)

    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiles.splits, x.shape[0], out), y_dtype),
        grid=grid,
        grid_names=("split", "out", "rows"),
        scratch_types=[
            plgpu.SMEM((2, width, tiles.out), x.dtype, transforms=swizzled(x.dtype)),
            plgpu.SMEM((tiles.rows, tiles.out), y_dtype, transforms=swizzled(y_dtype)),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({} if interpret is None else {"interpret": interpret}),
    )(x, words, scale, zero)
    return (y[0] if tiles.splits == 1 else jnp.sum(y, axis=0).astype(x.dtype))[:rows]


def _refuses(x: Any, words: Any, scale: Any, zero: Any, *, bits: int, block: int) -> str:
    if x.dtype not in (jnp.bfloat16, jnp.float16) or words.dtype != jnp.uint8:
        return f"it multiplies bfloat16 or float16 by uint8 words, not {x.dtype} by {words.dtype}"
    if scale.dtype != zero.dtype or scale.dtype not in (jnp.float16, jnp.float32):
        return f"scales and zeros are {scale.dtype} and {zero.dtype}, not both float16 or float32"
    blocks, _, out = words.shape
    taken = min(x.shape[0], blocks, out) > 0 and out % 64 == 0
    if not taken or _unit(bits, block) % 8 or not _blocks(blocks, block, scale.shape[0]):
        return (
            "it takes nonempty arrays, outputs in multiples of 64, and blocks that fill 64 or 128 inputs, "
            f"with fields of a multiple of 8 rows, not {x.shape[0]} rows, {out} outputs and {blocks} blocks "
            f"of {block} rows of {bits} bits"
        )
    return ""


def _lacks(device: Any) -> str:
    # Blackwell has another instruction in place of `wgmma`, and earlier GPUs have none.
    capability = str(device.compute_capability)
    return "" if capability == "9.0" else f"it needs compute capability 9.0 (Hopper), not {capability}"


KERNEL = Kernel(dequant_matmul, _refuses, _lacks)


def _tiles(rows: int, blocks: int, block: int, out: int, groups: int, bits: int, itemsize: int) -> _Tiles:
    tile_rows = min(_ROWS, max(8, 1 << (rows - 1).bit_length()))
    tile_out = 128 if out % 128 == 0 else 64
    tile_blocks = _blocks(blocks, block, groups)
    programs, count = math.ceil(rows / tile_rows) * (out // tile_out), blocks // tile_blocks
    splits = max(
        d
        for d in range(1, _SPLITS + 1)
        if count % d == 0 and (d == 1 or (d * programs <= _PROGRAMS and d * tile_rows <= _PARTIAL_ROWS))
    )
    width = tile_blocks * block
    # Two rooms for the weight, y, and barriers; then in each step words, x, scales and zeros.
    kept = 4 * width * tile_out + (4 if splits > 1 else 2) * tile_rows * tile_out + 1024
    own_groups = max(1, tile_blocks * groups // blocks)
    step = width * tile_out * bits // 8 + 2 * width * tile_rows + 2 * itemsize * own_groups * tile_out
    room = _SHARED_BYTES // (2 if tile_rows <= _DECODE_ROWS else 1)
    return _Tiles(tile_rows, tile_out, tile_blocks, splits, min(4, max(2, (room - kept) // step)))


def _blocks(blocks: int, block: int, groups: int) -> int:
    """The most blocks that divide all, and groups or are divided by them, of 64 or 128 rows; 0: none are."""
    per_group = blocks // groups
    fitting = [d for d in range(1, _WIDTH // block + 1) if blocks % d == 0 and d * block % 64 == 0]
    return max((d for d in fitting if d % per_group == 0 or per_group % d == 0), default=0)


def _unit(bits: int, block: int) -> int:
    """Rows whose codes lie in one field of every plane."""
    return block * min(planes(bits)) // 8


def _codes(load: Any, start: int, bits: int, block: int) -> Array:
    """The int32 codes of a unit of rows from `start`, given what loads as many words."""
    fields, first, shift = [], 0, 0
    for plane in planes(bits):
        depth = block * plane // 8
        place, offset = divmod(start, depth)
        part = load(first + offset).astype(jnp.int32)
        fields.append(((part >> (place * plane)) & (2**plane - 1)) << shift)
        first, shift = first + depth, shift + plane
    return functools.reduce(jnp.bitwise_or, fields)
