"""Factorizations of symmetric positive semi-definite matrices that report what they had to do."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_RUNGS = 11
# Panels of a factorization: at most so many, whatever n is, and none narrower.
_PANELS, _PANEL_ROWS = 8, 256


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
        return _inverse(self.upper)

    @property
    def damped_inverse(self) -> Float[Array, "n n"]:
        """`(H + damping mean(diag H) I)^-1`, symmetric to the last bit."""
        return _gram(self.inverse)


def upper_cholesky(h: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Upper `A` with `H = A A^T`: the Cholesky factor of the flipped matrix, flipped back.

    Column panels from the last to the first, each less the product of those behind it: the work is in a few
    large matrix products, which run on all cores where LAPACK's factorization may not.

    All NaN, or NaN from some pivot on, where `H` is not positive definite; `A[0, 0]` is the last pivot.
    """
    n = h.shape[0]
    size = -(-n // min(_PANELS, max(1, n // _PANEL_ROWS)))
    a = jnp.zeros_like(h)
    for stop in range(n, 0, -size):
        start = max(0, stop - size)
        # As rows, transposed: LAPACK wants columns, and XLA would turn the whole of H around for them.
        panel = h[start:stop, :stop].T
        if stop < n:
            behind = a[:stop, stop:]
            panel = panel - jnp.matmul(behind, behind[start:].T, precision="highest")
        corner = _flipped_cholesky(panel[start:])
        above = jax.lax.linalg.triangular_solve(
            corner, panel[:start], left_side=False, lower=False, transpose_a=True
        )
        a = jax.lax.dynamic_update_slice(a, jnp.concatenate([above, corner]), (0, start))
    return a


@functools.partial(jax.jit, inline=True)
def damped_factor(h: Float[Array, "n n"], percdamp: float | Array = 0.01) -> DampedFactor:
    """`upper_cholesky(H + damping * mean(diag H) * I)` with a retry ladder.

    The damping starts at `percdamp` and doubles after each failure, up to `1024 percdamp`, in a
    `lax.while_loop` that is entered after the first one: `jnp.linalg.cholesky` signals failure by NaN only,
    so the last pivot is tested. If every rung fails, the factor of `diag(H)` (floored at its mean) is
    returned and `fallback` set: GPTQ then rounds to nearest.

    Args:
      h: symmetric, float32 or float64, unit free: any positive multiple gives the same result up to scale.
      percdamp: relative damping of the first rung, > 0.
    """
    n = h.shape[0]
    finite = jnp.all(jnp.isfinite(h))
    mean = jnp.where(finite, jnp.mean(jnp.diagonal(h)), 1)
    mean = jnp.where(mean > 0, mean, jnp.ones_like(mean))
    percdamp = jnp.asarray(percdamp, h.dtype)

    def failed(upper: Array) -> Array:
        return ~jnp.isfinite(upper[0, 0])

    def ladder(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        eye = jnp.eye(n, dtype=h.dtype)
        usable = jnp.where(finite, h, eye)

        def climb(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            _, _, attempt = state
            damping = percdamp * jnp.exp2(attempt.astype(h.dtype))
            return _flipped_cholesky(usable + damping * mean * eye), damping, attempt + 1

        upper, damping, attempts = jax.lax.while_loop(lambda s: failed(s[0]) & (s[2] < _RUNGS), climb, state)
        fallback = failed(upper)
        diagonal = jnp.maximum(jnp.diagonal(usable), mean)
        return jnp.where(fallback, jnp.sqrt(diagonal)[None, :] * eye, upper), damping, attempts, fallback

    # As a rule this is all. The ladder would also do it, but its loop keeps copies of H and of the factor.
    upper = upper_cholesky(h + percdamp * mean * jnp.eye(n, dtype=h.dtype))
    upper = jnp.where(finite, upper, jnp.nan)
    upper, damping, attempts, fallback = jax.lax.cond(
        failed(upper),
        ladder,
        lambda state: (*state, jnp.asarray(False)),
        (upper, percdamp, jnp.asarray(1, jnp.int32)),
    )
    return DampedFactor(upper=upper, damping=damping, attempts=attempts, fallback=fallback, finite=finite)


def _inverse(a: Array) -> Array:
    """Of an upper triangular matrix: small corners by substitution, the rest by products."""
    n = a.shape[0]
    if n <= _PANEL_ROWS:
        return jax.lax.linalg.triangular_solve(a, jnp.eye(n, dtype=a.dtype), left_side=True, lower=False)
    middle = n // 2
    first, last = _inverse(a[:middle, :middle]), _inverse(a[middle:, middle:])
    above = jnp.matmul(first, jnp.matmul(a[:middle, middle:], last, precision="highest"), precision="highest")
    return jnp.block([[first, -above], [jnp.zeros_like(above.T), last]])


def _gram(u: Array) -> Array:
    """`U^T U` of an upper triangular matrix: a third of the work of the plain product, and symmetric."""
    n = u.shape[0]
    if n <= _PANEL_ROWS:
        return _symmetric(jnp.matmul(u.T, u, precision="highest"))
    middle = n // 2
    first, above, last = u[:middle, :middle], u[:middle, middle:], u[middle:, middle:]
    corner = jnp.matmul(first.T, above, precision="highest")
    rest = _symmetric(jnp.matmul(above.T, above, precision="highest")) + _gram(last)
    return jnp.block([[_gram(first), corner], [corner.T, rest]])


def _symmetric(a: Array) -> Array:
    """Products of a matrix with its own transpose are, up to rounding."""
    return (a + a.T) / 2


def _flipped_cholesky(h: Array) -> Array:
    return jnp.linalg.cholesky(h[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
