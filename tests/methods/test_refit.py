"""Refitted grids against least squares in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_reference import correlated_layer, moments_of

from jaxquant.errors import UsageError
from jaxquant.methods import Problem, better_columns, gptq, layer_error, refit, refit_grid
from jaxquant.quant import Grid
from jaxquant.stages import Refit

ROWS, OUT = 48, 12
GRIDS = {
    "w2 groups": Grid(bits=2, group_size=16, scale_dtype="float32"),
    "w3 channel": Grid(bits=3, scale_dtype="float32"),
    "w3 symmetric": Grid(bits=3, group_size=16, symmetric=True, scale_dtype="float32"),
    "w2 float16": Grid(bits=2, group_size=16, clip="mse"),
}

unpacked = jax.jit(lambda rounded: rounded.pack().dequantize())
error_of = jax.jit(layer_error)


def layer(grid, seed=0, **options):
    w, x = correlated_layer(ROWS, OUT, seed=seed)
    problem = Problem.of(jnp.asarray(w, jnp.float32), moments_of(x), grid)
    return problem, gptq(problem.weight, problem.moments, grid, **options)


def values_of(rounded):
    return np.asarray(unpacked(rounded), np.float64)


def reference(problem, rounded, integer_zero):
    """Per column: weighted ridge regression on the indicator columns of the groups."""
    w, h = (np.asarray(a, np.float64) for a in (problem.target, problem.moments.second))
    grid, groups = rounded.grid, rounded.scale.shape[0]
    group = np.arange(ROWS) // (ROWS // groups)
    indicator = np.eye(groups)[group]
    result = np.empty_like(w)
    for j in range(w.shape[1]):
        zero = (
            grid.constant_zero if rounded.zero is None else np.asarray(rounded.zero[:, j], np.float64)[group]
        )
        scale = np.asarray(rounded.scale[:, j], np.float64)
        steps = np.asarray(rounded.codes[:, j], np.float64) - zero
        basis = steps[:, None] * indicator
        if rounded.zero is not None and not integer_zero:
            basis = np.concatenate([basis, indicator], axis=1)
        a = basis.T @ h @ basis
        ridge = 1e-3 * np.maximum(np.diag(a), 1e-3 * np.diag(a).max())
        old = basis[:, :groups] @ scale
        change = np.linalg.solve(a + np.diag(ridge), basis.T @ h @ (w[:, j] - old))
        new = old + basis @ change
        errors = [(v - w[:, j]) @ h @ (v - w[:, j]) for v in (new, old)]
        result[:, j] = new if errors[0] < errors[1] else old
    return result


@pytest.mark.parametrize("integer_zero", [False, True])
@pytest.mark.parametrize("name", ["w3 channel", "w3 symmetric", "w2 groups"])
def test_equals_least_squares(name, integer_zero):
    problem, rounded = layer(GRIDS[name])
    found = refit_grid(problem, rounded, integer_zero=integer_zero)
    scale = np.asarray(found.scale / rounded.scale)
    inside = (scale > 0.2) & (scale < 5)
    if found.zero is not None:  # clipped zeros are another solution than the reference's
        inside &= (np.asarray(found.zero) > 0) & (np.asarray(found.zero) < 2**found.grid.bits - 1)
    columns = inside.all(axis=0) | integer_zero
    assert columns.sum() >= OUT // 3
    expected = reference(problem, rounded, integer_zero)
    np.testing.assert_allclose(
        values_of(found)[:, columns], expected[:, columns], atol=2e-4 * np.abs(expected).max()
    )


@pytest.mark.parametrize("integer_zero", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_the_error_falls_and_integers_stay(name, integer_zero):
    problem, rounded = layer(GRIDS[name])
    found = refit_grid(problem, rounded, integer_zero=integer_zero)
    np.testing.assert_array_equal(found.codes, rounded.codes)
    assert found.scale.dtype == rounded.scale.dtype
    assert float(found.stats.error) < 0.99 * float(rounded.stats.error)
    if integer_zero and rounded.zero is not None:
        np.testing.assert_array_equal(found.zero, rounded.zero)
    error = error_of(unpacked(found), problem.target, problem.moments.second)
    np.testing.assert_allclose(found.stats.error, error, rtol=1e-4)


def test_a_planted_grid_is_found_again():
    grid = GRIDS["w2 groups"]
    problem, rounded = layer(grid)
    planted = dataclasses.replace(problem, target=rounded.pack().dequantize())
    noise = 1 + 0.2 * jax.random.normal(jax.random.key(0), rounded.scale.shape)
    moved = dataclasses.replace(rounded, scale=rounded.scale * noise)
    for _ in range(6):
        moved = refit_grid(planted, moved)
    assert float(moved.stats.error) < 1e-6


def test_groups_in_processing_order():
    problem, rounded = layer(GRIDS["w2 float16"], groups="dynamic")
    assert rounded.order is not None
    found = refit_grid(problem, rounded)
    error = error_of(unpacked(found), problem.target, problem.moments.second)
    np.testing.assert_allclose(found.stats.error, error, rtol=1e-3)
    assert float(error) < float(rounded.stats.error)


def test_vmap_equals_a_loop():
    pairs = [layer(GRIDS["w2 groups"], seed=seed) for seed in range(2)]
    problems, roundings = (jax.tree.map(lambda *a: jnp.stack(a), *side) for side in zip(*pairs, strict=True))
    stacked = jax.jit(jax.vmap(refit_grid))(problems, roundings)
    for i, (problem, rounded) in enumerate(pairs):
        alone = refit_grid(problem, rounded)
        np.testing.assert_allclose(stacked.scale[i], alone.scale, rtol=1e-3)
        np.testing.assert_allclose(stacked.stats.error[i], alone.stats.error, rtol=1e-4)


def test_dead_inputs_and_zero_columns_stay_finite():
    w, x = correlated_layer(ROWS, OUT)
    x[:, :16], w[:, 3] = 0, 0
    grid = GRIDS["w2 groups"]
    problem = Problem.of(jnp.asarray(w, jnp.float32), moments_of(x), grid)
    found = refit_grid(problem, gptq(problem.weight, problem.moments, grid))
    assert np.isfinite(values_of(found)).all()
    np.testing.assert_array_equal(values_of(found)[16:, 3], 0)


def test_turns_of_refits_and_sweeps_beat_either():
    problem, rounded = layer(GRIDS["w2 float16"])
    errors = [
        float(Refit(rounds=rounds, passes=passes)(problem, rounded).stats.error)
        for rounds, passes in [(0, 1), (1, 1), (3, 1), (3, 2)]
    ]
    assert errors[0] == pytest.approx(float(rounded.stats.error))
    assert errors[1] < 0.95 * errors[0]
    assert errors[3] <= errors[2] < errors[1]


def test_gptq_keeps_given_grids():
    problem, rounded = layer(GRIDS["w2 groups"])
    refitted = refit_grid(problem, rounded)
    again = gptq(problem.weight, problem.moments, problem.grid, fixed=refitted)
    np.testing.assert_array_equal(again.scale, refitted.scale)
    np.testing.assert_array_equal(again.zero, refitted.zero)
    same = gptq(problem.weight, problem.moments, problem.grid, fixed=rounded)
    np.testing.assert_array_equal(same.codes, rounded.codes)
    with pytest.raises(UsageError, match="static groups only"):
        gptq(problem.weight, problem.moments, problem.grid, fixed=rounded, groups="dynamic")


def test_columns_are_chosen_one_by_one():
    problem, first = layer(GRIDS["w2 groups"])
    second = gptq(problem.weight, problem.moments, problem.grid, act_order=False)
    found = better_columns(problem, first, second)
    h = np.asarray(problem.moments.second, np.float64)

    def errors(rounded):
        d = values_of(rounded) - np.asarray(problem.target, np.float64)
        return np.sum(d * (h @ d), axis=0)

    np.testing.assert_allclose(errors(found), np.minimum(errors(first), errors(second)), rtol=1e-6)
    assert float(found.stats.error) < min(float(first.stats.error), float(second.stats.error))
    np.testing.assert_allclose(
        found.stats.error,
        error_of(unpacked(found), problem.target, problem.moments.second),
        rtol=1e-4,
    )


def test_chunks_of_columns_change_nothing(monkeypatch):
    problem, rounded = layer(GRIDS["w2 groups"])
    whole = refit_grid(problem, rounded)
    monkeypatch.setattr(refit, "_CHUNK", 5 * 36)  # 5 of 12 columns, with padding
    parts = refit_grid.__wrapped__(problem, rounded)
    np.testing.assert_allclose(parts.scale, whole.scale, rtol=1e-4)


def test_scales_never_become_zero():
    grid = Grid(bits=1, group_size=24, symmetric=True)
    w, x = correlated_layer(ROWS, OUT)
    w[:24] *= 1e-8
    problem = Problem.of(jnp.asarray(w, jnp.float32), moments_of(x), grid)
    found = refit_grid(problem, gptq(problem.weight, problem.moments, grid))
    assert float(jnp.min(jnp.abs(found.scale.astype(jnp.float32)))) > 0
