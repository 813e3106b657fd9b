"""Conjugate gradients for many small positive definite systems at once."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_STEPS = 200


def conjugate_gradients(
    matvec: Callable[[Array], Array],
    b: Float[Array, "systems n"],
    *,
    diagonal: Float[Array, "systems n"],
    tolerance: float | None = None,
) -> Float[Array, "systems n"]:
    """Solves `A_c x_c = b_c` for every c, preconditioned by the diagonals; nothing but products.

    Batches of small Cholesky factorizations would call LAPACK once each, which on a CPU costs more than the
    ten or twenty products that well conditioned systems need, and two such batches in one program can wait
    for each other's threads forever. Stops at relative residuals of `tolerance`, per system, or after
    200 steps. Differentiable by the implicit function theorem.

    Args:
      matvec: `x -> [A_c x_c]`, linear; every `A_c` symmetric positive definite.
      b: right sides.
      diagonal: `diag A_c`, or anything positive near it.
      tolerance: `None` is 1e-6, in float64 1e-13.
    """
    if tolerance is None:
        tolerance = 1e-6 if b.dtype == jnp.float32 else 1e-13

    def dot(u: Array, v: Array) -> Array:
        return jnp.sum(u * v, axis=-1, keepdims=True)

    def ratio(u: Array, v: Array) -> Array:
        return jnp.where(v > 0, u / jnp.where(v > 0, v, 1), 0)

    def solve(apply: Callable[[Array], Array], b: Array) -> Array:
        limit = tolerance**2 * dot(b, b)

        def unfinished(state: tuple[Array, ...]) -> Array:
            _, residual, _, _, step = state
            return jnp.any(dot(residual, residual) > limit) & (step < _STEPS)

        def advance(state: tuple[Array, ...]) -> tuple[Array, ...]:
            x, residual, direction, energy, step = state
            image = apply(direction)
            # A system that is done stays as it is: its last digits are noise.
            active = dot(residual, residual) > limit
            alpha = jnp.where(active, ratio(energy, dot(direction, image)), 0)
            x, residual = x + alpha * direction, residual - alpha * image
            scaled = residual / diagonal
            following = dot(residual, scaled)
            direction = scaled + ratio(following, energy) * direction
            return x, residual, direction, following, step + 1

        scaled = b / diagonal
        start = (jnp.zeros_like(b), b, scaled, dot(b, scaled), jnp.asarray(0, jnp.int32))
        return jax.lax.while_loop(unfinished, advance, start)[0]

    return jax.lax.custom_linear_solve(matvec, b, solve, symmetric=True)
