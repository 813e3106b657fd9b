"""Candidates, their effective numbers, neighbourhoods: by definition in float64, and their properties."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxquant.errors import UsageError
from jaxquant.smoothness import (
    ball,
    candidates,
    continuations,
    effective_numbers,
    jaccard,
    nearest_tokens,
    retention,
    substituted,
    substitutions,
    union,
)

V = 50


@pytest.fixture(scope="module")
def logits():
    return 3 * np.random.default_rng(0).standard_normal((4, 3, V))


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def smallest_set(p: np.ndarray, mass: float) -> set[int]:
    chosen, total = set(), 0.0
    for v in np.argsort(-p):
        if total >= mass:
            break
        chosen.add(int(v))
        total += p[v]
    return chosen


@pytest.mark.parametrize("rule", ["eps", "min_p", "top_p"])
def test_candidates_are_what_the_rule_says(logits, rule):
    masks = jax.jit(lambda z: candidates(z, rule=rule))(jnp.asarray(logits, jnp.float32))
    assert masks.shape == logits.shape
    p = softmax(logits)
    if rule == "top_p":
        found = [set(np.flatnonzero(mask)) for mask in np.asarray(masks).reshape(-1, V)]
        assert found == [smallest_set(row, 0.9) for row in p.reshape(-1, V)]
    else:
        limit = 1e-3 if rule == "eps" else 0.05 * p.max(-1, keepdims=True)
        np.testing.assert_array_equal(masks, p >= limit)
    np.testing.assert_array_equal(jax.vmap(lambda z: candidates(z, rule=rule))(jnp.asarray(logits)), masks)


def test_certain_and_uniform_predictions():
    sure = jnp.where(jnp.arange(V) == 7, 0.0, -jnp.inf)
    even = jnp.zeros(V)
    for number, of_even in zip(effective_numbers(sure), effective_numbers(even), strict=True):
        assert float(number) == pytest.approx(1)
        assert float(of_even) == pytest.approx(V, rel=1e-5)
    for rule in ("eps", "min_p", "top_p"):
        assert int(jnp.sum(candidates(sure, rule=rule))) == 1
        assert int(jnp.sum(candidates(even, rule=rule))) == V


def test_effective_numbers_and_their_derivatives(logits):
    p = softmax(logits)
    with jax.enable_x64(True):
        entropy, participation = jax.vmap(effective_numbers)(jnp.asarray(logits))
    np.testing.assert_allclose(entropy, np.exp(-np.sum(p * np.log(p), -1)), rtol=1e-5)
    np.testing.assert_allclose(participation, 1 / np.sum(p**2, -1), rtol=1e-5)
    x, step = jnp.asarray(logits[0, 0], jnp.float32), jnp.asarray(logits[1, 0], jnp.float32)
    for which in (0, 1):
        number = jax.jit(lambda z, which=which: effective_numbers(z)[which])
        slope = jnp.vdot(jax.grad(number)(x), step)
        assert float(slope) == pytest.approx(
            float(number(x + 1e-2 * step) - number(x - 1e-2 * step)) / 2e-2, rel=1e-2
        )


sets = st.sets(st.integers(0, 19))


@settings(deadline=None, max_examples=50)
@given(sets, sets)
def test_shares_of_sets(a, b):
    ours, theirs = (jnp.asarray(np.isin(np.arange(20), list(s))) for s in (a, b))
    assert float(retention(ours, theirs)) == pytest.approx(len(a & b) / len(b) if b else 1)
    assert float(jaccard(ours, theirs)) == pytest.approx(len(a & b) / len(a | b) if a | b else 1)
    assert set(np.flatnonzero(union(jnp.stack([ours, theirs])))) == a | b
    assert set(np.flatnonzero(union(jnp.stack([ours, theirs]), jnp.asarray([True, False])))) == a


@pytest.fixture(scope="module")
def embedding():
    return np.random.default_rng(1).standard_normal((V, 8)).astype(np.float32)


def test_nearest_tokens(embedding):
    tokens = np.asarray([3, 17, 49])
    found = jax.jit(nearest_tokens, static_argnums=2)(jnp.asarray(embedding), jnp.asarray(tokens), 5)
    for token, near in zip(tokens, np.asarray(found), strict=True):
        apart = np.linalg.norm(embedding.astype(np.float64) - embedding[token], axis=1)
        assert near.tolist() == np.argsort(apart)[1:6].tolist()


@pytest.mark.parametrize("length", [pytest.param(30, marks=pytest.mark.slow), 5])
def test_substitutions_replace_one_late_token_by_a_near_one(embedding, length):
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, V, length), jnp.int32)
    key, table = jax.random.key(0), jnp.asarray(embedding)
    near = np.asarray(nearest_tokens(table, tokens, 4))
    texts = jax.jit(lambda k: substitutions(table, tokens, k, samples=200, last=8, nearest=4))(key)
    assert texts.dtype == tokens.dtype
    places = set()
    for text in np.asarray(texts):
        (place,) = np.flatnonzero(text != np.asarray(tokens))
        places.add(int(place))
        assert text[place] in near[place]
    assert places == set(range(max(length - 8, 0), length))
    again = substitutions(table, tokens, key, samples=200, last=8, nearest=4)
    np.testing.assert_array_equal(texts, again)
    other = substitutions(table, tokens, jax.random.key(1), samples=200, last=8, nearest=4)
    assert np.any(np.asarray(texts) != np.asarray(other))


def test_a_share_of_all_tokens_is_replaced_by_near_ones(embedding):
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, V, (3, 40)), jnp.int32)
    table = jnp.asarray(embedding)
    near = np.asarray(nearest_tokens(table, tokens.reshape(-1), 4)).reshape(3, 40, 4)
    draw = jax.jit(functools.partial(substituted, nearest=4), static_argnames="share")
    counts = np.zeros((3, 40))
    for seed in range(50):
        texts = draw(table, tokens, jax.random.key(seed), share=0.25)
        assert texts.dtype == tokens.dtype
        replaced = np.asarray(texts != tokens)
        assert replaced.sum() == 30
        assert np.all(np.any(np.asarray(texts)[..., None] == near, axis=-1)[replaced])
        counts += replaced
    # Binomial with mean 12.5 and deviation 3.1 at every place.
    assert counts.min() > 0
    assert counts.max() < 28
    np.testing.assert_array_equal(
        texts, substituted(table, tokens, jax.random.key(49), share=0.25, nearest=4)
    )
    np.testing.assert_array_equal(draw(table, tokens, jax.random.key(0), share=0.0), tokens)
    assert np.all(np.asarray(draw(table, tokens, jax.random.key(0), share=1.0) != tokens))


def test_offsets_of_a_ball_have_its_radius():
    e = 3 * jax.random.normal(jax.random.key(0), (12, 40))
    offsets = jax.jit(lambda e, key: ball(e, key, samples=50, radius=0.1))(e, jax.random.key(1))
    assert offsets.shape == (50, 12, 40)
    size = np.sqrt(np.mean(np.square(offsets)))
    assert size == pytest.approx(0.1 * float(jnp.sqrt(jnp.mean(e**2))), rel=0.02)


def test_continuations_are_the_likely_ones():
    p = np.asarray([0.5, 0.3, 0.15, 0.0495, 0.0005])
    texts, real = continuations(jnp.asarray([4, 2]), jnp.log(jnp.asarray(p, jnp.float32))[::-1], width=5)
    np.testing.assert_array_equal(texts, [[4, 2, 4], [4, 2, 3], [4, 2, 2], [4, 2, 1], [4, 2, 0]])
    assert np.asarray(real).tolist() == [True] * 4 + [False]
    texts, real = continuations(jnp.asarray([4, 2]), jnp.asarray(p, jnp.float32), width=2)
    assert texts.shape == (2, 3)


def test_impossible_rules(logits):
    with pytest.raises(UsageError, match="unknown rule 'top_k'; use eps, min_p, top_p"):
        candidates(jnp.asarray(logits), rule="top_k")
    with pytest.raises(UsageError, match="limit=2 of top_p is out of range"):
        candidates(jnp.asarray(logits), rule="top_p", limit=2)
