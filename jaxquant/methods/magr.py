"""MagR: smaller weights with nearly the same outputs, before rounding (arXiv 2406.00800)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.errors import UsageError
from jaxquant.methods.problem import Problem
from jaxquant.quant import working_dtype

_POWER_ITERATIONS = 30
# A power iteration ends below the eigenvalue it looks for.
_MARGIN = 1.01


@functools.partial(jax.jit, static_argnames="iterations")
def magr(problem: Problem, *, alpha: float | Array | None = None, iterations: int = 150) -> Problem:
    """Proximal gradient on every column w of the weight, started at the weight w0 itself:

        min_w 1/2 (w - w0)^T H1 (w - w0) + alpha sum_groups max|w|,   H1 = H / lambda_max(H)
        w <- prox(w - H1 (w - w0)),                                    prox = `linf_prox` of each group

    which lowers the objective in every step. A group is a group of the grid, so what shrinks is the range
    that the grid has to cover.

    Args:
      problem: `weight` `[in, out]`, any float dtype, and the moments.
      alpha: strength >= 0, in the units of the weight; `None` is the paper's 1e-3 where a column is one group
        and 1e-4 where it has several.
      iterations: steps; the paper takes 150.

    Returns:
      `problem` with another `weight`, in float32, or in float64 where weight or moments are: a half would
      lose most of the change. Inputs that were always 0 keep their weight and do not count in the range. Not
      finite where `problem` is not.

    Raises:
      UsageError: the group size does not divide `in`, or `iterations` is negative.
    """
    if iterations < 0:
        raise UsageError(f"iterations={iterations} is negative; the paper takes 150")
    dtype = working_dtype(problem.weight.dtype, problem.moments.second.dtype)
    original, h = problem.weight.astype(dtype), problem.moments.second.astype(dtype)
    rows, columns = original.shape
    groups = problem.grid.groups(rows)
    strength = jnp.asarray((1e-3 if groups == 1 else 1e-4) if alpha is None else alpha, dtype)
    largest = _largest_eigenvalue(h)
    normed = h / jnp.where(largest == 0, 1, largest)
    dead = (jnp.diagonal(h) == 0)[:, None]

    def step(_: Array, w: Array) -> Array:
        gradient = jnp.matmul(normed, w - original, precision="highest")
        grouped = jnp.where(dead, 0, w - gradient).reshape(groups, -1, columns)
        return linf_prox(grouped, strength).reshape(w.shape)

    w = jax.lax.fori_loop(0, iterations, step, original)
    return dataclasses.replace(problem, weight=jnp.where(dead, original, w))


def linf_prox(v: Float[Array, "*stack in out"], alpha: float | Array) -> Float[Array, "*stack in out"]:
    """`argmin_w 1/2 ||w - v||^2 + alpha max|w|` for every column: `clip(v, -t, t)`.

    By Moreau `v - alpha P(v / alpha)`, P the projection on the l1 ball; that is clipping at the t >= 0 with
    `sum max(|v| - t, 0) = alpha`, or at 0 where `sum |v| <= alpha`. The sum is convex and piecewise linear in
    t, so Newton's steps from below end at t exactly after as many as there are pieces to cross - a few, where
    sorting would touch every entry at the cost of many products.

    Args:
      v: float32 or float64; leading axes are free.
      alpha: >= 0, a scalar; 0 returns `v`.
    """
    magnitude = jnp.abs(v)
    alpha = jnp.asarray(alpha, v.dtype)

    def newton(state: tuple[Array, Array]) -> tuple[Array, Array]:
        t, _ = state
        excess = magnitude - t[..., None, :]
        slope = jnp.maximum(jnp.sum(excess > 0, axis=-2), 1).astype(v.dtype)
        raised = jnp.maximum(t, t + (jnp.sum(jnp.maximum(excess, 0), axis=-2) - alpha) / slope)
        return raised, raised > t

    # One entry alone accounts for no more than alpha, so this is below the solution.
    lowest = jnp.maximum(jnp.max(magnitude, axis=-2) - alpha, 0)
    t, _ = jax.lax.while_loop(lambda state: jnp.any(state[1]), newton, (lowest, jnp.ones_like(lowest, bool)))
    return jnp.clip(v, -t[..., None, :], t[..., None, :])


def _largest_eigenvalue(h: Float[Array, "n n"]) -> Float[Array, ""]:
    def step(_: Array, v: Array) -> Array:
        v = jnp.matmul(h, v, precision="highest")
        norm = jnp.linalg.norm(v)
        return v / jnp.where(norm == 0, 1, norm)

    # A random start has a share of every eigenvector.
    start = jax.random.normal(jax.random.key(0), h.shape[:1], h.dtype)
    v = jax.lax.fori_loop(0, _POWER_ITERATIONS, step, start)
    return _MARGIN * jnp.linalg.norm(jnp.matmul(h, v, precision="highest"))
