"""Losses against an original model at chosen tokens, from one pass through it and without its logits."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer

from jaxquant.calibrate.collect import batches
from jaxquant.errors import InputError
from jaxquant.evaluate.continuations import encode_pair
from jaxquant.evaluate.scoring import head_only, over_tokens
from jaxquant.evaluate.task_data import Item
from jaxquant.models import decoder
from jaxquant.models.config import ModelConfig


def gold_tokens(item: Item, tokenizer: Tokenizer, config: ModelConfig) -> tuple[list[int], list[int]]:
    """Tokens of a question and of its right answer; see `continuations.encode_pair`."""
    return encode_pair(tokenizer, config, item.contexts[item.gold], item.continuations[item.gold])


@dataclasses.dataclass(frozen=True)
class Domain:
    """Texts that a loss is measured on.

    Attributes:
      tokens: int32 `[n, T]`, shorter ones padded at the end.
      scored: bool `[n, T]`: tokens that the model has to predict; never the first.
    """

    tokens: Int[np.ndarray, "n T"]
    scored: Bool[np.ndarray, "n T"]

    @classmethod
    def of_windows(cls, tokens: Int[np.ndarray, "n T"]) -> Domain:
        """Running text: every token after the first of a window."""
        scored = np.ones(tokens.shape, bool)
        scored[:, 0] = False
        return cls(tokens, scored)

    @classmethod
    def of_items(
        cls, items: Sequence[Item], tokenizer: Tokenizer, config: ModelConfig, *, longest: int = 256
    ) -> Domain:
        """Right answers, given their questions; items of more than `longest` tokens are left out.

        Raises:
          InputError: no item is short enough.
        """
        pairs = [gold_tokens(item, tokenizer, config) for item in items]
        pairs = [(head, tail) for head, tail in pairs if len(head) + len(tail) <= longest]
        if not pairs:
            raise InputError(f"none of {len(items)} items has at most {longest} tokens; give shorter ones")
        width = max(len(head) + len(tail) for head, tail in pairs)
        tokens, scored = np.zeros((len(pairs), width), np.int32), np.zeros((len(pairs), width), bool)
        for row, (head, tail) in enumerate(pairs):
            tokens[row, : len(head) + len(tail)] = head + tail
            scored[row, len(head) : len(head) + len(tail)] = True
        return cls(tokens, scored)

    def facts(self) -> dict[str, Any]:
        """What tells one domain from another."""
        digest = hashlib.sha256(np.ascontiguousarray(self.tokens).tobytes() + self.scored.tobytes())
        return {"sha256": digest.hexdigest(), "texts": len(self.tokens), "scored": int(self.scored.sum())}


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the losses of a domain need of the original model, a row a scored token.

    Attributes:
      text, place: text and place of the activation that predicts the token.
      mean: `E p`, p the probabilities of the original.
      entropy: of p, in nats.
      target: the column of `E` of the token.
      nll: of the original.
    """

    text: np.ndarray
    place: np.ndarray
    mean: jax.Array
    entropy: jax.Array
    target: jax.Array
    nll: np.ndarray

    @classmethod
    def of(cls, params: dict[str, Any], config: ModelConfig, domain: Domain) -> Probe:
        """The original model's answers."""
        text, place = np.nonzero(domain.scored)
        place = place - 1
        rows = []
        for part in batches(domain.tokens):
            hidden, _ = _final_hidden(params, config, jnp.asarray(domain.tokens[part]))
            own = (text >= part.start) & (text < part.stop)
            rows.append(hidden[text[own] - part.start, place[own]])
        hidden = jnp.concatenate(rows)
        mean, entropy, lse = _answers(head_only(params, config), config, hidden)
        tokens = jnp.asarray(domain.tokens[text, place + 1])
        target = params["embed"][tokens] if config.tie_embeddings else params["head"].T[tokens]
        nll = lse - jnp.sum(hidden * target, axis=-1)
        return cls(text, place, mean, entropy, target, np.asarray(nll))

    def by_token(
        self, params: dict[str, Any], config: ModelConfig, changed: Any, state: np.ndarray, index: int
    ) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
        """Growth of the NLL and `KL(original || changed)` of every scored token, in nats, to rounding.

        Of a model that is quantized throughout, give its own `params`, its first block, what `embed_all`
        gives, and index 0; its head must be the original's.

        Args:
          params: of the whole model in floating point, blocks stacked.
          changed: block `index`, instead of that in `params`.
          state: what enters block `index`, `[n, T, d]`.
          index: of the first block that is run.
        """
        nll, kl = [], []
        for part in batches(state):
            own = np.flatnonzero((self.text >= part.start) & (self.text < part.stop))
            found = _losses(
                params, config, changed, state[part], np.int32(index), self.text[own] - part.start,
                self.place[own], self.mean[own], self.entropy[own], self.target[own],
            )  # fmt: skip
            nll.append(np.asarray(found[0]))
            kl.append(np.asarray(found[1]))
        growth = np.concatenate(nll).astype(np.float64) - self.nll
        return growth, np.concatenate(kl).astype(np.float64)

    def losses(
        self, params: dict[str, Any], config: ModelConfig, changed: Any, state: np.ndarray, index: int
    ) -> dict[str, float]:
        """Means of `by_token`, and the standard error of the divergence over texts."""
        growth, kl = self.by_token(params, config, changed, state, index)
        texts = np.unique(self.text)
        share = len(self.text) / len(texts)
        # A mean of ratios would give short texts more weight; this is the ratio's linearized error.
        apart = [np.sum(kl[self.text == t] - kl.mean()) / share for t in texts]
        return {
            "nll": float(growth.mean()),
            "kl": float(kl.mean()),
            "kl_stderr": float(np.std(apart, ddof=1) / len(texts) ** 0.5) if len(texts) > 1 else 0.0,
        }


@functools.partial(jax.jit, static_argnames="config")
def _final_hidden(params: Any, config: ModelConfig, tokens: jax.Array) -> Any:
    with jax.default_matmul_precision("highest"):
        return decoder.final_hidden(params, config, tokens)


@functools.partial(jax.jit, static_argnames="config")
def _answers(head: dict[str, Any], config: ModelConfig, hidden: jax.Array) -> tuple[jax.Array, ...]:
    """`E p`, the entropy of p, and `logsumexp`, of every activation."""
    table = head["embed"] if config.tie_embeddings else head["head"].T

    def answer(hidden: jax.Array) -> tuple[jax.Array, ...]:
        scores = decoder.logits(head, config, hidden)
        lse = jax.nn.logsumexp(scores, axis=-1)
        p = jnp.exp(scores - lse[:, None])
        mean = jnp.matmul(p.astype(table.dtype), table, precision="highest")
        return mean, lse - jnp.sum(p * scores, axis=-1), lse

    with jax.default_matmul_precision("highest"):
        return over_tokens(answer, config.vocab_size, hidden)


@functools.partial(jax.jit, static_argnames="config")
def _losses(
    params: Any, config: ModelConfig, changed: Any, x: jax.Array, index: jax.Array, text: jax.Array,
    place: jax.Array, mean: jax.Array, entropy: jax.Array, target: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """NLL and KL of scored tokens: block `index` is `changed`, those behind it are the original's."""
    flags = [config.slides(i) for i in range(config.num_layers)]
    mixed = len(set(flags)) > 1

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda whole, new: jnp.where(i == index, new, whole[i]), params["blocks"], changed)
        flag = jnp.asarray(flags)[i] if mixed else flags[0]
        return decoder.block(own, config, x, sliding=flag)[0]

    head = head_only(params, config)

    def score(hidden: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(decoder.logits(head, config, hidden), axis=-1)

    # Differences of large numbers follow: nothing may be rounded more than in the pass through the original.
    with jax.default_matmul_precision("highest"):
        x = jax.lax.fori_loop(index, config.num_layers, step, x)
        hidden = decoder.rms_norm(x, params["norm"], config)[text, place]
        lse = over_tokens(score, config.vocab_size, hidden)
    nll, cross = (lse - jnp.sum(hidden * row, axis=-1) for row in (target, mean))
    return nll, cross - entropy
