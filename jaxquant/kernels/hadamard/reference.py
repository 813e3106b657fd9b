"""The specification: one product with the whole matrix, then the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxquant.linalg import hadamard
from jaxquant.quant.grid import working_dtype

if TYPE_CHECKING:
    from jaxquant.quant import ActivationGrid


def hadamard_quantize(
    x: Float[Array, "rows n"], *, grid: ActivationGrid, block: int
) -> tuple[UInt8[Array, "rows n"], Float[Array, "rows groups"], Float[Array, "rows groups"]]:
    """Codes, scale and lo of `y = x_b H / sqrt(block)`, b a block of channels, H `hadamard(block)`.

    In float32 at highest precision, float64 for such an x.
    """
    wide = working_dtype(x.dtype)
    h = jnp.asarray(hadamard(block) * block**-0.5, wide)
    y = jnp.matmul(x.reshape(-1, block).astype(wide), h, precision="highest").reshape(x.shape)
    scale, lo = grid.fit(y)
    return grid.quantize(y, scale, lo), scale, lo
