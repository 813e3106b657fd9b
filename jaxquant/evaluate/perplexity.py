"""Perplexity by the usual protocol: windows without overlap, every next token of each scored."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.evaluate.scoring import (
    Progress,
    check_windows,
    head_only,
    mean_and_stderr,
    next_token_nll,
    over_tokens,
)
from jaxquant.models import decoder
from jaxquant.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Mean negative log-likelihood of next tokens, in nats.

    Attributes:
      nll: mean over all targets; every window has the same number.
      stderr: standard error of `nll`, over windows; over the tokens if there is only one window.
      tokens: how many targets were scored, `n (T - 1)`.
      window_nll: the mean of each window.
    """

    nll: float
    stderr: float
    tokens: int
    window_nll: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """`exp(nll)`, infinity where that overflows."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @classmethod
    def of(cls, token_nll: np.ndarray) -> Perplexity:
        """The summary of `token_nll` `[n, T - 1]`; raises `NonFiniteError` where it is not finite."""
        nll, stderr = mean_and_stderr(token_nll, "the negative log-likelihood")
        windows = tuple(token_nll.mean(axis=1, dtype=np.float64).tolist())
        return cls(nll=nll, stderr=stderr, tokens=token_nll.size, window_nll=windows)


def perplexity(
    params: dict[str, Any], config: ModelConfig, windows: np.ndarray, *, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of a model on `windows` int32 `[n, T]`: `exp(mean_t(-log p(token t | tokens < t)))`, t > 0.

    One window is computed at a time; logits and log-softmax are float32 whatever the activations are, and the
    head works in chunks of tokens, so the memory beside the parameters is some megabytes per 1000 tokens.

    Raises:
      InputError: unusable windows (see `scoring.check_windows`).
      NonFiniteError: the model gives NaN or infinity.
    """
    windows = check_windows(windows, config)
    losses = []
    for done, window in enumerate(windows, start=1):
        losses.append(np.asarray(token_nll(params, config, window)))
        if progress is not None:
            progress(done, len(windows))
    return Perplexity.of(np.stack(losses))


@functools.partial(jax.jit, static_argnames="config")
def token_nll(params: dict[str, Any], config: ModelConfig, window: jax.Array) -> jax.Array:
    """`-log p(window[t] | window[:t])` for `t = 1 .. T - 1`: float32 `[T - 1]` from int32 `[T]`."""
    hidden, _ = decoder.final_hidden(params, config, window[None])
    score = functools.partial(next_token_nll, head_only(params, config), config)
    return over_tokens(score, config.vocab_size, hidden[0, :-1], jnp.asarray(window)[1:])
