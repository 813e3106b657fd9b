"""The choice of an implementation of the Hadamard transform that quantizes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxquant.errors import UsageError
from jaxquant.kernels.hadamard import cpu, factors, gpu, tpu
from jaxquant.kernels.platform import Backend, by_platform
from jaxquant.linalg import base_order

if TYPE_CHECKING:
    from jaxquant.quant import ActivationGrid

_hadamard_quantize = by_platform(
    factors.hadamard_quantize, {"cpu": [cpu.KERNEL], "tpu": [tpu.KERNEL], "cuda": [gpu.KERNEL]}, rows=1
)


def hadamard_quantize(
    x: Float[Array, "*tokens n"], grid: ActivationGrid, block: int, *, backend: Backend | None = None
) -> tuple[UInt8[Array, "*tokens n"], Float[Array, "*tokens groups"], Float[Array, "*tokens groups"]]:
    """`(codes, scale, lo)` of `y = x_b H / sqrt(block)`, b a block of channels, on `grid`.

    H is `linalg.hadamard(block)`, y `linalg.hadamard_transform` of blocks in float32 (float64 for such an x).
    Kernels read x once and never write y. Derivatives of any order, of scale and lo, are those of the
    portable implementation; codes have none. Implementations round y differently: where it lies between two
    codes they may take either.

    Args:
      x: activations, leading axes are free.
      grid: what y is quantized with.
      block: channels that are transformed together.
      backend: `"portable"` is XLA's, everywhere; `"kernel"` is C++ on CPUs, Pallas on TPUs and GPUs
        (Hopper). `None`: as `kernels.use_backend` says, else the kernel, where the program is lowered for
        such a device and it takes these arrays.

    Raises:
      UsageError: blocks or groups that do not divide the channels, an order without a matrix, an x that is
        not of a float dtype, an unknown backend, or `"kernel"` where there is none.
    """
    n = x.shape[-1]
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UsageError(f"hadamard_quantize: x is {x.dtype}; cast it to a float dtype")
    base_order(block)
    if n % block:
        raise UsageError(f"hadamard_quantize: blocks of {block} do not divide {n} channels")
    groups = grid.groups(n)
    rows = x.reshape(math.prod(x.shape[:-1]), n)
    codes, scale, lo = _hadamard_quantize(rows, backend=backend, grid=grid, block=block)
    shape = (*x.shape[:-1], groups)
    return codes.reshape(x.shape), scale.reshape(shape), lo.reshape(shape)
