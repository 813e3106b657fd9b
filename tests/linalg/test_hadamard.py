"""Hadamard matrices: exact, normalized, and equal to their fast transform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxquant.errors import UsageError
from jaxquant.linalg import (
    base_order,
    hadamard,
    hadamard_factors,
    hadamard_transform,
    random_hadamard,
    random_orthogonal,
)

UNKNOWN = {92, 116, 156, 172, 184, 188}
transform = jax.jit(hadamard_transform)


def assert_hadamard(n: int) -> None:
    h = hadamard(n).astype(int)
    assert h.shape == (n, n)
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n, dtype=int))
    np.testing.assert_array_equal(h[0], 1)
    np.testing.assert_array_equal(h[:, 0], 1)


def test_every_known_order_up_to_200_is_exact():
    for n in (1, 2, *(n for n in range(4, 201, 4) if n not in UNKNOWN)):
        assert_hadamard(n)


@pytest.mark.parametrize("n", [576, 640, 896, 960, 1152, pytest.param(1536, marks=pytest.mark.slow)])
def test_orders_of_models_are_exact(n):
    assert_hadamard(n)


@pytest.mark.parametrize(
    ("n", "base"), [(1, 1), (64, 1), (576, 36), (896, 28), (1536, 12), (4864, 76), (5632, 44), (8960, 140)]
)
def test_the_base_is_the_smallest(n, base):
    assert base_order(n) == base


@pytest.mark.parametrize(
    ("n", "factors"),
    [(1, (1,)), (64, (64,)), (128, (16, 8)), (576, (36, 16)), (1536, (48, 32)), (4864, (76, 64))],
)
def test_factors_are_few_and_even(n, factors):
    assert hadamard_factors(n) == factors
    np.testing.assert_array_equal(functools.reduce(np.kron, map(hadamard, factors)), hadamard(n))


@pytest.mark.parametrize(("n", "factors"), [(4096, (64, 64)), (14336, (28, 32, 16)), (28672, (28, 32, 32))])
def test_factors_of_wide_models_are_small(n, factors):
    assert hadamard_factors(n) == factors


def test_powers_of_two_are_sylvester():
    np.testing.assert_array_equal(hadamard(32), scipy.linalg.hadamard(32))


@pytest.mark.parametrize("n", [0, -4, 3, 6, 9, 14, 15, *sorted(UNKNOWN)])
def test_other_orders_are_refused(n):
    with pytest.raises(UsageError, match=f"no Hadamard matrix of order {n} is known here; use blocks"):
        hadamard(n)


def test_the_matrix_cannot_be_overwritten():
    with pytest.raises(ValueError, match="read-only"):
        hadamard(4)[0, 0] = 0


@pytest.mark.parametrize("n", [1, 2, 8, 12, 52, 128, 576, 1536, pytest.param(7168, marks=pytest.mark.slow)])
def test_the_fast_transform_is_the_product(n):
    x = np.random.default_rng(n).standard_normal((3, 5, n))
    expected = x @ hadamard(n).astype(float) / n**0.5
    np.testing.assert_allclose(transform(jnp.asarray(x, jnp.float32)), expected, atol=2e-5)
    with jax.enable_x64(True):
        np.testing.assert_allclose(transform(jnp.asarray(x)), expected, atol=1e-12)
    assert transform(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_fast_transform_does_not_multiply_by_the_whole_matrix():
    cost = jax.jit(hadamard_transform).lower(jnp.zeros((1, 4096))).compile().cost_analysis()
    assert cost["flops"] < 1.1 * 2 * (64 + 64) * 4096


def test_half_precision_does_not_overflow_and_integers_are_refused():
    x = jnp.full((1, 4096), 50, jnp.float16)
    np.testing.assert_array_equal(transform(x)[0, :2], [3200, 0])
    assert transform(jnp.zeros((0, 8))).shape == (0, 8)
    with pytest.raises(UsageError, match="x is int32; cast it to a float dtype"):
        hadamard_transform(jnp.arange(8))


def test_vmap_and_gradient():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 24)), jnp.float32)
    np.testing.assert_allclose(jax.vmap(hadamard_transform)(x), hadamard_transform(x), atol=1e-6)
    c = jnp.arange(24.0)
    gradient = jax.jit(jax.grad(lambda v: hadamard_transform(v) @ c))(x[0])
    np.testing.assert_allclose(gradient, hadamard(24) @ np.arange(24.0) / 24**0.5, atol=1e-4)


@pytest.mark.parametrize("make", [random_orthogonal, random_hadamard])
def test_random_rotations_are_orthogonal_and_repeat(make):
    r = make(60, seed=3)
    assert r.dtype == np.float64
    assert np.abs(r.T @ r - np.eye(60)).max() <= 1e-12
    np.testing.assert_array_equal(r, make(60, seed=3))
    assert np.abs(r - make(60, seed=4)).max() > 0.1


def test_signs_are_on_the_input_side():
    """The first input still spreads evenly over all outputs, as an offset; signs on outputs end that."""
    r = random_hadamard(20, seed=0)
    assert np.ptp(r[0]) == 0
    assert np.ptp(r[:, 0]) > 0.4
