"""What a quantized array is: grids (how), `QArray` and `QActivation` (what), `packing` (bits)."""

from jaxquant.quant.activation import ActivationGrid, QActivation
from jaxquant.quant.grid import Grid, working_dtype
from jaxquant.quant.packing import pack, packed_rows, unpack
from jaxquant.quant.qarray import QArray, quantize

__all__ = [
    "ActivationGrid",
    "Grid",
    "QActivation",
    "QArray",
    "pack",
    "packed_rows",
    "quantize",
    "unpack",
    "working_dtype",
]
