from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.errors import InputError, NonFiniteError
from jaxquant.evaluate import divergence, perplexity, scoring
from jaxquant.models import ModelConfig
from jaxquant.models.decoder import forward
from jaxquant.models.init import init_params
from jaxquant.quant import Grid, QArray, quantize

CONFIG = ModelConfig(
    family="llama",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    query_scale=8**-0.5,
    max_position=64,
)
WINDOWS = np.random.default_rng(3).integers(0, 40, (3, 33)).astype(np.int32)


def params_of(seed):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), CONFIG))
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape) * 0.4, jnp.float32), shapes)


def log_probabilities(params):
    """float64 log-softmax of the positions that have a target, `[n, T - 1, V]`."""
    run = jax.jit(lambda t: forward(params, CONFIG, t).logits)
    logits = np.asarray(run(jnp.asarray(WINDOWS)), np.float64)[:, :-1]
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def nll_of(log_p):
    return -np.take_along_axis(log_p, WINDOWS[:, 1:, None], axis=-1)[..., 0]


def test_perplexity_against_float64():
    params, calls = params_of(0), []
    result = perplexity(params, CONFIG, WINDOWS, progress=lambda done, total: calls.append((done, total)))
    expected = nll_of(log_probabilities(params)).mean(axis=1)
    np.testing.assert_allclose(result.window_nll, expected, rtol=1e-5)
    assert result.nll == pytest.approx(expected.mean(), rel=1e-5)
    assert result.stderr == pytest.approx(expected.std(ddof=1) / 3**0.5, rel=1e-3)
    assert result.perplexity == pytest.approx(np.exp(expected.mean()), rel=1e-4)
    assert result.tokens == 3 * 32
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_one_window_takes_its_error_over_tokens():
    params = params_of(0)
    tokens = nll_of(log_probabilities(params))[0]
    result = perplexity(params, CONFIG, WINDOWS[:1])
    assert result.stderr == pytest.approx(tokens.std(ddof=1) / 32**0.5, rel=1e-3)


def test_divergence_against_float64():
    model, reference = params_of(0), params_of(1)
    ours, theirs = log_probabilities(model), log_probabilities(reference)
    kl = (np.exp(theirs) * (theirs - ours)).sum(axis=-1)
    agrees = ours.argmax(axis=-1) == theirs.argmax(axis=-1)
    result = divergence(model, reference, CONFIG, CONFIG, WINDOWS)
    assert result.kl == pytest.approx(kl.mean(), rel=1e-5)
    assert result.kl_stderr == pytest.approx(kl.mean(axis=1).std(ddof=1) / 3**0.5, rel=1e-3)
    assert result.top1 == pytest.approx(agrees.mean())
    assert result.model.nll == pytest.approx(nll_of(ours).mean(), rel=1e-5)
    assert result.reference.nll == pytest.approx(nll_of(theirs).mean(), rel=1e-5)


def test_a_model_does_not_diverge_from_itself():
    result = divergence(params_of(0), params_of(0), CONFIG, CONFIG, WINDOWS)
    assert abs(result.kl) < 1e-6
    assert (result.top1, result.top1_stderr) == (1.0, 0.0)


@pytest.mark.parametrize("chunk", [1, 5, 32, 100])
def test_the_chunk_size_does_not_matter(chunk, monkeypatch):
    x = jnp.arange(32.0)[:, None] * jnp.ones((1, 3))
    monkeypatch.setattr(scoring, "_MIN_CHUNK", chunk)
    monkeypatch.setattr(scoring, "_LOGIT_BYTES", 0)
    total, last = scoring.over_tokens(lambda a, b: (a.sum(axis=-1), b + 1), 40, x, jnp.arange(32))
    np.testing.assert_array_equal(total, 3 * np.arange(32.0))
    np.testing.assert_array_equal(last, np.arange(32) + 1)


def test_bfloat16_weights_and_untied_or_tied_heads():
    for tied in (False, True):
        config = dataclasses.replace(CONFIG, tie_embeddings=tied)
        wide = params_of(0)
        narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide)
        rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
        exact = perplexity(rounded, config, WINDOWS).nll
        assert perplexity(narrow, config, WINDOWS).nll == pytest.approx(exact, rel=1e-6)


def test_a_head_of_262144_tokens_is_never_whole():
    def score(hidden, targets):
        assert hidden.shape[0] * 262_144 * 4 <= 64 * 2**20
        return targets

    shapes = jax.ShapeDtypeStruct((2047, 640), jnp.float32), jax.ShapeDtypeStruct((2047,), jnp.int32)
    out = jax.eval_shape(lambda *arrays: scoring.over_tokens(score, 262_144, *arrays), *shapes)
    assert out.shape == (2047,)


def test_packed_models_are_scored():
    params = params_of(0)
    gate = params["blocks"]["mlp"]["gate"]
    packed = jax.jit(quantize, static_argnums=1)(gate["kernel"], Grid(bits=8, group_size=16))
    mlp = {**params["blocks"]["mlp"], "gate": {"kernel": packed}}
    quantized = {**params, "blocks": {**params["blocks"], "mlp": mlp}}
    assert isinstance(packed, QArray)
    result = divergence(quantized, params, CONFIG, CONFIG, WINDOWS)
    assert 0 < result.kl < 0.01
    assert result.model.nll == pytest.approx(perplexity(quantized, CONFIG, WINDOWS).nll, rel=1e-5)


@pytest.mark.parametrize(
    ("windows", "match"),
    [
        (np.zeros((0, 8), np.int32), "longer text"),
        (np.zeros((2, 1), np.int32), "longer text"),
        (np.zeros((1, 65), np.int32), "max_position = 64"),
        (np.full((1, 8), 40), "token 40 is outside the vocabulary of 40"),
        (np.full((1, 8), -1), "token -1 is outside"),
    ],
)
def test_unusable_windows(windows, match):
    with pytest.raises(InputError, match=match):
        perplexity({}, CONFIG, windows)


def test_vocabularies_must_agree():
    other = dataclasses.replace(CONFIG, vocab_size=41)
    with pytest.raises(InputError, match="40 and 41"):
        divergence({}, {}, CONFIG, other, WINDOWS)


def test_not_a_number_is_an_error():
    params = params_of(0)
    params = {**params, "norm": params["norm"] * jnp.nan}
    with pytest.raises(NonFiniteError, match="window 0"):
        perplexity(params, CONFIG, WINDOWS)
