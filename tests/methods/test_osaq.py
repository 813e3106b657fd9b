"""OSAQ: its forms against each other and against independent solvers, its bounds, its corner cases."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import linalg, methods
from jaxquant.calibrate.moments import Moments
from jaxquant.errors import UsageError
from jaxquant.methods import Problem, gptq, osaq
from jaxquant.quant import Grid

deflated_mean, hard_null_space = jax.jit(linalg.deflated_mean), jax.jit(linalg.hard_null_space)
anti_shift, soft_null_space = jax.jit(linalg.anti_shift), jax.jit(linalg.soft_null_space)
osaq_primal, osaq_kernel = jax.jit(methods.osaq_primal), jax.jit(methods.osaq_kernel)
osaq_top = jax.jit(methods.osaq_top, static_argnames=("support", "groups"))
osaq_delta = jax.jit(methods.osaq_delta, static_argnames=("grid", "support", "steps"))
softmax_infinity = jax.jit(methods.softmax_infinity, static_argnames="groups")

N, M = 48, 6
SYMMETRIC = Grid(bits=3, symmetric=True)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def layer(n: int = N, m: int = M, *, exponent: float = 2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weight with some large entries, second moment with a decaying spectrum."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    h = (q * np.arange(1, n + 1.0) ** -exponent) @ q.T
    w = rng.standard_normal((n, m))
    w[rng.integers(0, n, m), np.arange(m)] *= 6
    return w, (h + h.T) / 2


def problem_of(w, h, grid: Grid = SYMMETRIC, dtype=jnp.float32) -> Problem:
    moments = Moments(
        second=jnp.asarray(h, dtype),
        count=jnp.asarray(100, jnp.int32),
        max_abs=jnp.ones(h.shape[-1], dtype),
    )
    return Problem.of(jnp.asarray(w, dtype), moments, grid)


def range_of(w: np.ndarray, groups: int = 1) -> np.ndarray:
    return np.abs(w).reshape(groups, -1, w.shape[-1]).max(1)


def energy(delta: np.ndarray, h: np.ndarray) -> np.ndarray:
    return np.sum(delta * (h @ delta), axis=0)


@pytest.mark.parametrize("mu2", [0.0, 0.05])
@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float64, 1e-10), (jnp.float32, 1e-4)])
def test_primal_kernel_and_full_support_agree(dtype, limit, mu2):
    w, h = layer()
    mu1 = 0.02
    with jax.enable_x64(dtype == jnp.float64):
        weight = jnp.asarray(w, dtype)
        space = hard_null_space(jnp.asarray(h, dtype), gamma=0.1)
        assert 5 < int(space.rank) < 40
        s = softmax_infinity(weight, tau=0.2) / N
        np.testing.assert_allclose(np.sum(s, axis=0), 1, rtol=1e-5)
        primal = osaq_primal(weight, space.basis, s, mu1=mu1, mu2=mu2)
        g = anti_shift(space.projector / mu1, mu2 / N)
        largest = float(jnp.max(jnp.abs(primal)))
        assert largest > 0.1
        # The convention of `osaq`: s of mean 1, mu = n mu1, the same mu2.
        rescaled = anti_shift(space.projector / (N * mu1), mu2)
        for other in (
            osaq_kernel(weight, g, s),
            osaq_top(weight, g, s, support=N),
            osaq_kernel(weight, rescaled, N * s),
            osaq_top(weight, rescaled, N * s, support=2 * N),
        ):
            np.testing.assert_allclose(other, primal, rtol=0, atol=limit * largest)


def test_primal_is_the_minimum_of_the_published_objective(double):
    """Against numpy: a least-squares problem per channel, without the closed form."""
    w, h = layer()
    mu1, mu2, k = 0.03, 0.2, 20
    z = np.linalg.eigh(h)[1][:, :k]
    s = np.exp(np.abs(w) / 0.7) / np.exp(np.abs(w) / 0.7).sum(0)
    ours = osaq_primal(jnp.asarray(w), jnp.asarray(z), jnp.asarray(s), mu1=mu1, mu2=mu2)
    for i in range(M):
        root = np.sqrt(s[:, i])
        rows = np.r_[root[:, None] * z, np.sqrt(mu1) * np.eye(k), np.sqrt(mu2 / N) * z.sum(0)[None]]
        b = np.linalg.lstsq(rows, np.r_[-root * w[:, i], np.zeros(k + 1)])[0]
        np.testing.assert_allclose(ours[:, i], z @ b, atol=1e-10)


@pytest.mark.parametrize("support", [4, 30])
def test_small_supports_solve_the_truncated_system(double, support):
    """4 gathers, 30 multiplies by the whole of G; both against numpy."""
    w, h = layer()
    g = soft_null_space(jnp.asarray(h), eta=50.0)
    s = np.asarray(softmax_infinity(jnp.asarray(w), tau=0.2))
    ours = osaq_top(jnp.asarray(w), g, jnp.asarray(s), support=support)
    for i in range(M):
        kept = np.where(s[:, i] >= np.sort(s[:, i])[-support], s[:, i], 0)
        delta = np.linalg.solve(np.diag(kept) + np.linalg.inv(g), -kept * w[:, i])
        np.testing.assert_allclose(ours[:, i], delta, atol=1e-10)


def test_soft_is_the_direct_solve(double):
    w, h = layer()
    eta, mu, mu2 = 200.0, 0.6, 0.1
    s = softmax_infinity(jnp.asarray(w), tau=0.3)
    g = soft_null_space(jnp.asarray(h), eta=eta, mu=mu, mu2=mu2)
    ours = osaq_top(jnp.asarray(w), g, s, support=N)
    price = eta * h / float(deflated_mean(jnp.asarray(h))) + mu * np.eye(N) + mu2 * np.ones((N, N))
    for i in range(M):
        si = np.asarray(s[:, i])
        np.testing.assert_allclose(
            ours[:, i], np.linalg.solve(np.diag(si) + price, -si * w[:, i]), atol=1e-10
        )


def test_groups_are_solved_jointly(double):
    """Softmax and support per group, one system per column, the middle of each group as its target."""
    w, h = layer()
    w = w + 0.5
    groups, support, grid = 3, 5, Grid(bits=2, group_size=16)
    g = soft_null_space(jnp.asarray(h), eta=100.0)
    delta = np.asarray(osaq_delta(jnp.asarray(w), g, grid, support=support))
    for i in range(M):
        cells = w[:, i].reshape(groups, -1)
        middle = (np.minimum(cells.min(1), 0) + np.maximum(cells.max(1), 0)) / 2
        peaks = cells - middle[:, None]
        s = np.exp(np.abs(peaks) / (0.2 * np.abs(peaks).max(1, keepdims=True)))
        s /= s.mean(1, keepdims=True)
        s = np.where(s >= np.sort(s, 1)[:, -support][:, None], s, 0).ravel()
        step = np.linalg.solve(np.diag(s) + np.linalg.inv(g), -s * peaks.ravel())
        thetas = np.linspace(0, 1, 11)
        moved = [cells + t * step.reshape(groups, -1) for t in thetas]
        reach = [
            np.maximum(np.maximum(c.max(1), 0) - middle, middle - np.minimum(c.min(1), 0)) for c in moved
        ]
        values = np.sum(np.square(reach), axis=1)
        np.testing.assert_allclose(delta[:, i], thetas[np.argmin(values)] * step, atol=1e-9)


@pytest.mark.parametrize("grid", [SYMMETRIC, Grid(bits=2, group_size=16)], ids=str)
def test_without_a_support_weights_near_the_largest_pull_each_for_itself(double, grid):
    w, h = layer()
    w = w + 0.5
    g = np.asarray(soft_null_space(jnp.asarray(h), eta=100.0))
    delta = np.asarray(osaq_delta(jnp.asarray(w), jnp.asarray(g), grid))
    assert np.all(np.abs(delta).max(axis=0) > 0)
    for i in range(M):
        cells = w[:, i].reshape(grid.groups(N), -1)
        lo, hi = np.minimum(cells.min(1), 0), np.maximum(cells.max(1), 0)
        middle = np.zeros_like(lo) if grid.symmetric else (lo + hi) / 2
        peaks = cells - middle[:, None]
        size = np.abs(peaks)
        s = np.exp(size / (0.2 * size.max(1, keepdims=True)))
        s = np.where(size >= 0.7 * size.max(1, keepdims=True), s / s.mean(1, keepdims=True), 0).ravel()
        step = -g @ (s * peaks.ravel() / (1 + s * np.diag(g)))
        moved = [cells + theta * step.reshape(cells.shape) for theta in np.linspace(0, 1, 11)]
        reach = [np.abs(cell - middle[:, None]).max(1) for cell in moved]
        best = np.argmin(np.sum(np.square(reach), axis=1))
        np.testing.assert_allclose(delta[:, i], moved[best].ravel() - w[:, i], atol=1e-12)


@pytest.mark.parametrize("gamma", [0.01, 0.1])
def test_hard_stays_in_its_space_and_within_its_bounds(double, gamma):
    w, h = layer(96)
    problem = problem_of(w, h, dtype=jnp.float64)
    delta = np.asarray(osaq(problem, form="hard", gamma=gamma, mu=0.3).weight) - w
    space = hard_null_space(jnp.asarray(h), gamma=gamma)
    k, p = int(space.rank), np.asarray(space.projector)
    assert k > 3
    assert np.linalg.norm(delta) > 1e-2
    assert np.linalg.norm(delta - p @ delta) <= 1e-10 * np.linalg.norm(delta)
    squared = np.sum(delta**2)
    lost = energy(delta, h).sum()
    assert lost <= float(space.eigenvalues[k - 1]) * squared
    assert lost / energy(w, h).sum() <= 2 * gamma * (96 / k) * squared / np.sum(w**2)


@pytest.mark.parametrize("grid", [SYMMETRIC, Grid(bits=2, group_size=16)], ids=str)
@pytest.mark.parametrize("eta", [10.0, 1e3, 1e5])
def test_soft_perturbation_bound(double, eta, grid):
    w, h = layer(exponent=1.0)
    delta = np.asarray(osaq(problem_of(w, h, grid, jnp.float64), eta=eta, support=16).weight) - w
    assert np.all(energy(delta, h / float(deflated_mean(jnp.asarray(h)))) <= N * range_of(w)[0] ** 2 / eta)


@pytest.mark.parametrize("grid", [SYMMETRIC, Grid(bits=2, group_size=16)], ids=str)
def test_ranges_never_widen(grid):
    """Also at temperatures and prices at which the whole step overshoots."""
    moved = 0
    for seed in range(4):
        w, h = layer(seed=seed, exponent=1.5)
        w = w.astype(np.float32)
        cells = w.reshape(grid.groups(N), -1, M)

        def size(a, shape=cells.shape):
            lo = np.minimum(a.reshape(shape).min(1), 0)
            hi = np.maximum(a.reshape(shape).max(1), 0)
            return np.sum(np.square(np.maximum(-lo, hi) if grid.symmetric else hi - lo), axis=0)

        for options in (
            {"tau": 0.03, "mu": 0.01},
            {"eta": 10.0},
            {"steps": 5, "mu": 0.01},
            {"form": "hard", "gamma": 0.1, "mu": 1e-3},
        ):
            after = size(np.asarray(osaq(problem_of(w, h, grid), **options).weight))
            assert np.all(after <= size(w) * (1 + 1e-6))
            moved += np.sum(after < 0.95 * size(w))
    assert moved > 24


def test_limits_of_the_strength(double):
    w, h = layer()
    w += 1e-3
    nothing = np.asarray(osaq(problem_of(w, h, dtype=jnp.float64), eta=1e12).weight) - w
    assert np.linalg.norm(nothing) < 1e-6 * np.linalg.norm(w)
    free = soft_null_space(jnp.asarray(h), eta=0.0, mu=1e-12)
    s = softmax_infinity(jnp.asarray(w), tau=0.2)
    for support in (3, N):
        after = w + np.asarray(osaq_top(jnp.asarray(w), free, s, support=support))
        largest = np.argsort(-np.abs(w), axis=0)[:support]
        assert np.abs(np.take_along_axis(after, largest, axis=0)).max() < 1e-6
        others = np.argsort(-np.abs(w), axis=0)[support:]
        unmoved = np.take_along_axis(w, others, axis=0)
        np.testing.assert_allclose(np.take_along_axis(after, others, axis=0), unmoved, atol=1e-9)


def test_gradients_are_finite_where_s_underflows(double):
    w, h = layer()
    tau = 1e-4
    g = soft_null_space(jnp.asarray(h), eta=40.0)

    @jax.jit
    @jax.grad
    def slope(weight):
        s = softmax_infinity(weight, tau=tau)
        return jnp.sum(jnp.square(weight + osaq_kernel(weight, g, s)))

    assert float(jnp.min(softmax_infinity(jnp.asarray(w), tau=tau))) == 0
    assert np.isfinite(slope(jnp.asarray(w))).all()


def test_gauge(double):
    """Rotating, permuting and flipping a basis changes nothing."""
    w, h = layer()
    z = np.linalg.eigh(h)[1][:, :18]
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.standard_normal((18, 18)))[0]
    s = softmax_infinity(jnp.asarray(w), tau=0.2)
    deltas = [
        osaq_primal(jnp.asarray(w), jnp.asarray(basis), s, mu1=0.4, mu2=0.1)
        for basis in (z, z @ rotation, z[:, rng.permutation(18)], z * rng.choice([-1, 1], 18))
    ]
    for other in deltas[1:]:
        np.testing.assert_allclose(other, deltas[0], atol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_flat_spectrum_leaves_the_weight_bit_identical(dtype):
    w, _ = layer()
    w[:3] = -0.0
    problem = problem_of(w, np.eye(N))
    problem = dataclasses.replace(problem, weight=problem.weight.astype(dtype))
    after = osaq(problem, form="hard", gamma=1e-3).weight
    assert after.dtype == dtype
    assert np.asarray(after).tobytes() == np.asarray(problem.weight).tobytes()


def test_only_the_weight_changes():
    w, h = layer()
    problem = problem_of(w, h)
    after = osaq(problem)
    assert after.target is not None
    np.testing.assert_array_equal(after.target, problem.target)
    np.testing.assert_array_equal(after.moments.second, problem.moments.second)
    assert after.grid == problem.grid
    assert np.any(np.asarray(after.weight) != np.asarray(problem.weight))


def test_inputs_that_were_always_0_lose_their_weight():
    w, h = layer()
    h[[3, 7]] = 0
    h[:, [3, 7]] = 0
    after = np.asarray(osaq(problem_of(w, h)).weight)
    assert np.abs(after[[3, 7]]).max() < 0.1 * np.abs(w[[3, 7]]).max()
    assert np.all(np.isfinite(osaq(problem_of(w, 0 * h)).weight))


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        (SYMMETRIC, {"support": 1000}),
        (Grid(bits=2, group_size=16), {"steps": 5}),
        (SYMMETRIC, {"form": "hard", "gamma": 0.1}),
    ],
    ids=str,
)
def test_degenerate_columns_stay_finite(grid, options):
    w, h = layer()
    w[:, 0], w[:, 1], w[:, 2], w[:, 3] = 0, 1.5, -2.0, 1e-30
    w[5, 4] = 1e6
    after = np.asarray(osaq(problem_of(w, h, grid), **options).weight)
    assert np.all(np.isfinite(after))
    np.testing.assert_array_equal(after[:, 0], 0)
    cold = osaq(problem_of(w, h, grid), **options, tau=1e-4).weight
    assert np.all(np.isfinite(cold))


@pytest.mark.parametrize(
    ("shape", "options"),
    [((1, 3), {}), ((2, 1), {"form": "hard", "gamma": 0.3}), ((130, 3), {"steps": 3, "support": 2})],
    ids=str,
)
def test_odd_shapes(shape, options):
    w, h = layer(*shape)
    after = np.asarray(osaq(problem_of(w, h), **options).weight)
    assert after.shape == shape
    assert np.all(np.isfinite(after))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_does_not_spread(bad):
    w, h = layer()
    clean = np.asarray(osaq(problem_of(w, h)).weight)
    w[4, 1] = bad
    dirty = np.asarray(osaq(problem_of(w, h)).weight)
    np.testing.assert_allclose(np.delete(dirty, 1, axis=1), np.delete(clean, 1, axis=1), atol=1e-4)
    w, h = layer()
    h[2, 3] = bad
    np.testing.assert_array_equal(osaq(problem_of(w, h)).weight, w.astype(np.float32))
    np.testing.assert_array_equal(osaq(problem_of(w, h), form="hard").weight, w.astype(np.float32))


def chebyshev(w: np.ndarray, z: np.ndarray) -> float:
    """min_b ||w + Z b||_inf as a linear program."""
    from scipy.optimize import linprog

    n, k = z.shape
    ones = np.ones((n, 1))
    result = linprog(
        np.r_[np.zeros(k), 1.0],
        A_ub=np.r_[np.c_[z, -ones], np.c_[-z, -ones]],
        b_ub=np.r_[-w, w],
        bounds=[(None, None)] * k + [(0, None)],
    )
    assert result.status == 0
    return result.fun


def test_lawson_approaches_the_optimum_of_a_linear_program():
    """Shares of |w|_inf, dimension of the space .1, .25 and .5 of the inputs: optimum < Lawson < one shot."""
    n, m = 128, 4
    rng = np.random.default_rng(0)
    w = rng.standard_normal((n, m))
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    one_shot, iterated = (
        functools.partial(osaq_delta, grid=SYMMETRIC, support=n, steps=steps) for steps in (1, 20)
    )
    for share in (0.1, 0.25, 0.5):
        z = q[:, : int(share * n)]
        optimum = np.array([chebyshev(column, z) for column in w.T]) / range_of(w)[0]
        weight, p = jnp.asarray(w, jnp.float32), jnp.asarray(z @ z.T, jnp.float32)
        shot = range_of(w + np.asarray(one_shot(weight, g=p / 0.3)))[0] / range_of(w)[0]
        lawson = range_of(w + np.asarray(iterated(weight, g=p / 1e-2)))[0] / range_of(w)[0]
        assert np.all(lawson >= optimum * (1 - 1e-4))
        assert np.mean(lawson) <= 1.35 * np.mean(optimum)
        assert np.mean(lawson) < np.mean(shot) < 0.95


def test_more_steps_are_never_worse():
    w, h = layer()
    g = soft_null_space(jnp.asarray(h, jnp.float32), eta=100.0, mu=0.1)
    ranges = [
        range_of(w + np.asarray(osaq_delta(jnp.asarray(w, jnp.float32), g, SYMMETRIC, support=N, steps=k)))[0]
        for k in (1, 6, 12)
    ]
    assert np.all(ranges[1] <= ranges[0] * (1 + 1e-5))
    assert np.all(ranges[2] <= ranges[1] * 1.02)
    assert np.mean(ranges[2]) < np.mean(ranges[0])


@pytest.mark.parametrize(
    ("grid", "support"),
    [pytest.param(SYMMETRIC, 5, marks=pytest.mark.slow), (Grid(bits=2, group_size=16), 8)],
    ids=["gather", "groups"],
)
def test_gradient_against_finite_differences(double, grid, support):
    w, h = layer(32, 3)
    direction = jnp.asarray(np.random.default_rng(2).standard_normal(w.shape))

    def value(weight, tau, eta, mu):
        problem = dataclasses.replace(problem_of(w, h, grid, jnp.float64), weight=weight)
        after = osaq(problem, tau=tau, eta=eta, mu=mu, mu2=0.05, support=support).weight
        return jnp.sum(jnp.sin(after) * direction)

    value = jax.jit(value)
    point = (jnp.asarray(w), jnp.asarray(0.21), jnp.asarray(40.0), jnp.asarray(0.7))
    gradient = jax.jit(jax.grad(value, argnums=(0, 1, 2, 3)))(*point)
    for i, step in enumerate((1e-6, 1e-6, 1e-4, 1e-6)):
        along = direction if i == 0 else jnp.asarray(1.0)
        plus, minus = ((*point[:i], point[i] + sign * step * along, *point[i + 1 :]) for sign in (1, -1))
        expected = float(value(*plus) - value(*minus)) / (2 * step)
        assert abs(expected) > 1e-6
        assert float(jnp.sum(gradient[i] * along)) == pytest.approx(expected, rel=1e-5)


def test_strengths_can_be_mapped():
    w, h = layer()
    problem = problem_of(w, h)
    etas = jnp.asarray([1e2, 1e3, 1e4])
    mapped = jax.jit(lambda e: jax.lax.map(lambda eta: osaq(problem, eta=eta).weight, e))(etas)
    for eta, one in zip(etas, mapped, strict=True):
        np.testing.assert_allclose(one, osaq(problem, eta=eta).weight, atol=1e-5)


@pytest.mark.parametrize("options", [{"support": 4}, {"form": "hard", "gamma": 0.05}], ids=str)
def test_vmap_over_30_layers_equals_a_loop(options):
    layers = [layer(32, 8, seed=seed, exponent=1 + seed / 15) for seed in range(30)]
    grid = Grid(bits=2, group_size=16)
    problems = [problem_of(w, h, grid) for w, h in layers]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    batched = jax.vmap(lambda p: osaq(p, **options))(stacked)
    assert isinstance(batched, Problem)
    for i, one in enumerate(problems):
        np.testing.assert_allclose(batched.weight[i], osaq(one, **options).weight, atol=2e-4)


@pytest.mark.parametrize(
    "grid", [Grid(bits=2), pytest.param(Grid(bits=3, symmetric=True), marks=pytest.mark.slow)], ids=str
)
def test_lowers_the_error_of_gptq_where_the_spectrum_decays(grid):
    layers = [layer(128, 16, seed=seed) for seed in range(6)]
    problems = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[problem_of(w, h, grid) for w, h in layers])

    def rounded(problem):
        return gptq(problem.weight, problem.moments, problem.grid).pack().dequantize()

    plain = jax.jit(jax.vmap(rounded))(problems)
    ours = jax.jit(jax.vmap(lambda p: rounded(osaq(p, eta=1e3))))(problems)
    ratios = [
        energy(np.asarray(b) - w, h).sum() / energy(np.asarray(a) - w, h).sum()
        for (w, h), a, b in zip(layers, plain, ours, strict=True)
    ]
    assert np.max(ratios) < 1
    assert np.mean(ratios) < 0.6


def test_impossible_options():
    w, h = layer()
    with pytest.raises(UsageError, match="unknown form 'Soft'; use soft or hard"):
        osaq(problem_of(w, h), form="Soft")
    with pytest.raises(UsageError, match="steps=0"):
        osaq(problem_of(w, h), steps=0)
    with pytest.raises(UsageError, match="not divisible"):
        osaq(problem_of(w, h, Grid(group_size=7)))
