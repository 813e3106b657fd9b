"""The portable implementation: products with small factors of the matrix, then the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Array, Float, UInt8

from jaxquant.linalg import hadamard_transform
from jaxquant.quant.grid import working_dtype

if TYPE_CHECKING:
    from jaxquant.quant import ActivationGrid


def hadamard_quantize(
    x: Float[Array, "rows n"], *, grid: ActivationGrid, block: int
) -> tuple[UInt8[Array, "rows n"], Float[Array, "rows groups"], Float[Array, "rows groups"]]:
    """As `reference`, by `linalg.hadamard_transform`; the transformed x is written."""
    blocks = x.astype(working_dtype(x.dtype)).reshape(x.shape[0], x.shape[1] // block, block)
    y = hadamard_transform(blocks).reshape(x.shape)
    scale, lo = grid.fit(y)
    return grid.quantize(y, scale, lo), scale, lo
