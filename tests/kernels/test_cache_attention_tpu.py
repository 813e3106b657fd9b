"""The TPU kernel, interpreted and lowered where there is no TPU; tests/aot compiles it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu
from packed_heads import close, exact, problem, problems

from jaxquant.errors import UsageError
from jaxquant.kernels.cache_attention import cache_attention, tpu
from jaxquant.quant import ActivationGrid, PackedHeads

HALF = ActivationGrid(bits=4, scale_dtype="float16")


def arguments(q, k, v, start, window):
    """Those of a kernel, and its keywords."""
    seen = jnp.full(q.shape[0], k.words.shape[1] if window is None else window, jnp.int32)
    stores = [a for h in (k, v) for a in (h.words, h.scale, h.scale if h.lo is None else h.lo)]
    return (q, start, seen, *stores), {"k_grid": k.grid, "v_grid": v.grid}


def check(q, k, v, start, window, interpret):
    arrays, grids = arguments(q, k, v, start, window)
    y = tpu.cache_attention(*arrays, **grids, interpret=interpret)
    close(y, exact(q, k, v, start, window), 1e-5 if q.dtype == jnp.float32 else 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@settings(max_examples=10, deadline=None)
@given(drawn=problems())
def test_equals_float64(drawn, dtype):
    (q, *cache), window = drawn
    check(q.astype(dtype), *cache, window, True)


# Everything ragged; groups, a place for each row, several tiles, the last of them ragged and some skipped.
CASES = {
    "one tile": ((1, 1, 70, 1, 3, 16), (HALF, HALF), None, jnp.float32),
    "tiles": (
        (2, 2, 2100, 2, 3, 64),
        (ActivationGrid(bits=3, group_size=32), ActivationGrid(bits=2, symmetric=True)),
        900,
        jnp.bfloat16,
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c != "one tile")) for c in CASES]
)
@pytest.mark.parametrize("hardware", [False, True])
def test_tiles_and_races(case, hardware, monkeypatch):
    """On `hardware` memory is emulated: unsynchronized accesses raise, fresh memory reads as NaN."""
    shape, grids, window, dtype = CASES[case]
    monkeypatch.setattr(tpu, "_CODE_BYTES", 4 * shape[-1] * 256)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan") if hardware else True
    check(*problem(*shape, grids, dtype), window, interpret)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lowers_to_one_call(bits):
    """Mosaic verifies blocks and operations; the default backend is the kernel there, and is not here."""
    grid = ActivationGrid(bits=bits, group_size=32, scale_dtype="float16")
    shape = jax.ShapeDtypeStruct((3, 1, 2000, 2, 64), jnp.float32)
    cache = jax.eval_shape(lambda heads: PackedHeads.of(heads, grid), shape)
    q = jax.ShapeDtypeStruct((3, 1, 1, 6, 64), jnp.bfloat16)
    attend = jax.jit(jax.vmap(lambda q, k, v: cache_attention(q, k, v, start=1000)))
    traced = attend.trace(q, cache, cache)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call") == 1
    assert "@tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize(
    ("shape", "reason"),
    [((1, 600, 700, 1, 1, 64), "more than 256"), ((1, 1, 8, 1, 1, 24), "do not fill registers")],
)
def test_what_the_kernel_does_not_take(shape, reason):
    q, k, v, _ = problem(*shape, (HALF, HALF))

    def lowered(backend):
        attend = jax.jit(lambda q: cache_attention(q, k, v, start=0, backend=backend))
        return attend.trace(q).lower(lowering_platforms=("tpu",)).as_text()

    assert "@tpu_custom_call" not in lowered(None)
    with pytest.raises(UsageError, match=reason):
        lowered("kernel")
