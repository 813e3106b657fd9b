"""Proxies of smoothness as pure functions of `apply: embedded tokens -> logits` (arXiv 2605.08894).

The paper takes the gradient at the input for a proxy; its normalization is not public, the formulas are ours.
Any function will do for `apply`: for a model `functools.partial(decoder.forward_embedded, params, config)`,
dense, fake-quantized or packed. All proxies but those by differences are differentiable again, forward and in
reverse, with respect to whatever `apply` closes over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxquant.errors import UsageError

#: Embedded tokens `[B, T, d]` to logits `[B, T, V]`; causal, sequences apart from one another.
Apply = Callable[[jax.Array], jax.Array]

#: How the trace of the Fisher matrix is estimated; see `fisher_trace`.
TraceMethod = Literal["labels", "probes", "differences"]


def input_gradient(
    apply: Apply, embedded: Float[Array, "B T d"], targets: Int[Array, "B T-1"]
) -> Float[Array, "B T d"]:
    """`dL/de`, `L = mean_t -log p(targets[t] | e[..t])` of each sequence by itself.

    `|dL/de_t|` is the sensitivity to token t, `S = |dL/de|_F` that to the sequence. Two models are compared
    with the same targets: the text's next tokens (`tokens[:, 1:]`), or the original's own.

    Args:
      apply: the model.
      embedded: e.
      targets: what follows each position but the last.
    """
    return jax.grad(lambda e: jnp.sum(_sequence_loss(apply(e), targets)))(embedded)


def layer_gradient_norms(
    apply: Callable[[jax.Array, jax.Array], jax.Array],
    embedded: Float[Array, "B T d"],
    targets: Int[Array, "B T-1"],
    layers: int,
) -> Float[Array, "layers B"]:
    """`S_l = |dL/dh_l|_F` of the stream h_l that enters each block, L as in `input_gradient`.

    Args:
      apply: takes embedded tokens and `shifts` `[layers, B, T, d]` that are added to h_l, such as
        `lambda e, s: decoder.forward_embedded(params, config, e, shifts=s)`.
      embedded, targets: see `input_gradient`.
      layers: number of blocks.
    """
    shifts = jnp.zeros((layers, *embedded.shape), embedded.dtype)
    gradient = jax.grad(lambda s: jnp.sum(_sequence_loss(apply(embedded, s), targets)))(shifts)
    return jnp.sqrt(jnp.sum(jnp.square(gradient.astype(jnp.float32)), axis=(-2, -1)))


def fisher_trace(
    apply: Apply,
    embedded: Float[Array, "B T d"],
    key: jax.Array,
    *,
    samples: int = 8,
    method: TraceMethod = "labels",
    step: float = 1e-2,
) -> Float[Array, "samples B"]:
    """Estimates of `tr F = sum_t tr J_t^T (diag p_t - p_t p_t^T) J_t`, `J_t = dlogits_t/de`.

    F is what the predictions feel to second order: `sum_t KL(p_t(e) | p_t(e + h)) = h^T F h / 2 + o(h^2)`.

        labels       |d log p(y | e)/de|^2, y drawn from p at every position
        probes       v^T F v, v normal, by one forward-mode product
        differences  2 sum_t KL(p_t(e) | p_t(e + a v)) / a^2, a = step rms(e): forward only

    Labels and probes are unbiased, differences biased by O(a^2). Mean and spread over the first axis are the
    estimate and its error. Differences suit models whose gradient is not that of their values; where
    activations are rounded, `step` must exceed the rounding (.05), or the estimate is that of rounding noise.

    Args:
      apply: the model.
      embedded: e.
      key: of the labels or probes.
      samples: estimates.
      method: which.
      step: of differences.

    Raises:
      UsageError: another method, no samples, or a step that is not positive.
    """
    if method not in get_args(TraceMethod):
        raise UsageError(f"unknown method {method!r}; use {', '.join(get_args(TraceMethod))}")
    if samples < 1 or not step > 0:
        raise UsageError(f"fisher_trace: samples={samples} and step={step} must be positive")

    def by_label(key: jax.Array) -> jax.Array:
        def log_likelihood(e: jax.Array) -> jax.Array:
            scores = jax.nn.log_softmax(apply(e).astype(jnp.float32))
            labels = jax.random.categorical(key, lax.stop_gradient(scores))
            return jnp.sum(_at(scores, labels))

        return _squared(jax.grad(log_likelihood)(embedded))

    def by_probe(key: jax.Array) -> jax.Array:
        probe = jax.random.normal(key, embedded.shape, embedded.dtype)
        logits, moved = (a.astype(jnp.float32) for a in jax.jvp(apply, (embedded,), (probe,)))
        p = jax.nn.softmax(logits)
        mean = jnp.sum(p * moved, axis=-1, keepdims=True)
        return jnp.sum(p * jnp.square(moved - mean), axis=(-2, -1))

    def by_difference(key: jax.Array) -> jax.Array:
        size = step * jnp.sqrt(jnp.mean(jnp.square(embedded)))
        probe = jax.random.normal(key, embedded.shape, embedded.dtype)
        apart = token_kl(apply(embedded), apply(embedded + size * probe))
        return 2 * jnp.sum(apart, axis=-1) / jnp.square(size).astype(apart.dtype)

    estimate = {"labels": by_label, "probes": by_probe, "differences": by_difference}[method]
    return lax.map(estimate, jax.random.split(key, samples))


def local_lipschitz(
    apply: Apply, embedded: Float[Array, "B T d"], neighbours: Float[Array, "n B T d"]
) -> Float[Array, " B"]:
    """`max_n |logits(e_n) - logits(e)|_F / |e_n - e|_F`, a lower bound of the local Lipschitz constant.

    Neighbours equal to e are left out; 0 where all are.
    """
    logits = apply(embedded).astype(jnp.float32)

    def slope(neighbour: jax.Array) -> jax.Array:
        rise = _squared(apply(neighbour).astype(jnp.float32) - logits)
        run = _squared((neighbour - embedded).astype(jnp.float32))
        return jnp.where(run > 0, rise / jnp.where(run > 0, run, 1), 0)

    return jnp.sqrt(jnp.max(lax.map(slope, neighbours), axis=0))


def token_kl(logits: Float[Array, "*tokens V"], other: Float[Array, "*tokens V"]) -> Float[Array, "*tokens"]:
    """`KL(softmax(logits) | softmax(other)) = sum_v p (e^x - 1 - x)`, `x = log q - log p`, nats, float32.

    `p e^x - p` adds up to 0; with it no term is negative (but for rounding), and a small divergence keeps its
    digits.
    """
    p, q = (jax.nn.log_softmax(a.astype(jnp.float32)) for a in (logits, other))
    apart = q - p
    near = jnp.abs(apart) < 1
    # Where x is large, e^x may overflow while p e^x = q does not.
    small = jnp.where(near, apart, 0)
    terms = jnp.where(near, jnp.exp(p) * (jnp.expm1(small) - small), jnp.exp(q) - jnp.exp(p) * (1 + apart))
    return jnp.sum(terms, axis=-1)


def _sequence_loss(logits: Float[Array, "B T V"], targets: Int[Array, "B T-1"]) -> Float[Array, " B"]:
    scores = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return -jnp.mean(_at(scores, targets), axis=-1)


def _at(scores: Array, labels: Array) -> Array:
    return jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]


def _squared(a: Float[Array, "B T n"]) -> Float[Array, " B"]:
    return jnp.sum(jnp.square(a.astype(jnp.float32)), axis=(-2, -1))
