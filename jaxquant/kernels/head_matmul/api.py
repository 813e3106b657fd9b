"""The choice of an implementation of the product with the embedding, or the head."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.errors import InputError
from jaxquant.kernels.head_matmul import cpu, reference
from jaxquant.kernels.platform import Backend, by_platform

_head_matmul = by_platform(reference.head_matmul, {"cpu": [cpu.KERNEL]}, rows=1)


def head_matmul(
    x: Float[Array, "*rows d"],
    w: Float[Array, "vocabulary d"] | Float[Array, "d vocabulary"],
    *,
    axis: Literal[0, 1] = 0,
    backend: Backend | None = None,
) -> Float[Array, "*rows vocabulary"]:
    """`x @ w.T`, or `x @ w`, in float32 without a copy of `w` in the dtype of `x`, where XLA would make one.

    Args:
      x: activations; leading axes are free.
      w: one row a token, as an embedding has it, or one column; in any float dtype.
      axis: that of the vocabulary in `w`.
      backend: `"portable"` is one product; `"kernel"`, for CPUs, widens a float16 or bfloat16 `w` by parts of
        the vocabulary. `None`: as `kernels.use_backend` says, else the kernel where it can be.

    Raises:
      UsageError: an unknown backend, or `"kernel"` where there is none.
      InputError: x that is no floats, or shapes that do not agree.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"head_matmul: x is {x.dtype}; convert it to a float dtype")
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[1 - axis]:
        raise InputError(
            f"head_matmul: x {x.shape} does not fit w {w.shape}: the last axis of x is to be as long as axis "
            f"{1 - axis} of w, whose other one is the vocabulary"
        )
    y = _head_matmul(x.reshape(-1, x.shape[-1]), w, backend=backend, axis=axis)
    return y.reshape(*x.shape[:-1], y.shape[-1])
