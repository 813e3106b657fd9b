"""Neighbourhoods of a text, and the tokens that a model holds possible within them (arXiv 2605.08894).

The paper speaks of "effective token candidates within the prediction neighbourhood"; what is effective, and
how far a neighbourhood goes, is not public: the formulas are ours. Neighbours are functions of a key and of
the reference, never of the model that is measured, so that both models are given the same.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxquant.errors import UsageError
from jaxquant.evaluate.scoring import over_tokens

#: What makes a token a candidate; see `candidates`.
Rule = Literal["eps", "min_p", "top_p"]
_LIMITS = {"eps": 1e-3, "min_p": 0.05, "top_p": 0.9}


def candidates(
    logits: Float[Array, "*tokens V"], *, rule: Rule = "eps", limit: float | None = None
) -> Bool[Array, "*tokens V"]:
    """Which tokens are effective candidates, `p = softmax(logits)` in float32.

        eps     p >= limit, by default 1e-3
        min_p   p >= limit max p, .05
        top_p   the smallest set of mass limit, .9, with tokens as probable as its last

    Args:
      logits: or log probabilities.
      rule: which.
      limit: of the rule, in (0, 1).

    Raises:
      UsageError: another rule, or a limit out of range.
    """
    if rule not in get_args(Rule):
        raise UsageError(f"unknown rule {rule!r}; use {', '.join(get_args(Rule))}")
    limit = _LIMITS[rule] if limit is None else limit
    if not 0 < limit < 1:
        raise UsageError(f"limit={limit} of {rule} is out of range; use more than 0 and less than 1")
    p = jax.nn.softmax(logits.astype(jnp.float32))
    if rule == "eps":
        return p >= limit
    if rule == "min_p":
        return p >= limit * jnp.max(p, axis=-1, keepdims=True)
    falling = -jnp.sort(-p, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling
    last = jnp.min(jnp.where(before < limit, falling, jnp.inf), axis=-1, keepdims=True)
    return p >= last


def effective_numbers(
    logits: Float[Array, "*tokens V"],
) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
    """`exp(H)`, H the entropy of `p = softmax(logits)`, and `1 / sum p^2`: candidates without a limit.

    Both are V where p is uniform and 1 where it is certain, and differentiable.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    p = jnp.exp(log_p)
    entropy = -jnp.sum(p * jnp.where(p > 0, log_p, 0), axis=-1)
    return jnp.exp(entropy), 1 / jnp.sum(jnp.square(p), axis=-1)


def union(
    masks: Bool[Array, "n *tokens V"], real: Bool[Array, " n"] | None = None
) -> Bool[Array, "*tokens V"]:
    """Candidates of a neighbourhood: those of any neighbour, or of any of which `real` is true."""
    if real is not None:
        masks = masks & lax.expand_dims(real, range(1, masks.ndim))
    return jnp.any(masks, axis=0)


def retention(mask: Bool[Array, "*tokens V"], reference: Bool[Array, "*tokens V"]) -> Float[Array, "*tokens"]:
    """`|A & R| / |R|`, the share of the reference's candidates R that are candidates still; 1 for none."""
    return _share(mask & reference, reference)


def jaccard(mask: Bool[Array, "*tokens V"], other: Bool[Array, "*tokens V"]) -> Float[Array, "*tokens"]:
    """`|A & B| / |A | B|`, 1 for two empty sets."""
    return _share(mask & other, mask | other)


def nearest_tokens(
    embedding: Float[Array, "V d"], tokens: Int[Array, " n"], count: int = 10
) -> Int[Array, "n {count}"]:
    """The `count` < V other tokens whose embeddings are nearest (Euclidean) to those of `tokens`."""
    table = embedding.astype(jnp.float32)
    own = jnp.take(table, tokens, axis=0)
    products = jnp.matmul(own, table.T, precision="highest")
    # The norm of the token itself is the same for all others.
    distance = jnp.sum(jnp.square(table), axis=-1)[None] - 2 * products
    distance = distance.at[jnp.arange(len(tokens)), tokens].set(jnp.inf)
    return lax.top_k(-distance, count)[1]


def substitutions(
    embedding: Float[Array, "V d"],
    tokens: Int[Array, " T"],
    key: jax.Array,
    *,
    samples: int = 16,
    last: int = 16,
    nearest: int = 10,
) -> Int[Array, "{samples} T"]:
    """Texts with one of the `last` tokens replaced by one of its `nearest` neighbours in the embedding.

    Place and neighbour are drawn evenly; a text may come twice.

    Args:
      embedding: of the reference.
      tokens: a text.
      key: of the draws.
      samples: texts.
      last: how far from the end, at most T.
      nearest: neighbours of a token.
    """
    length = len(tokens)
    at_place, at_rank = jax.random.split(key)
    places = jax.random.randint(at_place, (samples,), max(length - last, 0), length)
    ranks = jax.random.randint(at_rank, (samples,), 0, nearest)
    near = nearest_tokens(embedding, tokens[-last:], nearest)
    rows = jnp.arange(samples)
    new = near[places - max(length - last, 0), ranks].astype(tokens.dtype)
    return jnp.broadcast_to(tokens[None], (samples, length)).at[rows, places].set(new)


def substituted(
    embedding: Float[Array, "V d"],
    tokens: Int[Array, "*texts T"],
    key: jax.Array,
    *,
    share: float = 0.2,
    nearest: int = 10,
) -> Int[Array, "*texts T"]:
    """Texts with a share of all their tokens replaced, each by one of its `nearest` in the embedding.

    Places are drawn evenly without repetition, `round(share n)` of the n tokens, and neighbours evenly.

    Args:
      embedding: of the reference.
      tokens: texts.
      key: of the draws.
      share: of the tokens, static, 0 to 1.
      nearest: neighbours of a token.
    """
    flat = tokens.reshape(-1)
    at_place, at_rank = jax.random.split(key)
    places = jax.random.permutation(at_place, flat.size)[: round(share * flat.size)]
    if not places.size:
        return tokens
    near = over_tokens(lambda own: nearest_tokens(embedding, own, nearest), len(embedding), flat[places])
    ranks = jax.random.randint(at_rank, places.shape, 0, nearest)
    new = near[jnp.arange(places.size), ranks].astype(tokens.dtype)
    return flat.at[places].set(new).reshape(tokens.shape)


def ball(
    embedded: Float[Array, "*tokens d"], key: jax.Array, *, samples: int = 16, radius: float = 1e-2
) -> Float[Array, "{samples} *tokens d"]:
    """Offsets `radius rms(e) n`, n normal, of embedded tokens e; the neighbours are `e + offsets`.

    Models in one basis are given the same offsets, a rotated one the rotated offsets.
    """
    size = radius * jnp.sqrt(jnp.mean(jnp.square(embedded)))
    return size * jax.random.normal(key, (samples, *embedded.shape), embedded.dtype)


def continuations(
    tokens: Int[Array, " T"], logits: Float[Array, " V"], *, width: int = 8, limit: float = 1e-3
) -> tuple[Int[Array, "{width} T+1"], Bool[Array, " {width}"]]:
    """`tokens` followed by any v with `p(v) >= limit`, the `width` most probable of them.

    Args:
      tokens: a text.
      logits: what the reference predicts behind it.
      width: texts.
      limit: least probability.

    Returns:
      `width` texts in order of probability, and which of them reach the limit; the others fill up.
    """
    p, new = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), width)
    heads = jnp.broadcast_to(tokens[None], (width, len(tokens)))
    return jnp.concatenate([heads, new[:, None].astype(tokens.dtype)], axis=1), p >= limit


def _share(part: Array, whole: Array) -> Array:
    a, b = (jnp.sum(mask, axis=-1).astype(jnp.float32) for mask in (part, whole))
    return jnp.where(b > 0, a / jnp.maximum(b, 1), 1)
