"""Pallas (Mosaic GPU) for Hopper: `wgmma` transforms slices of 128 channels, threads what lies across."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, UInt8

from jaxquant.kernels.mosaic_gpu import SHARED_BYTES, Mosaic, shared_bytes, without_hopper
from jaxquant.kernels.platform import Kernel
from jaxquant.linalg import base_order, hadamard

if TYPE_CHECKING:
    from jaxquant.quant import ActivationGrid

# Channels of a slice, as many as threads; slices that `wgmma` multiplies, and that are copied, at once.
_SLICE, _TILE, _ALIGNED = 128, 64, 8
# Floats from a slice to the next one, so that stores of 8 slices meet in no bank.
_STRIDE = _SLICE + 8
# Orders of factors whose values are in registers at once: of doublings, and of what is left.
_DOUBLED, _LARGEST_BASE = 16, 44


def hadamard_quantize(
    x: Float[Array, "rows n"], *, grid: ActivationGrid, block: int, interpret: Any = None
) -> tuple[UInt8[Array, "rows n"], Float[Array, "rows groups"], Float[Array, "rows groups"]]:
    """As `reference`, in float32; x is bfloat16 or float16, and NaN where a slice holds NaN or infinity.

    The matrix is `A (x) B`, B of the order of a slice (several smaller ones, where blocks are). Products of x
    and signs are exact, so B is multiplied by tensor cores; A, in float32, by its own Kronecker factors:
    thread t adds up channel t of the slices of a block, which wait in shared memory. A program has one row of
    x, or several that a tile has room for.

    Args:
      interpret: as in `mosaic_gpu.kernel`: how to run where there is no GPU.
    """
    mosaic = Mosaic(interpret)
    plgpu, lay = mosaic.gpu, mosaic.lay
    rows, n = x.shape
    groups, slices = grid.groups(n), n // _SLICE
    size, (own_rows, aligned, tiles) = n // groups, _plan(rows, n)
    own, programs = own_rows * slices, pl.cdiv(rows, own_rows)
    # Groups of a slice, or slices of a group.
    parts, run = max(1, _SLICE // size), max(1, size // _SLICE)
    order = min(block, _SLICE)
    within = np.kron(np.eye(_SLICE // order), hadamard(order))
    flat = x.reshape(-1, _SLICE)
    flat = jnp.pad(flat, ((0, -len(flat) % _ALIGNED), (0, 0)))
    by_lane, channels = plgpu.Layout.WG_STRIDED((_SLICE,), vec_size=1), pl.ds(0, _SLICE)

    def codes_of(y: Array, scale: Array, lo: Array) -> Array:
        places = (y - lo) / jnp.where(scale == 0, 1.0, scale)
        # What is cut off is rounded, half of the way upwards.
        return jnp.clip(places + 0.5, 0.0, 2**grid.bits - 0.5).astype(jnp.int32).astype(jnp.uint8)

    def kernel(
        x_gmem, within_gmem, codes_gmem, scale_gmem, lo_gmem, x_smem, within_smem, y_smem, codes_smem,
        scale_smem, lo_smem, barrier,
    ):  # fmt: skip
        program = jax.lax.axis_index("rows")
        first = program * own
        before = np.int32(0) if aligned else jax.lax.rem(first, np.int32(_ALIGNED))

        def tile(t: Array) -> Any:
            return pl.ds(t * _TILE, _TILE)

        def lanes(i: Array) -> Array:
            return lay(y_smem[before + i, channels], by_lane)

        plgpu.copy_gmem_to_smem(within_gmem, within_smem, barrier)
        plgpu.barrier_wait(barrier)

        @pl.loop(0, tiles)
        def _(t: Array) -> None:
            plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(first - before + t * _TILE, _TILE)], x_smem, barrier)
            plgpu.barrier_wait(barrier)
            y_smem[tile(t), channels] = mosaic.product(x_smem, within_smem) * block**-0.5
            # All warps have to be through before the next tile comes to the same place.
            plgpu.commit_smem()

        stride = 1
        for factor in reversed(_factors(block)):
            signs = hadamard(factor)

            @pl.loop(0, own // factor)
            def _(g: Array, factor: int = factor, stride: int = stride, signs: np.ndarray = signs) -> None:
                outer, inner = jax.lax.div(g, np.int32(stride)), jax.lax.rem(g, np.int32(stride))
                places = [outer * (factor * stride) + inner + i * stride for i in range(factor)]
                for place, y in zip(places, _times(signs, [lanes(place) for place in places]), strict=True):
                    y_smem[before + place, channels] = y

            stride *= factor

        if size <= _SLICE:
            plgpu.commit_smem()

            @pl.loop(0, tiles)
            def _(t: Array) -> None:
                for part in range(parts):
                    y = lay(y_smem[tile(t), pl.ds(part * size, size)], plgpu.Layout.WGMMA)
                    scale, lo = grid.of_range(jnp.min(y, axis=1), jnp.max(y, axis=1))
                    scale_smem[part, tile(t)], lo_smem[part, tile(t)] = scale, lo

        else:

            @pl.loop(0, own // run)
            def _(g: Array) -> None:
                def widen(i: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
                    y = lanes(g * run + i)
                    return jnp.minimum(ends[0], y), jnp.maximum(ends[1], y)

                start = lanes(g * run)
                low, high = jax.lax.fori_loop(1, run, widen, (start, start))
                scale, lo = grid.of_range(jnp.min(low), jnp.max(high))
                scale_smem[0, g], lo_smem[0, g] = scale, lo

        plgpu.commit_smem()
        part_of = plgpu.broadcasted_iota(jnp.int32, (_SLICE,), 0, layout=by_lane) // size

        @pl.loop(0, own)
        def _(i: Array) -> None:
            g = before + i if size <= _SLICE else jax.lax.div(i, np.int32(run))

            def own_group(ref: Any) -> Array:
                value = jnp.full(_SLICE, ref[0, g])
                for part in range(1, parts):
                    value = jnp.where(part_of == part, ref[part, g], value)
                return value

            codes_smem[i] = codes_of(lanes(i), own_group(scale_smem), own_group(lo_smem))

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(codes_smem.at[pl.ds(0, own)], codes_gmem.at[pl.ds(first, own)])
        plgpu.copy_smem_to_gmem(scale_smem, scale_gmem.at[program])
        plgpu.copy_smem_to_gmem(lo_smem, lo_gmem.at[program])
        plgpu.wait_smem_to_gmem(0)

    per_group = (parts, tiles * _TILE)
    of_programs = jax.ShapeDtypeStruct((programs, *per_group), jnp.float32)
    codes, scale, lo = mosaic.kernel(
        kernel,
        # Most of what a thread reads it has written itself.
        barriers=False,
        out_type=(jax.ShapeDtypeStruct((rows * slices, _SLICE), jnp.uint8), of_programs, of_programs),
        grid=(programs,),
        grid_names=("rows",),
        scratch_types=[
            plgpu.SMEM((_TILE, _SLICE), x.dtype, transforms=mosaic.swizzled(x.dtype)),
            plgpu.SMEM((_SLICE, _SLICE), x.dtype, transforms=mosaic.swizzled(x.dtype)),
            plgpu.SMEM((tiles * _TILE, _STRIDE), jnp.float32),
            plgpu.SMEM((tiles * _TILE, _SLICE), jnp.uint8),
            plgpu.SMEM(per_group, jnp.float32),
            plgpu.SMEM(per_group, jnp.float32),
            plgpu.Barrier(),
        ],
    )(flat, jnp.asarray(within, x.dtype))

    def by_row(a: Array) -> Array:
        if size > _SLICE or aligned:
            a = a[:, :, : own // run]
        else:
            starts = np.arange(programs) * own % _ALIGNED
            a = jnp.take_along_axis(a, (starts[:, None] + np.arange(own))[:, None], axis=2)
        return a.swapaxes(1, 2).reshape(-1, groups)[:rows]

    return codes.reshape(rows, n), by_row(scale), by_row(lo)


def _times(signs: np.ndarray, y: list[Array]) -> list[Array]:
    """The product with a Hadamard matrix: by butterflies, where there is no odd part."""
    order = len(y)
    if base_order(order) == 1:
        for bit in (2**k for k in range(order.bit_length() - 1)):
            y = [y[i ^ bit] - y[i] if i & bit else y[i] + y[i ^ bit] for i in range(order)]
        return y
    return [
        functools.reduce(
            lambda total, term: total + term[0] if term[1] > 0 else total - term[0],
            zip(y[1:], column[1:], strict=True),
            y[0],
        )
        for column in signs.T
    ]


def _factors(block: int) -> list[int]:
    """Orders of which the matrix across slices is the Kronecker product."""
    across = max(1, block // _SLICE)
    base = base_order(across)
    doublings = (across // base).bit_length() - 1
    most = _DOUBLED.bit_length() - 1
    powers = [2 ** min(most, doublings - done) for done in range(0, doublings, most)]
    return [factor for factor in (base, *powers) if factor > 1]


def _plan(rows: int, n: int) -> tuple[int, bool, int]:
    """Rows of a program, as many as a tile has room for; whether its slices begin where copies do; tiles.

    Copies of x begin at multiples of 8 slices: otherwise, those before a program's own come along.
    """
    slices = n // _SLICE
    most = max(1, min(rows, _TILE // slices))
    own = next((count for count in range(most, 0, -1) if count * slices % _ALIGNED == 0), most)
    aligned = own >= rows or own * slices % _ALIGNED == 0
    return own, aligned, pl.cdiv(own * slices + (0 if aligned else _ALIGNED - 1), _TILE)


def _shared_bytes(rows: int, n: int, size: int) -> int:
    slices = _plan(rows, n)[2] * _TILE
    groups = 4 * max(1, _SLICE // size) * slices
    return shared_bytes(
        2 * _TILE * _SLICE, 2 * _SLICE**2, 4 * slices * _STRIDE, slices * _SLICE, groups, groups
    )


def _refuses(x: Any, *, grid: ActivationGrid, block: int) -> str:
    rows, n = x.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16) or 0 in x.shape:
        return f"it takes nonempty bfloat16 or float16 x, not {x.dtype} of {x.shape}"
    if grid.scale_dtype != "float32":
        return f"scales are {grid.scale_dtype}, not float32"
    size, doubled = n // grid.groups(n), block // base_order(block)
    fitting = size % _SLICE == 0 or (_SLICE % size == 0 and size % 16 == 0)
    if n % _SLICE or not fitting or (_SLICE % block and doubled % _SLICE):
        return (
            f"{n} channels, blocks of {block} = {block // doubled} x {doubled} and groups of {size} do not "
            f"fill slices of {_SLICE}"
        )
    if block // doubled > _LARGEST_BASE:
        return f"a factor of {block // doubled} has too many values for registers"
    if _shared_bytes(rows, n, size) > SHARED_BYTES:
        return f"rows of {n} channels do not fit into shared memory"
    return ""


KERNEL = Kernel(hadamard_quantize, _refuses, without_hopper)
