"""`x @ w` where both are integers on grids: int32 sums, and what scales and offsets add to them."""

from jaxquant.kernels.integer_matmul.api import integer_matmul

__all__ = ["integer_matmul"]
