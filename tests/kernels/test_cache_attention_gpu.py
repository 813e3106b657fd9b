"""The GPU kernel, interpreted and lowered where there is no GPU; tests/aot compiles it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import interpreted, strict
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_heads import close, exact, problem

from jaxquant.errors import UsageError
from jaxquant.kernels.cache_attention import cache_attention, gpu
from jaxquant.quant import ActivationGrid, PackedHeads

HALF = ActivationGrid(bits=4, scale_dtype="float16")


def attend(q, k, v, start, window):
    seen = jnp.full(q.shape[0], k.words.shape[1] if window is None else window, jnp.int32)
    stores = [a for h in (k, v) for a in (h.words, h.scale, h.scale if h.lo is None else h.lo)]
    arrays, grids = (q, start, seen, *stores), {"k_grid": k.grid, "v_grid": v.grid}
    assert not gpu.KERNEL.refuses(*arrays, **grids)
    return gpu.cache_attention(*arrays, **grids, interpret=strict())


# The last tile ragged; groups, a place for each row, tiles left out at both ends; planes of several widths,
# shares of one tile; many tokens, all tiles of a head in one program.
CASES = {
    "ragged": ((1, 1, 70, 1, 3, 64), (HALF, HALF), None),
    "window": (
        (2, 2, 200, 2, 3, 64),
        (ActivationGrid(bits=4, group_size=32), ActivationGrid(bits=2, symmetric=True)),
        90,
    ),
    "planes": (
        (1, 1, 300, 1, 4, 128),
        (ActivationGrid(bits=3, scale_dtype="float16"), ActivationGrid(bits=8, scale_dtype="float16")),
        None,
    ),
    "groups of values": (
        (2, 9, 130, 2, 7, 128),
        (ActivationGrid(bits=8, symmetric=True), ActivationGrid(bits=4, group_size=64)),
        40,
    ),
}


@interpreted
@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c != "ragged")) for c in CASES])
def test_tiles_and_races(case, monkeypatch):
    shape, grids, window = CASES[case]
    monkeypatch.setattr(gpu, "_SHARE", 5 if case == "groups of values" else 1)
    arrays = problem(*shape, grids, jnp.bfloat16)
    close(attend(*arrays, window), exact(*arrays, window), 1e-2)


@interpreted
@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    rows=st.tuples(st.integers(1, 2), st.integers(1, 4)),
    places=st.integers(4, 300),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 6)),
    n=st.sampled_from([64, 128]),
    bits=st.tuples(*[st.sampled_from([2, 4, 6, 8])] * 2),
    symmetric=st.booleans(),
    window=st.sampled_from([None, 1, 7, 100]),
    dtypes=st.tuples(st.sampled_from(["float16", "float32"]), st.sampled_from([jnp.bfloat16, jnp.float16])),
)
def test_equals_float64(rows, places, heads, n, bits, symmetric, window, dtypes):
    grids = [ActivationGrid(bits=b, symmetric=symmetric, scale_dtype=dtypes[0]) for b in bits]
    arrays = problem(*rows, places, *heads, n, grids, dtypes[1])
    close(attend(*arrays, window), exact(*arrays, window), 1e-2)


@interpreted
@pytest.mark.slow
def test_what_lies_behind_the_last_token_is_not_read():
    q, k, v, _ = problem(1, 1, 100, 1, 2, 64, (HALF, HALF), jnp.bfloat16)
    start = jnp.asarray([40], jnp.int32)
    stale = [jax.tree.map(lambda a: a.at[:, 41:].set(jnp.asarray(255, a.dtype)), h) for h in (k, v)]
    unknown = [
        jax.tree.map(lambda a: a.at[:, 41:].set(jnp.nan) if a.dtype == jnp.float16 else a, h) for h in stale
    ]
    np.testing.assert_array_equal(attend(q, *unknown, start, None), attend(q, k, v, start, None))


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("gap", [6, 12])
def test_float16_queries_keep_small_weights(gap):
    """A sink, of value 0, takes nearly all weight: what is left times a scale is too small for float16."""
    rng = np.random.default_rng(0)
    q, k, v = (
        np.zeros((1, 1, 1, 64)),
        rng.standard_normal((1, 256, 1, 64)) / 10,
        rng.standard_normal((1, 256, 1, 64)),
    )
    q[..., 0], k[..., 0], k[0, 0, 0, 0], v[0, 0] = 1, 0, gap, 0
    grid = ActivationGrid(bits=8)
    heads = [PackedHeads.of(jnp.asarray(a, jnp.float32), grid) for a in (k, v)]
    arrays = (jnp.asarray(q, jnp.float16), *heads, jnp.asarray([255], jnp.int32))
    close(attend(*arrays, None), exact(*arrays), 1e-2)


def lowered(backend, shape, grids, dtype=jnp.bfloat16):
    q, k, v, _ = problem(*shape, grids, dtype)
    program = jax.jit(lambda q, k, v: cache_attention(q, k, v, start=3, backend=backend))
    return program.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lowers_to_one_call_where_asked(bits):
    grid = ActivationGrid(bits=bits, scale_dtype="float16")
    assert lowered("kernel", (3, 1, 500, 2, 4, 128), (grid, HALF)).count("@mosaic_gpu") == 1


@pytest.mark.parametrize("groups", [(None, None), (64, None), (None, 128)])
def test_what_nearly_fills_shared_memory_lowers(groups):
    grids = [
        ActivationGrid(bits=bits, group_size=size, scale_dtype="float16")
        for bits, size in zip((6, 4), groups, strict=True)
    ]
    assert "@mosaic_gpu" in lowered("kernel", (1, 1, 300, 1, 4, 256), grids)


def test_scans_where_the_device_is_not_known():
    """The kernel is for one generation of GPUs, and nothing tells which will run the program."""
    assert "@mosaic_gpu" not in lowered(None, (1, 1, 70, 1, 3, 64), (HALF, HALF))


@pytest.mark.parametrize(
    ("shape", "grid", "dtype", "reason"),
    [
        ((1, 17, 40, 1, 4, 64), HALF, jnp.bfloat16, "17 tokens of 4 heads are more than 64"),
        ((1, 1, 8, 1, 1, 64), HALF, jnp.float32, "bfloat16 or float16 queries, not float32"),
        ((1, 1, 8, 1, 1, 24), HALF, jnp.bfloat16, "1 groups of 24 channels at 4 bits have no layout"),
        (
            (1, 1, 8, 1, 1, 128), ActivationGrid(bits=4, group_size=32), jnp.bfloat16,
            "4 groups of 128 channels at 4 bits have no layout",
        ),
        ((1, 1, 8, 1, 1, 256), ActivationGrid(bits=8), jnp.bfloat16, "do not fit shared memory"),
        ((1, 1, 8, 1, 1, 192), ActivationGrid(bits=8), jnp.bfloat16, "1 groups of 192 channels at 8 bits"),
    ],
)  # fmt: skip
def test_what_the_kernel_does_not_take(shape, grid, dtype, reason):
    with pytest.raises(UsageError, match=reason):
        lowered("kernel", shape, (grid, grid), dtype)
