"""Integers that keep what a layer passes forward, and what the loss feels or gradients meet (FINE).

"Fitting Is Not Enough" (arXiv 2605.08894) asks quantization to maintain the propagation of gradients; its
formulas are not public, these objectives are ours. With `y = x W` and g the gradient of the loss at y, an
error `D = Q - W` costs `x D` on the way forward and `g D^T` on the way back, and moves the loss by `x D g^T`:

    loss:      tr(D^T Hi D) + strength tr(D^T Hi D Ho)
    backward:  tr(D^T Hi D) + strength tr(D Ho D^T),   Hi ~ sum x^T x,   Ho ~ sum g^T g,   mean eigenvalues 1

What the loss feels is the Kronecker form of its curvature (YAQA, arXiv 2505.22988, rounds with it).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxquant.errors import UsageError
from jaxquant.linalg import product, rows_from
from jaxquant.methods.coordinate import Visits, sweep
from jaxquant.methods.problem import Problem
from jaxquant.methods.rounded import Rounded, layer_error, relative_energy
from jaxquant.quant.mixed import quantize

# Rows whose own changes are kept apart from the gradient of the whole.
_ROWS = 64
# Channels of a row that move together; wider blocks are bounded more loosely and gain less.
_CHANNELS = 16
# The same where whole channels move together.
_SPREAD = 8


@functools.partial(jax.jit, static_argnames=("strength", "sweeps"))
def loss_descent(
    problem: Problem,
    rounded: Rounded,
    outputs: Float[Array, "out out"],
    *,
    strength: float = 4.0,
    sweeps: int = 3,
) -> Rounded:
    """Coordinate descent on what the loss feels, over the integers of a rounding, whose grids stay.

        F(Q) = tr(D^T Hi D M),   M = I + strength Ho

    Channels are visited in blocks B that are spread over the layer. The curvature of a block is bounded by a
    diagonal, `M_BB <= C = lambda diag(M_BB)` with lambda the largest eigenvalue of M_BB scaled to unit
    diagonal; with it channels are independent, and Hi drops out of where each one should go:

        T_B = Q_B - (D M)_B C^-1,   Q_B <- one sweep of `methods.coordinate` with T_B for its target

    so F falls with every move. With `strength = 0` this is `methods.coordinate`.

    Args:
      problem: `target` `[in, out]` and the moments of the inputs; computed in float32, or in float64 where
        either is. `weight` is not read.
      rounded: what GPTQ or another rounding left.
      outputs: Ho, the second moment of the loss gradients at the outputs, or any positive multiple.
      strength: weight of the loss; 1 to 10 is usual. The unit matrix keeps channels whose gradients happened
        to be small.
      sweeps: passes over the layer; 2 to 4 suffice.

    Returns:
      `rounded` with other codes; `stats.error` is the forward error against `problem.target`.

    Raises:
      UsageError: a negative strength or number of sweeps.
    """
    _check(strength, sweeps)
    grid, order = rounded.grid, rounded.order
    w, h = problem.in_order(order)
    rows, columns = w.shape
    blocks = -(-columns // _SPREAD)
    # Block b has the channels b, b + blocks, ..; copies of the last, which nothing is coupled to, fill it.
    spread = np.arange(blocks * _SPREAD).reshape(_SPREAD, blocks).T.ravel()
    pad = (0, len(spread) - columns)
    coupling = jnp.pad(strength * _unit_mean(outputs.astype(w.dtype)), (pad, pad))[spread][:, spread]
    coupling = coupling + jnp.eye(len(spread), dtype=w.dtype)
    inside = jnp.einsum("bibj->bij", coupling.reshape(blocks, _SPREAD, blocks, _SPREAD))
    diagonal = jnp.diagonal(inside, axis1=1, axis2=2)
    root = jnp.sqrt(diagonal)
    largest = jnp.linalg.eigvalsh(inside / root[:, :, None] / root[:, None, :])[:, -1]
    bound = diagonal * largest[:, None]

    visits = Visits.of(h, grid.groups(rows))
    channels = np.minimum(spread, columns - 1)
    target, codes = visits.pad(w[:, channels]), visits.pad(rounded.codes[:, channels])
    scale = rounded.scale[:, channels]
    zero = None if rounded.zero is None else rounded.zero[:, channels]
    values = visits.pad(grid.dequantize(codes[:rows], scale, zero, w.dtype))

    def visit(state: tuple[Array, ...], b: Array) -> tuple[tuple[Array, ...], None]:
        values, codes, _ = (rows_from(a, b * _SPREAD, _SPREAD, axis=1) for a in state)
        goal = values - product(state[2], rows_from(coupling, b * _SPREAD, _SPREAD).T) / bound[b][None]
        own_target, own_scale, own_zero = jax.tree.map(
            lambda a: rows_from(a, b * _SPREAD, _SPREAD, axis=1), (target, scale, zero)
        )
        part = dataclasses.replace(rounded, scale=own_scale, zero=own_zero)
        values, codes = sweep(visits, part, goal, values, codes)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, new, b * _SPREAD, axis=1)
            for whole, new in zip(state, (values, codes, values - own_target), strict=True)
        ), None

    state = values, codes, values - target
    (values, codes, _), _ = jax.lax.scan(visit, state, jnp.tile(jnp.arange(blocks), sweeps))
    values, codes = (a[:rows, np.argsort(spread)[:columns]] for a in (values, codes))
    stats = dataclasses.replace(rounded.stats, error=layer_error(values, w, h))
    return dataclasses.replace(rounded, codes=codes, stats=stats)


@functools.partial(jax.jit, static_argnames=("strength", "sweeps"))
def two_sided_descent(
    problem: Problem,
    rounded: Rounded,
    outputs: Float[Array, "out out"],
    *,
    strength: float = 0.1,
    sweeps: int = 3,
) -> Rounded:
    """Coordinate descent on the errors of both directions, over the integers of a rounding, whose grids stay.

        F(Q) = tr(D^T Hi D) + strength tr(D Ho D^T)

    Rows are visited one after another, their channels in blocks B. With `G = Hi D + strength D Ho`,

        c_i = Hi_jj + strength sum_{k in B} |Ho_ik|,   q_ji <- Q(q_ji - G_ji / c_i)   for i in B at once

    and `Q(.)` the nearest level, kept unless it is strictly nearer. The sum bounds the curvature of a block
    (Gershgorin), so F falls with every move. With `strength = 0` this is `methods.coordinate`.

    Args:
      problem: `target` `[in, out]` and the moments of the inputs; computed in float32, or in float64 where
        either is. `weight` is not read.
      rounded: what GPTQ or another rounding left.
      outputs: Ho, the second moment of the loss gradients at the outputs, or any positive multiple.
      strength: price of the backward error; .05 to .3 is usual.
      sweeps: passes over all inputs; 2 to 4 suffice.

    Returns:
      `rounded` with other codes; `stats.error` is the forward error against `problem.target`.

    Raises:
      UsageError: a negative strength or number of sweeps.
    """
    _check(strength, sweeps)
    grid, order = rounded.grid, rounded.order
    w, h = problem.in_order(order)
    dtype = w.dtype
    rows, columns = w.shape
    inner = _unit_mean(h)
    outer = strength * _unit_mean(outputs.astype(dtype))

    row_pad, column_pad = -rows % _ROWS, -columns % _CHANNELS
    group = jnp.pad(jnp.arange(rows) // (rows // grid.groups(rows)), (0, row_pad))
    diagonal = jnp.pad(jnp.diagonal(inner), (0, row_pad))
    inner = jnp.pad(inner, ((0, row_pad), (0, row_pad)))
    outer = jnp.pad(outer, ((0, column_pad), (0, column_pad)))
    target, start_values = (
        jnp.pad(a, ((0, row_pad), (0, column_pad)))
        for a in (w, grid.dequantize(rounded.codes, rounded.scale, rounded.zero, dtype))
    )
    start_codes = jnp.pad(rounded.codes, ((0, row_pad), (0, column_pad)))
    # Columns of padding have the scale 1; nothing pulls them away from their 0.
    scale = jnp.pad(rounded.scale, ((0, 0), (0, column_pad)), constant_values=1)
    zero = None if rounded.zero is None else jnp.pad(rounded.zero, ((0, 0), (0, column_pad)))
    blocked = outer.reshape(-1, _CHANNELS, columns + column_pad)
    places = jnp.arange(0, columns + column_pad, _CHANNELS)
    bound = jax.vmap(lambda b, at: jnp.sum(jnp.abs(rows_from(b, at, _CHANNELS, 1)), axis=1))(blocked, places)
    one_group = dataclasses.replace(grid, group_size=None)

    def visit_row(pull: Array, j: Array, old: Array, code: Array) -> tuple[Array, Array]:
        """New values and codes of row j, `pull` being `-G_j`."""
        own = [None if a is None else rows_from(a, group[j], 1, 0) for a in (scale, zero)]
        alive = diagonal[j] > 0

        def visit_channels(pull: Array, block: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
            at, coupling, curvature = block
            mine, mine_code = (rows_from(a, at, _CHANNELS, 0)[None] for a in (old, code))
            s, z = (None if a is None else rows_from(a, at, _CHANNELS, 1) for a in own)
            assert s is not None
            total = diagonal[j] + curvature
            step = jnp.where(alive, rows_from(pull, at, _CHANNELS, 0) / jnp.where(total > 0, total, 1), 0)
            best = mine + step[None]
            found = quantize(one_group, best, s, z, rounded.bits_of(group[j]))
            value = one_group.dequantize(found, s, z, dtype)
            nearer = alive & (jnp.abs(value - best) < jnp.abs(mine - best))
            value, found = jnp.where(nearer, value, mine), jnp.where(nearer, found, mine_code)
            pull = pull - product((value - mine)[0], coupling)
            return pull, (value[0], found[0])

        _, (values, codes) = jax.lax.scan(visit_channels, pull, (places, blocked, bound))
        return values.ravel(), codes.ravel()

    def visit_rows(state: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        values, codes = state
        apart = values - target
        near = rows_from(inner, start, _ROWS, 0)
        pulls = -product(near, apart) - product(rows_from(apart, start, _ROWS, 0), outer)
        within = rows_from(near, start, _ROWS, 1)

        def visit(changes: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
            pull = pulls[i] - product(within[i], changes)
            old = values[start + i]
            new, code = visit_row(pull, start + i, old, codes[start + i])
            return changes.at[i].set(new - old), (new, code)

        none = jnp.zeros((_ROWS, columns + column_pad), dtype)
        _, found = jax.lax.scan(visit, none, jnp.arange(_ROWS))
        values, codes = (
            jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)
            for whole, part in zip(state, found, strict=True)
        )
        return (values, codes), None

    def sweep(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.lax.scan(visit_rows, state, jnp.arange(0, rows + row_pad, _ROWS))[0]

    values, codes = jax.lax.fori_loop(0, sweeps, sweep, (start_values, start_codes))
    values, codes = values[:rows, :columns], codes[:rows, :columns]
    stats = dataclasses.replace(rounded.stats, error=layer_error(values, w, h))
    return dataclasses.replace(rounded, codes=codes, stats=stats)


def backward_error(
    values: Float[Array, "in out"], weight: Float[Array, "in out"], outputs: Float[Array, "out out"]
) -> Float[Array, ""]:
    """`tr(D Ho D^T) / tr(W Ho W^T)`, `D = values - weight`: the share of gradient energy that goes astray."""
    energies = [jnp.sum(a * product(a, outputs)) for a in (values - weight, weight)]
    return relative_energy(energies[0], energies[1])


def _check(strength: float, sweeps: int) -> None:
    if not strength >= 0 or sweeps < 0:
        raise UsageError(f"strength={strength} and sweeps={sweeps} must not be negative; 3 sweeps are usual")


def _unit_mean(h: Array) -> Array:
    mean = jnp.mean(jnp.diagonal(h))
    return h / jnp.where(mean > 0, mean, 1)
