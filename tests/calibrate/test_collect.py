"""Moments of blocks and of whole models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, run

from jaxquant.calibrate import collect
from jaxquant.calibrate.collect import batches, block_moments, model_moments
from jaxquant.calibrate.moments import massive_tokens
from jaxquant.methods import Problem
from jaxquant.models.decoder import TAPS, block, embed
from jaxquant.models.init import init_params
from jaxquant.named import named
from jaxquant.quant import Grid

run_block = jax.jit(block, static_argnums=1, static_argnames=("sliding", "taps"))


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(jax.random.randint(jax.random.key(1), (6, 16), 0, 64), np.int32)


@pytest.fixture(scope="module")
def hidden(params, tokens):
    return np.asarray(embed(params, CONFIG, jnp.asarray(tokens)))


def first_block(params):
    return jax.tree.map(lambda leaf: leaf[0], params["blocks"])


def taps_of(params, hidden):
    return run_block(first_block(params), CONFIG, jnp.asarray(hidden), sliding=False, taps=TAPS)[2]


def assert_second(moments, x, weights=None):
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    weights = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64).ravel()
    expected = (x * weights[:, None]).T @ x
    np.testing.assert_allclose(moments.second, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("limit", [16, 32, 1000])
def test_batches_are_equal_and_cover_all(limit, monkeypatch):
    monkeypatch.setattr(collect, "BATCH_TOKENS", limit)
    parts = list(batches(np.zeros((6, 16))))
    assert [i for part in parts for i in range(6)[part]] == list(range(6))
    assert len({part.stop - part.start for part in parts}) == 1
    assert all((part.stop - part.start) * 16 <= max(limit, 16) for part in parts)


@pytest.mark.parametrize("limit", [32, 1000])
def test_block_moments_are_those_of_the_taps(limit, params, hidden, monkeypatch):
    monkeypatch.setattr(collect, "BATCH_TOKENS", limit)
    found = block_moments(first_block(params), CONFIG, hidden, sliding=False)
    for tap, x in taps_of(params, hidden).items():
        assert_second(found[tap], x)
        assert int(found[tap].count) == 96


def test_the_first_token_can_be_left_out(params, hidden):
    found = block_moments(first_block(params), CONFIG, hidden, sliding=False, mask="first")
    for tap, x in taps_of(params, hidden).items():
        assert_second(found[tap], x[:, 1:])
        assert int(found[tap].count) == 90


def test_massive_tokens_are_left_out(params, hidden):
    # Beside the norm's epsilon all tokens but one are small, so that one is massive where q, k, v read it.
    hidden = 1e-5 * hidden
    hidden[2, 3] *= 1e5
    found = block_moments(first_block(params), CONFIG, hidden, sliding=False, mask="massive")
    assert int(found["attn_in"].count) == 95
    for tap, x in taps_of(params, hidden).items():
        kept = ~np.asarray(massive_tokens(x))
        assert_second(found[tap], x, kept)
        assert int(found[tap].count) == kept.sum()


def test_massive_tokens_are_those_far_above_the_median():
    x = np.ones((4, 5, 3), np.float32)
    x[1, 2, 0], x[0, 0, 1] = -65, 63
    massive = np.asarray(massive_tokens(jnp.asarray(x)))
    assert massive[1, 2]
    assert massive.sum() == 1


def test_no_token_is_massive_where_most_are_zero():
    x = jnp.zeros((8, 3)).at[:3].set(1.0)
    assert not bool(massive_tokens(x).any())


def test_weights_scale_tokens(params, hidden):
    weights = {tap: np.random.default_rng(i).random((6, 16)).astype(np.float32) for i, tap in enumerate(TAPS)}
    found = block_moments(first_block(params), CONFIG, hidden, sliding=False, weights=weights)
    for tap, x in taps_of(params, hidden).items():
        assert_second(found[tap], x, weights[tap])


@pytest.mark.parametrize("mask", ["none", "first"])
def test_moments_of_a_whole_model_are_those_of_its_taps(mask, params, tokens):
    found = model_moments(params, CONFIG, tokens, mask=mask)
    output = run(params, CONFIG, jnp.asarray(tokens), taps=TAPS)
    for tap in TAPS:
        assert found[tap].second.shape[0] == CONFIG.num_layers
        for index in range(CONFIG.num_layers):
            x = output.taps[tap][index][:, 1 if mask == "first" else 0 :]
            assert_second(jax.tree.map(lambda leaf, i=index: leaf[i], found[tap]), x)


def test_activations_of_the_model_are_not_stacked(params, tokens):
    program = collect._observe_model.lower(params, CONFIG, tokens, taps=TAPS, mask="none").as_text()
    assert f"tensor<{tokens.shape[0]}x{tokens.shape[1]}x{CONFIG.hidden_size}x" in program
    assert f"tensor<{CONFIG.num_layers}x{tokens.shape[0]}x{tokens.shape[1]}x" not in program


def test_stacked_moments_suit_a_recipe_under_vmap(params, tokens):
    moments = model_moments(params, CONFIG, tokens, taps=("mlp_in",))["mlp_in"]
    kernels = params["blocks"]["mlp"]["up"]["kernel"]
    recipe = named("gptq", Grid(bits=3, group_size=16))
    stacked = jax.vmap(recipe)(Problem.of(kernels, moments, recipe.grid))
    assert stacked.codes.shape == kernels.shape
    alone = recipe(Problem.of(kernels[1], jax.tree.map(lambda leaf: leaf[1], moments), recipe.grid))
    assert np.mean(np.asarray(stacked.codes[1]) != np.asarray(alone.codes)) < 1e-2
