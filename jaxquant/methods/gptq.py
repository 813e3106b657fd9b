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
from jaxquant.linalg import damped_factor
from jaxquant.methods.rounded import Rounded, Stats, layer_error
from jaxquant.quant import Grid, working_dtype

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
    factor = damped_factor(h[order][:, order], percdamp)

    block = group_rows if dynamic else min(block, rows)
    strip = max(d for d in range(1, _STRIP + 1) if block % d == 0)
    pad = -rows % block
    # Padding rows come last and have no weight: nothing reaches a real row from them.
    w = jnp.pad(w[order], ((0, pad), (0, 0)))
    feedback = jnp.pad(factor.upper / jnp.diagonal(factor.upper)[None, :], ((0, pad), (0, pad)))
    group = jnp.pad(jnp.arange(rows) // group_rows if dynamic else order // group_rows, (0, pad))
    one_group = dataclasses.replace(grid, group_size=None)

    def round_block(errors: Array, start: Array) -> tuple[Array, tuple[Array, Array, Array | None]]:
        columns_of_block = _slice(feedback, start, block, axis=1)
        inside = _slice(columns_of_block, start, block)
        target = _slice(w, start, block)

        def add_block(i: Array, received: Array) -> Array:
            above, earlier = (_slice(a, i * block, block) for a in (columns_of_block, errors))
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
            columns_of_strip = _slice(inside, offset, strip, axis=1)
            factor_strip = _slice(columns_of_strip, offset, strip)
            weights = _slice(target, offset, strip)
            updated = weights + _slice(received, offset, strip) + _feed(columns_of_strip, block_errors)

            def round_row(strip_errors: Array, k: Array) -> tuple[Array, Array]:
                row = updated[k] + _feed(factor_strip[:, k], strip_errors)
                g = 0 if dynamic else group[start + offset + k]
                row_scale = block_scale[g][None]
                row_zero = None if block_zero is None else block_zero[g][None]
                code = one_group.quantize(row[None], row_scale, row_zero)
                value = one_group.dequantize(code, row_scale, row_zero, dtype)[0]
                return strip_errors.at[k].set(weights[k] - value), code[0]

            strip_errors, codes = jax.lax.scan(round_row, jnp.zeros_like(weights), jnp.arange(strip))
            return jax.lax.dynamic_update_slice_in_dim(block_errors, strip_errors, offset, axis=0), codes

        offsets = jnp.arange(0, block, strip)
        block_errors, codes = jax.lax.scan(round_strip, jnp.zeros_like(target), offsets)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, block_errors, start, axis=0)
        return errors, (codes, block_scale[:1], None if block_zero is None else block_zero[:1])

    _, (codes, scales, zeros) = jax.lax.scan(round_block, jnp.zeros_like(w), jnp.arange(0, rows + pad, block))
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


def _slice(a: Array, start: Array, size: int, axis: int = 0) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, start, size, axis)


def _feed(factor: Array, errors: Array) -> Array:
    """Errors of some rows, passed on to the rows that the columns of `factor` stand for."""
    return jnp.matmul(factor.T, errors, precision="highest")
