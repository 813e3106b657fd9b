"""What training a quantized model minimizes: distillation, the hidden stream, and smoothness (FINE).

Smoothness losses keep how a model reacts to its inputs, not only what it says ("Fitting Is Not Enough", arXiv
2605.08894, whose formulas are not public; these are ours). All are pure functions of parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxquant.evaluate.scoring import head_only, next_token_nll, over_tokens
from jaxquant.methods import backward_error
from jaxquant.methods.rounded import relative_energy
from jaxquant.models import decoder
from jaxquant.models.decoder import Model
from jaxquant.smoothness.neighborhood import ball
from jaxquant.smoothness.proxy import token_kl
from jaxquant.train.latent import Latent, is_latent

#: What is added to distillation: a term, see `gradient_loss`, `neighborhood_loss` and `layer_loss`; or
#: neighbours in the place of the text, see `smoothness.substituted`.
Smoothness = Literal["none", "gradient", "neighborhood", "layer", "substitution"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Response:
    """How a model reacts to tokens `[B, T]`.

    Attributes:
      hidden: activations after the final norm, `[B, T, d]`.
      stream: the residual stream as it leaves every block, `[L, B, T, d]`.
      gradient: `dL/de`, `[B, T, d]` float32, or `None`; L and e as in `smoothness.input_gradient`, with the
        next tokens for targets.
    """

    hidden: Float[Array, "B T d"]
    stream: Float[Array, "L B T d"]
    gradient: Float[Array, "B T d"] | None


def respond(
    model: Model, tokens: Int[Array, "B T"], *, gradient: bool = False, remat: bool = True
) -> Response:
    """The response of a model, its gradient by the same forward pass.

    Args:
      model: `(params, config)`.
      tokens: int32.
      gradient: whether it is wanted.
      remat: see `decoder.hidden_of_embedded`.
    """
    params, config = model

    def run(e: Array) -> tuple[Array, Array]:
        hidden, taps = decoder.hidden_of_embedded(params, config, e, taps=(decoder.STREAM,), remat=remat)
        return hidden, taps[decoder.STREAM]

    embedded = decoder.embed(params, config, tokens)
    if not gradient:
        return Response(*run(embedded), None)
    hidden, pull, stream = jax.vjp(run, embedded, has_aux=True)
    score = jax.checkpoint(functools.partial(next_token_nll, head_only(params, config), config))

    def loss(hidden: Array) -> Array:
        flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        nll = over_tokens(score, config.vocab_size, flat, tokens[:, 1:].reshape(-1))
        return jnp.sum(nll) / (tokens.shape[1] - 1)

    (at_input,) = pull(jax.grad(loss)(hidden))
    return Response(hidden, stream, at_input.astype(jnp.float32))


def prediction_loss(
    student: Model, teacher: Model, hidden: Float[Array, "B T d"], known: Float[Array, "B T d"]
) -> Float[Array, ""]:
    """`mean_t KL(p_teacher | p_student)` in nats, logits made in chunks of tokens and again on the way back.

    Args:
      student, teacher: of which the heads are read.
      hidden, known: `Response.hidden` of the two.
    """
    config, other = student[1], teacher[1]
    head, known_head = head_only(student[0], config), head_only(teacher[0], other)

    @jax.checkpoint
    def score(ours: Array, theirs: Array) -> Array:
        return token_kl(decoder.logits(known_head, other, theirs), decoder.logits(head, config, ours))

    flat = (a.reshape(-1, a.shape[-1]) for a in (hidden, known))
    return jnp.mean(over_tokens(score, config.vocab_size, *flat))


def stream_loss(stream: Float[Array, "L B T d"], known: Float[Array, "L B T d"]) -> Float[Array, ""]:
    """`mean_{l,t} | h / |h| - h_teacher / |h_teacher| |^2`, h as it leaves block l.

    Compared entry by entry: both models must be in one basis.
    """

    def unit(h: Array) -> Array:
        wide = h.astype(jnp.float32)
        energy = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
        # A stream of 0 has no direction, and no gradient either.
        some = energy > 1e-12
        return jnp.where(some, wide * lax.rsqrt(jnp.where(some, energy, 1)), 0)

    return jnp.mean(jnp.sum(jnp.square(unit(stream) - unit(known)), axis=-1))


def gradient_loss(gradient: Float[Array, "B T d"], known: Float[Array, "B T d"]) -> Float[Array, ""]:
    """`|g - g_teacher|^2 / |g_teacher|^2`, g the gradients at the input, of all windows together.

    0 where the teacher has none. Its own gradient with respect to the student's parameters is a double
    backward pass.
    """
    return relative_energy(jnp.sum(jnp.square(gradient - known)), jnp.sum(jnp.square(known)))


def neighborhood_loss(
    student: Model,
    teacher: Model,
    tokens: Int[Array, "B T"],
    key: jax.Array,
    *,
    radius: float = 0.05,
    remat: bool = True,
) -> Float[Array, ""]:
    """`mean_t KL(p_teacher(e + a v) | p_student(e + a v))`, `a = radius rms(e)`, v normal, one for both.

    Agreement around a text: to second order that of the Jacobians, without a second backward pass.
    """
    known = decoder.embed(*teacher, tokens)
    (noise,) = ball(known, key, samples=1, radius=radius)
    hidden, _ = decoder.hidden_of_embedded(*student, decoder.embed(*student, tokens) + noise, remat=remat)
    theirs, _ = decoder.hidden_of_embedded(*teacher, known + noise)
    return prediction_loss(student, teacher, hidden, lax.stop_gradient(theirs))


def layer_loss(
    student: Model, teacher: Model, outputs: Mapping[str, Float[Array, "layers out out"]]
) -> Float[Array, ""]:
    """Mean over the linears of `|D c^T|^2 / |W c^T|^2`, `D = what - W`, c the teacher's gradients behind W.

    The way back of every linear by itself, from moments `sum c^T c` that are taken once: no data, no second
    backward pass.

    Args:
      student: kernels that are no `Latent` have no error.
      teacher: with float kernels in the student's basis.
      outputs: by path, see `calibrate.fisher.output_moments`; stacked over layers.
    """

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def error(layer: tuple[Latent, Array, Array]) -> Array:
        latent, weight, second = layer
        return backward_error(latent.values(), weight.astype(jnp.float32), second)

    totals = []
    for path, second in outputs.items():
        part, name = path.split(".")
        own, original = (model[0]["blocks"][part][name]["kernel"] for model in (student, teacher))
        if not is_latent(own):
            continue
        totals.append(jnp.mean(lax.map(error, (own, original, second))))
    return jnp.mean(jnp.stack(totals))
