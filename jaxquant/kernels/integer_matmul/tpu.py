"""Pallas for TPU: words become int8 in VMEM and are multiplied with int8 on the MXU, piece by piece."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt, UInt8

from jaxquant.kernels.mosaic import LANES, SUBLANES, bits_of_half, even, unpack_int32, widened
from jaxquant.kernels.platform import Kernel

# Of 16 MiB of VMEM: sums, a product and two copies of y take 1 MiB each, what is kept of all groups up to
# `_GROUP_BYTES`, two copies of words and x up to 3 MiB, codes of a block 1 MiB.
_ROWS, _IN, _OUT = 256, 1024, 1024
_GROUP_BYTES = 5 << 20
# int8 comes in registers of this many rows.
_BYTE_ROWS = 4 * SUBLANES


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
    interpret: Any = False,
) -> Float[Array, "rows out"]:
    """As `scan.integer_matmul`, in float32.

        y = sum_t s_t S_t (p_t . q_t) + sum_t c_t S_t (sum q_t - n Z_t) - sum_t s_t (sum p_t) S_t Z_t

    The grid runs over tiles of rows, outputs and inputs. The first sum is added up tile by tile; for the
    others what the weight contributes is collected in VMEM, a row for each group, and multiplied at the end,
    in full precision.

    Args:
      interpret: as in `pallas_call`: how to run where there is no TPU.
    """
    rows, channels = x.shape
    blocks, depth, out = words.shape
    groups, x_groups = scale.shape[0], x_scale.shape[1]
    size = math.gcd(block, channels // x_groups)
    tile_rows = even(rows, _ROWS, _BYTE_ROWS)
    tile_out = even(out, _widest(groups, x_groups), LANES)
    tile_blocks = max(d for d in range(1, blocks + 1) if blocks % d == 0 and (d == 1 or d * block <= _IN))
    grid = (pl.cdiv(rows, tile_rows), pl.cdiv(out, tile_out), blocks // tile_blocks)

    half = 2 ** (x_bits - 1)
    # Bytes wrap around: wider ones would be written to HBM.
    p = jax.lax.bitcast_convert_type(x, jnp.int8) - np.asarray(half).astype(np.int8)
    p = p.reshape(rows, channels // size, size)
    sums = jnp.sum(p, axis=-1, dtype=jnp.int32).reshape(rows, x_groups, -1).astype(jnp.float32)
    left = (-x_scale[..., None] * sums).reshape(rows, groups, -1).sum(axis=-1)
    scale, zero = map(bits_of_half, (scale, zero))

    per_row = lambda count: pl.BlockSpec((tile_rows, count), lambda i, j, k: (i, 0))  # noqa: E731
    per_group = pl.BlockSpec((groups, tile_out), lambda i, j, k: (0, j))
    passes = x.nbytes * grid[1] + (words.nbytes + scale.nbytes + zero.nbytes) * grid[0]
    return pl.pallas_call(
        functools.partial(_kernel, bits=bits, block=block),
        out_shape=jax.ShapeDtypeStruct((rows, out), jnp.float32, manual_axis_type=jax.typeof(x).mat),
        grid=grid,
        in_specs=[
            pl.BlockSpec((tile_blocks * block // size, tile_rows, size), lambda i, j, k: (k, i, 0)),
            per_row(x_groups),
            per_row(x_groups),
            per_row(groups),
            pl.BlockSpec((tile_blocks, depth, tile_out), lambda i, j, k: (k, 0, j)),
            per_group,
            per_group,
        ],
        out_specs=pl.BlockSpec((tile_rows, tile_out), lambda i, j, k: (i, j)),
        scratch_shapes=[
            *[pltpu.VMEM((groups, tile_out), jnp.float32)] * 2,
            pltpu.VMEM((x_groups, tile_out), jnp.float32),
            pltpu.VMEM((tile_rows, tile_out), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * channels * out + 2 * channels * out * grid[0],
            bytes_accessed=passes + 4 * rows * out,
            transcendentals=0,
        ),
        interpret=interpret,
        name="integer_matmul",
    )(p.swapaxes(0, 1), x_scale, x_lo + half * x_scale, left, words, scale, zero)


def _refuses(
    x: Any, x_scale: Any, x_lo: Any, words: Any, scale: Any, zero: Any, *, x_bits: int, bits: int, block: int
) -> str:
    if not x_scale.dtype == x_lo.dtype == jnp.float32:
        return f"x_scale and x_lo are {x_scale.dtype} and {x_lo.dtype}, not float32"
    size = math.gcd(block, x.shape[1] // x_scale.shape[1])
    if min(x.shape[0], *words.shape) == 0 or size % _BYTE_ROWS or block > _IN:
        return (
            f"it takes nonempty x and blocks of up to {_IN} rows, they and groups of x multiples of "
            f"{_BYTE_ROWS}, not x of {x.shape} in {x_scale.shape[1]} groups and blocks of {block}"
        )
    if not _widest(scale.shape[0], x_scale.shape[1]):
        return f"{scale.shape[0]} groups of the weight and {x_scale.shape[1]} of x do not fit into VMEM"
    return ""


def _lacks(device: Any) -> str:
    old = device.device_kind in ("TPU v2", "TPU v3", "TPU v4")
    return f"{device.device_kind} cannot multiply int8" if old else ""


KERNEL = Kernel(integer_matmul, _refuses, _lacks)


def _widest(groups: int, x_groups: int) -> int:
    """Outputs of a tile, in whole lanes: two buffers of scales and zeros, and the scratch, are kept whole."""
    return min(_OUT, _GROUP_BYTES // (24 * groups + 4 * x_groups) // LANES * LANES)


def _kernel(
    p_ref: Any,  # [pieces, rows, size] int8
    x_scale_ref: Any,  # [rows, x_groups] float32
    middle_ref: Any,  # [rows, x_groups] float32: x where p is 0
    left_ref: Any,  # [rows, groups] float32: -sum of s_t sum p_t
    words_ref: Any,  # [blocks, words, out]
    scale_ref: Any,  # [groups, out], float32 or bits of float16
    zero_ref: Any,
    y_ref: Any,  # [rows, out] float32
    wide_scale_ref: Any,  # [groups, out] float32
    offset_ref: Any,  # [groups, out] float32: S Z
    weight_ref: Any,  # [x_groups, out] float32: sum of S_t (sum q_t - n Z_t)
    sum_ref: Any,  # [rows, out] float32
    *,
    bits: int,
    block: int,
) -> None:
    step, steps = pl.program_id(2), pl.num_programs(2)
    pieces, _, size = p_ref.shape
    tile_blocks, half = words_ref.shape[0], 2 ** (bits - 1)

    @pl.when(step == 0)
    def _():
        wide_scale_ref[...] = widened(scale_ref[...])
        offset_ref[...] = wide_scale_ref[...] * (widened(zero_ref[...]) - half)
        weight_ref[...] = jnp.zeros_like(weight_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    channels = tile_blocks * block * steps

    def group_of(channel: Array, groups: int) -> Array:
        # `//` would ask for the sign, and the lowering of that for the chip at hand.
        return jax.lax.div(channel, jax.lax.div(channels, np.int32(groups)))

    @pl.loop(0, tile_blocks)
    def _(b: Array) -> None:
        code = unpack_int32(words_ref[b], bits, block) - half
        first = (step * tile_blocks + b) * block
        group = pl.ds(group_of(first, scale_ref.shape[0]), 1)
        big_s, offset = wide_scale_ref[group], offset_ref[group]
        for i in range(block // size):
            q = code[i * size : (i + 1) * size]
            x_group = group_of(first + i * size, x_scale_ref.shape[1])
            total = jnp.sum(q, axis=0, keepdims=True).astype(jnp.float32)
            weight_ref[pl.ds(x_group, 1)] += big_s * total - size * offset
            p = p_ref[b * (pieces // tile_blocks) + i]
            product = jnp.dot(p, q.astype(jnp.int8), preferred_element_type=jnp.int32)
            sum_ref[...] += _column(x_scale_ref[...], x_group) * big_s * product.astype(jnp.float32)

    @pl.when(step == steps - 1)
    def _():
        y_ref[...] = (
            sum_ref[...]
            + _product(middle_ref[...], weight_ref[...])
            + _product(left_ref[...], offset_ref[...])
        )


def _column(a: Float[Array, "rows n"], index: Array) -> Float[Array, "rows 1"]:
    # Lanes have no addresses.
    if a.shape[1] == 1:
        return a
    lane = jax.lax.broadcasted_iota(jnp.int32, a.shape, 1)
    return jnp.sum(jnp.where(lane == index, a, 0.0), axis=1, keepdims=True)


def _product(a: Float[Array, "rows n"], b: Float[Array, "n out"]) -> Float[Array, "rows out"]:
    if a.shape[1] == 1:
        return a * b
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
