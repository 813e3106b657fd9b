"""Pallas for TPU: words are unpacked in VMEM, a tile of places at a time, and HBM holds the packed cache."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, UInt8

from jaxquant.kernels.mosaic import LANES, SUBLANES, bits_of_half, unpack_int32, widened
from jaxquant.kernels.platform import Kernel
from jaxquant.quant import ActivationGrid
from jaxquant.quant.packing import planes

# Of 16 MiB of VMEM: codes of a head in int32 and float32, twice; two copies of the words of a tile.
_CODE_BYTES, _WORD_BYTES = 1 << 19, 1 << 20
#: Queries of a head of the cache, at most.
_LARGEST_ROWS = 256


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
    interpret: Any = False,
) -> Float[Array, "batch tokens heads n"]:
    """Online softmax over tiles of places (see `scan`) with products of codes, scaled after the MXU:

        q k = sum_g scale_g (q_g . code_g) + lo_g sum(q_g)
        w v_g = (w scale_g) code_g + sum(w lo_g)

    The grid runs over the batch and tiles. Products are in the dtype of `q`, in which codes are exact, and in
    full precision where that is float32. Tiles that no token sees are not read. Arguments as in `reference`.

    Args:
      interpret: as in `pallas_call`: how to run where there is no TPU.
    """
    batch, tokens, heads, n = q.shape
    places, kv_heads = k_words.shape[1:3]
    rows = tokens * heads // kv_heads
    height = math.ceil(rows / (2 * SUBLANES)) * 2 * SUBLANES
    k_groups, v_groups = k_scale.shape[3], v_scale.shape[3]
    tile = _tile(places, n, kv_heads * (k_words.shape[3] + v_words.shape[3]))

    queries = q.reshape(batch, tokens, kv_heads, -1, k_groups, n // k_groups)
    queries = queries.transpose(0, 2, 4, 3, 1, 5).reshape(batch, kv_heads, k_groups, rows, -1)
    queries = jnp.pad(queries, [(0, 0)] * 3 + [(0, height - rows), (0, 0)])
    # That is how they lie: XLA gives lanes to places, of which there are many.
    words = [a.transpose(0, 2, 3, 1) for a in (k_words, v_words)]
    affine = [bits_of_half(a).transpose(0, 3, 2, 1) for a in (k_scale, k_lo, v_scale, v_lo)]

    def at_tile(*fixed: int) -> pl.BlockSpec:
        def index(b: Array, i: Array, start: Any, window: Any) -> tuple[Any, ...]:
            last = jax.lax.div(start[b] + (tokens - 1), np.int32(tile))
            first = jax.lax.div(jnp.maximum(start[b] - window[b] + 1, 0), np.int32(tile))
            return b, 0, 0, jnp.clip(i, first, last)

        return pl.BlockSpec((1, *fixed, tile), index)

    def whole(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda b, i, start, window: (b, *[0] * len(shape)))

    per_group = {groups: at_tile(groups, kv_heads) for groups in (k_groups, v_groups)}
    wide = {groups: pltpu.VMEM((groups, kv_heads, tile), jnp.float32) for groups in (k_groups, v_groups)}
    mixed = (kv_heads, v_groups, height, n // v_groups)
    read = sum(a.nbytes for a in (*words, *affine, queries, queries))
    y = pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, k_grid=k_grid, v_grid=v_grid),
        out_shape=jax.ShapeDtypeStruct((batch, *mixed), q.dtype, manual_axis_type=jax.typeof(q).mat),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, pl.cdiv(places, tile)),
            in_specs=[
                whole(*queries.shape[1:]),
                at_tile(*words[0].shape[1:3]),
                at_tile(*words[1].shape[1:3]),
                *[per_group[k_groups]] * 2,
                *[per_group[v_groups]] * 2,
            ],
            out_specs=whole(*mixed),
            scratch_shapes=[
                *[wide[k_groups]] * 2,
                *[wide[v_groups]] * 2,
                *[pltpu.VMEM((kv_heads, height, 1), jnp.float32)] * 2,
                pltpu.VMEM(mixed, jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * places * kv_heads * height * n,
            bytes_accessed=read,
            transcendentals=batch * places * kv_heads * height,
        ),
        interpret=interpret,
        name="cache_attention",
    )(start, window, queries, *words, *affine)
    y = y[..., :rows, :].reshape(batch, kv_heads, v_groups, -1, tokens, n // v_groups)
    return y.transpose(0, 4, 1, 3, 2, 5).reshape(q.shape)


def _refuses(
    q: Any, start: Any, window: Any, k_words: Any, k_scale: Any, k_lo: Any, v_words: Any, v_scale: Any,
    v_lo: Any, *, k_grid: ActivationGrid, v_grid: ActivationGrid,
) -> str:  # fmt: skip
    _, tokens, heads, n = q.shape
    if q.dtype not in (jnp.bfloat16, jnp.float32) or 0 in q.shape:
        return f"it takes nonempty bfloat16 or float32 queries, not {q.dtype} of {q.shape}"
    if tokens * heads > _LARGEST_ROWS * k_words.shape[2]:
        return f"{tokens} tokens of {heads} heads are more than {_LARGEST_ROWS} to a head of the cache"
    for grid, groups in ((k_grid, k_scale.shape[3]), (v_grid, v_scale.shape[3])):
        if n // groups % SUBLANES or n * min(planes(grid.bits)) // 8 % SUBLANES:
            return f"{groups} groups of {n} channels at {grid.bits} bits do not fill registers of 8 rows"
    return ""


KERNEL = Kernel(cache_attention, _refuses)


def _tile(places: int, n: int, words: int) -> int:
    """Places of a tile: all, or as many whole lanes as there is memory for."""
    most = min(_CODE_BYTES // (4 * n), _WORD_BYTES // words)
    return places if places <= most else max(LANES, most // LANES * LANES)


def _kernel(
    start_ref: Any,  # [batch]
    window_ref: Any,
    q_ref: Any,  # [1, kv_heads, k_groups, rows, channels of a group]
    k_words_ref: Any,  # [1, kv_heads, words, places]
    v_words_ref: Any,
    k_scale_ref: Any,  # [1, groups, kv_heads, places], float32 or bits of float16
    k_lo_ref: Any,
    v_scale_ref: Any,
    v_lo_ref: Any,
    y_ref: Any,  # [1, kv_heads, v_groups, rows, channels of a group]
    wide_k_scale_ref: Any,  # [groups, kv_heads, places] float32
    wide_k_lo_ref: Any,
    wide_v_scale_ref: Any,
    wide_v_lo_ref: Any,
    top_ref: Any,  # [kv_heads, rows, 1]: the largest score
    total_ref: Any,  # [kv_heads, rows, 1]: the sum of e^(score - largest)
    mixed_ref: Any,  # [kv_heads, v_groups, rows, channels of a group]
    *,
    tokens: int,
    k_grid: ActivationGrid,
    v_grid: ActivationGrid,
) -> None:
    b, i = pl.program_id(0), pl.program_id(1)
    kv_heads, k_groups, height, k_channels = q_ref.shape[1:]
    _, v_groups, _, v_channels = mixed_ref.shape
    tile = k_words_ref.shape[3]
    start, window = start_ref[b], window_ref[b]
    stop = start + tokens
    lowest = jnp.finfo(jnp.float32).min
    dot = functools.partial(
        jax.lax.dot_general,
        precision=jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )

    @pl.when(i == 0)
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, lowest)
        total_ref[...] = jnp.zeros_like(total_ref)
        mixed_ref[...] = jnp.zeros_like(mixed_ref)

    def widen(
        scale_ref: Any, lo_ref: Any, wide_scale_ref: Any, wide_lo_ref: Any, grid: ActivationGrid
    ) -> None:
        # Behind the last token there is anything, behind the last place even NaN.
        place = i * tile + jax.lax.broadcasted_iota(jnp.int32, (kv_heads, tile), 1)
        for g in range(scale_ref.shape[1]):
            scale = jnp.where(place < stop, widened(scale_ref[0, g]), 0.0)
            wide_scale_ref[g] = scale
            lo = grid.symmetric_lo(scale) if grid.symmetric else widened(lo_ref[0, g])
            wide_lo_ref[g] = jnp.where(place < stop, lo, 0.0)

    def codes(words: Array, grid: ActivationGrid, channels: int, groups: int) -> list[Array]:
        whole = unpack_int32(words, grid.bits, channels * groups).astype(jnp.float32)
        return [whole[g * channels : (g + 1) * channels].astype(q_ref.dtype) for g in range(groups)]

    @pl.when((i * tile < stop) & ((i + 1) * tile > start - window + 1))
    def _() -> None:
        widen(k_scale_ref, k_lo_ref, wide_k_scale_ref, wide_k_lo_ref, k_grid)
        widen(v_scale_ref, v_lo_ref, wide_v_scale_ref, wide_v_lo_ref, v_grid)
        place = i * tile + jax.lax.broadcasted_iota(jnp.int32, (height, tile), 1)
        token = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (height, tile), 0), np.int32(tokens))
        distance = start + token - place
        visible = (distance >= 0) & (distance < window)

        @pl.loop(0, kv_heads)
        def _(h: Array) -> None:
            own = pl.ds(h, 1)
            scores = jnp.zeros((height, tile), jnp.float32)
            for g, k in enumerate(codes(k_words_ref[0, h], k_grid, k_channels, k_groups)):
                q = q_ref[0, h, g]
                q_sum = jnp.sum(q.astype(jnp.float32), axis=-1, keepdims=True)
                scores += wide_k_scale_ref[g, own] * dot(q, k, (((1,), (0,)), ((), ())))
                scores += wide_k_lo_ref[g, own] * q_sum
            scores = jnp.where(visible, scores, lowest)
            top = jnp.maximum(top_ref[h], jnp.max(scores, axis=-1, keepdims=True))
            shrink, weights = jnp.exp(top_ref[h] - top), jnp.exp(scores - top)
            top_ref[h] = top
            total_ref[h] = total_ref[h] * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            for g, v in enumerate(codes(v_words_ref[0, h], v_grid, v_channels, v_groups)):
                scaled = (weights * wide_v_scale_ref[g, own]).astype(q_ref.dtype)
                part = dot(scaled, v, (((1,), (1,)), ((), ())))
                offset = jnp.sum(weights * wide_v_lo_ref[g, own], axis=-1, keepdims=True)
                mixed_ref[h, g] = mixed_ref[h, g] * shrink + part + offset

    @pl.when(i == pl.num_programs(1) - 1)
    def _() -> None:
        y_ref[0] = (mixed_ref[...] / total_ref[...][:, None]).astype(y_ref.dtype)
