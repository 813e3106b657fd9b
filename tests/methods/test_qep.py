"""QEP against least squares in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.calibrate.moments import observe
from jaxquant.errors import UsageError
from jaxquant.methods import Problem, qep
from jaxquant.quant import Grid
from jaxquant.recipe import chain
from jaxquant.stages import AWQ, QEP, RTN, CoordinateDescent

GRID = Grid(bits=3, group_size=8, clip="mse")


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    then = rng.normal(size=(200, 16)) @ rng.normal(size=(16, 16)) / 4
    now = then + 0.2 * rng.normal(size=then.shape) @ rng.normal(size=(16, 16)) / 4
    then[:, 5] = now[:, 5] = 0
    return rng.normal(size=(16, 6)), then, now


def problem_of(weight, then, now) -> Problem:
    moments = observe(jnp.asarray(now, jnp.float32), original=jnp.asarray(then, jnp.float32))
    return Problem.of(jnp.asarray(weight, jnp.float32), moments, GRID)


def test_the_whole_correction_is_least_squares(inputs):
    weight, then, now = inputs
    moved = qep(problem_of(*inputs), alpha=1.0, percdamp=1e-6)
    alive = np.arange(16) != 5
    expected = np.linalg.lstsq(now[:, alive], then[:, alive] @ weight[alive], rcond=None)[0]
    np.testing.assert_allclose(moved.weight[alive], expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(moved.weight[5], weight[5], rtol=1e-6)
    np.testing.assert_array_equal(moved.target, moved.weight)
    half = qep(problem_of(*inputs), alpha=0.5, percdamp=1e-6)
    np.testing.assert_allclose(half.weight, (moved.weight + weight) / 2, rtol=1e-5, atol=1e-5)


def test_damping_is_in_units_of_the_mean_square(inputs):
    weight, then, now = inputs
    h, c = now.T @ now, now.T @ (then - now)
    damped = h + 0.03 * np.mean(np.diag(h)) * np.eye(16)
    expected = weight + 0.7 * np.linalg.solve(damped, c @ weight)
    moved = jax.jit(qep)(problem_of(*inputs), alpha=0.7, percdamp=0.03)
    np.testing.assert_allclose(moved.weight, expected, rtol=1e-3, atol=1e-4)


def test_inputs_that_are_those_of_the_original_change_nothing(inputs):
    weight, then, _ = inputs
    problem = problem_of(weight, then, then)
    np.testing.assert_array_equal(qep(problem).weight, problem.weight)
    with pytest.raises(UsageError, match="qep: the moments have no drift"):
        qep(Problem.of(problem.weight, observe(jnp.asarray(then, jnp.float32)), GRID))


def test_outputs_come_nearer_to_those_of_the_original(inputs):
    weight, then, now = inputs
    correction = QEP(alpha=1.0, percdamp=1e-6)
    plain, corrected = (
        chain(*before, RTN(), CoordinateDescent(), grid=GRID)(problem_of(*inputs))
        for before in ((), (correction,))
    )
    apart, least = (
        np.sum(np.square(now @ np.asarray(found.values(), np.float64) - then @ weight))
        for found in (plain, corrected)
    )
    assert least < 0.9 * apart
    # By the normal equations it is what no weight can mend, and the reported error against the moved target.
    best = np.linalg.lstsq(now, then @ weight, rcond=None)[0]
    residual = np.sum(np.square(now @ best - then @ weight))
    energy = np.sum(np.square(now @ best))
    assert least == pytest.approx(residual + float(corrected.stats.error) * energy, rel=1e-3)


def test_it_maps_over_stacks_and_has_gradients(inputs):
    problem = problem_of(*inputs)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), problem)
    together = jax.vmap(qep)(stack)
    for i in range(2):
        one = qep(jax.tree.map(lambda leaf, i=i: leaf[i], stack))
        np.testing.assert_allclose(together.weight[i], one.weight, rtol=1e-5, atol=1e-5)

    def size(alpha):
        return jnp.sum(jnp.square(qep(problem, alpha=alpha).weight))

    slope = (size(0.501) - size(0.499)) / 0.002
    assert float(jax.grad(size)(0.5)) == pytest.approx(float(slope), rel=1e-2)


def test_impossible_options_are_refused():
    for wrong in ({"alpha": 1.5}, {"alpha": -0.1}, {"percdamp": 0.0}):
        with pytest.raises(UsageError, match=r"qep: alpha=.* must be 0 to 1"):
            QEP(**wrong)
    with pytest.raises(UsageError, match="AWQ scales inputs that QEP compares"):
        chain(AWQ(), QEP(), RTN(), grid=GRID)
