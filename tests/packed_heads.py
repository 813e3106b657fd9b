"""Attention over packed keys and values: random problems, and their results in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxquant.quant import ActivationGrid, PackedHeads


def problem(batch, tokens, places, kv_heads, shared, n, grids, dtype=jnp.float32, seed=0):
    """Queries, packed keys and values, and the place of the first query of every row."""
    rng = np.random.default_rng(seed)

    def heads(grid):
        codes = rng.integers(0, 2**grid.bits, (batch, places, kv_heads, n), dtype=np.uint8)
        per_group = (batch, places, kv_heads, grid.groups(n))
        scale, lo = (rng.uniform(low, high, per_group) for low, high in ((0.5, 1), (-2, 1)))
        scale, lo = (jnp.asarray(a, grid.scale_dtype) for a in (scale / 2**grid.bits, lo))
        words = jnp.asarray(packed(codes, grid.bits))
        return PackedHeads(words=words, scale=scale, lo=None if grid.symmetric else lo, grid=grid, head_dim=n)

    q = jnp.asarray(rng.standard_normal((batch, tokens, kv_heads * shared, n)), dtype)
    start = jnp.asarray(rng.integers(0, places - tokens + 1, batch), jnp.int32)
    return q, *map(heads, grids), start


def packed(codes, bits):
    """`quant.packing.pack` along the last axis: planes from the lowest bit up, fields apart."""
    parts = []
    for plane in (8, 4, 2, 1):
        if bits & plane:
            fields = 8 // plane
            padded = np.pad(codes, [(0, 0)] * 3 + [(0, -codes.shape[-1] % fields)]) & (2**plane - 1)
            columns = padded.reshape(*codes.shape[:-1], fields, -1).astype(np.uint16)
            shifts = plane * np.arange(fields, dtype=np.uint16)[:, None]
            parts.append((columns << shifts).sum(axis=-2).astype(np.uint8))
            codes = codes >> plane if plane < 8 else codes
    return np.concatenate(parts, axis=-1)


def values(heads):
    """float64 `lo + scale code`."""
    grid, words, codes, shift = heads.grid, np.asarray(heads.words), 0, 0
    for plane in (8, 4, 2, 1):
        if grid.bits & plane:
            depth = -(-heads.head_dim * plane // 8)
            part, words = words[..., :depth], words[..., depth:]
            fields = [(part >> (plane * i)) & (2**plane - 1) for i in range(8 // plane)]
            codes = codes + (np.concatenate(fields, axis=-1)[..., : heads.head_dim].astype(int) << shift)
            shift += plane
    scale = np.float64(heads.scale)
    lo = -scale * 2 ** (grid.bits - 1) if heads.lo is None else np.float64(heads.lo)
    repeat = heads.head_dim // scale.shape[-1]
    scale, lo = (np.repeat(a, repeat, axis=-1) for a in (scale, lo))
    return lo + scale * codes


def exact(q, k, v, start, window=None):
    """`softmax(q k^T + mask) v` in float64."""
    q, k, v = np.float64(q), values(k), values(v)
    shared = q.shape[2] // k.shape[2]
    k, v = (np.repeat(a, shared, axis=2) for a in (k, v))
    at = np.asarray(start)[:, None, None] + np.arange(q.shape[1])[:, None]
    distance = at - np.arange(k.shape[1])
    visible = (distance >= 0) & (distance < (window or k.shape[1]))
    scores = np.where(visible[:, None], np.einsum("bthn,bshn->bhts", q, k), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhts,bshn->bthn", weights / weights.sum(axis=-1, keepdims=True), v)


def close(y, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.float64(y), expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


def grids_for(n):
    sizes = st.sampled_from([None, *(g for g in (16, 32) if n % g == 0)])
    return st.builds(
        ActivationGrid,
        bits=st.integers(2, 8),
        group_size=sizes,
        symmetric=st.booleans(),
        scale_dtype=st.sampled_from(["float16", "float32"]),
    )


@st.composite
def problems(draw):
    n = draw(st.sampled_from([8, 9, 32, 64, 80]))
    shape = [draw(st.integers(1, top)) for top in (2, 4)]
    places = shape[1] + draw(st.integers(0, 600))
    heads = [draw(st.integers(1, top)) for top in (3, 6)]
    grids = (draw(grids_for(n)), draw(grids_for(n)))
    arrays = problem(*shape, places, *heads, n, grids, seed=draw(st.integers(0, 2**16)))
    return arrays, draw(st.sampled_from([None, 1, 7, 100, 5000]))
