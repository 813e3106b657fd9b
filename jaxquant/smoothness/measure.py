"""Proxies of two models on the same text, with their errors."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.errors import NonFiniteError, UsageError
from jaxquant.evaluate.scoring import Progress, check_windows
from jaxquant.methods.spin import nearest_orthogonal
from jaxquant.models import decoder
from jaxquant.models.config import ModelConfig
from jaxquant.smoothness.proxy import input_gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientComparison:
    """How a model's gradients at the input differ from a reference's, over sequences.

    Attributes:
      ratio: `mean S / mean S_reference`, S the norm for a sequence; above 1 the model is sharper, below 1
        gradients vanish on their way. `ratio_stderr` by the delta method.
      cosine: mean cosine between the two gradients of a sequence, and its standard error.
      token_cosine: mean cosine token by token, and its standard error over sequences.
      norms, reference_norms: S of every sequence.
      cosines: those of every sequence.
    """

    ratio: float
    ratio_stderr: float
    cosine: float
    cosine_stderr: float
    token_cosine: float
    token_cosine_stderr: float
    norms: tuple[float, ...]
    reference_norms: tuple[float, ...]
    cosines: tuple[float, ...]

    @property
    def log_ratio(self) -> float:
        """`log(ratio)`: 0 where nothing changed, of equal size for twice and for half the gradient."""
        return math.log(self.ratio) if self.ratio > 0 else -math.inf


def gradient_comparison(
    model: tuple[dict[str, Any], ModelConfig],
    reference: tuple[dict[str, Any], ModelConfig],
    windows: np.ndarray,
    *,
    progress: Progress | None = None,
) -> GradientComparison:
    """`compare_gradients` of two models on text, targets its next tokens, one window at a time.

    Gradients are those at the embedded tokens. Where the model's embedding is the reference's in another
    basis (`methods.rotate`), its gradients are turned back: by the orthogonal R that brings one embedding
    nearest to the other.

    Args:
      model: `(params, config)`, dense or packed.
      reference: the same of the model to compare with.
      windows: int32 `[n, T]`.
      progress: called after every window.

    Raises:
      InputError: windows do not suit the models.
      UsageError: the embeddings of the two have nothing to do with one another.
      NonFiniteError: a gradient is NaN or infinite; names the window.
    """
    windows = check_windows(windows, reference[1])
    turn = _turn_between(reference[0]["embed"], model[0]["embed"])
    gradients = []
    for number, window in enumerate(windows):
        pair = [_gradient(*side, jnp.asarray(window[None])) for side in (model, reference)]
        gradients.append([np.asarray(g[0], np.float64) for g in pair])
        if not all(np.isfinite(g).all() for g in gradients[-1]):
            raise NonFiniteError(
                f"the gradient of window {number} is not finite; the model's weights or activations overflow"
            )
        if progress is not None:
            progress(number + 1, len(windows))
    ours, theirs = (np.stack(side) for side in zip(*gradients, strict=True))
    return compare_gradients(ours @ turn.T, theirs)


def compare_gradients(gradients: np.ndarray, reference: np.ndarray) -> GradientComparison:
    """Ratio of the norms of two gradients `[n, T, d]`, and the cosines between them.

    Raises:
      UsageError: the reference has no gradient.
    """
    gradients, reference = (np.asarray(g, np.float64) for g in (gradients, reference))
    norms, others = (np.linalg.norm(g, axis=(1, 2)) for g in (gradients, reference))
    if not others.any():
        raise UsageError(
            "the reference's gradient is 0 everywhere; compare models that depend on their input"
        )
    ratio = norms.mean() / others.mean()
    spread = float(stderr(norms - ratio * others) / others.mean())
    cosines = np.sum(gradients * reference, axis=(1, 2)) / np.maximum(norms * others, 1e-300)
    own, known = (np.linalg.norm(g, axis=2) for g in (gradients, reference))
    by_token = np.sum(gradients * reference, axis=2) / np.maximum(own * known, 1e-300)
    # The last token of a sequence has no target behind it, and no gradient. One that vanished counts as 0.
    by_token = [np.mean(a[felt]) if felt.any() else 0.0 for a, felt in zip(by_token, known > 0, strict=True)]
    return GradientComparison(
        ratio=float(ratio),
        ratio_stderr=spread,
        cosine=float(cosines.mean()),
        cosine_stderr=stderr(cosines),
        token_cosine=float(np.mean(by_token)),
        token_cosine_stderr=stderr(np.asarray(by_token)),
        norms=tuple(norms.tolist()),
        reference_norms=tuple(others.tolist()),
        cosines=tuple(cosines.tolist()),
    )


def _turn_between(embedding: jax.Array, other: jax.Array) -> np.ndarray:
    """The orthogonal R with `embedding R` nearest to `other`."""
    a, b = (np.asarray(e).astype(np.float64) for e in (embedding, other))
    if a.shape != b.shape:
        raise UsageError(
            f"the models' embeddings are {list(b.shape)} and {list(a.shape)}; compare equal ones"
        )
    if np.array_equal(a, b):
        return np.eye(a.shape[1])
    spread = np.linalg.svd(a.T @ b, compute_uv=False)
    if not spread[-1] > 1e-7 * spread[0]:
        raise UsageError("the embeddings span too few directions to find the basis of one in the other")
    turn = nearest_orthogonal(a.T @ b)
    apart = np.linalg.norm(a @ turn - b) / np.linalg.norm(b)
    if not apart < 0.1:
        raise UsageError(
            f"the models' embeddings differ by {apart:.0%} in any basis, so their gradients cannot be "
            "compared; take the model that was quantized as the reference"
        )
    return turn


def stderr(values: np.ndarray) -> float:
    """Standard error of the mean of `values`, NaN for one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else math.nan


@functools.partial(jax.jit, static_argnames="config")
def _gradient(params: dict[str, Any], config: ModelConfig, tokens: jax.Array) -> jax.Array:
    apply = functools.partial(decoder.forward_embedded, params, config)
    return input_gradient(apply, decoder.embed(params, config, tokens), tokens[:, 1:]).astype(jnp.float32)
