"""Mixtures of moments, their traces and the search, against float64 formulas and fine grids."""

from __future__ import annotations

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import CONFIG, MemorySource

from jaxquant.calibrate import collect
from jaxquant.calibrate.collect import block_moments, embed_all, merge_taps, model_moments
from jaxquant.calibrate.fisher import fisher_weights
from jaxquant.calibrate.mixture import (
    alignment,
    best_mixture,
    diversity,
    effective_rank,
    energy_traces,
    gradient_traces,
    mix,
    search_mixture,
)
from jaxquant.calibrate.moments import Moments, merge
from jaxquant.errors import InputError, UsageError
from jaxquant.models.decoder import TAPS
from jaxquant.models.init import init_params

SEEDS = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def sources(params):
    """Three texts of other words, the first twice as long."""

    def moments(low, high):
        return model_moments(params, CONFIG, draw(low, high), mask="first")

    return {
        "wiki": merge_taps(moments(0, 64), moments(1, 64)),
        "maths": moments(40, 64),
        "code": moments(0, 8),
    }


def draw(low, high):
    return np.asarray(jax.random.randint(jax.random.key(low + high), (4, 12), low, high), np.int32)


def traces_of(rng, entries=12):
    return rng.lognormal(sigma=1.5, size=entries)


# --- mixing


def test_a_mixture_is_the_weighted_mean_over_tokens(sources):
    mixed = mix(sources, {"wiki": 1, "maths": 3})
    for tap, moments in mixed.items():
        of_wiki, of_maths = sources["wiki"][tap], sources["maths"][tap]
        n = [np.asarray(m[tap].count, np.float64)[:, None, None] for m in sources.values()]
        mean = 0.25 * of_wiki.second / n[0] + 0.75 * of_maths.second / n[1]
        np.testing.assert_allclose(moments.second, mean * sum(n), rtol=1e-5, atol=1e-5 * np.abs(mean).max())
        np.testing.assert_array_equal(moments.count, sum(n)[:, 0, 0])
        np.testing.assert_array_equal(moments.max_abs, np.maximum(of_wiki.max_abs, of_maths.max_abs))


def test_weights_in_proportion_to_the_tokens_merge_the_sources(sources):
    counts = {name: int(source["mlp_in"].count[0]) for name, source in sources.items()}
    for tap, moments in mix(sources, counts).items():
        together = functools.reduce(merge, (source[tap] for source in sources.values()))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4), moments, together)


def test_traces_of_a_mixture_are_the_mixture_of_traces(sources):
    wiki, maths = (energy_traces(sources[name]) for name in ("wiki", "maths"))
    for alpha in (0.0, 0.3, 1.0):
        mixed = energy_traces(mix(sources, {"wiki": alpha, "maths": 1 - alpha}))
        np.testing.assert_allclose(mixed, alpha * wiki + (1 - alpha) * maths, rtol=1e-5)


def test_traces_are_energies_a_token_block_by_block(sources):
    found = energy_traces(sources["wiki"])
    assert found.dtype == np.float64
    assert found.shape == (CONFIG.num_layers * len(TAPS),)
    for index, tap in itertools.product(range(CONFIG.num_layers), range(len(TAPS))):
        moments = sources["wiki"][TAPS[tap]]
        expected = np.trace(np.float64(moments.second[index])) / (8 * 11)  # without the first tokens
        assert found[index * len(TAPS) + tap] == pytest.approx(expected, rel=1e-6)


def test_mixtures_that_cannot_be_made_are_refused(sources):
    with pytest.raises(UsageError, match="no source prose; there are wiki, maths, code"):
        mix(sources, {"prose": 1})
    for weights in ({}, {"wiki": 0}, {"wiki": 2, "maths": -1}, {"wiki": float("nan")}):
        with pytest.raises(UsageError, match="numbers >= 0, not all 0"):
            mix(sources, weights)
    short = {"wiki": sources["wiki"], "other": jax.tree.map(lambda leaf: leaf[:2], sources["maths"])}
    with pytest.raises(UsageError, match="other has other taps or layers"):
        mix(short, {"wiki": 1})
    empty = jax.tree.map(jnp.zeros_like, sources["wiki"])
    with pytest.raises(InputError, match="nothing has no tokens"):
        mix({**sources, "nothing": empty}, {"wiki": 1, "nothing": 1})
    with pytest.raises(InputError, match=r"blocks\.0\.attn_in: trace 0"):
        energy_traces(empty)


def test_gradient_traces_are_energies_weighted_by_absolute_gradients(params, monkeypatch):
    tokens = draw(0, 64)
    monkeypatch.setattr(collect, "BATCH_TOKENS", 24)  # two batches
    found = gradient_traces(MemorySource(params), tokens).reshape(CONFIG.num_layers, len(TAPS))
    weights = fisher_weights(MemorySource(params), tokens, relative=False)[0]
    first = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    moments = block_moments(
        first, CONFIG, embed_all(params, CONFIG, tokens), sliding=False, mask="first", weights=weights
    )
    expected = [np.trace(moments[tap].second) / float(moments[tap].count) for tap in TAPS]
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)


# --- ranks


@pytest.mark.parametrize("rank", ["participation", "entropy"])
def test_effective_rank_counts_directions(rank):
    h = [3 * np.eye(6), np.outer(np.arange(6), np.arange(6)), np.diag([0, 5, 0, 0, 5, 0])]
    h = jnp.asarray(np.stack(h), jnp.float32)
    np.testing.assert_allclose(effective_rank(h, rank), [6, 1, 2], rtol=1e-4)
    np.testing.assert_allclose(effective_rank(1e12 * h, rank), [6, 1, 2], rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_effective_ranks_equal_their_formulas(seed):
    x = np.random.default_rng(seed).standard_normal((4, 6))
    h = x.T @ x
    p = np.linalg.eigvalsh(h)[2:] / np.trace(h)
    by_entropy, participation = (
        float(effective_rank(jnp.asarray(h, jnp.float32), rank)) for rank in ("entropy", "participation")
    )
    assert by_entropy == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-3)
    assert participation == pytest.approx(1 / np.sum(p**2), rel=1e-3)
    assert 1 <= participation <= by_entropy * (1 + 1e-3)


def test_diversity_is_the_mean_log_share_of_directions():
    def of(second):
        return Moments(second=second, count=jnp.ones(2, jnp.int32), max_abs=jnp.ones(second.shape[:2]))

    flat, narrow = of(jnp.stack(2 * [7 * jnp.eye(4)])), of(jnp.ones((2, 8, 8)))
    assert diversity({"a": flat}) == pytest.approx(0, abs=1e-6)
    assert diversity({"a": flat, "b": narrow}) == pytest.approx(-np.log(8) / 2, rel=1e-5)
    with pytest.raises(UsageError, match="unknown rank 'trace'"):
        diversity({"a": flat}, "trace")  # pyright: ignore[reportArgumentType]


# --- the search


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_the_closed_form_equals_a_fine_grid(seed):
    rng = np.random.default_rng(seed)
    a, b, target = (traces_of(rng) for _ in range(3))
    if seed % 2:
        target = rng.uniform(-0.2, 1.2) * a + rng.uniform(0, 1) * b + 0.1 * target
        target = np.maximum(target, 1e-3)
    grid = np.linspace(0, 1, 2001)
    aligned = alignment(grid[:, None] * a + (1 - grid[:, None]) * b, target, (a + b) / 2)
    assert best_mixture(a, b, target) == pytest.approx(grid[np.argmax(aligned)], abs=1e-3)
    assert best_mixture(a, b, target) == pytest.approx(1 - best_mixture(b, a, target), abs=1e-9)


def test_sources_alike_are_mixed_in_halves():
    a = np.array([1.0, 2, 3])
    assert best_mixture(a, a, np.array([1.0, 1, 1])) == 0.5


def test_alignment_alone_picks_the_target_and_says_so(sources):
    """With the target itself among the sources the cosine is 1 there, whatever else calibration needs."""
    target = energy_traces(sources["maths"])
    two = {name: sources[name] for name in ("wiki", "maths")}
    with pytest.warns(UserWarning, match="those of source maths: alignment alone always picks"):
        found = search_mixture(two, target, nu=0)
    assert found.best == {"wiki": 0, "maths": 1}
    assert np.all(np.diff(found.alignment[np.argsort(found.shares[:, 0])]) < 0)
    with pytest.warns(UserWarning, match="those of source b: alignment"):
        assert best_mixture(energy_traces(sources["wiki"]), target, target) == pytest.approx(0, abs=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search_mixture(two, target)


def test_both_terms_have_the_same_spread(sources):
    target = energy_traces(sources["code"]) + energy_traces(sources["maths"])
    found = search_mixture(sources, target)
    assert found.shares.shape == (15, 3)  # multiples of 1/4 that add up to 1
    np.testing.assert_allclose(found.shares.sum(axis=1), 1)
    assert found.nu * np.ptp(found.diversity) == pytest.approx(np.ptp(found.alignment))
    best = np.argmax(found.alignment + found.nu * found.diversity)
    assert list(found.best.values()) == found.shares[best].tolist()
    mixed = mix(sources, found.best)
    scale = np.mean([energy_traces(source) for source in sources.values()], axis=0)
    assert diversity(mixed) == pytest.approx(found.diversity[best])
    assert alignment(energy_traces(mixed), target, scale) == pytest.approx(found.alignment[best], rel=1e-6)


def test_the_search_without_diversity_equals_the_closed_form(sources):
    two = {name: sources[name] for name in ("wiki", "maths")}
    wiki, maths = (energy_traces(source) for source in two.values())
    target = 0.4 * wiki + 0.6 * maths
    found = search_mixture(two, target, nu=0, steps=20)
    assert found.best["wiki"] == pytest.approx(best_mixture(wiki, maths, target)) == pytest.approx(0.4)


def test_given_traces_take_the_place_of_energies(sources):
    two = {name: sources[name] for name in ("wiki", "maths")}
    rng = np.random.default_rng(0)
    traces = {name: traces_of(rng) for name in two}
    found = search_mixture(two, traces["wiki"] + traces["maths"], traces=traces, nu=0, steps=2)
    assert found.best == {"wiki": 0.5, "maths": 0.5}


def test_searches_that_cannot_be_made_are_refused(sources):
    target = energy_traces(sources["wiki"])
    with pytest.raises(UsageError, match="1 sources"):
        search_mixture({"wiki": sources["wiki"]}, target)
    for wrong in ({"steps": 0}, {"nu": -1.0}, {"nu": float("nan")}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            search_mixture(sources, target, **wrong)
    with pytest.raises(UsageError, match="traces of every source and of the target"):
        search_mixture(sources, target[:4])
