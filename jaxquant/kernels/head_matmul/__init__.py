"""`x @ w.T` for an embedding or a head that is stored in a narrower dtype than the activations."""

from jaxquant.kernels.head_matmul.api import head_matmul

__all__ = ["head_matmul"]
