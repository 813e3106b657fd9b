"""Quantized models in the formats of other engines, one file a format."""

from jaxquant.io.export.compressed_tensors import export_compressed_tensors

__all__ = ["export_compressed_tensors"]
