"""Pallas for TPU: rows are transformed on the MXU by factors of the matrix and quantized in VMEM."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt8

from jaxquant.kernels.mosaic import LANES, SUBLANES, even
from jaxquant.kernels.platform import Kernel
from jaxquant.linalg import base_order, hadamard

if TYPE_CHECKING:
    from jaxquant.quant import ActivationGrid

# Of 16 MiB of VMEM: two copies of x in float32 and of codes, and the transformed rows.
_TILE_BYTES, _BYTES_OF_CHANNEL = 13 << 20, 14
_ROWS = 256
# Bytes come in registers of this many rows.
_BYTE_ROWS = 4 * SUBLANES


def hadamard_quantize(
    x: Float[Array, "rows n"], *, grid: ActivationGrid, block: int, interpret: Any = False
) -> tuple[UInt8[Array, "rows n"], Float[Array, "rows groups"], Float[Array, "rows groups"]]:
    """As `reference`, in float32; x is float32 or bfloat16.

    The matrix is `A (x) B`, B of the order of the lanes (several smaller ones, where blocks are), so that
    slices of 128 channels are multiplied by B, and the slices of a block in a row, one above the other, by A.
    The grid runs over tiles of rows.

    Args:
      interpret: as in `pallas_call`: how to run where there is no TPU.
    """
    rows, n = x.shape
    groups, slices = grid.groups(n), n // LANES
    tile = even(rows, _most_rows(n), _BYTE_ROWS)
    order = min(block, LANES)
    within = np.kron(np.eye(LANES // order), hadamard(order))
    across = hadamard(block // order)
    whole = lambda a: pl.BlockSpec(a.shape, lambda i: (0, 0))  # noqa: E731
    per_row = lambda count: pl.BlockSpec((tile, count), lambda i: (i, 0))  # noqa: E731
    result = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(x).mat)
    per_group = result((rows, groups), jnp.float32)
    codes, scale, lo = pl.pallas_call(
        functools.partial(_kernel, grid=grid, norm=block**-0.5),
        out_shape=(result(x.shape, jnp.uint8), per_group, per_group),
        grid=(pl.cdiv(rows, tile),),
        in_specs=[per_row(n), whole(within), whole(across)],
        out_specs=(per_row(n), per_row(groups), per_row(groups)),
        scratch_shapes=[pltpu.VMEM((slices, tile, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * n * (LANES + len(across)),
            bytes_accessed=x.nbytes + x.size + 8 * rows * groups,
            transcendentals=0,
        ),
        interpret=interpret,
        name="hadamard_quantize",
    )(x, jnp.asarray(within, x.dtype), jnp.asarray(across.T, jnp.float32))
    return codes, scale, lo


def _refuses(x: Any, *, grid: ActivationGrid, block: int) -> str:
    rows, n = x.shape
    if x.dtype not in (jnp.bfloat16, jnp.float32) or rows == 0:
        return f"it takes nonempty bfloat16 or float32 x, not {x.dtype} of {x.shape}"
    if grid.scale_dtype != "float32":
        return f"scales are {grid.scale_dtype}, not float32"
    group, doubled = n // grid.groups(n), block // base_order(block)
    if n % LANES or (LANES % block and doubled % LANES) or (LANES % group and group % LANES):
        return (
            f"{n} channels, blocks of {block} = {block // doubled} x {doubled} and groups of {group} do not "
            f"fill registers of {LANES}"
        )
    return "" if _most_rows(n) else f"rows of {n} channels do not fit into VMEM"


KERNEL = Kernel(hadamard_quantize, _refuses)


def _most_rows(n: int) -> int:
    return min(_ROWS, _TILE_BYTES // (_BYTES_OF_CHANNEL * n) // _BYTE_ROWS * _BYTE_ROWS)


def _kernel(
    x_ref: Any,  # [rows, n]
    within_ref: Any,  # [lanes, lanes], signs
    across_ref: Any,  # [a, a] float32, signs, transposed
    codes_ref: Any,  # [rows, n] uint8
    scale_ref: Any,  # [rows, groups] float32
    lo_ref: Any,
    y_ref: Any,  # [slices, rows, lanes] float32
    *,
    grid: ActivationGrid,
    norm: float,
) -> None:
    slices, rows, _ = y_ref.shape
    a = across_ref.shape[0]
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    exact = jax.lax.Precision.HIGHEST

    def lanes(i: Array) -> Any:
        return pl.ds(pl.multiple_of(i * LANES, LANES), LANES)

    @pl.loop(0, slices)
    def _(i: Array) -> None:
        # Products of bfloat16 and signs are exact.
        precision = exact if x_ref.dtype == jnp.float32 else None
        y_ref[i] = norm * dot(x_ref[:, lanes(i)], within_ref[...], precision=precision)

    if a > 1:

        @pl.loop(0, slices // a)
        def _(b: Array) -> None:
            @pl.loop(0, rows)
            def _(r: Array) -> None:
                own = pl.ds(b * a, a), pl.ds(r, 1)
                y_ref[own] = dot(across_ref[...], y_ref[own][:, 0], precision=exact)[:, None]

    groups = scale_ref.shape[1]
    # Of one run of slices; where groups are narrower than a slice, each has some lanes of it.
    per_run = max(1, groups // slices)
    run, group = slices * per_run // groups, slices * LANES // groups
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    column = jax.lax.broadcasted_iota(jnp.int32, (rows, groups), 1)

    @pl.loop(0, slices // run)
    def _(first: Array) -> None:
        def widen(i: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            y = y_ref[first * run + i]
            return jnp.minimum(ends[0], y), jnp.maximum(ends[1], y)

        start = y_ref[first * run]
        low, high = jax.lax.fori_loop(1, run, widen, (start, start))
        step, offset = jnp.ones_like(start), jnp.zeros_like(start)
        for g in range(per_run):
            own = (lane >= g * group) & (lane < (g + 1) * group)
            least = jnp.min(jnp.where(own, low, jnp.inf), axis=1, keepdims=True)
            most = jnp.max(jnp.where(own, high, -jnp.inf), axis=1, keepdims=True)
            scale, lo = grid.of_range(least, most)
            here = column == first * per_run + g
            scale_ref[...] = jnp.where(here, scale, scale_ref[...])
            lo_ref[...] = jnp.where(here, lo, lo_ref[...])
            step = jnp.where(own, jnp.where(scale == 0, 1.0, scale), step)
            offset = jnp.where(own, lo, offset)

        @pl.loop(0, run)
        def _(i: Array) -> None:
            codes = jnp.round((y_ref[first * run + i] - offset) / step)
            codes = jnp.clip(codes, 0, 2**grid.bits - 1).astype(jnp.int32)
            codes_ref[:, lanes(first * run + i)] = codes.astype(jnp.uint8)
