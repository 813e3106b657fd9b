"""Factorizations of symmetric positive semi-definite matrices that report what they had to do."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_RUNGS = 11


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DampedFactor:
    """Upper triangular `A` with `H + damping mean(diag H) I = A A^T`, and how it was obtained.

    Attributes:
      upper: `[n, n]`, positive diagonal, zeros below it.
      damping: what was added to the diagonal, in units of `mean(diag H)`.
      attempts: factorizations tried; 1 is the normal case.
      fallback: every rung of the ladder failed, `upper` is the factor of `diag(H)` alone.
      finite: `H` held neither NaN nor infinity. Where it is false, `upper` is a multiple of the identity.
    """

    upper: Float[Array, "n n"]
    damping: Float[Array, ""]
    attempts: Int[Array, ""]
    fallback: Bool[Array, ""]
    finite: Bool[Array, ""]

    @property
    def inverse(self) -> Float[Array, "n n"]:
        """GPTQ's factor: upper triangular `U = A^-1`, `(H + damping mean(diag H) I)^-1 = U^T U`."""
        eye = jnp.eye(self.upper.shape[-1], dtype=self.upper.dtype)
        return jax.lax.linalg.triangular_solve(self.upper, eye, left_side=True, lower=False)


def upper_cholesky(h: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Upper `A` with `H = A A^T`: the Cholesky factor of the flipped matrix, flipped back.

    All NaN, or NaN from some pivot on, where `H` is not positive definite; `A[0, 0]` is the last pivot.
    """
    return jnp.linalg.cholesky(h[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]


def damped_factor(h: Float[Array, "n n"], percdamp: float | Array = 0.01) -> DampedFactor:
    """`upper_cholesky(H + damping * mean(diag H) * I)` with a retry ladder.

    The damping starts at `percdamp` and doubles after each failure, up to `1024 percdamp`, inside
    `lax.while_loop`: `jnp.linalg.cholesky` signals failure by NaN only, so the last pivot is tested. If every
    rung fails, the factor of `diag(H)` (floored at its mean) is returned and `fallback` set: GPTQ then rounds
    to nearest.

    Args:
      h: symmetric, float32 or float64, unit free: any positive multiple gives the same result up to scale.
      percdamp: relative damping of the first rung, > 0.
    """
    eye = jnp.eye(h.shape[0], dtype=h.dtype)
    finite = jnp.all(jnp.isfinite(h))
    h = jnp.where(finite, h, eye)
    mean = jnp.mean(jnp.diagonal(h))
    mean = jnp.where(mean > 0, mean, jnp.ones_like(mean))
    percdamp = jnp.asarray(percdamp, h.dtype)

    def climb(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, _, attempt = state
        damping = percdamp * jnp.exp2(attempt.astype(h.dtype))
        return upper_cholesky(h + damping * mean * eye), damping, attempt + 1

    def failed(upper: Array) -> Array:
        return ~jnp.isfinite(upper[0, 0])

    start = (jnp.full_like(h, jnp.nan), percdamp, jnp.asarray(0, jnp.int32))
    upper, damping, attempts = jax.lax.while_loop(lambda s: failed(s[0]) & (s[2] < _RUNGS), climb, start)
    fallback = failed(upper)
    diagonal = jnp.maximum(jnp.diagonal(h), mean)
    upper = jnp.where(fallback, jnp.diag(jnp.sqrt(diagonal)), upper)
    return DampedFactor(upper=upper, damping=damping, attempts=attempts, fallback=fallback, finite=finite)
