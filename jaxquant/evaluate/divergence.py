"""How far a model is from its reference, token by token."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.errors import InputError
from jaxquant.evaluate.perplexity import Perplexity
from jaxquant.evaluate.scoring import (
    Progress,
    at_targets,
    check_windows,
    head_only,
    mean_and_stderr,
    over_tokens,
)
from jaxquant.models import decoder
from jaxquant.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """A model against its reference on the same windows; standard errors as in `Perplexity`.

    Attributes:
      kl: mean over targets of `KL(reference || model) = sum_v p_ref (log p_ref - log p)`, in nats.
      top1: share of positions where both models rank the same token first.
      model, reference: the perplexities, from the same pass.
    """

    kl: float
    kl_stderr: float
    top1: float
    top1_stderr: float
    model: Perplexity
    reference: Perplexity


def divergence(
    params: dict[str, Any],
    reference_params: dict[str, Any],
    config: ModelConfig,
    reference_config: ModelConfig,
    windows: np.ndarray,
    *,
    progress: Progress | None = None,
) -> Divergence:
    """Divergence of `params` from `reference_params` on `windows` int32 `[n, T]`, T - 1 positions of each.

    Raises:
      InputError: unusable windows, or vocabularies of different size.
      NonFiniteError: one of the models gives NaN or infinity.
    """
    if config.vocab_size != reference_config.vocab_size:
        raise InputError(
            f"the models have vocabularies of {config.vocab_size} and {reference_config.vocab_size} tokens; "
            "only models of one tokenizer can be compared"
        )
    windows = check_windows(check_windows(windows, config), reference_config)
    rows = []
    for done, window in enumerate(windows, start=1):
        scores = _token_scores(params, reference_params, config, reference_config, window)
        rows.append([np.asarray(score) for score in scores])
        if progress is not None:
            progress(done, len(windows))
    nll, reference_nll, kl, agrees = (np.stack(column) for column in zip(*rows, strict=True))
    model, reference = Perplexity.of(nll), Perplexity.of(reference_nll)
    mean_kl, kl_stderr = mean_and_stderr(kl, "the divergence")
    top1, top1_stderr = mean_and_stderr(agrees, "the agreement")
    return Divergence(
        kl=mean_kl, kl_stderr=kl_stderr, top1=top1, top1_stderr=top1_stderr, model=model, reference=reference
    )


@functools.partial(jax.jit, static_argnames=("config", "reference_config"))
def _token_scores(
    params: dict[str, Any],
    reference_params: dict[str, Any],
    config: ModelConfig,
    reference_config: ModelConfig,
    window: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of each target: both negative log-likelihoods, the divergence, and whether the best tokens agree."""
    hidden, _ = decoder.final_hidden(params, config, window[None])
    reference_hidden, _ = decoder.final_hidden(reference_params, reference_config, window[None])
    head, reference_head = head_only(params, config), head_only(reference_params, reference_config)

    def score(hidden: jax.Array, reference_hidden: jax.Array, targets: jax.Array) -> Any:
        ours = jax.nn.log_softmax(decoder.logits(head, config, hidden), axis=-1)
        theirs = decoder.logits(reference_head, reference_config, reference_hidden)
        theirs = jax.nn.log_softmax(theirs, axis=-1)
        kl = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
        agrees = (ours.argmax(axis=-1) == theirs.argmax(axis=-1)).astype(jnp.float32)
        return -at_targets(ours, targets), -at_targets(theirs, targets), kl, agrees

    arrays = (hidden[0, :-1], reference_hidden[0, :-1], jnp.asarray(window)[1:])
    return over_tokens(score, config.vocab_size, *arrays)
