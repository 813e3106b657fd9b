"""The portable implementation: a scan over chunks of places; no more than a chunk is ever dequantized."""

from __future__ import annotations

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, UInt8

from jaxquant.kernels.cache_attention.reference import store
from jaxquant.kernels.platform import varying_alike
from jaxquant.quant import ActivationGrid, working_dtype

# Places dequantized at once: few enough to stay in a cache of the CPU, many enough for a matrix product.
_CHUNK = 512

# Of every query so far: the largest score, the sum of exp(score - largest), and that of its multiples of v.
_State: TypeAlias = tuple[Array, Array, Array]


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
) -> Float[Array, "batch tokens heads n"]:
    """Softmax over chunks c of places, in the terms of the largest score m so far (arXiv 1805.02867):

        m' = max(m, max s_c),  l' = l e^(m - m') + sum e^(s_c - m'),  y' = y e^(m - m') + e^(s_c - m') v_c

    Arguments as in `reference`; all in float32, float64 for such queries. Chunks that no token sees are
    skipped.
    """
    batch, tokens, _, n = q.shape
    size, kv_heads = k_words.shape[1:3]
    chunk, wide = min(_CHUNK, size), working_dtype(q.dtype)
    # The heads that share a key become rows of one matrix product.
    rows = q.astype(wide).reshape(batch, tokens, kv_heads, -1, n)
    rows = rows.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, n)
    at = start[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
    first, stop = jnp.min(start - window) + 1, jnp.max(at) + 1
    keys, values = store(k_words, k_scale, k_lo, k_grid, n), store(v_words, v_scale, v_lo, v_grid, n)
    lowest = jnp.finfo(wide).min

    # Else the backward pass would keep the dequantized chunks, which together are the whole cache.
    @jax.checkpoint
    def attend(state: _State, begin: Array) -> _State:
        top, total, mixed = state
        # The last chunk overlaps the one before where the chunks do not divide the places.
        place = jnp.minimum(begin, size - chunk)
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=place, slice_size=chunk, axis=1)
        k, v = (jax.tree.map(cut, heads).dequantize(wide) for heads in (keys, values))
        scores = jnp.einsum("bkrn,bskn->bkrs", rows, k)
        key_at = place + jnp.arange(chunk, dtype=jnp.int32)
        distance = at[:, :, None] - key_at[None, None]
        visible = (distance >= 0) & (distance < window[:, None, None]) & (key_at >= begin)[None, None]
        scores = scores.reshape(batch, kv_heads, -1, tokens, chunk)
        scores = jnp.where(visible[:, None, None], scores, lowest).reshape(*rows.shape[:3], chunk)
        new = lax.stop_gradient(jnp.maximum(top, scores.max(axis=-1, keepdims=True)))
        shrink, weights = jnp.exp(top - new), jnp.exp(scores - new)
        total = total * shrink + weights.sum(axis=-1, keepdims=True)
        return new, total, mixed * shrink + jnp.einsum("bkrs,bskn->bkrn", weights, v)

    def step(state: _State, begin: Array) -> tuple[_State, None]:
        seen = (begin < stop) & (begin + chunk > first)
        return lax.cond(seen, attend, lambda state, begin: state, state, begin), None

    zero = jnp.zeros_like(rows[..., :1])  # on a mesh of explicit axes laid out as they are
    arrays = (rows, start, window, *jax.tree.leaves((keys, values)))
    top, total, mixed, *_ = varying_alike(zero + lowest, zero, jnp.zeros_like(rows), *arrays)
    (_, total, mixed), _ = lax.scan(step, (top, total, mixed), jnp.arange(0, size, chunk, dtype=jnp.int32))
    y = (mixed / total).reshape(batch, kv_heads, -1, tokens, n).transpose(0, 3, 1, 2, 4)
    return y.reshape(q.shape).astype(q.dtype)
