"""Conjugate gradients against numpy's solver."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.linalg import conjugate_gradients


def systems(count: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, n, n)) * rng.lognormal(0, 2, (count, n, 1))
    b = rng.standard_normal((count, n)) * 10.0 ** rng.uniform(-8, 8, (count, 1))
    return np.eye(n) + x @ x.transpose(0, 2, 1) / n, b


@functools.partial(jax.jit)
def solve(a, b):
    return conjugate_gradients(
        lambda x: jnp.einsum("cij,cj->ci", a, x, precision="highest"),
        b,
        diagonal=jnp.diagonal(a, axis1=1, axis2=2),
    )


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 1e-4), (jnp.float64, 1e-10)])
def test_every_system_reaches_the_tolerance_whatever_its_scale(dtype, limit):
    a, b = systems(7, 12)
    with jax.enable_x64(dtype == jnp.float64):
        x = np.asarray(solve(jnp.asarray(a, dtype), jnp.asarray(b, dtype)), np.float64)
    expected = np.linalg.solve(a, b[..., None])[..., 0]
    assert np.all(np.linalg.norm(x - expected, axis=1) < limit * np.linalg.norm(expected, axis=1))


def test_a_zero_right_side_gives_zero():
    a, b = systems(3, 8)
    b[1] = 0
    x = np.asarray(solve(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)))
    np.testing.assert_array_equal(x[1], 0)
    assert np.all(np.isfinite(x))


def test_gradient_is_that_of_the_inverse():
    a, b = systems(2, 6)
    with jax.enable_x64(True):
        a, b = jnp.asarray(a), jnp.asarray(b / np.abs(b).max(1, keepdims=True))
        ours = jax.grad(lambda a, b: jnp.sum(jnp.sin(solve(a, b))), argnums=(0, 1))(a, b)
        theirs = jax.grad(
            lambda a, b: jnp.sum(jnp.sin(jnp.linalg.solve(a, b[..., None])[..., 0])), argnums=(0, 1)
        )(a, b)
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-8, atol=1e-10)
