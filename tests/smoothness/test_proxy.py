"""Proxies of smoothness: closed forms of a linear-softmax model, agreement of estimators, derivatives."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import run
from tiny_families import tiny_config, tiny_params, tiny_tokens

from jaxquant.errors import UsageError
from jaxquant.models import Precision
from jaxquant.models.decoder import embed, forward_embedded
from jaxquant.quant import ActivationGrid, Grid, QArray, quantize
from jaxquant.smoothness import (
    fisher_trace,
    input_gradient,
    layer_gradient_norms,
    local_lipschitz,
    token_kl,
)

B, T, D, V = 2, 5, 6, 9


@pytest.fixture(scope="module")
def linear():
    rng = np.random.default_rng(0)
    e, w = rng.standard_normal((B, T, D)), rng.standard_normal((D, V))
    return e, w, rng.integers(0, V, (B, T - 1))


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def fisher_of_linear(e: np.ndarray, w: np.ndarray) -> np.ndarray:
    """`W (diag p - p p^T) W^T` of every token: a linear model has no other derivative."""
    p = softmax(e @ w)
    return np.einsum("iv,btv,jv->btij", w, p, w) - np.einsum("iv,btv,btu,ju->btij", w, p, p, w)


def test_the_gradient_of_a_linear_softmax_model(linear):
    e, w, targets = linear
    with jax.enable_x64(True):
        apply = functools.partial(jnp.matmul, b=jnp.asarray(w))
        ours = jax.jit(lambda e: input_gradient(apply, e, jnp.asarray(targets)))(jnp.asarray(e))
    expected = np.zeros_like(e)
    expected[:, :-1] = (softmax(e @ w)[:, :-1] - np.eye(V)[targets]) @ w.T / (T - 1)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_layer_gradients_of_a_linear_chain(linear):
    """Every layer multiplies by c: norms fall by c from the last to the first."""
    e, w, targets = linear
    c = np.float32(1.5)

    def apply(e, shifts):
        for shift in shifts:
            e = c * (e + shift)
        return e @ jnp.asarray(w, jnp.float32)

    x = jnp.asarray(e, jnp.float32)
    norms = jax.jit(lambda x: layer_gradient_norms(apply, x, jnp.asarray(targets), 3))(x)
    unshifted = functools.partial(apply, shifts=jnp.zeros((3, B, T, D)))
    gradient = jax.jit(lambda x: input_gradient(unshifted, x, jnp.asarray(targets)))(x)
    first = np.linalg.norm(gradient, axis=(1, 2))
    expected = first[None] * 1.5 ** -np.arange(3)[:, None]
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


@pytest.mark.parametrize(("method", "samples"), [("labels", 4000), ("probes", 2000), ("differences", 2000)])
def test_trace_estimates_agree_with_the_exact_one(linear, method, samples):
    e, w, _ = linear
    exact = np.trace(fisher_of_linear(e, w), axis1=-2, axis2=-1).sum(1)
    apply = functools.partial(jnp.matmul, b=jnp.asarray(w, jnp.float32))
    estimates = np.asarray(
        jax.jit(lambda e, key: fisher_trace(apply, e, key, samples=samples, method=method))(
            jnp.asarray(e, jnp.float32), jax.random.key(0)
        )
    )
    assert estimates.shape == (samples, B)
    stderr = estimates.std(0, ddof=1) / samples**0.5
    assert np.all(np.abs(estimates.mean(0) - exact) < 4 * stderr + 0.02 * exact)
    assert np.all(stderr < 0.05 * exact)


def test_divergence_of_a_small_step_is_half_its_fisher_form(linear):
    """And its mean over normal steps is `eps^2 / 2 tr F`."""
    e, w, _ = linear
    step = 1e-2 * np.random.default_rng(1).standard_normal((400, B, T, D))
    with jax.enable_x64(True):
        divergence = jax.jit(jax.vmap(lambda h: token_kl(jnp.asarray(e @ w), jnp.asarray((e + h) @ w))))
        far = divergence(jnp.asarray(step))
    form = np.einsum("nbti,btij,nbtj->nbt", step, fisher_of_linear(e, w), step) / 2
    np.testing.assert_allclose(np.sum(far, axis=2), form.sum(2), rtol=0.05)
    trace = 1e-4 / 2 * np.trace(fisher_of_linear(e, w), axis1=-2, axis2=-1).sum()
    assert float(np.sum(far)) / 400 == pytest.approx(trace, rel=0.05)


def test_lipschitz_of_a_linear_model_is_below_its_norm(linear):
    e, w, _ = linear
    x, apply = jnp.asarray(e, jnp.float32), functools.partial(jnp.matmul, b=jnp.asarray(w, jnp.float32))
    steps = jax.random.normal(jax.random.key(0), (20, *x.shape))
    bound = float(np.linalg.norm(w, 2))
    found = local_lipschitz(apply, x, x[None] + steps)
    assert found.shape == (B,)
    assert np.all((found > 0.3 * bound) & (found <= 1.0001 * bound))
    # Along the leading direction of W the bound is reached; a neighbour that is e itself says nothing.
    leading = jnp.asarray(np.linalg.svd(w)[0][:, 0], jnp.float32)
    along = jnp.broadcast_to(leading, x.shape)
    np.testing.assert_allclose(local_lipschitz(apply, x, jnp.stack([x, x + along])), bound, rtol=1e-4)
    np.testing.assert_array_equal(local_lipschitz(apply, x, x[None]), 0)


def sharpness(w, e, targets):
    """A proxy as a function of a weight, through a nonlinear model."""
    gradient = input_gradient(lambda e: jnp.tanh(e @ w) @ w.T @ w, e, targets)
    return jnp.sum(jnp.square(gradient))


def test_proxies_are_differentiable_forward_and_in_reverse(linear):
    e, w, targets = linear
    with jax.enable_x64(True):
        e, w, targets = jnp.asarray(e), jnp.asarray(w[:, :D] * 0.3), jnp.asarray(targets % D)
        direction = jnp.asarray(np.random.default_rng(1).standard_normal(w.shape))
        value = jax.jit(lambda w: sharpness(w, e, targets))
        in_reverse = jnp.vdot(jax.jit(jax.grad(value))(w), direction)
        _, forward_mode = jax.jit(lambda w: jax.jvp(value, (w,), (direction,)))(w)
        step = 1e-4
        up, down = (value(w + sign * step * direction) for sign in (1, -1))
        # The loss itself is computed in float32.
        assert float(in_reverse) == pytest.approx(float(forward_mode), rel=1e-5)
        assert float(in_reverse) == pytest.approx(float((up - down) / (2 * step)), rel=5e-3)

        @jax.jit
        def trace(w):
            return jnp.sum(
                fisher_trace(lambda e: jnp.tanh(e @ w), e, jax.random.key(0), samples=2, method="probes")
            )

        up, down = (trace(w + sign * step * direction) for sign in (1, -1))
        difference = float((up - down) / (2 * step))
        assert float(jnp.vdot(jax.jit(jax.grad(trace))(w), direction)) == pytest.approx(difference, rel=5e-3)


def test_impossible_traces(linear):
    e, w, _ = linear
    apply = functools.partial(jnp.matmul, b=jnp.asarray(w, jnp.float32))
    for options, message in (
        ({"method": "exact"}, "unknown method 'exact'; use labels, probes, differences"),
        ({"samples": 0}, "samples=0 and step=0.01 must be positive"),
    ):
        with pytest.raises(UsageError, match=message):
            fisher_trace(apply, jnp.asarray(e, jnp.float32), jax.random.key(0), **options)


@pytest.fixture(scope="module")
def model():
    config = tiny_config("llama3")
    params = jax.tree.map(jnp.asarray, tiny_params(config))
    return params, config, jnp.asarray(tiny_tokens("llama3"))


def gradient_of(params, config, tokens):
    apply = functools.partial(forward_embedded, params, config)
    return input_gradient(apply, embed(params, config, tokens), tokens[:, 1:])


def packed_and_dequantized(params):
    def pack_one(path, leaf):
        return quantize(leaf, Grid(bits=4, group_size=16)) if path[-1].key == "kernel" else leaf

    packed = jax.tree_util.tree_map_with_path(pack_one, params)
    values = jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, QArray) else leaf,
        packed,
        is_leaf=lambda leaf: isinstance(leaf, QArray),
    )
    return packed, values


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True], ids=["weights", "activations too"])
def test_packed_models_have_the_gradients_of_their_values(model, quantized):
    params, config, tokens = model
    if quantized:
        grid = ActivationGrid(bits=4, group_size=16)
        config = dataclasses.replace(config, precision=Precision.uniform(grid, ActivationGrid(bits=4)))
    gradient = jax.jit(gradient_of, static_argnums=1)
    ours, theirs = (gradient(p, config, tokens) for p in packed_and_dequantized(params))
    assert float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)) < 1e-4
    original = gradient(params, config, tokens)
    assert float(jnp.linalg.norm(ours - original) / jnp.linalg.norm(original)) > 1e-2


@pytest.mark.slow
def test_a_proxy_of_a_packed_model_is_differentiable_by_its_scales(model):
    params, config, tokens = model
    packed, _ = packed_and_dequantized(params)
    kernel = packed["blocks"]["mlp"]["up"]["kernel"]

    def sharpness(scale):
        up = {"kernel": dataclasses.replace(kernel, scale=scale)}
        blocks = {**packed["blocks"], "mlp": {**packed["blocks"]["mlp"], "up": up}}
        return jnp.sum(jnp.square(gradient_of({**packed, "blocks": blocks}, config, tokens)))

    scale = kernel.scale.astype(jnp.float32)
    direction = scale * jax.random.normal(jax.random.key(0), scale.shape)
    gradient, (_, forward_mode) = (
        jax.jit(jax.grad(sharpness))(scale),
        jax.jit(lambda s: jax.jvp(sharpness, (s,), (direction,)))(scale),
    )
    assert float(jnp.vdot(gradient, direction)) == pytest.approx(float(forward_mode), rel=1e-3)
    up, down = (jax.jit(sharpness)(scale + sign * 1e-2 * direction) for sign in (1, -1))
    assert float(forward_mode) == pytest.approx(float((up - down) / 2e-2), rel=0.02)


def test_embedded_tokens_give_the_logits_of_the_tokens(model):
    params, config, tokens = model
    x, expected = embed(params, config, tokens), run(params, config, tokens).logits
    embedded = jax.jit(forward_embedded, static_argnums=1)
    np.testing.assert_allclose(embedded(params, config, x), expected, atol=1e-5)
    shifts = jnp.zeros((config.num_layers, *x.shape)).at[0].set(x)
    shifted = embedded(params, config, jnp.zeros_like(x), shifts=shifts)
    np.testing.assert_allclose(shifted, expected, atol=1e-5)


def test_a_divergence_is_never_negative_and_keeps_its_digits():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((64, 200)) * np.repeat([0.1, 1, 10, 60], 16)[:, None]
    summed_slope = jax.jit(jax.grad(lambda a, b: jnp.sum(token_kl(a, b)), argnums=1))
    for size in (0.0, 1e-6, 1e-3, 1.0, 200.0):
        other = logits + size * rng.standard_normal(logits.shape)
        pair = jnp.asarray(logits, jnp.float32), jnp.asarray(other, jnp.float32)
        # Of the same inputs: rounding them to float32 alone moves small divergences.
        p, q = (np.asarray(a, np.float64) for a in pair)
        p, q = (a - a.max(-1, keepdims=True) for a in (p, q))
        p, q = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (p, q))
        expected = np.sum(np.exp(p) * (p - q), axis=-1)
        found = jax.jit(token_kl)(*pair)
        assert float(jnp.min(found)) >= 0
        if size >= 1e-3:
            np.testing.assert_allclose(found, expected, rtol=2e-2 if size == 1e-3 else 1e-4, atol=1e-9)
        slope = summed_slope(*pair)
        np.testing.assert_allclose(slope, np.exp(q) - np.exp(p), atol=1e-5)
