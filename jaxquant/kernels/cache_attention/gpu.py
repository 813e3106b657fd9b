"""Pallas (Mosaic GPU) for Hopper: codes are multiplied as they are by `wgmma`, and scaled after it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32, UInt8

from jaxquant.kernels.mosaic_gpu import (
    AFFINE_DTYPES,
    PROGRAMS,
    Mosaic,
    codes_of,
    steps_of,
    unit_of,
    without_hopper,
)
from jaxquant.kernels.platform import Kernel
from jaxquant.quant import ActivationGrid

# Rows of an operand of `wgmma`, so queries of a head of the cache at most, and places of a tile.
_ROWS = _TILE = 64
# Tiles of a program, at least where there are as many: fewer would be less to read than partial sums are.
_SHARE = 4


def cache_attention(
    q: Float[Array, "batch tokens heads n"],
    start: Int32[Array, " batch"],
    window: Int32[Array, " batch"],
    k_words: UInt8[Array, "batch places kv_heads k_words"],
    k_scale: Float[Array, "batch places kv_heads k_groups"],
    k_lo: Float[Array, "batch places kv_heads k_groups"],
    v_words: UInt8[Array, "batch places kv_heads v_words"],
    v_scale: Float[Array, "batch places kv_heads v_groups"],
    v_lo: Float[Array, "batch places kv_heads v_groups"],
    *,
    k_grid: ActivationGrid,
    v_grid: ActivationGrid,
    interpret: Any = None,
) -> Float[Array, "batch tokens heads n"]:
    """Online softmax over tiles of places (see `scan`) with products of codes, scaled after `wgmma`:

        q k = sum_g scale_g (q_g . code_g) + lo_g sum(q_g),   w v_g = (w scale_g) code_g + sum(w lo_g)

    A program takes a share of the tiles that tokens see, for one head of the cache, and the queries of all
    tokens and heads that read it as rows; XLA adds the shares up. Products are in the dtype of `q`, and of
    the values in bfloat16, in which codes are exact; sums are float32. Arguments as in `reference`.

    Args:
      interpret: as in `mosaic_gpu.kernel`: how to run where there is no GPU.
    """
    mosaic = Mosaic(interpret)
    plgpu, lay, product = mosaic.gpu, mosaic.lay, mosaic.product
    batch, tokens, heads, n = q.shape
    places, kv_heads = k_words.shape[1:3]
    rows, tiles = tokens * heads // kv_heads, math.ceil(places / _TILE)
    height, k_groups, v_groups = math.ceil(rows / 8) * 8, k_scale.shape[3], v_scale.shape[3]
    splits = max(1, min(math.ceil(tiles / _SHARE), PROGRAMS // (batch * kv_heads)))

    queries = q.reshape(batch, tokens, kv_heads, -1, n).transpose(0, 2, 3, 1, 4)
    queries = jnp.pad(queries.reshape(batch, kv_heads, rows, n), [(0, 0)] * 2 + [(0, _ROWS - rows), (0, 0)])
    # Of a row the first and the last place that it sees, and sums of its groups; rows that only fill up see
    # what the first token sees. Floats are exact up to 2^24 places.
    token = jnp.where(jnp.arange(_ROWS) < rows, jnp.arange(_ROWS) % tokens, 0).astype(jnp.int32)
    last = start[:, None] + token[None]
    ends = jnp.stack([jnp.maximum(last - window[:, None] + 1, 0), last], axis=1).astype(jnp.float32)
    sums = queries.astype(jnp.float32).reshape(batch, kv_heads, _ROWS, k_groups, -1).sum(axis=-1)
    ends = jnp.broadcast_to(ends[:, None], (batch, kv_heads, *ends.shape[1:]))
    facts = jnp.concatenate([ends, sums.transpose(0, 1, 3, 2)], axis=2)
    lowest = jnp.maximum(start - window + 1, 0) // _TILE
    seen = jnp.stack([lowest, (start + tokens - 1) // _TILE + 1], axis=1)
    # Copies of a scale of every head at once would not be multiples of 16 bytes.
    ragged = [(0, 0)] * 3 + [(0, -places % 8)]
    affine = [jnp.pad(a.transpose(0, 2, 3, 1), ragged) for a in (k_scale, k_lo, v_scale, v_lo)]

    steps = _steps(n, k_words, k_scale, v_words, v_scale)
    k_width, v_width = (min(_unit(grid.bits, n), 64) for grid in (k_grid, v_grid))
    worst, partial = float(jnp.finfo(jnp.float32).min), (splits, batch, kv_heads)

    def store_codes(words: Any, codes: Any, grid: ActivationGrid) -> None:
        unit = _unit(grid.bits, n)
        layout = _layout(plgpu, unit)
        for first in range(0, n, unit):
            own = codes_of(lambda a: lay(words[:, a : a + unit], layout), first, grid.bits, n)
            codes[:, first : first + unit] = own.astype(codes.dtype)

    def parts(groups: int) -> list[Any]:
        return [pl.ds(g * (n // groups), n // groups) for g in range(groups)]

    def kernel(
        q_gmem, facts_gmem, seen_gmem, k_gmem, k_scale_gmem, k_lo_gmem, v_gmem, v_scale_gmem, v_lo_gmem,
        y_gmem, top_gmem, total_gmem, q_smem, facts_smem, k_smem, v_smem, weight_smem, y_smem, row_smem,
        barrier,
    ):  # fmt: skip
        split, h, b = (jax.lax.axis_index(name) for name in ("split", "head", "batch"))
        plgpu.copy_gmem_to_smem(q_gmem.at[b, h], q_smem, barrier)
        plgpu.copy_gmem_to_smem(facts_gmem.at[b, h], facts_smem, barrier)
        plgpu.barrier_wait(barrier)
        by_row, by_place = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
        first, last, *q_sums = (lay(facts_smem[i], by_row) for i in range(2 + k_groups))
        begin, stop = seen_gmem[b, 0], seen_gmem[b, 1]
        share = jax.lax.div(stop - begin + np.int32(splits - 1), np.int32(splits))
        begin = jnp.minimum(begin + split * share, stop)
        count = jnp.minimum(share, stop - begin)

        def across(a: Array, width: int) -> Array:  # of rows
            return lay(jax.lax.broadcast_in_dim(a, (_ROWS, width), (0,)), plgpu.Layout.WGMMA)

        def down(ref: Any) -> Array:  # of places
            values = lay(ref[...], by_place).astype(jnp.float32)
            return lay(jax.lax.broadcast_in_dim(values, (_ROWS, _TILE), (1,)), plgpu.Layout.WGMMA)

        def affine_of(scale_ref: Any, lo_ref: Any, g: int, grid: ActivationGrid) -> tuple[Array, Array]:
            scale = down(scale_ref.at[g])
            return scale, grid.symmetric_lo(scale) if grid.symmetric else down(lo_ref.at[g])

        def body(index, k_words, k_scale_ref, k_lo_ref, v_words, v_scale_ref, v_lo_ref, state):
            top, total, mixed = state
            store_codes(k_words, k_smem, k_grid)
            plgpu.commit_smem()
            scores = 0.0
            for g, own in enumerate(parts(k_groups)):
                scale, lo = affine_of(k_scale_ref, k_lo_ref, g, k_grid)
                codes = product(q_smem.at[:, own], k_smem.at[:, own].T)
                scores += codes * scale + lo * across(q_sums[g], _TILE)
            place = plgpu.broadcasted_iota(jnp.int32, (_ROWS, _TILE), 1, layout=plgpu.Layout.WGMMA)
            place = (place + (begin + index[0]) * _TILE).astype(jnp.float32)
            visible = (place >= across(first, _TILE)) & (place <= across(last, _TILE))
            scores = jnp.where(visible, scores, worst)
            new = jnp.maximum(top, jnp.max(scores, axis=1))
            shrink = jnp.exp(top - new)
            weights = jnp.where(visible, jnp.exp(scores - across(new, _TILE)), 0.0)
            total = total * shrink + jnp.sum(weights, axis=1)
            shifts = []
            for g in range(v_groups):
                # Behind the last token there is anything, even NaN.
                scaled, shifted = (
                    jnp.where(visible, weights * a, 0.0) for a in affine_of(v_scale_ref, v_lo_ref, g, v_grid)
                )
                weight_smem[g] = scaled.astype(weight_smem.dtype)
                shifts.append(jnp.sum(shifted, axis=1))
            store_codes(v_words, v_smem, v_grid)
            plgpu.commit_smem()
            width = n // v_groups
            mixed = tuple(
                part * across(shrink, width)
                + across(shift, width)
                + product(weight_smem.at[g], v_smem.at[:, own])
                for g, (own, part, shift) in enumerate(zip(parts(v_groups), mixed, shifts, strict=True))
            )
            return new, total, mixed

        def words(depth: int) -> Any:
            return plgpu.BlockSpec((None, _TILE, None, depth), lambda k: (b, begin + k, h, 0))

        def scales(groups: int) -> Any:
            return plgpu.BlockSpec((None, None, groups, _TILE), lambda k: (b, h, 0, begin + k))

        zero = lay(jnp.zeros(_ROWS, jnp.float32), by_row)
        mixed = lay(jnp.zeros((_ROWS, n // v_groups), jnp.float32), plgpu.Layout.WGMMA)
        top, total, mixed = plgpu.emit_pipeline(
            body,
            grid=(count,),
            in_specs=[
                words(k_words.shape[3]),
                *[scales(k_groups)] * 2,
                words(v_words.shape[3]),
                *[scales(v_groups)] * 2,
            ],
            max_concurrent_steps=steps,
            init_carry=(zero + worst, zero, (mixed,) * v_groups),
        )(k_gmem, k_scale_gmem, k_lo_gmem, v_gmem, v_scale_gmem, v_lo_gmem)
        for own, part in zip(parts(v_groups), mixed, strict=True):
            y_smem[:, own] = part
        row_smem[0], row_smem[1] = top, total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_smem.at[pl.ds(0, height)], y_gmem.at[split, b, h])
        plgpu.copy_smem_to_gmem(row_smem.at[0], top_gmem.at[split, b, h])
        plgpu.copy_smem_to_gmem(row_smem.at[1], total_gmem.at[split, b, h])
        plgpu.wait_smem_to_gmem(0)

    rows_out = jax.ShapeDtypeStruct((*partial, _ROWS), jnp.float32)
    y, top, total = mosaic.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((*partial, height, n), jnp.float32), rows_out, rows_out),
        grid=(splits, kv_heads, batch),
        grid_names=("split", "head", "batch"),
        scratch_types=[
            plgpu.SMEM((_ROWS, n), q.dtype, transforms=mosaic.swizzled(q.dtype, k_width)),
            plgpu.SMEM((2 + k_groups, _ROWS), jnp.float32),
            plgpu.SMEM((_TILE, n), q.dtype, transforms=mosaic.swizzled(q.dtype, k_width)),
            # Small weights times small scales would vanish in float16.
            plgpu.SMEM((_TILE, n), jnp.bfloat16, transforms=mosaic.swizzled(jnp.bfloat16, v_width)),
            plgpu.SMEM(
                (v_groups, _ROWS, _TILE), jnp.bfloat16, transforms=mosaic.swizzled(jnp.bfloat16, v_width)
            ),
            plgpu.SMEM((_ROWS, n), jnp.float32, transforms=mosaic.swizzled(jnp.float32)),
            plgpu.SMEM((2, _ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        ],
    )(queries, facts, seen, k_words, *affine[:2], v_words, *affine[2:])
    part = jnp.exp(top - jnp.max(top, axis=0, keepdims=True))[..., :rows]
    y = jnp.sum(y[..., :rows, :] * part[..., None], axis=0)
    y = y / jnp.sum(total[..., :rows] * part, axis=0)[..., None]
    y = y.reshape(batch, kv_heads, -1, tokens, n).transpose(0, 3, 1, 2, 4)
    return y.reshape(q.shape).astype(q.dtype)


def _layout(plgpu: Any, unit: int) -> Any:
    """Of `[64, unit]` codes: a thread has four neighbors in a row, a warp whole rows next to each other."""
    rows = 128 // unit
    if rows == 1:
        tiling = plgpu.Tiling(((4, unit), (4,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    tiling = plgpu.Tiling(((4 * rows, unit), (rows, unit), (4,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _steps(n: int, k_words: Any, k_scale: Any, v_words: Any, v_scale: Any) -> int:
    """Tiles of places in shared memory at once; 0 where two do not fit."""
    k_groups, v_groups = k_scale.shape[3], v_scale.shape[3]
    kept = [*[2 * _ROWS * n] * 3, 2 * v_groups * _ROWS * _TILE, 4 * _ROWS * n, 8 * _ROWS]
    kept.append(4 * (2 + k_groups) * _ROWS)
    step = [_TILE * a.shape[3] for a in (k_words, v_words)]
    step += [_TILE * a.shape[3] * a.dtype.itemsize for a in (k_scale, v_scale)] * 2
    return steps_of(kept, step, two=True)


def _unit(bits: int, n: int) -> int:
    """Channels whose codes are stored at once."""
    return min(unit_of(bits, n), 128)


def _refuses(
    q: Any, start: Any, window: Any, k_words: Any, k_scale: Any, k_lo: Any, v_words: Any, v_scale: Any,
    v_lo: Any, *, k_grid: ActivationGrid, v_grid: ActivationGrid,
) -> str:  # fmt: skip
    _, tokens, heads, n = q.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16) or 0 in q.shape:
        return f"it takes nonempty bfloat16 or float16 queries, not {q.dtype} of {q.shape}"
    if tokens * heads > _ROWS * k_words.shape[2]:
        return f"{tokens} tokens of {heads} heads are more than {_ROWS} to a head of the cache"
    dtypes = {a.dtype for a in (k_scale, k_lo, v_scale, v_lo)}
    narrow = k_words.dtype == v_words.dtype == jnp.uint8
    if not narrow or len(dtypes) > 1 or not dtypes.issubset(AFFINE_DTYPES):
        names = ", ".join(sorted(map(str, dtypes)))
        return f"it reads uint8 words, and scales and offsets all in float16 or all in float32, not {names}"
    for grid, groups in ((k_grid, k_scale.shape[3]), (v_grid, v_scale.shape[3])):
        unit = _unit(grid.bits, n)
        if unit not in (16, 32, 64, 128) or n % unit or n // groups % max(32, min(unit, 64)):
            return f"{groups} groups of {n} channels at {grid.bits} bits have no layout in shared memory"
    if not _steps(n, k_words, k_scale, v_words, v_scale):
        return f"tiles of {n} channels in {v_scale.shape[3]} groups do not fit shared memory"
    return ""


KERNEL = Kernel(cache_attention, _refuses, without_hopper)
