"""Moments add up, whatever the order, the dtype and the transformation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.calibrate.moments import Moments, merge, observe


def tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def assert_same(a: Moments, b: Moments, rtol: float = 1e-5) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(jnp.max(jnp.abs(y))))


def test_equals_numpy():
    x = np.asarray(tokens(3, 7, 5))
    moments, flat = observe(jnp.asarray(x)), x.reshape(-1, 5).astype(np.float64)
    np.testing.assert_allclose(moments.second, flat.T @ flat, rtol=1e-5)
    np.testing.assert_array_equal(moments.max_abs, np.abs(x).reshape(-1, 5).max(0))
    assert int(moments.count) == 21
    np.testing.assert_allclose(moments.mean_second, flat.T @ flat / 21, rtol=1e-5)
    np.testing.assert_array_equal(moments.second, moments.second.T)


def test_streaming_equals_one_shot():
    x = tokens(40, 6)
    total = Moments.zeros(6)
    for start, stop in ((0, 1), (1, 17), (17, 40)):
        total = merge(total, observe(x[start:stop]))
    assert_same(total, observe(x))


def test_merge_is_associative_and_commutative():
    a, b, c = (observe(tokens(n, 6, seed=n)) for n in (3, 8, 20))
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert_same(merge(a, b), merge(b, a), rtol=0)
    assert_same(merge(a, Moments.zeros(6)), a, rtol=0)


def test_masked_tokens_do_not_count_even_if_nan():
    x = tokens(4, 9, 6)
    mask = jnp.arange(9)[None, :] >= jnp.asarray([0, 1, 5, 9])[:, None]
    kept = observe(x.reshape(-1, 6)[np.asarray(mask).reshape(-1)])
    assert_same(observe(jnp.where(mask[..., None], x, jnp.nan), mask=mask), kept)
    assert int(kept.count) == 21


def test_nothing_seen():
    assert_same(observe(jnp.zeros((0, 4))), Moments.zeros(4))
    assert_same(observe(tokens(3, 4), mask=jnp.zeros(3, bool)), Moments.zeros(4))
    np.testing.assert_array_equal(Moments.zeros(4).mean_second, 0)


def test_bfloat16_is_accumulated_in_float32():
    x = (1 + tokens(1024, 4) / 8).astype(jnp.bfloat16)
    moments = observe(x)
    assert moments.second.dtype == moments.max_abs.dtype == jnp.float32
    assert moments.count.dtype == jnp.int32
    exact = np.asarray(x.astype(jnp.float32), np.float64)
    np.testing.assert_allclose(moments.second, exact.T @ exact, rtol=1e-5)


def test_jit_vmap_and_scan_over_blocks_equal_a_loop():
    x = tokens(3, 2, 11, 6)
    loop = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[observe(block) for block in x])
    stacked = jax.jit(jax.vmap(observe))(x)
    assert_same(stacked, loop)
    np.testing.assert_allclose(stacked.mean_second, loop.second / 22, rtol=1e-5)
    total, _ = jax.lax.scan(lambda total, batch: (merge(total, observe(batch)), None), Moments.zeros(6), x)
    assert_same(total, observe(x))


@pytest.mark.parametrize("weighted", [False, True])
def test_drift_is_the_product_with_what_is_missing(weighted):
    x, original = tokens(3, 5, 4), tokens(3, 5, 4) + 0.1
    weights = jnp.linspace(0, 2, 15).reshape(3, 5) if weighted else None
    mask = jnp.arange(15).reshape(3, 5) != 7
    broken = original.at[1, 2].set(jnp.nan)  # is masked
    moments = observe(x, mask=mask, weights=weights, original=broken)
    r = np.asarray(mask, np.float64).ravel() * (1 if weights is None else np.asarray(weights).ravel())
    a, b = (np.asarray(part, np.float64).reshape(15, 4) for part in (x, original))
    np.testing.assert_allclose(moments.drift, (r[:, None] * a).T @ (b - a), rtol=1e-5, atol=1e-5)
    assert_same(dataclasses.replace(moments, drift=None), observe(x, mask=mask, weights=weights))


def test_drift_must_be_on_both_sides():
    a = observe(tokens(5, 4))
    b = dataclasses.replace(a, drift=jnp.eye(4))
    np.testing.assert_array_equal(merge(b, b).drift, 2 * jnp.eye(4))
    with pytest.raises(ValueError, match="one side has drift"):
        merge(a, b)
