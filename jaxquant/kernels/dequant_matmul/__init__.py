"""`x @ dequantize(words)` for packed weights with grouped scales and zeros."""

from jaxquant.kernels.dequant_matmul.api import dequant_matmul, paired_matmul

__all__ = ["dequant_matmul", "paired_matmul"]
