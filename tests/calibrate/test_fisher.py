"""Fisher weights of tokens against gradients of the whole loss."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, MemorySource

from jaxquant.calibrate import collect
from jaxquant.calibrate.fisher import fisher_weights, output_moments
from jaxquant.errors import NonFiniteError
from jaxquant.evaluate.perplexity import token_nll
from jaxquant.models.config import LINEARS, Precision
from jaxquant.models.init import init_params
from jaxquant.quant import ActivationGrid


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(jax.random.randint(jax.random.key(1), (4, 12), 0, 64), np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Bumped:
    """A kernel whose outputs `[1, T, out]` are moved by `bump` `[T, out]`."""

    kernel: jax.Array
    bump: jax.Array

    def __rmatmul__(self, x):
        return x @ self.kernel + self.bump[None]


@functools.partial(jax.jit, static_argnames="config")
def gradients(params, config, window):
    """dL / dy_t of every linear, `{path: [L, T, out]}`, through the whole model at once."""

    def loss(bumps):
        blocks = {**params["blocks"], "attn": dict(params["blocks"]["attn"])}
        blocks["mlp"] = dict(blocks["mlp"])
        for path, bump in bumps.items():
            part, name = path.split(".")
            linear = blocks[part][name]
            blocks[part][name] = {**linear, "kernel": Bumped(linear["kernel"], bump)}
        return jnp.sum(token_nll({**params, "blocks": blocks}, config, window))

    bumps = {
        path: jnp.zeros((config.num_layers, len(window), config.linear_shape(path)[1]))
        for _, paths in LINEARS
        for path in paths
    }
    return jax.grad(loss)(bumps)


@pytest.mark.parametrize(
    "fields",
    [{}, {"family": "gemma3", "post_norms": True, "norm_plus_one": True, "tie_embeddings": False}],
    ids=["llama", "gemma-like"],
)
def test_weights_are_the_squared_gradients_of_the_loss(fields, tokens, monkeypatch):
    monkeypatch.setattr(collect, "BATCH_TOKENS", 24)  # two batches
    config = dataclasses.replace(CONFIG, **fields)
    params = init_params(jax.random.key(0), config)
    found = fisher_weights(MemorySource(params, config), tokens)
    assert len(found) == config.num_layers
    expected = [gradients(params, config, window) for window in tokens]
    for index, weights in enumerate(found):
        for tap, paths in LINEARS:
            assert weights[tap].shape == tokens.shape
            assert weights[tap].dtype == np.float32
            plain = np.stack(
                [sum(np.sum(np.square(e[path][index]), axis=-1) for path in paths) for e in expected]
            )
            np.testing.assert_allclose(weights[tap], plain / plain.mean(), rtol=1e-4, atol=1e-5)


def test_absolute_weights_keep_the_scale_of_the_gradient(tokens):
    params = init_params(jax.random.key(0), CONFIG)
    found = fisher_weights(MemorySource(params), tokens, relative=False)
    every = [gradients(params, CONFIG, window) for window in tokens]
    plain = np.stack([np.sum(np.square(e["mlp.down"][1]), axis=-1) for e in every])
    np.testing.assert_allclose(found[1]["mlp_hidden"], plain, rtol=1e-4, atol=1e-5 * plain.max())


def test_output_moments_are_those_of_the_gradients_of_the_loss(tokens, monkeypatch):
    monkeypatch.setattr(collect, "BATCH_TOKENS", 24)  # two batches
    params = init_params(jax.random.key(0), CONFIG)
    found = output_moments(MemorySource(params), tokens)
    every = [gradients(params, CONFIG, window) for window in tokens]
    for index, moments in enumerate(found):
        assert set(moments) == {path for _, paths in LINEARS for path in paths}
        for path, moment in moments.items():
            rows = np.concatenate([np.asarray(e[path][index])[1:] for e in every])
            assert moment.dtype == np.float32
            np.testing.assert_allclose(moment, rows.T @ rows, rtol=1e-3, atol=1e-5 * np.trace(moment))


def test_what_is_quantized_at_run_time_does_not_touch_gradients(tokens):
    params = init_params(jax.random.key(0), CONFIG)
    quantized = dataclasses.replace(CONFIG, precision=Precision(keys=ActivationGrid(bits=2)))
    for measure in (fisher_weights, output_moments):
        ours, theirs = (measure(MemorySource(params, c), tokens) for c in (quantized, CONFIG))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_last_token_weighs_nothing_behind_its_keys_and_values(tokens):
    """Nothing is predicted from it, so only what other tokens could attend to would matter - nobody can."""
    found = fisher_weights(MemorySource(init_params(jax.random.key(0), CONFIG)), tokens)
    for weights in found:
        for weight in weights.values():
            np.testing.assert_array_equal(weight[:, -1], 0)


def test_progress_counts_both_directions(tokens):
    seen = []
    source = MemorySource(init_params(jax.random.key(0), CONFIG))
    fisher_weights(source, tokens, on_block=lambda *pair: seen.append(pair))
    assert seen == [(i + 1, 2 * CONFIG.num_layers) for i in range(2 * CONFIG.num_layers)]


def test_gradients_that_are_not_finite_are_an_error(tokens):
    params = init_params(jax.random.key(0), CONFIG)
    params = {**params, "norm": params["norm"].at[3].set(jnp.nan)}
    with pytest.raises(NonFiniteError, match=r"blocks\.0\.attn_in: the gradient of the loss is not finite"):
        fisher_weights(MemorySource(params), tokens)
    with pytest.raises(NonFiniteError, match=r"blocks\.2\..*: the gradient of the loss is not finite"):
        output_moments(MemorySource(params), tokens)
