"""Gradients of two models compared: equal models, known gradients, other bases, bad input."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import tiny_config, tiny_params, tiny_tokens

from jaxquant.errors import InputError, NonFiniteError, UsageError
from jaxquant.methods import fold_norms, quarot, rotate
from jaxquant.quant import Grid, quantize
from jaxquant.smoothness import compare_gradients, gradient_comparison


@pytest.fixture(scope="module")
def model():
    config = tiny_config("llama3")
    return jax.tree.map(jnp.asarray, tiny_params(config)), config


@pytest.fixture(scope="module")
def windows():
    return np.tile(np.asarray(tiny_tokens("llama3")), (2, 1))[:3]


def rounded(params, bits):
    def values(path, leaf):
        return (
            quantize(leaf, Grid(bits=bits, group_size=16)).dequantize() if path[-1].key == "kernel" else leaf
        )

    return jax.tree_util.tree_map_with_path(values, params)


def test_a_model_against_itself(model, windows):
    seen = []
    result = gradient_comparison(
        model, model, windows, progress=lambda done, total: seen.append((done, total))
    )
    assert result.ratio == pytest.approx(1, abs=1e-6)
    assert result.cosine == pytest.approx(1, abs=1e-6)
    assert result.token_cosine == pytest.approx(1, abs=1e-6)
    assert result.log_ratio == pytest.approx(0, abs=1e-6)
    assert len(result.norms) == 3
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.slow
def test_fewer_bits_turn_the_gradient_further(model, windows):
    params, config = model
    cosines = [gradient_comparison((rounded(params, b), config), model, windows).cosine for b in (8, 4, 2)]
    assert 1 > cosines[0] > cosines[1] > cosines[2]


def test_a_rotated_model_is_compared_in_the_basis_of_the_original(model, windows):
    params, config = model
    rotated = rotate(*fold_norms(params, config), quarot(config, 0))
    result = gradient_comparison(rotated, model, windows)
    assert result.cosine == pytest.approx(1, abs=1e-4)
    assert result.ratio == pytest.approx(1, abs=1e-3)


def test_known_gradients():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((400, 6, 8))
    reference[:, -1] = 0
    noise = rng.standard_normal(reference.shape)
    noise[:, -1] = 0
    result = compare_gradients(2 * reference + 2 * noise, reference)
    # Twice as much, and turned by 45 degrees.
    assert abs(result.ratio - 2 * 2**0.5) < 4 * result.ratio_stderr
    assert abs(result.cosine - 0.5**0.5) < 4 * result.cosine_stderr + 0.01
    assert result.ratio_stderr < 0.05
    norms, others = (np.linalg.norm(g, axis=(1, 2)) for g in (2 * reference + 2 * noise, reference))
    draws = rng.integers(0, 400, (500, 400))
    bootstrap = (norms[draws].mean(1) / others[draws].mean(1)).std()
    assert result.ratio_stderr == pytest.approx(bootstrap, rel=0.2)


def test_bad_input(model, windows):
    params, config = model
    with pytest.raises(InputError, match="outside the vocabulary"):
        gradient_comparison(model, model, windows + config.vocab_size)
    other = {**params, "embed": jax.random.normal(jax.random.key(9), params["embed"].shape)}
    with pytest.raises(UsageError, match="in any basis, so their gradients cannot be compared"):
        gradient_comparison((other, config), model, windows)
    small = {**params, "embed": params["embed"][:, :16]}
    with pytest.raises(UsageError, match="compare equal ones"):
        gradient_comparison((small, config), model, windows)
    broken = {**params, "norm": params["norm"].at[0].set(jnp.nan)}
    with pytest.raises(NonFiniteError, match="gradient of window 0 is not finite"):
        gradient_comparison((broken, dataclasses.replace(config)), model, windows)


def test_tokens_whose_gradient_vanished_count_as_turned():
    reference, gradients = np.ones((1, 10, 4)), np.zeros((1, 10, 4))
    reference[:, -1], gradients[:, 0] = 0, 1
    assert compare_gradients(gradients, reference).token_cosine == pytest.approx(1 / 9)


def test_gradients_that_vanish():
    one = np.ones((2, 3, 4))
    assert compare_gradients(0 * one, one).log_ratio == -np.inf
    with pytest.raises(UsageError, match="the reference's gradient is 0 everywhere"):
        compare_gradients(one, 0 * one)


def test_embeddings_of_too_few_directions(model, windows):
    params, config = model
    flat = {**params, "embed": params["embed"].at[:, 3:].set(0)}
    assert gradient_comparison((flat, config), (flat, config), windows).cosine == pytest.approx(1, abs=1e-6)
    moved = {**flat, "embed": flat["embed"] * 1.001}
    with pytest.raises(UsageError, match="span too few directions"):
        gradient_comparison((moved, config), (flat, config), windows)
