"""Causal grouped-query attention in query chunks: no `[T, T]` for all heads, no work above the diagonal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.kernels.cache_attention import cache_attention
from jaxquant.models.cache import KVCache
from jaxquant.quant import PackedHeads

# Small enough to skip most of the masked half; at most 16 chunks bound the size of the compiled program.
_MIN_CHUNK = 256
_MAX_CHUNKS = 16


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None,
    sliding: bool | jax.Array,
    start: jax.Array | None = None,
) -> jax.Array:
    """`softmax(q k^T + mask) v`, softmax in float32.

    Args:
      q: `[B, T, H, head_dim]`, already scaled.
      k, v: `[B, S, KV, head_dim]`; head `h` reads `h // (H / KV)`.
      window: query `t` sees keys `t - window < s <= t` where sliding; `None` for all `s <= t`.
      sliding: whether the window applies; a Python bool lets the masked keys be skipped.
      start: position of the first query among the keys of a cache, possibly traced; later places of the
        cache are masked, whatever they hold. `None` for a whole text (`S = T`).

    Returns:
      `[B, T, H * head_dim]`, heads in order.
    """
    length = q.shape[1]
    queries, keys, values = _heads_first(q, k, v)
    chunk = max(_MIN_CHUNK, -(-length // _MAX_CHUNKS))
    outputs = []
    for begin in range(0, length, chunk):
        first, stop = 0, min(begin + chunk, length)
        query_at = jnp.arange(begin, stop)
        part = queries[:, :, :, begin:stop]
        if start is not None:
            stop, query_at = k.shape[1], query_at + start
        elif window is not None and sliding is True:
            first = max(0, begin - window + 1)
        mask = _mask(query_at, jnp.arange(first, stop), window, sliding)
        outputs.append(_attend(part, keys[:, :, first:stop], values[:, :, first:stop], mask))
    out = jnp.concatenate(outputs, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(*q.shape[:2], -1)


def attention_to_cache(
    q: jax.Array, cache: KVCache, *, window: int | None, sliding: bool | jax.Array
) -> jax.Array:
    """`attention` of the last tokens of a cache to all of it; arguments and result as there.

    A packed cache is never dequantized as a whole.
    """
    start = cache.length - q.shape[1]
    if isinstance(cache.k, PackedHeads) and isinstance(cache.v, PackedHeads):
        seen = None if window is None else jnp.where(sliding, window, cache.size)
        y = cache_attention(q, cache.k, cache.v, start=start, window=seen)
        return y.reshape(*q.shape[:2], -1)
    return attention(q, *cache.heads(q.dtype), window=window, sliding=sliding, start=start)


def _heads_first(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch, length, heads, head_dim = q.shape
    groups = k.shape[2]
    queries = q.reshape(batch, length, groups, heads // groups, head_dim).transpose(0, 2, 3, 1, 4)
    return queries, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def _mask(query_at: jax.Array, key_at: jax.Array, window: int | None, sliding: bool | jax.Array) -> jax.Array:
    distance = query_at[:, None] - key_at[None]
    visible = distance >= 0
    if window is None or sliding is False:
        return visible
    near = distance < window
    return visible & (near if sliding is True else near | ~sliding)


def _attend(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """`[B, KV, G, C, hd]`, two of `[B, KV, S, hd]` and `[C, S]` to `[B, KV, G, C, hd]`."""
    # The heads that share a key become rows of one matrix product.
    rows = queries.reshape(*queries.shape[:2], -1, queries.shape[-1])
    scores = jnp.einsum("bntd,bnsd->bnts", rows, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(*queries.shape[:4], -1)
    scores = jnp.where(mask[None, None, None], scores, jnp.finfo(jnp.float32).min)
    top = lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(values.dtype).reshape(*rows.shape[:3], -1)
    mixed = jnp.einsum("bnts,bnsd->bntd", weights, values, preferred_element_type=jnp.float32)
    return (mixed.reshape(queries.shape) / total).astype(values.dtype)
