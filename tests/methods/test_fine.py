"""Two-sided reconstruction: monotone, never below brute force, plain coordinate descent without a price."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.calibrate.moments import observe
from jaxquant.errors import UsageError
from jaxquant.methods import Problem, coordinate_descent, gptq, rtn
from jaxquant.methods.fine import backward_error, loss_descent, two_sided_descent
from jaxquant.quant import Grid


def low_rank_noise(rng, tokens: int, n: int, rank: int) -> np.ndarray:
    return rng.standard_normal((tokens, rank)) @ rng.standard_normal((rank, n)) + 0.3 * rng.standard_normal(
        (tokens, n)
    )


def layer(n: int, m: int, bits: int, *, seed=0, group_size=None, symmetric=False):
    """A problem, GPTQ's answer, and the second moment of gradients at the output."""
    rng = np.random.default_rng(seed)
    x, g = low_rank_noise(rng, 4 * n, n, n // 4), low_rank_noise(rng, 4 * n, m, max(m // 4, 1))
    w = jnp.asarray(rng.standard_normal((n, m)))
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric, clip="mse", scale_dtype="float32")
    moments = observe(jnp.asarray(x))
    return Problem.of(w, moments, grid), gptq(w, moments, grid), jnp.asarray(g.T @ g)


def objective(values, problem, outputs, strength, descend=two_sided_descent) -> float:
    d = np.asarray(values, np.float64) - np.asarray(problem.target, np.float64)
    inner, outer = (np.asarray(h, np.float64) for h in (problem.moments.second, outputs))
    inner, outer = (h / np.mean(np.diag(h)) for h in (inner, outer))
    felt = d.T @ inner @ d @ outer if descend is loss_descent else d @ outer @ d.T
    return float(np.trace(d.T @ inner @ d) + strength * np.trace(felt))


both = pytest.mark.parametrize("descend", [two_sided_descent, loss_descent])

unpacked = jax.jit(lambda rounded: rounded.pack().dequantize(jnp.float64))


def values_of(rounded):
    return unpacked(rounded)


@pytest.mark.parametrize("shape", [(96, 40), (64, 64), (70, 16)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("descend", "strength"), [(two_sided_descent, 0.1), (loss_descent, 4.0)])
def test_the_objective_falls_with_every_sweep(shape, symmetric, descend, strength):
    with jax.enable_x64(True):
        problem, rounded, outputs = layer(*shape, 2, group_size=None, symmetric=symmetric)
        before = objective(values_of(rounded), problem, outputs, strength, descend)
        for _ in range(4):
            rounded = descend(problem, rounded, outputs, strength=strength, sweeps=1)
            after = objective(values_of(rounded), problem, outputs, strength, descend)
            assert after <= before * (1 + 1e-9)
            before = after


def loss_sweep(problem, rounded, outputs, strength: float) -> np.ndarray:
    """Codes after one sweep by the formulas of `loss_descent`, one weight after another."""
    w, h, outer = (np.asarray(a, np.float64) for a in (problem.target, problem.moments.second, outputs))
    m = np.eye(w.shape[1]) + strength * outer / np.mean(np.diag(outer))
    rows_of_group = len(w) // len(rounded.scale)
    scale, zero = (
        np.repeat(np.asarray(a, np.float64), rows_of_group, axis=0) for a in (rounded.scale, rounded.zero)
    )
    codes = np.asarray(rounded.codes, np.float64)
    q = (codes - zero) * scale
    blocks = -(-w.shape[1] // 8)
    for b in range(blocks):
        block = np.arange(b, w.shape[1], blocks)
        inside = m[np.ix_(block, block)]
        root = np.sqrt(np.diag(inside))
        bound = np.diag(inside) * np.linalg.eigvalsh(inside / np.outer(root, root))[-1]
        goal = q[:, block] - (q - w) @ m[:, block] / bound
        for k, (column, own) in itertools.product(range(len(w)), enumerate(block)):
            best = q[k, own] + h[k] @ (goal[:, column] - q[:, own]) / h[k, k]
            code = np.clip(np.round(best / scale[k, own]) + zero[k, own], 0, 2**problem.grid.bits - 1)
            value = (code - zero[k, own]) * scale[k, own]
            if abs(value - best) < abs(q[k, own] - best):
                q[k, own], codes[k, own] = value, code
    return codes


@pytest.mark.parametrize(("shape", "group_size"), [((32, 24), None), ((64, 19), 16), ((48, 5), None)])
def test_equals_the_formulas(shape, group_size):
    with jax.enable_x64(True):
        problem, _, outputs = layer(*shape, 3, group_size=group_size)
        start = rtn(problem.weight, problem.moments, problem.grid)
        found = loss_descent(problem, start, outputs, strength=4.0, sweeps=1)
        expected = loss_sweep(problem, start, outputs, 4.0)
    assert np.mean(expected != np.asarray(start.codes)) > 0.02
    np.testing.assert_array_equal(found.codes, expected)


@pytest.mark.slow
def test_a_price_buys_backward_error_with_little_forward_error():
    """The trade that the method is for, on a layer with coupled inputs and outputs."""
    with jax.enable_x64(True):
        problem, start, outputs = layer(192, 192, 2)
        errors = {}
        for strength in (0.0, 0.1, 1.0):
            found = two_sided_descent(problem, start, outputs, strength=strength)
            errors[strength] = (
                float(found.stats.error),
                float(backward_error(values_of(found), problem.target, outputs)),
            )
        forward, backward = (
            float(start.stats.error),
            float(backward_error(values_of(start), problem.target, outputs)),
        )
    assert errors[0.1][0] < forward  # better than GPTQ both ways
    assert errors[0.1][1] < 0.8 * backward
    assert errors[0.0][0] < errors[0.1][0] < errors[1.0][0]
    assert errors[0.0][1] > errors[0.1][1] > errors[1.0][1]


def test_the_loss_feels_less_of_an_error_that_knows_the_gradients():
    with jax.enable_x64(True):
        problem, start, _ = layer(96, 64, 3)
        # Few directions, as at queries and keys.
        g = low_rank_noise(np.random.default_rng(1), 400, 64, 4)
        outputs = jnp.asarray(g.T @ g)
        plain = coordinate_descent(problem, start, sweeps=3)
        felt = [
            objective(values_of(found), problem, outputs, 1e6, loss_descent)
            for found in (plain, loss_descent(problem, start, outputs, strength=10.0))
        ]
    assert felt[1] < 0.7 * felt[0]


@pytest.mark.parametrize("group_size", [None, 32])
@both
def test_without_a_price_it_is_coordinate_descent(group_size, descend):
    with jax.enable_x64(True):
        problem, start, outputs = layer(96, 40, 3, group_size=group_size)
        ours = descend(problem, start, outputs, strength=0.0, sweeps=3)
        theirs = coordinate_descent(problem, start, sweeps=3)
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    np.testing.assert_allclose(ours.stats.error, theirs.stats.error, rtol=1e-9)


@pytest.mark.slow
@both
def test_it_is_never_below_the_optimum_and_often_there(descend):
    reached = 0
    with jax.enable_x64(True):
        for seed in range(12):
            problem, start, outputs = layer(3, 2, 2, seed=seed)
            found = descend(problem, start, outputs, strength=0.3, sweeps=6)
            codes = jnp.asarray(list(itertools.product(range(4), repeat=6)), jnp.uint8).reshape(-1, 3, 2)
            stacked = (jnp.broadcast_to(a, (len(codes), *a.shape)) for a in (start.scale, start.zero))
            every = problem.grid.dequantize(codes, *stacked, jnp.float64)
            best = min(objective(values, problem, outputs, 0.3, descend) for values in np.asarray(every))
            ours = objective(values_of(found), problem, outputs, 0.3, descend)
            assert ours >= best * (1 - 1e-9)
            reached += ours <= best * (1 + 1e-9)
    assert reached >= 6


@pytest.mark.slow
@both
def test_no_move_of_one_integer_gains_3_percent(descend):
    with jax.enable_x64(True):
        problem, start, outputs = layer(16, 16, 2)
        # Blocks bound the curvature from above: single moves may still pay a little.
        found = descend(problem, start, outputs, strength=0.05, sweeps=30)
        ours = objective(values_of(found), problem, outputs, 0.05, descend)
        codes, best = np.asarray(found.codes), ours
        for place in np.ndindex(*codes.shape):
            for code in range(4):
                moved = codes.copy()
                moved[place] = code
                values = problem.grid.dequantize(jnp.asarray(moved), found.scale, found.zero, jnp.float64)
                best = min(best, objective(values, problem, outputs, 0.05, descend))
    assert best >= 0.97 * ours


@pytest.mark.slow
@both
def test_float32_stacks_order_and_dead_inputs(descend):
    problem, start, outputs = layer(96, 40, 3, group_size=32)
    problem, start, outputs = jax.tree.map(
        lambda a: a.astype(jnp.float32) if a.dtype == jnp.float64 else a, (problem, start, outputs)
    )
    alone = descend(problem, start, outputs)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), (problem, start, outputs))
    pair = jax.vmap(descend)(*stacked)
    np.testing.assert_array_equal(pair.codes[1], alone.codes)
    second = problem.moments.second.at[5].set(0).at[:, 5].set(0)
    dead = dataclasses.replace(problem, moments=dataclasses.replace(problem.moments, second=second))
    rounded = rtn(dead.weight, dead.moments, dead.grid)
    np.testing.assert_array_equal(descend(dead, rounded, outputs).codes[5], rounded.codes[5])
    ordered = gptq(problem.weight, problem.moments, problem.grid, act_order=True, groups="dynamic")
    found = descend(problem, ordered, outputs, strength=0.1)
    assert float(found.stats.error) < float(ordered.stats.error) * 1.5
    before, after = (
        objective(r.pack().dequantize(), problem, outputs, 0.1, descend) for r in (ordered, found)
    )
    assert after < before


def test_backward_error_is_the_share_of_gradient_energy():
    rng = np.random.default_rng(0)
    g, w, d = rng.standard_normal((50, 6)), rng.standard_normal((9, 6)), rng.standard_normal((9, 6))
    with jax.enable_x64(True):
        error = backward_error(jnp.asarray(w + d), jnp.asarray(w), jnp.asarray(g.T @ g))
    assert float(error) == pytest.approx(np.sum((g @ d.T) ** 2) / np.sum((g @ w.T) ** 2), rel=1e-10)


@pytest.mark.parametrize("options", [{"strength": -0.1}, {"sweeps": -1}])
@both
def test_impossible_options(options, descend):
    problem, start, outputs = layer(16, 16, 2)
    with pytest.raises(UsageError, match="must not be negative"):
        descend(problem, start, outputs, **options)
