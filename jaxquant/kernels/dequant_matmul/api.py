"""The choice of an implementation of the dequantizing matmul."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt

from jaxquant.errors import InputError
from jaxquant.kernels.dequant_matmul import cpu, gpu, scan, tpu
from jaxquant.kernels.platform import Backend, by_platform
from jaxquant.quant.packing import check_packed

_dequant_matmul = by_platform(
    scan.dequant_matmul,
    {"cpu": [cpu.KERNEL], "tpu": [tpu.KERNEL], "cuda": [gpu.HOPPER, gpu.BLACKWELL]},
    rows=1,
)
_paired_matmul = by_platform(scan.paired_matmul, {"tpu": [tpu.PAIRED]}, rows=1)


def dequant_matmul(
    x: Float[Array, "*rows in"],
    words: UInt[Array, "blocks words out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    *,
    bits: int,
    block: int,
    backend: Backend | None = None,
) -> Float[Array, "*rows out"]:
    """`x @ (scale * (code - zero))` in the dtype of `x`; no more than a tile of the weight is dequantized.

    Tiles (512 inputs; of the kernel for CPUs a million weights, none up to 64 rows of x) are dequantized in
    float32, rounded to the dtype of `x`, multiplied, summed in float32 (float64 for float64 `x`). The kernel
    for CPUs rounds nothing but the result. Derivatives of any order, in `x`, `scale` and `zero`, are those of
    the portable implementation.

    Args:
      x: activations; leading axes are free.
      words: codes packed by `quant.packing.pack`, `block` rows at a time.
      scale, zero: one row per group; the rows of a group are a whole number of blocks.
      bits: 1 to 8.
      block: input rows in one packed block.
      backend: `"portable"` scans over tiles, everywhere; `"kernel"` is C++ on CPUs, Pallas on TPUs and, for
        bfloat16 and float16 `x`, on GPUs of the generations Hopper and Blackwell. `None`: as
        `kernels.use_backend` says, else the kernel, where the program is lowered for such a device and it
        takes these arrays. `JAXQUANT_NATIVE=0` leaves C++ out of programs that are compiled from then on.

    Raises:
      UsageError: an unknown backend, or `"kernel"` where there is none.
      InputError: x that is no floats, or shapes that do not agree.
    """
    _check(x, words, scale, zero, bits=bits, block=block)
    rows = x.reshape(-1, x.shape[-1])
    y = _dequant_matmul(rows, words, scale, zero, backend=backend, bits=bits, block=block)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def paired_matmul(
    x: Float[Array, "*rows in"],
    words: UInt[Array, "blocks words out"],
    pairs: UInt[Array, "groups 1 out"],
    *,
    bits: int,
    block: int,
    backend: Backend | None = None,
) -> Float[Array, "*rows out"]:
    """`dequant_matmul` with scales and zeros as `quant.packing.pair` packs them, for TPUs.

    Elsewhere the portable implementation runs. It is differentiable in `x`. Arguments and errors are those of
    `dequant_matmul`.
    """
    if pairs.ndim != 3 or pairs.shape[1] != 1 or pairs.dtype != jnp.uint32:
        raise InputError(
            f"pairs of {pairs.shape} and {pairs.dtype} are none: make them with jaxquant.quant.packing.pair, "
            "uint32 of (groups, 1, outputs)"
        )
    scale = jax.ShapeDtypeStruct((pairs.shape[0], pairs.shape[2]), jnp.float16)
    _check(x, words, scale, scale, bits=bits, block=block)
    rows = x.reshape(-1, x.shape[-1])
    y = _paired_matmul(rows, words, pairs, backend=backend, bits=bits, block=block)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _check(x: Array, *packed: Any, bits: int, block: int) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        # The weight would be rounded to integers.
        raise InputError(
            f"dequant_matmul: x is {x.dtype}; convert it to a float dtype, or give codes to integer_matmul"
        )
    check_packed(x, *packed, bits=bits, block=block)
