"""What perplexity and divergence share: the head in chunks of tokens, standard errors, checks of windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.errors import InputError, NonFiniteError
from jaxquant.models import decoder
from jaxquant.models.config import ModelConfig

# Fewer tokens would read a large head too often, more would push the logits out of the caches.
_MIN_CHUNK = 64
_LOGIT_BYTES = 32 * 2**20

#: Called after every window with `(windows done, windows in total)`.
Progress = Callable[[int, int], None]


def over_tokens(function: Callable[..., Any], vocab_size: int, *arrays: jax.Array) -> Any:
    """`function` mapped over chunks of tokens, so that one array of logits never exceeds 64 MB.

    Args:
      function: takes chunks of `arrays` and returns per-token arrays; must accept padding (zeros).
      vocab_size: columns of the logits that `function` makes; with 262144 a chunk has 64 tokens.
      arrays: `[T, ...]` each.

    Returns:
      What `function` returns, over all `T` tokens.
    """
    length = arrays[0].shape[0]
    chunks = -(-length // max(_MIN_CHUNK, _LOGIT_BYTES // (4 * vocab_size)))
    size = -(-length // chunks)

    def split(array: jax.Array) -> jax.Array:
        padding = [(0, chunks * size - length)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(chunks, size, *array.shape[1:])

    outputs = lax.map(lambda parts: function(*parts), tuple(split(array) for array in arrays))
    return jax.tree.map(lambda out: out.reshape(chunks * size, *out.shape[2:])[:length], outputs)


def head_only(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The part of `params` that `decoder.logits` reads, cast to the activations' dtype.

    XLA would repeat the cast of a bfloat16 head in every chunk: it hoists nothing that grows.
    """
    name = "embed" if config.tie_embeddings else "head"
    head = params[name]
    return {name: jnp.asarray(head, config.dtype) if isinstance(head, (jax.Array, np.ndarray)) else head}


def at_targets(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """`scores[t, targets[t]]`: `[T]` from `[T, V]` and `[T]`."""
    return jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]


def next_token_nll(
    head: dict[str, Any], config: ModelConfig, hidden: jax.Array, targets: jax.Array
) -> jax.Array:
    """`-log p(target)` in float32, `[T]`, from final activations `[T, d]` and `head_only` parameters."""
    scores = decoder.logits(head, config, hidden)
    return jax.nn.logsumexp(scores, axis=-1) - at_targets(scores, targets)


def check_windows(windows: np.ndarray, config: ModelConfig) -> np.ndarray:
    """`windows` as int32 `[n, T]`.

    Raises:
      InputError: no window, one that has no target or exceeds the model's context, or a foreign token.
    """
    windows = np.asarray(windows)
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise InputError(
            f"windows have shape {windows.shape}; at least one window of two tokens is needed - "
            "use a longer text or a smaller seqlen"
        )
    if windows.shape[1] > config.max_position:
        raise InputError(
            f"windows of {windows.shape[1]} tokens exceed the model's max_position = {config.max_position}; "
            "use a smaller seqlen"
        )
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= config.vocab_size:
        raise InputError(
            f"token {high if low >= 0 else low} is outside the vocabulary of {config.vocab_size}; "
            "was the text encoded by another model's tokenizer?"
        )
    return windows.astype(np.int32)


def mean_and_stderr(values: np.ndarray, name: str) -> tuple[float, float]:
    """Mean of `values` `[n windows, T]` and its standard error over windows (over tokens if there is one).

    Raises:
      NonFiniteError: a window has NaN or infinity.
    """
    means = values.mean(axis=1, dtype=np.float64)
    if not np.isfinite(means).all():
        bad = int(np.flatnonzero(~np.isfinite(means))[0])
        raise NonFiniteError(
            f"{name} of window {bad} is not finite; the model's weights or activations overflow"
        )
    sample = means if len(means) > 1 else values[0].astype(np.float64)
    stderr = sample.std(ddof=1) / np.sqrt(len(sample)) if len(sample) > 1 else float("nan")
    return float(means.mean()), float(stderr)
