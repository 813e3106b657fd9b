"""The choice of an implementation of the dequantizing matmul."""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Array, Float, UInt

from jaxquant.errors import UsageError
from jaxquant.kernels.dequant_matmul import cpu, reference, scan

#: An implementation; see `dequant_matmul`.
Backend = Literal["reference", "scan", "ffi"]


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
    """`x @ (scale * (code - zero))` in the dtype of `x`, without materializing the dequantized weight.

    Tiles of the weight are dequantized in float32, rounded to the dtype of `x`, multiplied, summed in float32
    (float64 for float64 `x`). The kernel for CPUs rounds nothing but the result.

    Args:
      x: activations; leading axes are free.
      words: codes packed by `quant.packing.pack`, `block` rows at a time.
      scale, zero: one row per group; the rows of a group are a whole number of blocks.
      bits: 1 to 8.
      block: input rows in one packed block.
      backend: `"scan"` is portable and dequantizes tiles; `"ffi"` is the kernel for CPUs, instead of which
        other platforms get `"scan"`; `"reference"` dequantizes the whole weight. `None`: `"ffi"` for at most
        256 rows of dtypes that it takes, where a C++ compiler is at hand and `JAXQUANT_NATIVE` is not 0; else
        `"scan"`, which is what `jax.export` needs, too.

    Raises:
      UsageError: unknown backend, or `"ffi"` where it cannot be used.
    """
    rows = x.reshape(-1, x.shape[-1])
    if backend is None:
        few = rows.shape[0] <= cpu.LARGEST_ROWS
        backend = "ffi" if few and cpu.takes(rows, words, scale, zero) else "scan"
    elif backend not in get_args(Backend):
        raise UsageError(f"unknown backend {backend!r}; use one of {', '.join(get_args(Backend))}")
    elif backend == "ffi" and not cpu.takes(rows, words, scale, zero):
        raise UsageError(
            f"backend='ffi' does not multiply {rows.dtype} by {words.dtype} words with {scale.dtype} scales "
            f"and {zero.dtype} zeros; use backend='scan'"
        )
    elif backend == "ffi" and not cpu.available():
        raise UsageError(
            "backend='ffi' has no kernel: it needs a C++ compiler (set CXX) and a cache folder that can be "
            "written (JAXQUANT_CACHE), and JAXQUANT_NATIVE must not be 0; use backend='scan'"
        )
    implementation = {"reference": reference, "scan": scan, "ffi": cpu}[backend].dequant_matmul
    y = implementation(rows, words, scale, zero, bits=bits, block=block)
    return y.reshape(*x.shape[:-1], y.shape[-1])
