"""Coordinate descent on the integers of a rounded layer (MagR, arXiv 2406.00800; OSAQ-dagger, 2605.04738)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt

from jaxquant.errors import UsageError
from jaxquant.linalg import product, rows_from
from jaxquant.methods.problem import Problem
from jaxquant.methods.rounded import Rounded, layer_error
from jaxquant.quant.mixed import quantize

_BLOCK = 128
# Rows that change one by one; their changes stay in the cache of a core.
_STRIP = 16


@functools.partial(jax.jit, static_argnames="sweeps")
def coordinate_descent(problem: Problem, rounded: Rounded, *, sweeps: int = 4) -> Rounded:
    """Visits the inputs one after another and moves each integer to its best value, all others held.

    With `W` the original weight, `Q` the rounded one and `R = H (W - Q)` the gradient, row k becomes

        q_k <- Q(q_k + R_k / H_kk),   R_j <- R_j - H_jk (change of q_k)

    `Q(.)` is the nearest level of the grid of `rounded`, which stays. A level is left only for one that is
    strictly nearer, so `tr(D^T H D)`, `D = Q - W`, falls with every move and the fixed point is stable.
    Output columns are independent and move together. The gradient is kept up to date lazily: a block of 128
    rows computes its own from `W - Q`, at the cost of the update that this replaces, and maintains it while
    the block is visited. So rounding errors do not pile up over sweeps.

    Args:
      problem: `target` `[in, out]`, any float dtype, and the moments; computed in float32, or in float64
        where either is. `weight` is not read.
      rounded: codes `[in, out]`, in the order of `rounded.order` if there is one. Rows are visited in the
        order in which they lie.
      sweeps: passes over all inputs; 2 to 4 suffice.

    Returns:
      `rounded` with other codes. `stats.error` is that against `problem.target`; the other statistics are
      those of `rounded`. Inputs that were always 0 keep their codes.

    Raises:
      UsageError: `sweeps` is negative.
    """
    if sweeps < 0:
        raise UsageError(f"sweeps={sweeps} is negative; use 0 to keep the codes, 2 to 4 to refine them")
    grid, order = rounded.grid, rounded.order
    w, h = problem.in_order(order)
    rows = len(w)
    visits = Visits.of(h, grid.groups(rows))
    target = visits.pad(w)

    def once(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        return sweep(visits, rounded, target, *state)

    values = grid.dequantize(rounded.codes, rounded.scale, rounded.zero, w.dtype)
    state = visits.pad(values), visits.pad(rounded.codes)
    values, codes = (a[:rows] for a in jax.lax.fori_loop(0, sweeps, once, state))
    stats = dataclasses.replace(rounded.stats, error=layer_error(values, w, h))
    return dataclasses.replace(rounded, codes=codes, stats=stats)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """What visits to the inputs of a layer need of its second moment, padded to whole blocks of inputs.

    Attributes:
      second: `[inputs, inputs]`.
      inverse: `[inputs]`, `1 / H_kk`; 0 for dead inputs and for padding, which makes them stay.
      group: int32 `[inputs]`.
      block: inputs that share a gradient.
    """

    second: Float[Array, "in in"]
    inverse: Float[Array, " in"]
    group: Int[Array, " in"]
    block: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, h: Float[Array, "in in"], groups: int) -> Visits:
        """Visits to inputs in `groups` groups of consecutive ones."""
        rows, diagonal = len(h), jnp.diagonal(h)
        block = min(_BLOCK, -(-rows // _STRIP) * _STRIP)
        pad = -rows % block
        inverse = jnp.where(diagonal > 0, 1 / jnp.where(diagonal > 0, diagonal, 1), 0)
        return cls(
            second=jnp.pad(h, ((0, pad), (0, pad))),
            inverse=jnp.pad(inverse, (0, pad)),
            group=jnp.pad(jnp.arange(rows) // (rows // groups), (0, pad)),
            block=block,
        )

    def pad(self, a: Shaped[Array, "_ out"]) -> Shaped[Array, "in out"]:
        """Rows for the padding."""
        return jnp.pad(a, ((0, len(self.group) - len(a)), (0, 0)))


def sweep(
    visits: Visits,
    rounded: Rounded,
    target: Float[Array, "in out"],
    values: Float[Array, "in out"],
    codes: UInt[Array, "in out"],
) -> tuple[Float[Array, "in out"], UInt[Array, "in out"]]:
    """One pass over all inputs: new values and codes, on the grids of `rounded`; its codes are not read."""
    block, columns, dtype = visits.block, target.shape[1], target.dtype
    one_group = dataclasses.replace(rounded.grid, group_size=None)
    # Converted once and not in every row.
    scales = rounded.scale.astype(dtype)
    zeros = None if rounded.zero is None else rounded.zero.astype(dtype)

    def visit_block(state: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        values, codes = state
        rows_of_block = rows_from(visits.second, start, block)
        inside = rows_from(rows_of_block, start, block, axis=1)
        gradient = product(rows_of_block, target - values)

        def visit_strip(changes: Array, offset: Array) -> tuple[Array, tuple[Array, Array]]:
            rows_of_strip = rows_from(inside, offset, _STRIP)
            within = rows_from(rows_of_strip, offset, _STRIP, axis=1)
            strip_gradient = rows_from(gradient, offset, _STRIP) - product(rows_of_strip, changes)

            def visit_row(strip_changes: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
                k = start + offset + i
                g = rows_from(visits.group, k, 1)[0]
                scale = rows_from(scales, g, 1)
                zero = None if zeros is None else rows_from(zeros, g, 1)
                old = rows_from(values, k, 1)
                # A product with one row would be a call of its own, which takes longer than all the rest.
                moved = jnp.sum(within[i][:, None] * strip_changes, axis=0, keepdims=True)
                slope = rows_from(strip_gradient, i, 1) - moved
                best = old + rows_from(visits.inverse, k, 1)[:, None] * slope
                code = quantize(one_group, best, scale, zero, rounded.bits_of(g))
                value = one_group.dequantize(code, scale, zero, dtype)
                nearer = jnp.abs(value - best) < jnp.abs(old - best)
                value, code = jnp.where(nearer, value, old), jnp.where(nearer, code, rows_from(codes, k, 1))
                changes = jax.lax.dynamic_update_slice_in_dim(strip_changes, value - old, i, axis=0)
                return changes, (value[0], code[0])

            start_strip = jnp.zeros((_STRIP, columns), dtype)
            strip_changes, visited = jax.lax.scan(visit_row, start_strip, jnp.arange(_STRIP))
            return jax.lax.dynamic_update_slice_in_dim(changes, strip_changes, offset, axis=0), visited

        start_block = jnp.zeros((block, columns), dtype)
        _, visited = jax.lax.scan(visit_strip, start_block, jnp.arange(0, block, _STRIP))
        values, codes = (
            jax.lax.dynamic_update_slice_in_dim(whole, part.reshape(block, columns), start, axis=0)
            for whole, part in zip(state, visited, strict=True)
        )
        return (values, codes), None

    return jax.lax.scan(visit_block, (values, codes), jnp.arange(0, len(target), block))[0]
