"""Pallas for TPU: words are unpacked and dequantized in VMEM, and HBM holds nothing but the packed weight."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt

from jaxquant.kernels.mosaic import LANES, SUBLANES, bits_of_half, even, halves, unpack_int32, widened
from jaxquant.kernels.platform import Kernel

# Of 16 MiB of VMEM, which is what v4 has and what the compiler grants on every chip: a tile of the weight
# (`_IN` x `_OUT`) takes 2 MiB in bfloat16, sums and products 2 MiB each, two copies of x, y and words up to
# 6 MiB.
_IN, _OUT = 1024, 1024
_TILE_BYTES = 2 * _IN * _OUT
_ROW_BYTES = 1024


class _Tiles(NamedTuple):
    rows: int
    blocks: int
    out: int
    groups: int


def dequant_matmul(
    x: Float[Array, "rows in"],
    words: UInt[Array, "blocks words out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    *,
    bits: int,
    block: int,
    interpret: Any = False,
) -> Float[Array, "rows out"]:
    """`y = sum_t x[:, t] @ (scale_t * (code_t - zero_t))` over tiles t; shapes as in `reference`.

    The grid runs over tiles of rows, outputs and inputs. A tile of the weight is dequantized in float32,
    rounded to the dtype of `x` and multiplied on the MXU, in full precision where x is float32; sums are
    float32.

    Args:
      interpret: as in `pallas_call`: how to run where there is no TPU.
    """
    return _call(x, words, *map(bits_of_half, (scale, zero)), bits=bits, block=block, interpret=interpret)


def paired_matmul(
    x: Float[Array, "rows in"],
    words: UInt[Array, "blocks words out"],
    pairs: UInt[Array, "groups 1 out"],
    *,
    bits: int,
    block: int,
    interpret: Any = False,
) -> Float[Array, "rows out"]:
    """`dequant_matmul` with scales and zeros as `quant.packing.pair` packs them."""
    pairs = jax.lax.bitcast_convert_type(pairs, jnp.int32)
    return _call(x, words, pairs, bits=bits, block=block, interpret=interpret)


def _call(x: Array, words: Array, *per_group: Array, bits: int, block: int, interpret: Any) -> Array:
    rows, channels = x.shape
    blocks, depth, out = words.shape
    groups, *one, _ = per_group[0].shape
    tiles = _tiles(rows, blocks, block, out, groups, x.dtype.itemsize, paired=bool(one))
    width = tiles.blocks * block
    grid = (pl.cdiv(rows, tiles.rows), pl.cdiv(out, tiles.out), blocks // tiles.blocks)
    whole = tiles.groups == groups
    table = (tiles.groups, *one, tiles.out)
    metadata = pl.BlockSpec(table, lambda i, j, k: (0 if whole else k, *[0] * len(one), j))
    passes = x.nbytes * grid[1] + (words.nbytes + sum(a.nbytes for a in per_group)) * grid[0]
    return pl.pallas_call(
        functools.partial(_kernel, bits=bits, block=block, blocks_per_group=blocks // groups, whole=whole),
        out_shape=jax.ShapeDtypeStruct((rows, out), x.dtype, manual_axis_type=jax.typeof(x).mat),
        grid=grid,
        in_specs=[
            pl.BlockSpec((tiles.rows, width), lambda i, j, k: (i, k)),
            pl.BlockSpec((tiles.blocks, depth, tiles.out), lambda i, j, k: (k, 0, j)),
            *[metadata] * len(per_group),
        ],
        out_specs=pl.BlockSpec((tiles.rows, tiles.out), lambda i, j, k: (i, j)),
        scratch_shapes=[
            *[pltpu.VMEM(table, jnp.float32)] * 2,
            pltpu.VMEM((tiles.blocks, block, tiles.out), x.dtype),
            pltpu.VMEM((tiles.rows, tiles.out), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * channels * out + 2 * channels * out * grid[0],
            bytes_accessed=passes + rows * out * x.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="dequant_matmul",
    )(x, words, *per_group)


def _refuses(x: Any, words: Any, *per_group: Any, bits: int, block: int) -> str:
    tile = _in_blocks(words.shape[0], block) * block * LANES * x.dtype.itemsize
    taken = (
        x.dtype in (jnp.bfloat16, jnp.float32)
        and min(x.shape[0], *words.shape) > 0
        and block % SUBLANES == 0
        and tile <= _TILE_BYTES
    )
    return (
        ""
        if taken
        else (
            f"it takes nonempty bfloat16 or float32 x and blocks of a multiple of 8 rows, not {x.dtype} of "
            f"{x.shape} and {words.shape[0]} blocks of {block}"
        )
    )


KERNEL = Kernel(dequant_matmul, _refuses)
PAIRED = Kernel(paired_matmul, _refuses)


def _tiles(
    rows: int, blocks: int, block: int, out: int, groups: int, itemsize: int, *, paired: bool
) -> _Tiles:
    in_blocks = _in_blocks(blocks, block)
    in_groups = in_blocks * groups // blocks
    # A block of an array is whole or made of whole registers; a pair has a register to itself.
    cut = (paired or in_groups % SUBLANES == 0) and in_groups * blocks == in_blocks * groups
    widest = min(_OUT, _TILE_BYTES // (in_blocks * block * itemsize) // LANES * LANES)
    return _Tiles(
        rows=even(rows, _ROW_BYTES // itemsize, 2 * SUBLANES),
        blocks=in_blocks,
        out=even(out, widest, LANES),
        groups=in_groups if cut else groups,
    )


def _in_blocks(blocks: int, block: int) -> int:
    """The most blocks of up to `_IN` rows that divide all and begin at whole lanes of x; else all blocks."""
    fitting = [d for d in range(1, _IN // block + 1) if blocks % d == 0 and d * block % LANES == 0]
    return max(fitting, default=blocks)


def _kernel(
    x_ref: Any,  # [rows, in]
    words_ref: Any,  # [blocks, words, out]
    *refs: Any,
    bits: int,
    block: int,
    blocks_per_group: int,
    whole: bool,
) -> None:
    (
        *per_group,  # scale and zero [groups, out], float32 or bits of float16; or pairs [groups, 1, out]
        y_ref,  # [rows, out]
        wide_scale_ref,  # float32, shaped as they are
        wide_zero_ref,
        weight_ref,  # [blocks, block, out]
        sum_ref,  # [rows, out] float32
    ) = refs
    step = pl.program_id(2)
    blocks = words_ref.shape[0]

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    paired = len(per_group) == 1
    scale, zero = halves(per_group[0][...]) if paired else (ref[...] for ref in per_group)
    wide_scale_ref[...], wide_zero_ref[...] = widened(scale), widened(zero)

    @pl.loop(0, blocks)
    def _(b: Array) -> None:
        # `//` would ask for the sign, and the lowering of that for the chip at hand.
        group = jax.lax.div(b + step * blocks if whole else b, np.int32(blocks_per_group))
        row = group if paired else pl.ds(group, 1)
        codes = unpack_int32(words_ref[b], bits, block).astype(jnp.float32)
        weight_ref[b] = ((codes - wide_zero_ref[row]) * wide_scale_ref[row]).astype(weight_ref.dtype)

    exact = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    weight = weight_ref[...].reshape(blocks * block, -1)
    sum_ref[...] += jnp.dot(x_ref[...], weight, precision=exact, preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)
