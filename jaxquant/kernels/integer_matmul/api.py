"""The choice of an implementation of the integer matmul."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt, UInt8

from jaxquant.errors import InputError
from jaxquant.kernels.integer_matmul import cpu, gpu, scan, tpu
from jaxquant.kernels.platform import Backend, by_platform
from jaxquant.quant.packing import check_packed

_integer_matmul = by_platform(
    scan.integer_matmul, {"cpu": [cpu.KERNEL], "tpu": [tpu.KERNEL], "cuda": [gpu.KERNEL]}, rows=3
)


def integer_matmul(
    x: UInt8[Array, "*rows in"],
    x_scale: Float[Array, "*rows x_groups"],
    x_lo: Float[Array, "*rows x_groups"],
    words: UInt[Array, "blocks words out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    *,
    x_bits: int,
    bits: int,
    block: int,
    backend: Backend | None = None,
) -> Float[Array, "*rows out"]:
    """`(x_lo + x_scale * x) @ (scale * (code - zero))` with products of integers (arXiv 2606.07116).

    Codes are multiplied as int8 and added up in int32, exactly; scales, offsets and zeros join in the dtype
    of `x_scale`, where the result is, float32 or float64. Derivatives of any order, in the scales, `x_lo` and
    `zero`, are those of the portable implementation.

    Args:
      x: codes of activations, 0 to `2^x_bits - 1`; leading axes are free.
      x_scale, x_lo: one of each per group of channels of a token.
      words: codes of weights packed by `quant.packing.pack`, `block` rows at a time.
      scale, zero: one row per group; the rows of a group are a whole number of blocks.
      x_bits, bits: 1 to 8.
      block: input rows in one packed block.
      backend: `"portable"` scans over blocks, everywhere; `"kernel"` is C++ on CPUs, Pallas on TPUs and on
        Hopper GPUs (which multiply in bfloat16 and add up in float32, exactly as well). `None`: as
        `kernels.use_backend` says, else the kernel, where the program is lowered for such a device and it
        takes these arrays.

    Raises:
      UsageError: an unknown backend, or `"kernel"` where there is none.
      InputError: x that is no uint8 of 1 to 8 bits, or shapes that do not agree.
    """
    if x.dtype != jnp.uint8 or not 1 <= x_bits <= 8:
        raise InputError(
            f"integer_matmul: x is {x.dtype}, x_bits={x_bits}; give codes of 1 to 8 bits as uint8, or floats "
            "to dequant_matmul"
        )
    check_packed(x, words, scale, zero, bits=bits, block=block)
    x_groups = x_scale.shape[-1] if x_scale.ndim == x.ndim else 0
    fits = x_groups > 0 and x.shape[-1] % x_groups == 0
    if not fits or x_scale.shape != (*x.shape[:-1], x_groups) or x_lo.shape != x_scale.shape:
        raise InputError(
            f"scales {x_scale.shape} and offsets {x_lo.shape} do not fit x {x.shape}: give both one for each "
            "group of channels of a token"
        )
    rows = [a.reshape(-1, a.shape[-1]) for a in (x, x_scale, x_lo)]
    y = _integer_matmul(*rows, words, scale, zero, backend=backend, x_bits=x_bits, bits=bits, block=block)
    return y.reshape(*x.shape[:-1], y.shape[-1])
