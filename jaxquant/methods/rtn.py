"""RTN: rounding to nearest."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxquant.calibrate.moments import Moments
from jaxquant.methods.rounded import Rounded, Stats, layer_error
from jaxquant.quant import Grid, working_dtype
from jaxquant.quant.mixed import fit, quantize


@functools.partial(jax.jit, static_argnames="grid")
def rtn(
    weight: Float[Array, "in out"],
    moments: Moments,
    grid: Grid,
    *,
    group_bits: Int[Array, " groups"] | None = None,
) -> Rounded:
    """`code = clip(round(w / scale) + zero, 0, 2**bits - 1)` on the grid fitted to `weight`.

    The moments enter the reported error only.

    Args:
      weight: `[in, out]`, any float dtype. Computed in float32, or in float64 where weight or moments are.
      moments: of the layer's inputs.
      grid: static.
      group_bits: see `Problem`.

    Raises:
      UsageError: the group size does not divide `in`, or bits by group do not go with the grid.
    """
    dtype = working_dtype(weight.dtype, moments.second.dtype)
    w, second = weight.astype(dtype), moments.second.astype(dtype)
    scale, zero = fit(grid, w, group_bits)
    codes = quantize(grid, w, scale, zero, group_bits)
    stats = Stats(
        error=layer_error(grid.dequantize(codes, scale, zero, dtype), w, second),
        damping=jnp.zeros((), dtype),
        attempts=jnp.zeros((), jnp.int32),
        fallback=jnp.asarray(False),
        dead=jnp.sum(jnp.diagonal(second) == 0, dtype=jnp.int32),
        finite=jnp.all(jnp.isfinite(w)) & jnp.all(jnp.isfinite(second)),
    )
    return Rounded(
        codes=codes, scale=scale, zero=zero, order=None, stats=stats, grid=grid, group_bits=group_bits
    )
