"""What a quantized array is: `Grid` (how), `QArray` (what), `packing` (bits); `ActivationGrid` of tokens."""

from jaxquant.quant.activation import ActivationGrid
from jaxquant.quant.grid import Grid, working_dtype
from jaxquant.quant.packing import pack, packed_rows, unpack
from jaxquant.quant.qarray import QArray, quantize

__all__ = [
    "ActivationGrid",
    "Grid",
    "QArray",
    "pack",
    "packed_rows",
    "quantize",
    "unpack",
    "working_dtype",
]
