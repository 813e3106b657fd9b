"""RTN: rounding to nearest."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.calibrate.moments import Moments
from jaxquant.methods.rounded import Rounded, Stats, layer_error
from jaxquant.quant import Grid, working_dtype


@functools.partial(jax.jit, static_argnames="grid")
def rtn(weight: Float[Array, "in out"], moments: Moments, grid: Grid) -> Rounded:
    """`code = clip(round(w / scale) + zero, 0, 2**bits - 1)` on the grid fitted to `weight`.

    The moments enter the reported error only.

    Args:
      weight: `[in, out]`, any float dtype. Computed in float32, or in float64 where weight or moments are.
      moments: of the layer's inputs.
      grid: static.

    Raises:
      UsageError: the group size does not divide `in`.
    """
    dtype = working_dtype(weight.dtype, moments.second.dtype)
    w, second = weight.astype(dtype), moments.second.astype(dtype)
    scale, zero = grid.fit(w)
    codes = grid.quantize(w, scale, zero)
    stats = Stats(
        error=layer_error(grid.dequantize(codes, scale, zero, dtype), w, second),
        damping=jnp.zeros((), dtype),
        attempts=jnp.zeros((), jnp.int32),
        fallback=jnp.asarray(False),
        dead=jnp.sum(jnp.diagonal(second) == 0, dtype=jnp.int32),
        finite=jnp.all(jnp.isfinite(w)) & jnp.all(jnp.isfinite(second)),
    )
    return Rounded(codes=codes, scale=scale, zero=zero, order=None, stats=stats, grid=grid)
