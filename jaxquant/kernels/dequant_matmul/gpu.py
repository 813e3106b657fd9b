"""Pallas (Mosaic GPU) for Hopper and Blackwell: tiles are dequantized from shared memory to shared memory."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, UInt8

from jaxquant.kernels.mosaic_gpu import (
    Mosaic,
    codes_of,
    refuses_words,
    tiles_of,
    unit_of,
    without_blackwell,
    without_hopper,
)
from jaxquant.kernels.platform import Kernel

_ROWS = 128


def dequant_matmul(
    x: Float[Array, "rows in"],
    words: UInt8[Array, "blocks words out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    *,
    bits: int,
    block: int,
    blackwell: bool = False,
    interpret: Any = None,
) -> Float[Array, "rows out"]:
    """`y = sum_t x[:, t] @ (scale_t * (code_t - zero_t))` over tiles t; shapes as in `reference`.

    A program computes a tile of y, transposed, so that its outputs fill the 64 rows of a `wgmma`, or the 128
    of a `tcgen05.mma`, however few rows x has. Words, x, scales and zeros of up to 128 inputs are copied
    ahead, dequantized in float32, rounded to the dtype of `x`, stored, and multiplied while the next ones are
    dequantized; sums are float32. Where tiles of y are too few for all multiprocessors, several programs
    divide the inputs of one.

    Args:
      blackwell: multiplies by the instruction of that generation, into tensor memory.
      interpret: as in `mosaic_gpu.kernel`: how to run where there is no GPU.
    """
    mosaic = Mosaic(interpret)
    plgpu, lay = mosaic.gpu, mosaic.lay
    rows, (blocks, depth, out), groups = x.shape[0], words.shape, scale.shape[0]
    per_group = blocks // groups
    tiles = tiles_of(
        rows,
        words.shape,
        block,
        groups,
        bits,
        largest=_ROWS,
        smallest=16 if blackwell else 8,
        outputs=128 if blackwell else None,
        itemsizes=(x.dtype.itemsize, scale.dtype.itemsize),
    )
    width, y_dtype = tiles.blocks * block, x.dtype if tiles.splits == 1 else jnp.dtype(jnp.float32)
    grid = (tiles.splits, math.ceil(out / tiles.out), math.ceil(rows / tiles.rows))
    x = jnp.pad(x, ((0, grid[2] * tiles.rows - rows), (0, 0)))
    steps = blocks // tiles.blocks // tiles.splits
    layout = mosaic.words()

    def dequantize(b: int, words_ref: Any, scale_ref: Any, zero_ref: Any, weight_ref: Any) -> None:
        group = b // per_group if tiles.blocks > per_group else 0
        step, shift = (lay(ref[group], layout.reduce(0)).astype(jnp.float32) for ref in (scale_ref, zero_ref))
        unit = unit_of(bits, block)
        for start in range(0, block, unit):
            codes = codes_of(lambda a: lay(words_ref[b, a : a + unit], layout), start, bits, block)
            step_rows, shift_rows = (
                lay(jax.lax.broadcast_in_dim(a, codes.shape, (1,)), layout) for a in (step, shift)
            )
            weight = (codes.astype(jnp.float32) - shift_rows) * step_rows
            first = b * block + start
            weight_ref[first : first + unit] = weight.astype(weight_ref.dtype)

    def kernel(x_gmem, words_gmem, scale_gmem, zero_gmem, y_gmem, weight_smem, y_smem, *tensor_cores):
        split, j, i = (jax.lax.axis_index(name) for name in ("split", "out", "rows"))

        def tile(k: Array) -> Array:
            return split * steps + k

        def multiply(sums: Any, done: Any = None) -> None:
            def body(index: Any, x_smem: Any, words_smem: Any, scale_smem: Any, zero_smem: Any) -> None:
                weight = weight_smem.at[jax.lax.rem(index[0], np.int32(2))]
                for b in range(tiles.blocks):
                    dequantize(b, words_smem, scale_smem, zero_smem, weight)
                # All warps have to be through with the other room before one of them writes there again.
                if blackwell:
                    pl.when(index[0] > 0)(lambda: plgpu.barrier_wait(done))
                    plgpu.commit_smem()
                    plgpu.tcgen05_mma(sums, weight.T, x_smem.T, done, accumulate=index[0] > 0)
                else:
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
                        transforms=mosaic.swizzled(x.dtype),
                        delay_release=1,
                    ),
                    plgpu.BlockSpec((tiles.blocks, depth, tiles.out), lambda k: (tile(k), 0, j)),
                    *[plgpu.BlockSpec(own_groups, lambda k: (tiles.group(tile(k), per_group), j))] * 2,
                ],
                max_concurrent_steps=tiles.steps,
            )(x_gmem, words_gmem, scale_gmem, zero_gmem)

        if blackwell:
            multiply(*tensor_cores)
            plgpu.barrier_wait(tensor_cores[1])
            sums = lay(plgpu.async_load_tmem(tensor_cores[0]), plgpu.Layout.TCGEN05)
            transposed = plgpu.Layout.TCGEN05_TRANSPOSED
        else:
            shape = plgpu.ACC((tiles.out, tiles.rows), jnp.float32)
            sums = pl.run_scoped(lambda sums: (multiply(sums), sums[...])[1], shape)
            transposed = plgpu.Layout.WGMMA_TRANSPOSED
        y_smem.T[...] = lay(sums.astype(y_dtype), transposed)
        plgpu.commit_smem()
        own_rows, own_out = (pl.ds(n * size, size) for n, size in ((i, tiles.rows), (j, tiles.out)))
        plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[split, own_rows, own_out])
        plgpu.wait_smem_to_gmem(0)

    tensor_cores = []
    if blackwell:
        tensor_cores = [
            plgpu.TMEM((tiles.out, tiles.rows), jnp.float32), plgpu.Barrier(orders_tensor_core=True)
        ]  # fmt: skip
    y = mosaic.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiles.splits, x.shape[0], out), y_dtype),
        grid=grid,
        grid_names=("split", "out", "rows"),
        scratch_types=[
            plgpu.SMEM((2, width, tiles.out), x.dtype, transforms=mosaic.swizzled(x.dtype)),
            plgpu.SMEM((tiles.rows, tiles.out), y_dtype, transforms=mosaic.swizzled(y_dtype)),
            *tensor_cores,
        ],
    )(x, words, scale, zero)
    return (y[0] if tiles.splits == 1 else jnp.sum(y, axis=0).astype(x.dtype))[:rows]


def _refuses(x: Any, words: Any, scale: Any, zero: Any, *, bits: int, block: int) -> str:
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies bfloat16 or float16 x, not {x.dtype}"
    if not x.shape[0]:
        return "it takes nonempty x"
    return refuses_words(words, scale, zero, bits=bits, block=block)


HOPPER = Kernel(dequant_matmul, _refuses, without_hopper)
BLACKWELL = Kernel(functools.partial(dequant_matmul, blackwell=True), _refuses, without_blackwell)
