"""`x @ w.T` for a vocabulary's embedding that is stored in a narrower dtype than the activations."""

from jaxquant.kernels.head_matmul.api import head_matmul

__all__ = ["head_matmul"]
