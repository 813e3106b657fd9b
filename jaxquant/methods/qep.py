"""QEP: weights that make up for what quantized layers before them did to their inputs (arXiv 2504.09629)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxquant.errors import UsageError
from jaxquant.linalg import damped_factor, product
from jaxquant.methods.problem import Problem


@functools.partial(jax.jit, inline=True)
def qep(problem: Problem, *, alpha: float | Array = 0.5, percdamp: float | Array = 0.01) -> Problem:
    """The weight whose outputs now are nearest to those that the original has in the original model.

        W* = W + alpha (H + damping mean(diag H) I)^-1 C W,   H = sum x x^T,   C = sum x (x_0 - x)^T

    with x the inputs behind the quantized layers and x_0 those of the original model. At `alpha` 1 this
    minimizes `sum |W*^T x - W^T x_0|^2` but for the damping; less holds back what only the calibration tokens
    ask for. The target moves too, so all that follows rounds towards W*, and errors are against it. GPTAQ
    (arXiv 2504.02692) has the same aim and corrects row by row inside GPTQ.

    Args:
      problem: `moments.drift` is C, `[in, in]`; computed in float32, or in float64 where weight or moments
        are.
      alpha: 0, nothing, to 1.
      percdamp: damping in units of `mean(diag H)`, doubled on failure (see `linalg.psd`).

    Returns:
      `problem` with another `weight` and `target`; inputs that were always 0 keep their weights, and all do
      where H cannot be factored.

    Raises:
      UsageError: the moments have no drift.
    """
    drift = problem.moments.drift
    if drift is None:
        raise UsageError("qep: the moments have no drift; give observe(x, original=...), or quantize a model")
    w, h = problem.in_order(None)
    factor = damped_factor(h, percdamp)
    change = product(drift.astype(w.dtype), w)
    for transposed in (False, True):
        change = jax.lax.linalg.triangular_solve(
            factor.upper, change, left_side=True, lower=False, transpose_a=transposed
        )
    change = jnp.where(factor.fallback, 0, jnp.asarray(alpha, w.dtype) * change)
    weight = problem.weight.astype(w.dtype) + change
    return dataclasses.replace(problem, weight=weight, target=w + change)
