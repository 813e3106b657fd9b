"""The specification: dequantize the whole cache, then a softmax over all places in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from jaxquant.quant import ActivationGrid, PackedHeads


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
    """`softmax(q k^T + mask) v`, with `k = k_lo + k_scale code` and v alike, at highest precision.

    Token t of a row is at place `start + t` and sees `start + t - window < s <= start + t`. Of a symmetric
    grid `lo` is not read.
    """
    batch, tokens, _, n = q.shape
    k = store(k_words, k_scale, k_lo, k_grid, n).dequantize(jnp.float32)
    v = store(v_words, v_scale, v_lo, v_grid, n).dequantize(jnp.float32)
    rows = q.astype(jnp.float32).reshape(batch, tokens, k.shape[2], -1, n)
    scores = jnp.einsum("btkgn,bskn->btkgs", rows, k, precision="highest")
    distance = start[:, None, None] + jnp.arange(tokens)[None, :, None] - jnp.arange(k.shape[1])[None, None]
    visible = (distance >= 0) & (distance < window[:, None, None])
    weights = jax.nn.softmax(jnp.where(visible[:, :, None, None], scores, -jnp.inf), axis=-1)
    y = jnp.einsum("btkgs,bskn->btkgn", weights, v, precision="highest")
    return y.reshape(q.shape).astype(q.dtype)


def store(
    words: UInt8[Array, "batch places kv_heads words"],
    scale: Float[Array, "batch places kv_heads groups"],
    lo: Float[Array, "batch places kv_heads groups"],
    grid: ActivationGrid,
    n: int,
) -> PackedHeads:
    """The keys or values that these arrays are."""
    lo_of_grid = None if grid.symmetric else lo
    return PackedHeads(words=words, scale=scale, lo=lo_of_grid, grid=grid, head_dim=n)
