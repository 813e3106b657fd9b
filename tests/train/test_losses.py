"""Losses of training: against their definitions, 0 for equal models, gradients against differences."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, run

from jaxquant.methods import backward_error
from jaxquant.models import decoder
from jaxquant.smoothness import input_gradient
from jaxquant.train import (
    gradient_loss,
    latent_params,
    layer_loss,
    merge,
    neighborhood_loss,
    prediction_loss,
    respond,
    split,
    stream_loss,
)


@functools.partial(jax.jit, static_argnums=1)
def response_of(params, config, tokens):
    return respond((params, config), tokens, gradient=True)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 12), 0, 64)


def test_response_is_the_forward_pass_and_the_input_gradient(student, tokens):
    params, config = student
    response = response_of(*student, tokens)
    whole = run(params, config, tokens, taps=(decoder.STREAM,))
    np.testing.assert_allclose(
        decoder.logits(params, config, response.hidden), whole.logits, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(response.stream, whole.taps[decoder.STREAM], rtol=1e-4, atol=1e-5)
    apply = functools.partial(decoder.forward_embedded, params, config)
    expected = input_gradient(apply, decoder.embed(params, config, tokens), tokens[:, 1:])
    np.testing.assert_allclose(response.gradient, expected, rtol=1e-3, atol=1e-6)
    plain = respond(student, tokens, remat=False)
    assert plain.gradient is None
    np.testing.assert_allclose(plain.hidden, response.hidden, rtol=1e-5, atol=1e-6)


def test_losses_equal_their_definitions_in_float64(student, teacher, tokens):
    ours, theirs = (response_of(*model, tokens) for model in (student, teacher))
    logits = [
        np.asarray(decoder.logits(*model, r.hidden), np.float64)
        for model, r in ((student, ours), (teacher, theirs))
    ]
    q, p = (a - np.log(np.exp(a).sum(axis=-1, keepdims=True)) for a in logits)
    kl = np.mean(np.sum(np.exp(p) * (p - q), axis=-1))
    np.testing.assert_allclose(prediction_loss(student, teacher, ours.hidden, theirs.hidden), kl, rtol=1e-4)

    a, b = (np.asarray(r.stream, np.float64) for r in (ours, theirs))
    a, b = (h / np.linalg.norm(h, axis=-1, keepdims=True) for h in (a, b))
    np.testing.assert_allclose(
        stream_loss(ours.stream, theirs.stream), np.mean(np.sum((a - b) ** 2, axis=-1)), rtol=1e-4
    )
    g, known = (np.asarray(r.gradient, np.float64) for r in (ours, theirs))
    expected = np.sum((g - known) ** 2) / np.sum(known**2)
    np.testing.assert_allclose(gradient_loss(ours.gradient, theirs.gradient), expected, rtol=1e-5)


def test_a_stream_of_zero_has_no_direction_and_no_gradient():
    zero, one = jnp.zeros((1, 1, 2, 4)), jnp.ones((1, 1, 2, 4))
    value, gradient = jax.value_and_grad(stream_loss)(zero, one)
    assert float(value) == pytest.approx(1)
    np.testing.assert_array_equal(gradient, 0)


def test_neighborhood_loss_is_the_divergence_at_shifted_inputs(student, teacher, tokens):
    key = jax.random.key(3)
    e = decoder.embed(*teacher, tokens)
    embedded = jax.jit(decoder.forward_embedded, static_argnums=1)
    noise = 0.1 * jnp.sqrt(jnp.mean(e**2)) * jax.random.normal(key, e.shape)
    p, q = (jax.nn.log_softmax(embedded(*model, e + noise)) for model in (teacher, student))
    expected = jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
    loss_of = jax.jit(lambda key: neighborhood_loss(student, teacher, tokens, key, radius=0.1))
    loss = loss_of(key)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert loss_of(jax.random.key(4)) != loss


def test_layer_loss_is_the_mean_backward_error(student, teacher):
    seconds, errors = {}, []
    for path in ("attn.o", "mlp.up"):
        part, name = path.split(".")
        weight = teacher[0]["blocks"][part][name]["kernel"]
        g = jax.random.normal(jax.random.key(5), (3, 20, weight.shape[-1]))
        seconds[path] = jnp.einsum("lti,ltj->lij", g, g)
        values = student[0]["blocks"][part][name]["kernel"].values()
        errors += [backward_error(*one) for one in zip(values, weight, seconds[path], strict=True)]
    np.testing.assert_allclose(layer_loss(student, teacher, seconds), np.mean(errors), rtol=1e-5)


def test_equal_models_have_no_loss(teacher, tokens):
    ours = response_of(*teacher, tokens)
    assert abs(float(prediction_loss(teacher, teacher, ours.hidden, ours.hidden))) < 1e-6
    assert float(stream_loss(ours.stream, ours.stream)) == 0
    assert float(gradient_loss(ours.gradient, ours.gradient)) == 0
    again = jax.jit(lambda key: neighborhood_loss(teacher, teacher, tokens, key))(jax.random.key(0))
    assert abs(float(again)) < 1e-6


@pytest.mark.slow
def test_the_gradient_of_the_gradient_loss_agrees_with_differences(teacher, tokens, grid):
    # Differences would see the steps of scales in float16.
    grid = dataclasses.replace(grid, scale_dtype="float32")
    trained, rest = split(latent_params(teacher[0], grid))
    known = response_of(*teacher, tokens).gradient

    def loss(trained):
        model = (merge(trained, rest), CONFIG)
        return gradient_loss(response_of(*model, tokens).gradient, known)

    gradient = jax.grad(loss)(trained)
    # Norms and stretches move values without moving codes, so differences see what the gradient sees.
    for choose in (
        lambda tree: tree["blocks"]["attn_norm"],
        lambda tree: tree["blocks"]["mlp"]["up"]["kernel"].stretch,
    ):
        leaf, slope = choose(trained), choose(gradient)
        direction = jax.random.normal(jax.random.key(7), leaf.shape)

        def moved(step, leaf=leaf, direction=direction):
            return loss(jax.tree.map(lambda a: a + step * direction if a is leaf else a, trained))

        size = 2e-3
        difference = (moved(size) - moved(-size)) / (2 * size)
        np.testing.assert_allclose(jnp.sum(slope * direction), difference, rtol=2e-2)
