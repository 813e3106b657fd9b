"""Null spaces: the hard one's budget, the soft one's inverse, the routes without eigenvectors, stability."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spectra import power_law, with_spectrum

from jaxquant import linalg
from jaxquant.linalg import hard_null_space, soft_from_factor, soft_null_space, tail_null_space

anti_shift, intersect = jax.jit(linalg.anti_shift), jax.jit(linalg.intersect)
damped_factor, from_factor = jax.jit(linalg.damped_factor), jax.jit(soft_from_factor)
deflated_mean = jax.jit(linalg.deflated_mean, static_argnames="deflate")
stability = jax.jit(linalg.subspace_stability, static_argnames="deflate")
hard = jax.jit(hard_null_space, static_argnames="deflate")
soft = jax.jit(soft_null_space, static_argnames="deflate")
tail = jax.jit(tail_null_space, static_argnames=("rank", "steps", "deflate"))


def massive(h: np.ndarray, size: float = 1e3, seed: int = 9) -> np.ndarray:
    v = np.random.default_rng(seed).standard_normal(len(h))
    return h + size * np.outer(v, v) / (v @ v)


@pytest.mark.parametrize("gamma", [1e-3, 1e-2, 0.1])
def test_the_space_is_the_largest_tail_within_its_budget(gamma):
    h = power_law(80)
    values, vectors = np.linalg.eigh(h)
    total = values[:-1].sum()
    rank = int(np.sum(np.cumsum(values) <= gamma * total))
    with jax.enable_x64(True):
        space = hard(jnp.asarray(h), gamma=gamma)
        p = np.asarray(space.projector)
    assert int(space.rank) == rank
    assert 0 < float(space.energy) <= gamma
    assert float(space.energy) == pytest.approx(values[:rank].sum() / total)
    np.testing.assert_allclose(p, vectors[:, :rank] @ vectors[:, :rank].T, atol=1e-10)
    np.testing.assert_allclose(p @ p, p, atol=1e-10)
    single = hard(jnp.asarray(h, jnp.float32), gamma=gamma)
    assert abs(int(single.rank) - rank) <= 1
    assert float(hard(jnp.asarray(1e9 * h, jnp.float32), gamma=gamma).energy) == pytest.approx(
        float(single.energy), rel=1e-3
    )


def test_a_massive_direction_does_not_change_the_rank():
    h = power_law(400)
    alone = int(hard(jnp.asarray(h, jnp.float32), gamma=1e-3, deflate=0).rank)
    with_one = jnp.asarray(massive(h), jnp.float32)
    assert int(hard(with_one, gamma=1e-3, deflate=1).rank) == pytest.approx(alone, rel=0.05)
    assert int(hard(with_one, gamma=1e-3, deflate=0).rank) > 390


def test_a_flat_spectrum_has_no_null_space():
    space = hard(jnp.eye(200), gamma=1e-3)
    assert int(space.rank) == 0
    assert float(space.energy) == 0
    np.testing.assert_array_equal(space.projector, 0)
    assert int(hard(jnp.eye(200), gamma=0.05).rank) <= 0.05 * 200 + 1


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_where_nothing_is_known_nothing_moves(bad):
    h = jnp.asarray(power_law(16), jnp.float32).at[2, 3].set(bad)
    assert int(hard(h, gamma=0.1).rank) == 0
    np.testing.assert_array_equal(soft(h, eta=1e3), 0)
    factor = damped_factor(h)
    np.testing.assert_array_equal(from_factor(factor)[0], 0)
    assert int(tail(factor, gamma=0.1, rank=8).rank) == 0


def test_inputs_that_are_all_dead_are_all_null_space():
    zero = jnp.zeros((12, 12))
    assert int(hard(zero, gamma=0).rank) == 12
    np.testing.assert_allclose(hard(zero, gamma=0).projector, np.eye(12), atol=1e-6)
    np.testing.assert_allclose(soft(zero, eta=1e3, mu=2.0), np.eye(12) / 2, rtol=1e-6)
    assert float(deflated_mean(zero)) == 1


@pytest.mark.parametrize("size", [0.0, 1e3, 1e5])
def test_deflated_mean(size):
    h = massive(power_law(300), size)
    expected = np.linalg.eigvalsh(h)[:-1].sum() / 300
    assert float(deflated_mean(jnp.asarray(h, jnp.float32))) == pytest.approx(
        expected, rel=max(1e-4, 3e-7 * size / expected)
    )
    assert float(deflated_mean(jnp.asarray(h, jnp.float32), deflate=0)) == pytest.approx(
        np.trace(h) / 300, rel=1e-5
    )
    assert float(deflated_mean(jnp.ones((1, 1)))) == 1


@pytest.mark.parametrize("mu2", [0.0, 0.3])
@pytest.mark.parametrize("eta", [0.0, 1e2, 1e4])
def test_soft_is_the_resolvent(eta, mu2):
    n, mu = 60, 0.7
    h = power_law(n)
    mean = np.linalg.eigvalsh(h)[:-1].sum() / n
    expected = np.linalg.inv(eta * h / mean + mu * np.eye(n) + mu2 * np.ones((n, n)))
    with jax.enable_x64(True):
        g = soft(jnp.asarray(h), eta=eta, mu=mu, mu2=mu2)
        assert g.dtype == jnp.float64
        # The mean eigenvalue comes from an iteration: what is exact is exact given that.
        mean = float(deflated_mean(jnp.asarray(h)))
    exact = np.linalg.inv(eta * h / mean + mu * np.eye(n) + mu2 * np.ones((n, n)))
    np.testing.assert_allclose(g, exact, atol=1e-10)
    np.testing.assert_allclose(g, expected, atol=1e-6)
    single = soft(jnp.asarray(1e7 * h, jnp.float32), eta=eta, mu=mu, mu2=mu2)
    np.testing.assert_allclose(single, expected, atol=2e-4)


@pytest.mark.parametrize("spread", [True, False], ids=["in all channels", "in one channel"])
def test_soft_survives_a_massive_direction_in_float32(spread):
    h = power_law(96)
    mean = np.trace(h) / 96
    if spread:
        # Stored in float32 among all entries, a larger one would drown the rest before anything is computed.
        h = massive(h, 96 * 1e2 * mean)
    else:
        h[5, 5] += 96 * 1e4 * mean
    with jax.enable_x64(True):
        exact = np.asarray(soft(jnp.asarray(h), eta=1e3))
    single = np.asarray(soft(jnp.asarray(h, jnp.float32), eta=1e3))
    assert np.linalg.norm(single - exact) < (0.02 if spread else 1e-3) * np.linalg.norm(exact)


def test_soft_from_the_factor_of_gptq():
    h = massive(power_law(60), 3.0)
    with jax.enable_x64(True):
        factor = damped_factor(jnp.asarray(h), 0.01)
        g, eta = from_factor(factor, mu=0.5, mu2=0.1)
        mean = float(deflated_mean(jnp.asarray(h)))
        assert float(eta) == pytest.approx(0.5 * mean / (0.01 * np.trace(h) / 60), rel=1e-6)
        np.testing.assert_allclose(
            g, soft(jnp.asarray(h), eta=float(eta), mu=0.5, mu2=0.1), rtol=1e-5, atol=1e-8
        )
    single = from_factor(damped_factor(jnp.asarray(h, jnp.float32), 0.01), mu=0.5, mu2=0.1)[0]
    np.testing.assert_allclose(single, g, atol=2e-4)


def test_anti_shift_prices_the_sum():
    g = soft(jnp.asarray(power_law(40), jnp.float32), eta=1e2)
    priced = np.asarray(anti_shift(g, 1e6))
    assert np.abs(priced.sum(1)).max() < 1e-3 * np.abs(np.asarray(g).sum(1)).max()


def test_tail_iteration_finds_the_space_without_eigenvectors():
    """A gap, then a power law: the space in one case, its energy in the other."""
    gap = with_spectrum(np.r_[np.full(30, 1e-5), np.linspace(0.5, 2, 70)])
    with jax.enable_x64(True):
        factor = damped_factor(jnp.asarray(gap), 0.01)
        ours, exact = tail(factor, gamma=1e-3, rank=40), hard(jnp.asarray(gap), gamma=1e-3)
        assert int(ours.rank) == int(exact.rank) == 30
        np.testing.assert_allclose(ours.projector, exact.projector, atol=1e-5)
        assert float(ours.energy) == pytest.approx(float(exact.energy), rel=1e-2)
    h = power_law(200)
    exact = hard(jnp.asarray(h, jnp.float32), gamma=0.01)
    ours = tail(damped_factor(jnp.asarray(h, jnp.float32), 1e-3), gamma=0.01, rank=180)
    assert 0.9 * int(exact.rank) <= int(ours.rank) <= int(exact.rank) + 1
    p = np.asarray(ours.projector, np.float64)
    np.testing.assert_allclose(p @ p, p, atol=1e-4)
    deflated = np.linalg.eigvalsh(h)[:-1].sum()
    assert np.sum(p * h) <= 1.05 * 0.01 * deflated


def test_stability():
    h = [power_law(64, seed=0), power_law(64, seed=1)]
    spaces = [hard(jnp.asarray(m, jnp.float32), gamma=0.05) for m in h]
    p1, p2 = (space.projector for space in spaces)
    k = int(spaces[0].rank)
    same = stability(p1, p1, jnp.asarray(h[0], jnp.float32))
    assert float(same.mean_squared_cosine) == pytest.approx(1, abs=1e-5)
    assert float(same.largest_cosine) == pytest.approx(1, abs=1e-4)
    assert float(same.random_baseline) == pytest.approx(k / 64, rel=1e-4)
    assert float(same.cross_energy) == pytest.approx(float(spaces[0].energy), rel=1e-2)
    other = stability(p1, p2, jnp.asarray(h[1], jnp.float32), deflate=0)
    assert float(other.mean_squared_cosine) == pytest.approx(k / 64, rel=0.1)
    expected = np.sum(np.asarray(p1) * h[1]) / np.trace(h[1])
    assert float(other.cross_energy) == pytest.approx(expected, rel=1e-3)
    assert float(other.cross_energy) > 5 * float(same.cross_energy)
    empty = stability(jnp.zeros((64, 64)), p2, jnp.asarray(h[1], jnp.float32))
    assert float(empty.mean_squared_cosine) == float(empty.largest_cosine) == float(empty.cross_energy) == 0
    norm = np.linalg.norm(np.asarray(p1) @ np.asarray(p2), 2)
    assert float(other.largest_cosine) == pytest.approx(norm, rel=0.05)


def test_intersection_is_what_all_share():
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))
    shared, first, second = q[:, :6], q[:, 6:12], q[:, 12:20]
    projectors = [z @ z.T for z in (np.c_[shared, first], np.c_[shared, second])]
    p = intersect(jnp.asarray(np.stack(projectors), jnp.float32))
    np.testing.assert_allclose(p, shared @ shared.T, atol=1e-5)
    np.testing.assert_array_equal(intersect(jnp.zeros((3, 8, 8))), 0)


def test_gradient_of_the_resolvent():
    h = power_law(20)
    with jax.enable_x64(True):
        h = jnp.asarray(h)

        def value(eta, mu):
            return jnp.sum(jnp.sin(soft(h, eta=eta, mu=mu, mu2=0.1)))

        point, step = (jnp.asarray(30.0), jnp.asarray(0.8)), 1e-5
        ours = jax.grad(value, argnums=(0, 1))(*point)
        for i in range(2):
            moved = [jnp.stack([*point]).at[i].add(sign * step) for sign in (1, -1)]
            expected = (value(*moved[0]) - value(*moved[1])) / (2 * step)
            assert float(ours[i]) == pytest.approx(float(expected), rel=1e-6)


def test_vmap_equals_a_loop():
    stack = jnp.asarray(
        np.stack([power_law(24), massive(power_law(24)), np.eye(24), np.zeros((24, 24))]), jnp.float32
    )

    def everything(h):
        factor = linalg.damped_factor(h, 0.01)
        return (
            hard_null_space(h, gamma=0.05).projector,
            soft_null_space(h, eta=1e2),
            soft_from_factor(factor)[0],
            tail_null_space(factor, gamma=0.05, rank=12).energy,
        )

    batched = jax.jit(jax.vmap(everything))(stack)
    one = jax.jit(everything)
    for i, h in enumerate(stack):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3),
            jax.tree.map(lambda leaf, i=i: leaf[i], batched),
            one(h),
        )
