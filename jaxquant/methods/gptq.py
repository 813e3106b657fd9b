"""GPTQ: rounding with error feedback through the inverse Hessian (arXiv 2210.17323)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.calibrate.moments import Moments
from jaxquant.errors import UsageError
from jaxquant.linalg import damped_inverse_factor
from jaxquant.methods.rounded import Rounded, Stats, layer_error
from jaxquant.quant import Grid, working_dtype

Groups = Literal["static", "dynamic"]


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
) -> Rounded:
    """Rounds the inputs of a layer one after another; each error is spread over the inputs that follow.

    With `H = sum x x^T + damping`, `H^-1 = U^T U`, U upper triangular, row k of the weight:

        q_k = Q(w_k),  e_k = (w_k - q_k) / U_kk,  w_j <- w_j - U_kj e_k   for j > k

    which minimizes `tr(D^T H D)`, `D = q - w`, greedily. Rows are processed `block` at a time: a row first
    receives the errors of all earlier blocks in one product, then those of its own block. The block size does
    not change the result beyond rounding.

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

    Returns:
      `Rounded`; `stats.finite` is false where the weight or `H` held NaN or infinity, and the codes are
      then meaningless.

    Raises:
      UsageError: the group size does not divide `in`, or `groups` is neither word.
    """
    if groups not in get_args(Groups):
        raise UsageError(f"unknown groups {groups!r}; use {' or '.join(get_args(Groups))}")
    dtype = working_dtype(weight.dtype, moments.second.dtype)
    w, h = weight.astype(dtype), moments.second.astype(dtype)
    rows, columns = w.shape
    group_rows = rows // grid.groups(rows)
    # One group a column is fitted before any update either way, and static groups have the faster loop.
    dynamic = groups == "dynamic" and group_rows < rows

    dead = jnp.diagonal(h) == 0
    original, w = w, jnp.where(dead[:, None], 0, w)
    mean = jnp.trace(h) / jnp.maximum(jnp.sum(~dead), 1).astype(dtype)
    h = h + jnp.diag(jnp.where(dead, jnp.where(jnp.all(dead), 1, mean), 0))
    scale, zero = grid.fit(w)

    order = jnp.argsort(-jnp.diagonal(h), stable=True) if act_order else jnp.arange(rows)
    factor = damped_inverse_factor(h[order][:, order], percdamp)

    block = group_rows if dynamic else min(block, rows)
    pad = -rows % block
    # Padding rows come last and have a unit factor, so they neither receive nor send anything.
    w = jnp.pad(w[order], ((0, pad), (0, 0)))
    upper = jnp.pad(factor.upper, ((0, pad), (0, pad)))
    upper = upper + jnp.diag((jnp.arange(rows + pad) >= rows).astype(dtype))
    group = jnp.pad(jnp.arange(rows) // group_rows if dynamic else order // group_rows, (0, pad))
    one_group = dataclasses.replace(grid, group_size=None)

    def round_block(errors: Array, start: Array) -> tuple[Array, tuple[Array, Array, Array | None]]:
        factor_columns = jax.lax.dynamic_slice_in_dim(upper, start, block, axis=1)
        factor_block = jax.lax.dynamic_slice_in_dim(factor_columns, start, block, axis=0)
        updated = jax.lax.dynamic_slice_in_dim(w, start, block, axis=0)
        updated = updated - jnp.matmul(factor_columns.T, errors, precision="highest")
        if dynamic:
            block_scale, block_zero = one_group.fit(updated)
        else:
            block_scale, block_zero = scale, zero

        def round_row(block_errors: Array, k: Array) -> tuple[Array, Array]:
            feedback = jnp.matmul(factor_block[:, k], block_errors, precision="highest")
            row = updated[k] - feedback
            g = 0 if dynamic else group[start + k]
            row_scale = block_scale[g][None]
            row_zero = None if block_zero is None else block_zero[g][None]
            code = one_group.quantize(row[None], row_scale, row_zero)
            value = one_group.dequantize(code, row_scale, row_zero, dtype)[0]
            return block_errors.at[k].set((row - value) / factor_block[k, k]), code[0]

        block_errors, codes = jax.lax.scan(round_row, jnp.zeros((block, columns), dtype), jnp.arange(block))
        errors = jax.lax.dynamic_update_slice_in_dim(errors, block_errors, start, axis=0)
        return errors, (codes, block_scale[:1], None if block_zero is None else block_zero[:1])

    starts = jnp.arange(0, rows + pad, block)
    _, (codes, scales, zeros) = jax.lax.scan(round_block, jnp.zeros((rows + pad, columns), dtype), starts)
    codes, inverse = codes.reshape(-1, columns)[:rows], jnp.argsort(order)
    if dynamic:
        scale, zero = scales[:, 0], None if zeros is None else zeros[:, 0]
        values = grid.dequantize(codes, scale, zero, dtype)[inverse]
    else:
        codes = codes[inverse]
        values = grid.dequantize(codes, scale, zero, dtype)
    stats = Stats(
        error=layer_error(values, original, moments.second.astype(dtype)),
        damping=factor.damping,
        attempts=factor.attempts,
        fallback=factor.fallback,
        dead=jnp.sum(dead, dtype=jnp.int32),
        finite=factor.finite & jnp.all(jnp.isfinite(original)),
    )
    return Rounded(
        codes=codes,
        scale=scale,
        zero=zero,
        order=order if dynamic and act_order else None,
        stats=stats,
        grid=grid,
    )
