"""`PackedHeads`: keys or values of attention, packed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxquant.quant.activation import ActivationGrid
from jaxquant.quant.packing import pack, unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedHeads:
    """Keys or values as packed integers, each head of a token on its own grid.

    Attributes:
      words: codes along `head_dim`, packed as `quant.packing` packs rows.
      scale, lo: in `grid.scale_dtype`; values are `lo + scale * code`. No `lo` where the grid is symmetric.
    """

    words: UInt8[Array, "*stack batch places heads words"]
    scale: Float[Array, "*stack batch places heads groups"]
    lo: Float[Array, "*stack batch places heads groups"] | None
    grid: ActivationGrid = dataclasses.field(metadata={"static": True})
    head_dim: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, heads: Float[Array, "*stack batch places heads n"], grid: ActivationGrid) -> PackedHeads:
        """`heads` quantized on `grid`."""
        scale, lo = grid.fit(heads)
        words = pack(grid.quantize(heads, scale, lo)[..., None], grid.bits)[..., 0]
        lo = None if grid.symmetric else lo.astype(grid.scale_dtype)
        scale = scale.astype(grid.scale_dtype)
        return cls(words=words, scale=scale, lo=lo, grid=grid, head_dim=heads.shape[-1])

    def dequantize(self, dtype: Any) -> Float[Array, "*stack batch places heads n"]:
        """The values, bit for bit those of `grid.fake_quantize` in `dtype`, float32 or narrower."""
        codes = unpack(self.words[..., None], self.grid.bits, self.head_dim)[..., 0]
        scale = self.scale.astype(jnp.float32)
        lo = self.grid.symmetric_lo(scale) if self.lo is None else self.lo.astype(jnp.float32)
        return self.grid.dequantize(codes, scale, lo, dtype)
