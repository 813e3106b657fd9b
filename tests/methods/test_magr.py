"""MagR against bisection, a general solver in float64, and its guarantees."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_reference import correlated_layer, moments_of, relative_layer_error
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.errors import UsageError
from jaxquant.methods import Problem, linf_prox, magr
from jaxquant.quant import Grid

prox = jax.jit(linf_prox)


def problem_of(w, x, grid, dtype=jnp.float32) -> Problem:
    return Problem.of(jnp.asarray(w, dtype), moments_of(x, dtype), grid)


def prox_by_bisection(v: np.ndarray, alpha: float) -> np.ndarray:
    """The t in [0, max|v|] where what is cut off adds up to alpha."""
    low, high = np.zeros(v.shape[1]), np.abs(v).max(0)
    for _ in range(200):
        t = (low + high) / 2
        over = np.maximum(np.abs(v) - t, 0).sum(0) > alpha
        low, high = np.where(over, t, low), np.where(over, high, t)
    return np.clip(v, -high, high)


def objective(w, w0, x, alpha, groups) -> np.ndarray:
    """Of every column, in float64; H1 from the eigenvalues, not from a power iteration."""
    h = x.T @ x
    d = w - w0
    fit = np.sum(d * (h / np.linalg.eigvalsh(h)[-1] / 1.01 @ d), axis=0) / 2
    return fit + alpha * np.abs(w.reshape(groups, -1, w.shape[1])).max(1).sum(0)


def solve(w0, x, alpha, groups) -> np.ndarray:
    """The same problem with the maxima as variables t: minimize 1/2 |..|^2 + alpha sum t, |w| <= t."""
    from scipy.optimize import minimize

    h, n = x.T @ x, len(w0)
    h = h / np.linalg.eigvalsh(h)[-1]
    pick = np.kron(np.eye(groups), np.ones((n // groups, 1)))
    bounds = np.block([[-np.eye(n), pick], [np.eye(n), pick]])
    result = minimize(
        lambda z: (z[:n] - w0) @ h @ (z[:n] - w0) / 2 + alpha * z[n:].sum(),
        np.concatenate([w0, np.full(groups, np.abs(w0).max())]),
        jac=lambda z: np.concatenate([h @ (z[:n] - w0), np.full(groups, alpha)]),
        constraints={"type": "ineq", "fun": lambda z: bounds @ z, "jac": lambda z: bounds},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return result.x[:n]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(-6, 3), st.sampled_from(["normal", "ties", "sparse", "outlier"]))
def test_prox_equals_bisection(seed, exponent, kind):
    rng = np.random.default_rng(seed)
    v = rng.standard_normal((32, 5))
    v = {"normal": v, "ties": np.round(v), "sparse": v * (rng.random(v.shape) < 0.1), "outlier": v**9}[kind]
    alpha = 10.0**exponent
    expected = prox_by_bisection(v, alpha)
    size = max(1, np.abs(v).max())
    with jax.enable_x64(True):
        np.testing.assert_allclose(prox(jnp.asarray(v), alpha), expected, rtol=0, atol=1e-13 * size)
    single = prox(jnp.asarray(v, jnp.float32), alpha)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-6 * size)


def test_prox_at_its_ends():
    v = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 5)), jnp.float32)
    np.testing.assert_array_equal(prox(v, 0.0), v)
    np.testing.assert_array_equal(prox(v, 1e4), 0 * v)
    np.testing.assert_array_equal(prox(v, 0.5)[1], prox(v[1], 0.5))


@pytest.mark.parametrize("groups", [1, 3])
def test_converges_to_the_solution_of_a_general_solver(groups):
    rng = np.random.default_rng(3)
    w, x = rng.standard_normal((12, 4)), rng.standard_normal((40, 12))
    grid = Grid(group_size=None if groups == 1 else 4)
    with jax.enable_x64(True):
        ours = np.asarray(magr(problem_of(w, x, grid, jnp.float64), alpha=0.2, iterations=2000).weight)
    # The power iteration and its margin make lambda_max 1.01 of the true one.
    theirs = np.stack([solve(column, x, 0.2 * 1.01, groups) for column in w.T], axis=1)
    assert np.abs(ours - w).max() > 0.1, "the strength must matter"
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    scores = [objective(v, w, x, 0.2, groups) for v in (ours, theirs)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)


@pytest.mark.parametrize("group_size", [None, 32])
def test_the_objective_falls_with_every_step(group_size):
    w, x = correlated_layer(96, 24)
    grid = Grid(group_size=group_size)
    with jax.enable_x64(True):
        one = jax.jit(lambda p, n: magr(p, alpha=0.05, iterations=n), static_argnums=1)
        problem = problem_of(w, x, grid, jnp.float64)
        weights = [w, *(np.asarray(one(problem, n).weight) for n in (1, 10, 150))]
    scores = np.stack([objective(v, w, x, 0.05, grid.groups(96)) for v in weights])
    assert np.all(np.diff(scores, axis=0) < 0)
    single = magr(problem_of(w, x, grid), alpha=0.05).weight
    np.testing.assert_allclose(single, weights[-1], atol=1e-4)


def test_shrinks_ranges_and_helps_rounding():
    w, x = correlated_layer(96, 24)
    problem = problem_of(w * 0.05, x, Grid(bits=2, group_size=32))
    shrunk = magr(problem)
    before, after = (np.abs(np.asarray(p.weight)).reshape(3, -1, 24).max(1) for p in (problem, shrunk))
    assert np.all(after < before)
    errors = [
        relative_layer_error(np.asarray(p.grid.fake_quantize(p.weight)), w * 0.05, x)
        for p in (problem, shrunk)
    ]
    assert errors[1] < errors[0]


def test_nothing_but_the_weight_changes():
    w, x = correlated_layer(96, 24)
    problem = problem_of(w, x, Grid(group_size=32))
    result = magr(problem)
    np.testing.assert_array_equal(result.target, problem.target)
    np.testing.assert_array_equal(result.moments.second, problem.moments.second)
    assert result.grid == problem.grid
    np.testing.assert_array_equal(magr(problem, alpha=0.0).weight, problem.weight)


def test_default_strengths():
    w, x = correlated_layer(96, 24)
    for grid, alpha in ((Grid(), 1e-3), (Grid(group_size=96), 1e-3), (Grid(group_size=32), 1e-4)):
        problem = problem_of(w, x, grid)
        np.testing.assert_array_equal(magr(problem).weight, magr(problem, alpha=alpha).weight)


def test_dead_inputs_keep_their_weight_and_do_not_count():
    w, x = correlated_layer(96, 24, dead=5)
    dead = np.abs(x).max(0) == 0
    quiet, loud = w.copy(), w.copy()
    loud[dead] = 100
    quiet[dead] = 0
    results = [np.asarray(magr(problem_of(v, x, Grid()), alpha=0.05).weight) for v in (quiet, loud)]
    np.testing.assert_array_equal(results[0][~dead], results[1][~dead])
    np.testing.assert_array_equal(results[1][dead], 100)
    silent = problem_of(w, np.zeros((3, 96)), Grid())
    np.testing.assert_array_equal(magr(silent, alpha=0.05).weight, silent.weight)


@pytest.mark.parametrize("group_size", [None, 32])
def test_vmap_over_layers_equals_a_loop(group_size):
    problems = [
        problem_of(*correlated_layer(96, 24, seed=s, dead=s), Grid(group_size=group_size)) for s in range(3)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    batched = jax.jit(jax.vmap(lambda p: magr(p, alpha=0.05)))(stacked)
    for i, problem in enumerate(problems):
        np.testing.assert_allclose(batched.weight[i], magr(problem, alpha=0.05).weight, atol=1e-5)


def test_half_precision_comes_out_wide():
    w, x = correlated_layer(96, 24)
    half = Problem.of(jnp.asarray(w, jnp.bfloat16), moments_of(x), Grid())
    wide = dataclasses.replace(half, weight=half.weight.astype(jnp.float32))
    assert magr(half).weight.dtype == jnp.float32
    np.testing.assert_array_equal(magr(half).weight, magr(wide).weight)


def test_impossible_options():
    w, x = correlated_layer(96, 24)
    with pytest.raises(UsageError, match="96 inputs are not divisible by group_size=36"):
        magr(problem_of(w, x, Grid(group_size=36)))
    with pytest.raises(UsageError, match="iterations=-1 is negative"):
        magr(problem_of(w, x, Grid()), iterations=-1)
