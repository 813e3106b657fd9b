"""What a quantized array is: grids (how), `QArray` and its kin (what), `packing` (bits)."""

from jaxquant.quant.activation import ActivationGrid, QActivation
from jaxquant.quant.grid import Grid, working_dtype
from jaxquant.quant.heads import PackedHeads
from jaxquant.quant.mixed import MixedQArray, Packed, QStack, is_packed
from jaxquant.quant.packing import pack, packed_rows, unpack
from jaxquant.quant.paired import PairedArray, paired, paired_on_tpus, unpaired
from jaxquant.quant.qarray import QArray, quantize

__all__ = [
    "ActivationGrid",
    "Grid",
    "MixedQArray",
    "Packed",
    "PackedHeads",
    "PairedArray",
    "QActivation",
    "QArray",
    "QStack",
    "is_packed",
    "pack",
    "packed_rows",
    "paired",
    "paired_on_tpus",
    "quantize",
    "unpack",
    "unpaired",
    "working_dtype",
]
