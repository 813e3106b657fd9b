"""The choice of an implementation of the product with the embedding."""

from __future__ import annotations

from jaxtyping import Array, Float

from jaxquant.kernels.head_matmul import cpu, reference
from jaxquant.kernels.platform import Backend, by_platform

_head_matmul = by_platform(reference.head_matmul, {"cpu": [cpu.KERNEL]}, rows=1)


def head_matmul(
    x: Float[Array, "*rows d"], w: Float[Array, "vocabulary d"], *, backend: Backend | None = None
) -> Float[Array, "*rows vocabulary"]:
    """`x @ w.T` in float32 without a copy of `w` in the dtype of `x`, where XLA would make one.

    Args:
      x: activations; leading axes are free.
      w: one row a token, in any float dtype.
      backend: `"portable"` is one product; `"kernel"`, for CPUs, widens a float16 `w` by parts, or multiplies
        one row by a bfloat16 `w`. `None`: as `kernels.use_backend` says, else the kernel where it can be.

    Raises:
      UsageError: an unknown backend, or `"kernel"` where there is none.
    """
    y = _head_matmul(x.reshape(-1, x.shape[-1]), w, backend=backend)
    return y.reshape(*x.shape[:-1], y.shape[-1])
