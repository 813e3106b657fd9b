"""TASA's allocation against brute force, its statistics against scipy, its salience against an inverse."""

from __future__ import annotations

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_reference import correlated_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.errors import NonFiniteError, UsageError
from jaxquant.methods import (
    aggregate,
    allocate,
    allocate_lagrangian,
    group_salience,
    isotonic,
    kendall_interval,
    normalize,
    salience_swap,
    tasa,
)

BITS = np.array([2, 3, 4])
SEEDS = st.integers(0, 2**31)


def instance(seed: int, units: int = 8, kind: str = "random"):
    """Sensitivities, costs with metadata in groups of 16, and sizes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 60, units)
    costs = sizes[:, None] * BITS + 32 * -(-sizes[:, None] // 16)
    s = {
        "random": rng.standard_normal((units, 3)),
        "decreasing": np.sort(rng.random((units, 3)))[:, ::-1],
        "ties": rng.integers(0, 3, (units, 3)).astype(float),
        "in proportion": sizes[:, None] * 4.0**-BITS,
    }[kind]
    return s, costs, sizes


def total(table, choice):
    return table[np.arange(len(table)), choice].sum()


def brute_force(s, costs, capacity) -> float:
    choices = np.array(list(itertools.product(range(s.shape[1]), repeat=len(s))))
    units = np.arange(len(s))
    fits = costs[units, choices].sum(axis=1) <= capacity
    return s[units, choices].sum(axis=1)[fits].min()


# --- sensitivities


def test_aggregate_is_a_weighted_mean_of_normalized_increases():
    rng = np.random.default_rng(0)
    task, general = rng.standard_normal((5, 3)), 1e3 * rng.standard_normal((5, 3))
    expected = [np.maximum(d, 0) / np.abs(d).mean() for d in (task, general)]
    np.testing.assert_allclose(aggregate(task, general), 0.7 * expected[0] + 0.3 * expected[1])
    np.testing.assert_allclose(aggregate(task, general, beta=0.0), normalize(1e6 * general))


def test_tables_that_cannot_be_used_are_named():
    table = np.ones((2, 3))
    with pytest.raises(UsageError, match=r"\(2, 3\) of the task, \(3, 3\) of the general"):
        aggregate(table, np.ones((3, 3)))
    with pytest.raises(UsageError, match=r"beta=1\.5 is out of range"):
        aggregate(table, table, beta=1.5)
    with pytest.raises(UsageError, match="nothing is lost at any width"):
        normalize(0 * table)
    with pytest.raises(UsageError, match=r"found shape \(3,\)"):
        normalize(np.ones(3))
    table[1, 2] = np.nan
    with pytest.raises(NonFiniteError, match="increase: unit 1 at width 2"):
        normalize(table)


def nearest_in_order(row: np.ndarray) -> np.ndarray:
    """Of all partitions into runs, each at its mean, the nearest one that does not increase."""
    candidates = []
    for cuts in itertools.product([False, True], repeat=len(row) - 1):
        runs = np.split(row, np.flatnonzero(cuts) + 1)
        candidates.append(np.concatenate([np.full(len(run), run.mean()) for run in runs]))
    return min((c for c in candidates if np.all(np.diff(c) <= 1e-12)), key=lambda c: np.sum((c - row) ** 2))


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_isotonic_is_the_nearest_table_in_order(seed):
    s = np.random.default_rng(seed).standard_normal((4, 5))
    found = isotonic(s)
    assert np.all(np.diff(found, axis=1) <= 0)
    np.testing.assert_allclose(found, [nearest_in_order(row) for row in s], atol=1e-12)
    np.testing.assert_allclose(isotonic(found), found, rtol=1e-14)
    in_order = np.sort(s, axis=1)[:, ::-1]
    np.testing.assert_array_equal(isotonic(in_order), in_order)


# --- allocation


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(["random", "decreasing", "ties", "in proportion"]), st.floats(0, 1.1))
def test_allocation_equals_brute_force(seed, kind, share):
    s, costs, sizes = instance(seed, kind=kind)
    least, most = costs.min(axis=1).sum(), costs.max(axis=1).sum()
    capacity = int(least + share * (most - least))
    budget = capacity / sizes.sum()
    found = allocate(s, costs, sizes, budget)
    assert total(costs, found) <= capacity
    assert total(s, found) == pytest.approx(brute_force(s, costs, capacity), abs=1e-9)
    near, price = allocate_lagrangian(s, costs, sizes, budget)
    assert total(costs, near) <= capacity
    bound = (s + price * costs).min(axis=1).sum() - price * capacity
    assert bound - 1e-9 <= total(s, found) <= total(s, near) + 1e-9


def test_more_bits_never_lose_more():
    s, costs, sizes = instance(3, units=40)
    budgets = np.linspace(costs.min(axis=1).sum(), costs.max(axis=1).sum(), 50) / sizes.sum()
    losses = [total(s, allocate(s, costs, sizes, budget)) for budget in budgets]
    assert np.all(np.diff(losses) <= 1e-12)
    assert losses[-1] == pytest.approx(s.min(axis=1).sum())


def test_equal_units_of_equal_loss_share_a_budget_to_the_bit():
    s, costs = np.tile([16.0, 4.0, 1.0], (30, 1)), np.tile(100 * BITS, (30, 1))
    found = allocate(s, costs, np.full(30, 100), 2.5)
    assert sorted(found) == [0] * 15 + [1] * 15
    # 4.35 * 100 is 434.99999999999994
    assert allocate(s[:1], np.array([[200, 300, 435]]), np.array([100]), 4.35) == [2]


def test_bits_that_save_nothing_are_not_bought_beyond_the_budget():
    assert list(allocate(np.ones((3, 2)), np.tile([4, 2], (3, 1)), np.ones(3, int), 2.0)) == [1, 1, 1]
    assert list(allocate(np.ones((2, 1)), np.array([[4], [6]]), np.array([1, 1]), 9.0)) == [0, 0]


@pytest.mark.parametrize("kind", ["decreasing", "in proportion"])
def test_a_thousand_units_take_less_than_a_second(kind):
    rng = np.random.default_rng(0)
    bits, sizes = np.array([2, 3, 4, 8]), rng.integers(10**3, 10**7, 1000)
    costs = sizes[:, None] * bits + 32 * (sizes[:, None] // 64)
    gain = sizes if kind == "in proportion" else rng.lognormal(size=1000)
    s = gain[:, None] * 4.0**-bits
    begun = time.perf_counter()
    found = allocate(s, costs, sizes, 3.5)
    assert time.perf_counter() - begun < 1
    assert total(costs, found) <= 3.5 * sizes.sum()
    assert total(s, found) <= total(s, allocate_lagrangian(s, costs, sizes, 3.5)[0])


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0, 1))
def test_a_selection_of_partial_allocations_still_keeps_the_budget(seed, share):
    s, costs, sizes = instance(seed, kind="in proportion")
    least, most = costs.min(axis=1).sum(), costs.max(axis=1).sum()
    budget = (least + share * (most - least)) / sizes.sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasa, "_STATES", 2)
        found = allocate(s, costs, sizes, budget)
    assert total(costs, found) <= budget * sizes.sum() + 1e-9
    assert total(s, found) <= total(s, allocate_lagrangian(s, costs, sizes, budget)[0])


@pytest.mark.parametrize("budget", [2.4, float("nan")])
def test_a_budget_that_nothing_meets_names_what_can_be_met(budget):
    s, costs, sizes = np.ones((4, 3)), np.tile(64 * BITS + 32, (4, 1)), np.full(4, 64)
    for solve in (allocate, allocate_lagrangian):
        with pytest.raises(UsageError, match=rf"budget={budget} .* cannot be met.*take 2\.5 to 4\.5"):
            solve(s, costs, sizes, budget)


def test_tables_that_do_not_fit_are_refused():
    s, costs, sizes = instance(0)
    with pytest.raises(UsageError, match=r"sensitivity \(8, 3\), costs \(8, 2\), sizes \(8,\)"):
        allocate(s, costs[:, :2], sizes, 3)
    for wrong, of in ((costs + 0.5, sizes), (-costs, sizes), (costs, 0 * sizes)):
        with pytest.raises(UsageError, match="whole numbers of bits"):
            allocate(s, wrong, of, 3)


# --- rankings


def test_tau_is_that_of_scipy_with_ties_and_the_interval_holds_it():
    from scipy.stats import kendalltau  # here and not above: every test process collects every file

    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 6, 30), rng.integers(0, 6, 30)
    interval = functools.partial(kendall_interval, a, b, resamples=200)
    tau, low, high = interval(seed=0)
    assert tau == pytest.approx(kendalltau(a, b).statistic, abs=1e-12)
    concordant = np.sign(a[:, None] - a) * np.sign(b[:, None] - b)
    pairs = [np.sum(v[:, None] != v) for v in (a, b)]
    assert tau == pytest.approx(concordant.sum() / np.sqrt(np.prod(pairs)), abs=1e-12)
    assert low < tau < high
    assert (tau, low, high) == interval(seed=0)
    assert (low, high) != interval(seed=1)[1:]
    _, lower, upper = interval(seed=0, level=0.5)
    assert low < lower < upper < high


def test_rankings_that_agree_have_a_tau_of_one():
    a = np.array([0.0, 0.0, 0.0, 1.0])  # many resamples tie everywhere
    assert kendall_interval(a, 2 * a, seed=0, resamples=200) == pytest.approx((1, 1, 1))


def test_rankings_without_a_tau_are_refused():
    with pytest.raises(UsageError, match="ties everywhere"):
        kendall_interval(np.zeros(4), np.arange(4), seed=0)
    with pytest.raises(UsageError, match=r"shapes \(4,\) and \(3,\)"):
        kendall_interval(np.zeros(4), np.arange(3), seed=0)


# --- groups


def test_salience_is_that_of_the_optimal_brain_surgeon():
    w, x = correlated_layer(32, 12)
    x[:, 5] = 0
    h = x.T @ x
    damped = h + 0.01 * np.mean(np.diag(h)) * np.eye(32)
    each = np.sum(w**2, axis=1) / np.diag(np.linalg.inv(damped))
    each[5] = 0
    found = group_salience(jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32), 8)
    np.testing.assert_allclose(found, each.reshape(4, -1).sum(1), rtol=1e-3)


def test_salience_under_vmap_and_without_a_finite_moment():
    w, h = jnp.ones((2, 8, 3)), jnp.stack([jnp.eye(8), jnp.full((8, 8), jnp.nan)])
    found = jax.vmap(lambda w, h: group_salience(w, h, 4))(w, h)
    np.testing.assert_allclose(found[0], 4 * 3 * 1.01, rtol=1e-5)
    assert np.all(np.isnan(found[1]))
    with pytest.raises(UsageError, match="8 inputs are not divisible by group_size=3"):
        group_salience(w[0], h[0], 3)


@settings(max_examples=12, deadline=None)
@given(SEEDS, st.integers(1, 20), st.integers(2, 7))
def test_the_swap_keeps_the_bits_and_is_never_worse_than_uniform(seed, groups, bits):
    rng = np.random.default_rng(seed)
    salience = rng.lognormal(sigma=3, size=groups)
    noise = rng.lognormal(sigma=2, size=groups)
    tried = []

    def error(group_bits):
        group_bits = np.asarray(group_bits)
        tried.append(group_bits)
        return jnp.float32(np.sum(salience * noise * 4.0**-group_bits))

    found = np.asarray(salience_swap(jnp.asarray(salience), bits, error))
    np.testing.assert_array_equal(tried[0], bits)
    assert len(tried) == len({0, groups // 8, groups // 4})
    for trial in tried:
        assert trial.mean() == bits
        lowered, raised = salience[trial < bits], salience[trial > bits]
        assert len(lowered) == len(raised)
        assert not len(lowered) or lowered.max() < np.min(salience[trial >= bits])
        assert not len(raised) or raised.min() > np.max(salience[trial <= bits])
    assert error(found) == min(error(trial) for trial in tried[:3])


def test_equal_errors_leave_the_layer_uniform():
    salience = jnp.arange(8.0)
    np.testing.assert_array_equal(salience_swap(salience, 3, lambda bits: jnp.float32(1)), 3)

    @jax.jit
    def apart(salience):
        return salience_swap(salience, 3, lambda bits: -jnp.var(bits.astype(jnp.float32)), shares=(0.5,))

    np.testing.assert_array_equal(apart(salience), [2] * 4 + [4] * 4)
    unknown = salience_swap(salience, 3, lambda bits: jnp.where(jnp.any(bits != 3), jnp.nan, 1.0))
    np.testing.assert_array_equal(unknown, 3)


def test_swaps_that_cannot_be_made_are_refused():
    with pytest.raises(UsageError, match="bits=8: groups would need 7 to 9"):
        salience_swap(jnp.ones(8), 8, lambda bits: jnp.float32(0))
    with pytest.raises(UsageError, match=r"shares=\(0\.75,\) are out of range"):
        salience_swap(jnp.ones(8), 3, lambda bits: jnp.float32(0), shares=(0.75,))
