"""The choice of an implementation of the dequantizing matmul."""

from __future__ import annotations

from jaxtyping import Array, Float, UInt

from jaxquant.kernels.dequant_matmul import scan


def dequant_matmul(
    x: Float[Array, "*rows in"],
    words: UInt[Array, "blocks words out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    *,
    bits: int,
    block: int,
) -> Float[Array, "*rows out"]:
    """`x @ (scale * (code - zero))` in the dtype of `x`, without materializing the dequantized weight.

    Tiles of the weight are dequantized in float32, rounded to the dtype of `x`, multiplied, summed in float32
    (float64 for float64 `x`).

    Args:
      x: activations; leading axes are free.
      words: codes packed by `quant.packing.pack`, `block` rows at a time.
      scale, zero: one row per group; the rows of a group are a whole number of blocks.
      bits: 1 to 8.
      block: input rows in one packed block.
    """
    y = scan.dequant_matmul(x.reshape(-1, x.shape[-1]), words, scale, zero, bits=bits, block=block)
    return y.reshape(*x.shape[:-1], y.shape[-1])
