"""The damped inverse factor: right where it can be, honest where it cannot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.linalg import damped_factor, upper_cholesky

factor = jax.jit(damped_factor)


def second_moments(n: int, tokens: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, n)) @ (np.eye(n) + rng.standard_normal((n, n)) / n**0.5)
    return x.T @ x


def with_eigenvalues(values: np.ndarray, seed: int = 0) -> np.ndarray:
    n = len(values)
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    h = (q * values) @ q.T
    return (h + h.T) / 2


def relative_error(result, h: np.ndarray) -> float:
    """The larger of those of U^T U and `damped_inverse`, against (H + damping)^-1 as reported."""
    n = h.shape[0]
    mean = np.mean(np.diagonal(h))
    damped = h.astype(np.float64) + float(result.damping) * (mean if mean > 0 else 1) * np.eye(n)
    u = np.asarray(result.inverse, np.float64)
    a = np.asarray(result.upper, np.float64)
    assert np.linalg.norm(a @ a.T - damped) < 1e-5 * np.linalg.norm(damped)
    expected = np.linalg.inv(damped)
    whole = np.asarray(result.damped_inverse, np.float64)
    np.testing.assert_array_equal(whole, whole.T)
    return max(np.linalg.norm(a - expected) for a in (u.T @ u, whole)) / np.linalg.norm(expected)


def assert_upper(result) -> None:
    for factor_ in (result.upper, result.inverse):
        assert np.all(np.isfinite(factor_))
        np.testing.assert_array_equal(np.tril(factor_, -1), 0)
        assert np.all(np.diagonal(factor_) > 0)


def test_equals_the_textbook_factor_in_float64():
    """cholesky -> inverse -> upper cholesky, as the published code does it."""
    h = second_moments(80, 200)
    with jax.enable_x64(True):
        a = np.asarray(upper_cholesky(jnp.asarray(h)))
        result = damped_factor(jnp.asarray(h), 1e-15)
        assert result.upper.dtype == jnp.float64
        u = np.asarray(result.inverse)
        assert relative_error(result, h) < 1e-10
    expected = np.linalg.cholesky(np.linalg.inv(h)).T
    np.testing.assert_allclose(u, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    np.testing.assert_allclose(a @ a.T, h, rtol=0, atol=1e-10 * np.abs(h).max())


def test_float32():
    h = second_moments(80, 200)
    result = factor(jnp.asarray(h, jnp.float32))
    assert result.upper.dtype == jnp.float32
    assert_upper(result)
    assert relative_error(result, h) < 1e-4
    assert int(result.attempts) == 1
    assert float(result.damping) == pytest.approx(0.01)
    assert bool(result.finite)
    assert not bool(result.fallback)


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_unit_free(unit):
    h = second_moments(40, 100)
    base, scaled = factor(jnp.asarray(h, jnp.float32)), factor(jnp.asarray(unit * h, jnp.float32))
    np.testing.assert_allclose(np.asarray(scaled.upper) / unit**0.5, base.upper, rtol=2e-3, atol=1e-6)


def test_upper_cholesky_says_nan_where_not_positive_definite():
    h = jnp.asarray(with_eigenvalues(np.r_[np.ones(9), -0.5]), jnp.float32)
    assert not np.isfinite(float(upper_cholesky(h)[0, 0]))


@pytest.mark.parametrize(
    "h",
    [
        second_moments(64, 8),
        np.outer(np.arange(1.0, 65), np.arange(1.0, 65)),
        np.diag(np.r_[np.zeros(10), np.ones(54)]),
        with_eigenvalues(np.r_[-1e-6, np.geomspace(1e-6, 1, 63)]),
    ],
    ids=["rank 8", "rank one", "dead inputs", "indefinite by rounding"],
)
def test_the_first_rung_carries_semi_definite_matrices(h):
    result = factor(jnp.asarray(h, jnp.float32))
    assert_upper(result)
    assert int(result.attempts) == 1
    assert relative_error(result, h.astype(np.float32)) < 1e-3


def test_all_zero():
    result = factor(jnp.zeros((16, 16)))
    assert_upper(result)
    assert (int(result.attempts), bool(result.fallback), bool(result.finite)) == (1, False, True)


@pytest.mark.parametrize("negative", [-0.015, -0.1, -1.0, -5.0])
def test_reported_damping_and_attempts_are_the_ones_used(negative):
    """The smallest eigenvalue decides which rung is the first above it; no lower one can have worked."""
    h = with_eigenvalues(np.r_[negative, np.full(49, 1.0)])
    mean = np.mean(np.diagonal(h))
    result = factor(jnp.asarray(h, jnp.float32))
    rungs = 0.01 * 2.0 ** np.arange(11)
    expected = int(np.argmax(rungs * mean > -negative))
    assert float(result.damping) == pytest.approx(rungs[expected])
    assert int(result.attempts) == expected + 1
    assert not bool(result.fallback)
    assert_upper(result)
    assert relative_error(result, h.astype(np.float32)) < 1e-3


def test_fallback_is_diagonal():
    h = with_eigenvalues(np.r_[-100.0, np.full(29, 4.0)])
    result = factor(jnp.asarray(h, jnp.float32))
    assert bool(result.fallback)
    assert int(result.attempts) == 11
    assert_upper(result)
    np.testing.assert_array_equal(result.upper, np.diag(np.diagonal(result.upper)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_is_flagged_and_does_not_spread(bad):
    h = second_moments(16, 40)
    h[3, 5] = bad
    result = factor(jnp.asarray(h, jnp.float32))
    assert not bool(result.finite)
    assert_upper(result)


def test_vmap_equals_a_loop_with_mixed_attempts():
    stack = [
        second_moments(24, 60),
        with_eigenvalues(np.r_[-0.1, np.ones(23)]),
        with_eigenvalues(np.r_[-100.0, np.full(23, 4.0)]),
        np.zeros((24, 24)),
        np.full((24, 24), np.nan),
    ]
    h = jnp.asarray(np.stack(stack), jnp.float32)
    batched = jax.jit(jax.vmap(damped_factor))(h)
    loop = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[factor(m) for m in h])
    np.testing.assert_array_equal(batched.attempts, loop.attempts)
    assert len(set(np.asarray(loop.attempts).tolist())) >= 3
    np.testing.assert_array_equal(batched.damping, loop.damping)
    np.testing.assert_array_equal(batched.fallback, loop.fallback)
    np.testing.assert_array_equal(batched.finite, loop.finite)
    np.testing.assert_allclose(batched.upper, loop.upper, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [255, 256, 1100])
def test_panels_give_the_factor_of_the_whole(n):
    h = second_moments(n, 2 * n) / n + 0.1 * np.eye(n)
    a = np.asarray(upper_cholesky(jnp.asarray(h)), np.float64)
    expected = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    np.testing.assert_allclose(a, expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(np.tril(a, -1), 0)


@pytest.mark.parametrize("n", [145, 257, pytest.param(577, marks=pytest.mark.slow)])
def test_inverses_by_halves(n):
    """Sizes below and above one panel, odd ones too: the factor's inverse, and the inverse itself."""
    h = second_moments(n, 2 * n) / n
    result = factor(jnp.asarray(h, jnp.float32))
    assert_upper(result)
    assert relative_error(result, h.astype(np.float32)) < 1e-4
