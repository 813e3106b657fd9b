"""Every implementation of attention over a packed cache against its specification."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from packed_heads import close, exact, problem, problems

from jaxquant.errors import InputError, UsageError
from jaxquant.kernels.cache_attention import cache_attention, cpu, reference
from jaxquant.quant import ActivationGrid, PackedHeads

TARGET = "jaxquant_cache_attention"
GRID = ActivationGrid(bits=4, clip=0.95, scale_dtype="float16")


@pytest.fixture(params=["portable", "kernel"])
def attend(request):
    """Attention by one backend, compiled."""
    skip_without_kernel(request.param)
    of = functools.partial(cache_attention, backend=request.param)
    return jax.jit(of, static_argnames="window")


def skip_without_kernel(backend):
    store = (jnp.uint8, jnp.float16, jnp.float16)
    dtypes = (jnp.float32, jnp.int32, jnp.int32, *store, *store)
    arrays = [jax.ShapeDtypeStruct((1, 1, 1, 1), dtype) for dtype in dtypes]
    if backend == "kernel" and (reason := cpu.KERNEL.refuses(*arrays, k_grid=GRID, v_grid=GRID)):
        pytest.skip(reason)


def check(drawn, dtype=jnp.float32, backend="kernel"):
    (q, *cache, start), window = drawn
    q = q.astype(dtype)
    y = cache_attention(q, *cache, start=start, window=window, backend=backend)
    assert y.dtype == dtype
    close(y, exact(q, *cache, start, window), 1e-5 if dtype == jnp.float32 else 1e-2)


@settings(max_examples=8, deadline=None)
@given(drawn=problems())
def test_kernel_equals_float64(drawn):
    skip_without_kernel("kernel")
    check(drawn)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("backend", ["portable", "kernel"])
def test_equals_float64(dtype, backend):
    skip_without_kernel(backend)
    grids = (ActivationGrid(bits=3, group_size=32, symmetric=True), GRID)
    check((problem(2, 3, 700, 2, 3, 64, grids), 530), dtype, backend)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("backend", ["portable", "kernel"])
@settings(max_examples=15, deadline=None)
@given(drawn=problems())
def test_any_shape_equals_float64(drawn, dtype, backend):
    skip_without_kernel(backend)
    check(drawn, dtype, backend)


def test_reference_equals_float64():
    grids = (GRID, ActivationGrid(bits=3, symmetric=True))
    q, k, v, start = problem(2, 3, 40, 2, 2, 16, grids)
    stores = (k.words, k.scale, k.lo, v.words, v.scale, v.scale)
    window = jnp.full(2, 9, jnp.int32)
    of = jax.jit(functools.partial(reference.cache_attention, k_grid=grids[0], v_grid=grids[1]))
    y = of(q, start, window, *stores)
    close(y, exact(q, k, v, start, 9), 1e-6)


def test_threads_share_the_places(attend):
    q, k, v, _ = problem(1, 1, 4099, 2, 4, 64, (GRID, GRID))
    expected = exact(q, k, v, [4090])
    for _ in range(3):
        close(attend(q, k, v, start=4090), expected)


def test_large_scores_and_far_keys(attend):
    """A softmax that is one key, and a window beside places whose scores are far above its own."""
    q, k, v, _ = problem(1, 2, 600, 1, 3, 32, (GRID, GRID))
    far = dataclasses.replace(k, scale=k.scale.at[:, :400].multiply(jnp.float16(300)))
    for queries in (q, jnp.full_like(q, 1e4)):
        close(attend(queries, far, v, start=500, window=90), exact(queries, far, v, [500], 90))


def test_places_behind_the_last_token_are_not_seen(attend):
    q, k, v, start = problem(2, 2, 100, 2, 2, 16, (GRID, GRID))
    start = jnp.minimum(start, 50)
    stale = jax.tree.map(lambda a: a.at[:, 60:].set(jnp.asarray(255, a.dtype)), (k, v))
    np.testing.assert_array_equal(attend(q, *stale, start=start), attend(q, k, v, start=start))


def test_vmap_is_one_call(attend):
    q, k, v, start = problem(6, 1, 70, 2, 2, 16, (GRID, GRID))
    pairs = jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), (q, k, v, start))
    each = jax.vmap(lambda q, k, v, start: attend(q, k, v, start=start, window=30))
    close(each(*pairs).reshape(q.shape), exact(q, k, v, start, 30))
    # One cache for many queries, each with a place of its own.
    shared = jax.tree.map(lambda a: a[:1], (k, v))
    y = jax.vmap(lambda q, start: attend(q[None], *shared, start=start))(q, start)
    repeated = jax.tree.map(lambda a: jnp.repeat(a, 6, axis=0), shared)
    close(y[:, 0], exact(q, *repeated, start))


def test_derivatives_are_those_of_the_reference():
    skip_without_kernel("kernel")
    grids = (ActivationGrid(bits=3), ActivationGrid(bits=4, symmetric=True, group_size=16))
    q, k, v, start = problem(2, 2, 40, 1, 2, 32, grids)

    def plain(q, k, v):
        stores = (k.words, k.scale, k.lo, v.words, v.scale, v.scale)
        window = jnp.full(2, 11, jnp.int32)
        return reference.cache_attention(q, start, window, *stores, k_grid=k.grid, v_grid=v.grid)

    def ours(q, k, v):
        return cache_attention(q, k, v, start=start, window=11)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(f):
        def loss(q, scales):
            stores = (
                PackedHeads(words=h.words, scale=s[0], lo=s[1], grid=h.grid, head_dim=32)
                for h, s in zip((k, v), scales, strict=True)
            )
            return jnp.sum(jnp.sin(f(q, *stores)))

        moving = (q, ((k.scale, k.lo), (v.scale, None)))
        gradient = jax.grad(loss, argnums=(0, 1))
        return gradient(*moving), jax.jvp(gradient, moving, jax.tree.map(jnp.cos, moving))[1]

    jax.tree.map(lambda a, b: close(a, b, 1e-4), derivatives(ours), derivatives(plain))


def test_choice_of_the_kernel():
    skip_without_kernel("kernel")
    q, k, v, _ = problem(1, 1, 40, 2, 2, 48, (GRID, GRID))

    def text(q, k, v):
        return jax.jit(lambda q: cache_attention(q, k, v, start=3)).lower(q).as_text()

    assert TARGET in text(q, k, v)
    many = jnp.repeat(q, cpu.LARGEST_TOKENS + 1, axis=1)
    assert TARGET not in text(many, k, v)
    odd = problem(1, 1, 40, 2, 2, 48, (ActivationGrid(bits=4, group_size=24), GRID))[1]
    assert TARGET not in text(q, k, odd)
    with pytest.raises(UsageError, match="groups of 24 channels are not multiples of 16"):
        cache_attention(q, k, odd, start=3, backend="kernel")


def test_shapes_that_do_not_fit():
    q, k, v, _ = problem(1, 1, 8, 2, 2, 16, (GRID, GRID))
    with pytest.raises(InputError, match=r"3 heads a multiple of 2"):
        cache_attention(q[:, :, :3], k, v, start=3)
    with pytest.raises(InputError, match=r"keys .* and values .* differ"):
        cache_attention(q, k, jax.tree.map(lambda a: a[:, 1:], v), start=3)
    with pytest.raises(
        InputError, match=r"queries \(1, 4, 16\) .* no floats of \(batch, tokens, heads, head_dim\)"
    ):
        cache_attention(q[0], k, v, start=3)
    for window in (0, -1, 2**31):
        with pytest.raises(InputError, match=f"window={window}: a token sees itself; give 1 or more"):
            cache_attention(q, k, v, start=3, window=window)
    for start in (-1, 8, 2**31):
        with pytest.raises(InputError, match=f"start={start}: 1 tokens from there on do not fit 8 places"):
            cache_attention(q, k, v, start=start)


def test_no_queries(attend):
    q, k, v, start = problem(2, 1, 8, 2, 2, 16, (GRID, GRID))
    assert attend(q[:, :0], k, v, start=start).shape == (2, 0, 4, 16)
    k, v = jax.tree.map(lambda a: a[:0], (k, v))
    assert attend(q[:0], k, v, start=start[:0]).shape == (0, 1, 4, 16)


@pytest.mark.parametrize("backend", ["portable", "kernel"])
def test_programs_do_not_grow_with_the_cache(backend):
    q, k, v, _ = problem(1, 1, 8, 2, 2, 64, (GRID, GRID))

    def text(places):
        wide = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, places, *a.shape[2:]), a.dtype), (k, v))
        of = jax.jit(lambda q, k, v: cache_attention(q, k, v, start=3, window=5, backend=backend))
        return of.trace(q, *wide).lower(lowering_platforms=("tpu",)).as_text()

    small, large = text(512), text(16384)
    assert ("tpu_custom_call" in small) == (backend == "kernel")
    assert small.count("\n") == large.count("\n")
    assert len(large) < 1.05 * len(small)
