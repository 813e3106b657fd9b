"""Coordinate descent against the explicit formula in float64, and its guarantees."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_reference import correlated_layer, moments_of, nearest, relative_layer_error
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.errors import UsageError
from jaxquant.methods import Problem, coordinate_descent, gptq, rtn
from jaxquant.quant import Grid

GRID = Grid(bits=2, group_size=16)
ROWS, OUT = 48, 16
CASES = {
    "w2 groups": (rtn, Grid(bits=2, group_size=32), {}),
    "w3 symmetric": (rtn, Grid(bits=3, symmetric=True, convention="full"), {}),
    "w3 dynamic": (gptq, Grid(bits=3, group_size=32), {"groups": "dynamic"}),
}

unpacked = jax.jit(lambda rounded: rounded.pack().dequantize())


def descend(w, h, codes, scale, zero, bits, sweeps):
    """q_j <- Q(w_j - sum_{k != j} H_jk (q_k - w_k) / H_jj), one column and one row at a time."""
    group = len(w) // len(scale)
    scale, zero = (np.repeat(a, group, axis=0) for a in (scale, zero))
    values, codes = scale * (codes - zero), codes.copy()
    for _ in range(sweeps):
        for j in np.flatnonzero(np.diagonal(h)):
            others = np.arange(len(w)) != j
            best = w[j] - h[j, others] @ (values - w)[others] / h[j, j]
            code = nearest(best, scale[j], zero[j], bits)
            value = scale[j] * (code - zero[j])
            move = np.abs(value - best) < np.abs(values[j] - best)
            values[j], codes[j] = np.where(move, value, values[j]), np.where(move, code, codes[j])
    return codes


def problem_of(w, x, grid=GRID, dtype=jnp.float32) -> Problem:
    return Problem.of(jnp.asarray(w, dtype), moments_of(x, dtype), grid)


def nearest_of(problem: Problem):
    return rtn(problem.weight, problem.moments, problem.grid)


def dequantized(rounded) -> np.ndarray:
    return np.asarray(unpacked(rounded), np.float64)


@pytest.mark.parametrize(("method", "grid", "options"), CASES.values(), ids=CASES.keys())
def test_equals_the_explicit_formula(method, grid, options):
    """160 rows are two blocks, the second of them ragged."""
    w, x = correlated_layer(160, 24, dead=5)
    h = x.T @ x
    with jax.enable_x64(True):
        problem = problem_of(w, x, grid, jnp.float64)
        start = method(problem.weight, problem.moments, grid, **options)
        order = np.arange(160) if start.order is None else np.asarray(start.order)
        assert (start.order is not None) == bool(options)
        scale = np.asarray(start.scale, np.float64)
        zero = (
            np.full_like(scale, grid.constant_zero) if start.zero is None else np.asarray(start.zero, float)
        )
        codes = np.asarray(start.codes, np.float64)
        expected = descend(w[order], h[order][:, order], codes, scale, zero, grid.bits, 2)
        result = coordinate_descent(problem, start, sweeps=2)
        np.testing.assert_array_equal(result.codes, expected)
        error = relative_layer_error(dequantized(result), w, x)
        assert float(result.stats.error) == pytest.approx(error, rel=1e-5)


def test_single_precision_ends_at_the_same_error():
    w, x = correlated_layer(160, 24, dead=5)
    grid = Grid(bits=2, group_size=32)
    single = problem_of(w, x, grid)
    single = coordinate_descent(single, rtn(single.weight, single.moments, grid))
    assert single.codes.dtype == jnp.uint8
    assert single.stats.error.dtype == jnp.float32
    with jax.enable_x64(True):
        double = problem_of(w, x, grid, jnp.float64)
        double = coordinate_descent(double, rtn(double.weight, double.moments, grid))
    assert np.mean(np.asarray(single.codes) != np.asarray(double.codes)) < 0.02
    assert float(single.stats.error) == pytest.approx(float(double.stats.error), rel=1e-3)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 10_000), st.sampled_from([10, 40, 200]), st.integers(0, 3), st.sampled_from([gptq, rtn])
)
def test_every_sweep_lowers_the_error_until_nothing_moves(seed, tokens, dead, method):
    problem = problem_of(*correlated_layer(ROWS, OUT, seed=seed, tokens=tokens, dead=dead))
    rounded = method(problem.weight, problem.moments, GRID)
    errors = [float(rounded.stats.error)]
    for _ in range(20):
        rounded = coordinate_descent(problem, rounded, sweeps=1)
        errors.append(float(rounded.stats.error))
    assert np.all(np.diff(errors) <= 1e-6 * np.asarray(errors[:-1]) + 1e-9)
    assert errors[-1] < errors[0]
    again = coordinate_descent(problem, rounded, sweeps=1)
    assert np.mean(np.asarray(again.codes) != np.asarray(rounded.codes)) < 0.01


def test_sweeps_compose_and_none_changes_nothing():
    problem = problem_of(*correlated_layer(ROWS, OUT))
    start = nearest_of(problem)
    np.testing.assert_array_equal(coordinate_descent(problem, start, sweeps=0).codes, start.codes)
    twice = start
    for _ in range(4):
        twice = coordinate_descent(problem, twice, sweeps=1)
    np.testing.assert_array_equal(coordinate_descent(problem, start).codes, twice.codes)


def test_the_target_is_the_original_weight():
    """A transform moved `weight`; rounding that and refining against the original repairs most of it."""
    w, x = correlated_layer(ROWS, OUT)
    problem = problem_of(w, x)
    moved = dataclasses.replace(problem, weight=problem.weight * 1.2)
    start = nearest_of(moved)
    result = coordinate_descent(moved, start)
    error = relative_layer_error(dequantized(result), w, x)
    assert float(result.stats.error) == pytest.approx(error, rel=1e-3)
    assert error < 0.5 * relative_layer_error(dequantized(start), w, x)


def test_dead_inputs_and_statistics_stay():
    w, x = correlated_layer(ROWS, OUT, dead=7)
    problem = problem_of(w, x)
    start = gptq(problem.weight, problem.moments, GRID)
    result = coordinate_descent(problem, start)
    dead = np.abs(x).max(0) == 0
    np.testing.assert_array_equal(np.asarray(result.codes)[dead], np.asarray(start.codes)[dead])
    assert np.any(np.asarray(result.codes) != np.asarray(start.codes))
    np.testing.assert_array_equal(result.scale, start.scale)
    for name in ("damping", "attempts", "fallback", "dead", "finite"):
        assert getattr(result.stats, name) == getattr(start.stats, name), name


def test_uncorrelated_or_absent_inputs_leave_rounding_to_nearest():
    w, _ = correlated_layer(ROWS, OUT)
    for x in (np.eye(ROWS), np.zeros((3, ROWS))):
        problem = problem_of(w, x)
        start = nearest_of(problem)
        np.testing.assert_array_equal(coordinate_descent(problem, start).codes, start.codes)


def test_non_finite_moments_move_nothing():
    problem = problem_of(*correlated_layer(ROWS, OUT))
    start = nearest_of(problem)
    broken = dataclasses.replace(problem.moments, second=jnp.full((ROWS, ROWS), jnp.nan))
    result = coordinate_descent(dataclasses.replace(problem, moments=broken), start)
    np.testing.assert_array_equal(result.codes, start.codes)
    assert np.isnan(result.stats.error)


@pytest.mark.slow
def test_vmap_over_layers_equals_a_loop():
    """Dynamic groups in act-order: every layer has an order of its own."""
    problems = [problem_of(*correlated_layer(ROWS, OUT, seed=seed, dead=seed)) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)

    def refine(problem: Problem):
        start = gptq(problem.weight, problem.moments, problem.grid, groups="dynamic")
        return coordinate_descent(problem, start)

    batched = jax.jit(jax.vmap(refine))(stacked)
    for i, problem in enumerate(problems):
        one = refine(problem)
        assert np.mean(np.asarray(batched.codes[i]) != np.asarray(one.codes)) <= 2e-3
        np.testing.assert_allclose(batched.stats.error[i], one.stats.error, rtol=1e-2)
    assert batched.order.shape == (3, ROWS)


def test_half_precision_target():
    w, x = correlated_layer(ROWS, OUT)
    weight = jnp.asarray(w, jnp.bfloat16)
    half, wide = (Problem.of(v, moments_of(x), GRID) for v in (weight, weight.astype(jnp.float32)))
    start = nearest_of(wide)
    results = [coordinate_descent(problem, start) for problem in (half, wide)]
    np.testing.assert_array_equal(results[0].codes, results[1].codes)


def test_program_size_does_not_depend_on_width_or_sweeps():
    def lines(rows: int, sweeps: int) -> int:
        problem = jax.eval_shape(lambda: problem_of(np.zeros((rows, 32)), np.zeros((1, rows))))
        start = jax.eval_shape(nearest_of, problem)
        return len(coordinate_descent.lower(problem, start, sweeps=sweeps).as_text().splitlines())

    assert lines(1024, 8) == pytest.approx(lines(128, 2), rel=0.02)


def test_negative_sweeps():
    problem = problem_of(*correlated_layer(ROWS, OUT))
    with pytest.raises(UsageError, match="sweeps=-1 is negative"):
        coordinate_descent(problem, nearest_of(problem), sweeps=-1)
