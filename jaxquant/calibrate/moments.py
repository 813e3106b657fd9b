"""`Moments`: what is known about the inputs of a linear layer."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxquant.linalg import product

#: Which tokens are left out of the moments: none, the first of each window, those of massive activation.
Mask = Literal["none", "first", "massive"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums over the tokens seen at one tap; linears that share the tap share it.

    Attributes:
      second: float32 `[..., n, n]`, `sum x x^T` (symmetric positive semi-definite).
      count: int32 `[...]`, number of tokens.
      max_abs: float32 `[..., n]`, `max |x|` of each channel.
      drift: float32 `[..., n, n]` or `None`, `sum x (x_0 - x)^T`, x_0 what x is in the original model.

    `merge` is associative and commutative, so shards and machines add up.
    """

    second: Float[Array, "*stack n n"]
    count: Int[Array, "*stack"]
    max_abs: Float[Array, "*stack n"]
    drift: Float[Array, "*stack n n"] | None = None

    @classmethod
    def zeros(cls, features: int) -> Moments:
        """Nothing seen yet."""
        return cls(
            second=jnp.zeros((features, features), jnp.float32),
            count=jnp.zeros((), jnp.int32),
            max_abs=jnp.zeros((features,), jnp.float32),
        )

    @property
    def mean_second(self) -> Float[Array, "*stack n n"]:
        """`H = sum x x^T / count`; zero where nothing was seen."""
        return self.second / jnp.maximum(self.count, 1).astype(jnp.float32)[..., None, None]


def observe(
    x: Float[Array, "*tokens n"],
    *,
    mask: Bool[Array, "*tokens"] | None = None,
    weights: Float[Array, "*tokens"] | None = None,
    original: Float[Array, "*tokens n"] | None = None,
) -> Moments:
    """Moments of one batch: float32 products at highest precision whatever the dtype of `x`.

    With weights r the second moment is `sum r_t x_t x_t^T`; r the squared norm of the loss gradient at the
    layer's output makes it the row-averaged Fisher matrix (see `calibrate.fisher`).

    Args:
      x: activations; every leading axis is a token axis.
      mask: tokens to count; the others (padding, a massive first token) are left out.
      weights: >= 0, of the tokens in `second` and `drift`; mean 1 keeps the scale of the plain sum.
      original: the same tokens in the original model; the result has `drift`.
    """
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    kept = jnp.ones(x.shape[0], bool) if mask is None else mask.reshape(-1)
    x = jnp.where(kept[:, None], x, 0)
    count = jnp.sum(kept, dtype=jnp.int32)
    max_abs = jnp.max(jnp.abs(x), axis=0, initial=0)
    apart = None
    if original is not None:
        apart = jnp.where(kept[:, None], original.reshape(x.shape).astype(jnp.float32) - x, 0)
    if weights is not None:
        roots = jnp.sqrt(weights.reshape(-1).astype(jnp.float32))
        roots = jnp.where(kept, roots, 0)[:, None]
        x, apart = x * roots, None if apart is None else apart * roots
    second = product(x.T, x)
    drift = None if apart is None else product(x.T, apart)
    return Moments(second=second, count=count, max_abs=max_abs, drift=drift)


def massive_tokens(x: Float[Array, "*tokens n"], *, factor: float = 64.0) -> Bool[Array, "*tokens"]:
    """Tokens whose largest activation exceeds `factor` times the median of that over the tokens.

    None where that median is 0. A handful of such tokens (often the first of a window) can hold most of the
    energy of a tap. The factor of 64 is that of PrefixQuant (arXiv 2410.05265).
    """
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1)
    median = jnp.median(largest)
    return (median > 0) & (largest > factor * median)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of tokens together."""
    if (a.drift is None) != (b.drift is None):
        raise ValueError("merge: one side has drift, the other has none")
    return Moments(
        second=a.second + b.second,
        count=a.count + b.count,
        max_abs=jnp.maximum(a.max_abs, b.max_abs),
        drift=None if a.drift is None or b.drift is None else a.drift + b.drift,
    )
