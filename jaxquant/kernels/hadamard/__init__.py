"""Blocks of channels times Hadamard matrices, quantized in the same pass."""

from jaxquant.kernels.hadamard.api import hadamard_quantize

__all__ = ["hadamard_quantize"]
