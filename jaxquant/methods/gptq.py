"""GPTQ: rounding with error feedback through the inverse Hessian (arXiv 2210.17323)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxquant.calibrate.moments import Moments
from jaxquant.errors import UsageError
from jaxquant.linalg import damped_factor, rows_from
from jaxquant.methods.rounded import Rounded, Stats, output_energy, relative_energy
from jaxquant.quant import Grid, working_dtype
from jaxquant.quant.mixed import fit, quantize

Groups = Literal["static", "dynamic"]

# Rows that are fed back one by one; their errors stay in the cache of a core.
_STRIP = 16


@functools.partial(jax.jit, static_argnames=("grid", "act_order", "groups", "block"))
def gptq(
    weight: Float[Array, "in out"],
    moments: Moments,
    grid: Grid,
    *,
    act_order: bool = True,
    groups: Groups = "static",
    percdamp: float | Array = 0.01,
    block: int = 128,
    fixed: Rounded | None = None,
    group_bits: Int[Array, " groups"] | None = None,
) -> Rounded:
    """Rounds the inputs of a layer one after another; each error is made up for by the inputs that follow.

    With `H = sum x x^T + damping = A A^T`, A upper triangular, row k of the weight becomes

        q_k = Q(w_k + sum_{j<k} (A_jk / A_kk) (w_j - q_j))

    which minimizes `tr(D^T H D)`, `D = q - w`, greedily. The paper writes the same with `U = A^-1`:
    `e_k = (w'_k - q_k) / U_kk` and `w'_j <- w'_j - U_kj e_k` for j > k. The form above (QuIP's LDLQ, arXiv
    2307.13304) gives the same integers, needs no inverse and leaves the weight alone. Rows are processed
    `block` at a time: a row receives the errors of earlier blocks in whole products, those of its own block
    strip by strip, those of its own strip one by one. The block size changes nothing beyond rounding.

    Order of operations: inputs that were always 0 get weight 0 and the mean `H_dd` of the rest, which
    leaves the damping alone; static grids are fitted to the original order; `act_order` sorts inputs by
    descending `H_dd` (stable); damping; factor; loop; the inverse permutation.

    Args:
      weight: `[in, out]`, any float dtype; computed in float32, or in float64 where it or the moments are.
      moments: of the layer's inputs; `second` `[in, in]`.
      grid: static.
      act_order: process inputs by descending second moment.
      groups: `"static"`: consecutive inputs share a group and its grid is fitted before any update;
        `"dynamic"`: a grid is fitted when its group is reached, to the weights as updated by then. With
        `act_order` dynamic groups lie in processing order and the result carries `order`.
      percdamp: damping in units of `mean(diag H)`, doubled on failure (see `linalg.psd`).
      block: rows per lazy update with static groups; with dynamic groups a block is a group.
      fixed: a former rounding whose static grids are kept instead of fitting new ones.
      group_bits: see `Problem`; for static groups, without `fixed`.

    Returns:
      `Rounded`; `stats.finite` is false where the weight or `H` held NaN or infinity, and the codes are
      then meaningless.

    Raises:
      UsageError: the group size does not divide `in`, `groups` is neither word, or `fixed` or `group_bits`
        meets dynamic groups.
    """
    if groups not in get_args(Groups):
        raise UsageError(f"unknown groups {groups!r}; use {' or '.join(get_args(Groups))}")
    if fixed is not None and (groups == "dynamic" or fixed.order is not None):
        raise UsageError("gptq: grids can be kept with static groups only")
    if fixed is not None:
        group_bits = fixed.group_bits
    if group_bits is not None and groups == "dynamic":
        raise UsageError("gptq: bits by group need static groups")
    dtype = working_dtype(weight.dtype, moments.second.dtype)
    w, h = weight.astype(dtype), moments.second.astype(dtype)
    rows, columns = w.shape
    group_rows = rows // grid.groups(rows)
    # One group a column is fitted before any update either way, and static groups have the faster loop.
    dynamic = groups == "dynamic" and group_rows < rows

    diagonal = jnp.diagonal(h)
    dead = diagonal == 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1).astype(dtype)
    diagonal = jnp.where(dead, jnp.where(jnp.all(dead), 1, mean), diagonal)
    if fixed is None:
        scale, zero = fit(grid, jnp.where(dead[:, None], 0, w), group_bits)
    else:
        scale, zero = fixed.scale, fixed.zero

    order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(rows)
    order = order.astype(jnp.int32)
    # Only the diagonal of a dead input is not 0.
    mended = h[order][:, order] + jnp.diag(jnp.where(dead, diagonal, 0)[order])
    factor = damped_factor(mended, percdamp)

    block = group_rows if dynamic else min(block, rows)
    strip = max(d for d in range(1, _STRIP + 1) if block % d == 0)
    pad = -rows % block
    # Padding rows come last and have no weight: nothing reaches a real row from them.
    live = jnp.pad(~dead[order], (0, pad))
    upper = jnp.pad(factor.upper, ((0, pad), (0, pad)))
    pivots = jnp.pad(jnp.diagonal(factor.upper), (0, pad), constant_values=1)
    input_of_row = jnp.pad(order, (0, pad))
    group = jnp.zeros_like(input_of_row) if dynamic else input_of_row // group_rows
    one_group = dataclasses.replace(grid, group_size=None)

    def round_block(errors: Array, start: Array) -> tuple[Array, tuple[Array, Array, Array | None]]:
        columns_of_block = rows_from(upper, start, block, axis=1) / rows_from(pivots, start, block)[None, :]
        inside = rows_from(columns_of_block, start, block)
        target = jnp.where(
            rows_from(live, start, block)[:, None], w[rows_from(input_of_row, start, block)], 0
        )

        def add_block(i: Array, received: Array) -> Array:
            above, earlier = (rows_from(a, i * block, block) for a in (columns_of_block, errors))
            return received + _feed(above, earlier)

        received = jax.lax.fori_loop(0, start // block, add_block, jnp.zeros_like(target))
        if dynamic:
            # What is received so far, once the rows of the block make up for each other too: the paper's w'.
            spread = jax.lax.linalg.triangular_solve(
                inside, received, left_side=True, lower=False, transpose_a=True, unit_diagonal=True
            )
            block_scale, block_zero = one_group.fit(target + spread)
        else:
            block_scale, block_zero = scale, zero

        def round_strip(block_errors: Array, offset: Array) -> tuple[Array, Array]:
            columns_of_strip = rows_from(inside, offset, strip, axis=1)
            factor_strip = rows_from(columns_of_strip, offset, strip)
            weights = rows_from(target, offset, strip)
            updated = weights + rows_from(received, offset, strip) + _feed(columns_of_strip, block_errors)

            def round_row(strip_errors: Array, k: Array) -> tuple[Array, Array]:
                row = rows_from(updated, k, 1) + _feed(rows_from(factor_strip, k, 1, axis=1), strip_errors)
                g = rows_from(group, start + offset + k, 1)[0]
                row_scale = rows_from(block_scale, g, 1)
                row_zero = None if block_zero is None else rows_from(block_zero, g, 1)
                bits = None if group_bits is None else group_bits[g][None]
                code = quantize(one_group, row, row_scale, row_zero, bits)
                value = one_group.dequantize(code, row_scale, row_zero, dtype)
                error = rows_from(weights, k, 1) - value
                return jax.lax.dynamic_update_slice_in_dim(strip_errors, error, k, axis=0), code[0]

            strip_errors, codes = jax.lax.scan(round_row, jnp.zeros_like(weights), jnp.arange(strip))
            return jax.lax.dynamic_update_slice_in_dim(block_errors, strip_errors, offset, axis=0), codes

        offsets = jnp.arange(0, block, strip)
        block_errors, codes = jax.lax.scan(round_strip, jnp.zeros_like(target), offsets)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, block_errors, start, axis=0)
        return errors, (codes, block_scale[:1], None if block_zero is None else block_zero[:1])

    errors, (codes, scales, zeros) = jax.lax.scan(
        round_block, jnp.zeros((rows + pad, columns), dtype), jnp.arange(0, rows + pad, block)
    )
    codes, inverse = codes.reshape(-1, columns)[:rows], jnp.argsort(order)
    if dynamic:
        scale, zero = scales[:, 0], None if zeros is None else zeros[:, 0]
    else:
        codes = codes[inverse]
    # A dead input has a diagonal in `mended` that it has not in H.
    errors = jnp.where(live[:rows, None], errors[:rows], 0)
    stats = Stats(
        error=relative_energy(output_energy(errors, mended), output_energy(w, h)),
        damping=factor.damping,
        attempts=factor.attempts,
        fallback=factor.fallback,
        dead=jnp.sum(dead, dtype=jnp.int32),
        finite=factor.finite & jnp.all(jnp.isfinite(w)),
    )
    return Rounded(
        codes=codes,
        scale=scale,
        zero=zero,
        order=order if dynamic and act_order else None,
        stats=stats,
        grid=grid,
        group_bits=group_bits,
    )


def _feed(factor: Array, errors: Array) -> Array:
    """Errors of some rows, passed on to the rows that the columns of `factor` stand for."""
    return jnp.matmul(factor.T, errors, precision="highest")
