"""Grids fitted anew to given integers: least squares for scales and zeros against the original weight."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxquant.linalg import conjugate_gradients, product
from jaxquant.methods.problem import Problem
from jaxquant.methods.rounded import (
    Rounded,
    column_energies,
    layer_error,
    output_energy,
    relative_energy,
)

# Share of its own diagonal that is added to every system: integers can make its columns dependent.
_RIDGE = 1e-3
# Elements of the systems that are in memory at a time.
_CHUNK = 2**24
# A scale may change by this factor at most.
_LARGEST_CHANGE = 8.0


@functools.partial(jax.jit, static_argnames="integer_zero")
def refit_grid(problem: Problem, rounded: Rounded, *, integer_zero: bool = False) -> Rounded:
    """Scales, and zeros where the grid has them, that fit the integers best; the integers stay.

        min over s, o of   tr(D^T H D),   D = sum_g (s_g (c_g - z_g) + o_g) - W

    per output column over all groups g at once: c_g are its integers in group g, z_g the zeros before, and
    an offset o_g is the zero `z_g - o_g / s_g`. Normal equations of as many unknowns as a column has scales
    and zeros (`H` couples them), solved by conjugate gradients for the change. A column keeps its grids
    where the new ones, rounded to `grid.scale_dtype`, leave more error: the error never grows. In turns with
    coordinate descent this is alternating minimization over grids and integers.

    Args:
      problem: `target` `[in, out]` and the moments; computed in float32, or in float64 where either is.
      rounded: codes `[in, out]`, in the order of `rounded.order` if there is one.
      integer_zero: keep the zeros, which engines with integer zero points need; else they become fractions
        in `[0, 2^bits - 1]`.

    Returns:
      `rounded` with other scales and zeros and its error against `problem.target`.
    """
    grid, order = rounded.grid, rounded.order
    w, h = problem.in_order(order)
    dtype = w.dtype
    rows, columns = w.shape
    groups = grid.groups(rows)
    length = rows // groups
    fits_zero = rounded.zero is not None and not integer_zero

    scale = rounded.scale.astype(dtype)
    zero = jnp.full_like(scale, grid.constant_zero) if rounded.zero is None else rounded.zero.astype(dtype)
    steps = rounded.codes.astype(dtype) - jnp.repeat(zero, length, axis=0)
    gradient = product(h, w - steps * jnp.repeat(scale, length, axis=0))

    def solve(part: tuple[Array, Array]) -> Array:
        """The change of the unknowns `[unknowns, columns]` for some columns of `steps` and `gradient`."""
        steps, gradient = part
        bases = [steps, jnp.ones_like(steps)] if fits_zero else [steps]

        def by_group(a: Array) -> Array:
            """Sums over the rows of each group, against every basis."""
            return jnp.concatenate([jnp.sum((b * a).reshape(groups, length, -1), axis=1) for b in bases])

        def couple(start: Array) -> Array:
            h_of_group = jax.lax.dynamic_slice_in_dim(h, start, length, axis=1)
            parts = [jax.lax.dynamic_slice_in_dim(b, start, length, axis=0) for b in bases]
            return jnp.stack([by_group(product(h_of_group, part)) for part in parts])

        systems = jax.lax.map(couple, jnp.arange(0, rows, length))
        systems = systems.transpose(3, 1, 0, 2).reshape(-1, unknowns, unknowns)
        diagonal = jnp.diagonal(systems, axis1=1, axis2=2)
        largest = jnp.max(diagonal, axis=1, keepdims=True)
        ridge = _RIDGE * jnp.where(largest > 0, jnp.maximum(diagonal, 1e-3 * largest), 1)

        def multiply(x: Array) -> Array:
            return ridge * x + jnp.einsum("cij,cj->ci", systems, x, precision="highest")

        return conjugate_gradients(multiply, by_group(gradient).T, diagonal=diagonal + ridge).T

    unknowns = (2 if fits_zero else 1) * groups
    size = min(columns, max(1, _CHUNK // unknowns**2))
    pad = -columns % size

    def chunked(a: Array) -> Array:
        return jnp.moveaxis(jnp.pad(a, ((0, 0), (0, pad))).reshape(rows, -1, size), 1, 0)

    change = jax.lax.map(solve, (chunked(steps), chunked(gradient)))
    change = jnp.moveaxis(change, 0, 1).reshape(unknowns, -1)[:, :columns]

    moved = scale + change[:groups]
    ratio = moved / scale
    usable = (ratio > 1 / _LARGEST_CHANGE) & (ratio < _LARGEST_CHANGE)
    moved = jnp.where(usable, moved, scale)
    new_scale, new_zero = grid.storable(moved).astype(rounded.scale.dtype), rounded.zero
    if fits_zero and rounded.zero is not None:
        bits = jnp.asarray(grid.bits) if rounded.group_bits is None else rounded.group_bits[:, None]
        shifted = jnp.clip(zero - change[groups:] / moved, 0, (2**bits - 1).astype(dtype))
        new_zero = jnp.where(usable, shifted, zero).astype(rounded.zero.dtype)

    def errors(scale: Array, zero: Array | None) -> Array:
        return column_energies(grid.dequantize(rounded.codes, scale, zero, dtype) - w, h)

    better = errors(new_scale, new_zero) < errors(rounded.scale, rounded.zero)
    new_scale = jnp.where(better[None, :], new_scale, rounded.scale)
    if new_zero is not None and rounded.zero is not None:
        new_zero = jnp.where(better[None, :], new_zero, rounded.zero)
    error = layer_error(grid.dequantize(rounded.codes, new_scale, new_zero, dtype), w, h)
    stats = dataclasses.replace(rounded.stats, error=error)
    return dataclasses.replace(rounded, scale=new_scale, zero=new_zero, stats=stats)


@jax.jit
def better_columns(problem: Problem, a: Rounded, b: Rounded) -> Rounded:
    """Of two roundings on one kind of grid, column by column the one with less error; statistics of `b`."""
    w, h = problem.in_order(None)
    first, second = (column_energies(r.values(w.dtype) - w, h) for r in (a, b))
    less = (first < second)[None, :]
    zero = None if a.zero is None or b.zero is None else jnp.where(less, a.zero, b.zero)
    error = relative_energy(jnp.sum(jnp.minimum(first, second)), output_energy(w, h))
    return dataclasses.replace(
        b,
        codes=jnp.where(less, a.codes, b.codes),
        scale=jnp.where(less, a.scale, b.scale),
        zero=zero,
        stats=dataclasses.replace(b.stats, error=error),
    )
