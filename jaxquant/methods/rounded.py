"""`Rounded`: what every rounding method returns."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxquant.linalg import product
from jaxquant.quant import Grid, MixedQArray, Packed, QArray
from jaxquant.quant.mixed import grid_at


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stats:
    """Diagnostics of one rounding, one number per matrix.

    Attributes:
      error: relative layer error `tr(D^T H D) / tr(W^T H W)`, `D = What - W`, against the original weight
        (behind `qep`, against what it made of it).
      damping: damping used, in units of `mean(diag H)`; 0 where the method needs none.
      attempts: factorizations tried; 0 where the method needs none.
      fallback: the factorization failed on every rung and the result is that of rounding to nearest.
      dead: inputs that were 0 on every calibration token.
      finite: the weight and the moments held neither NaN nor infinity.
      choices: int32 `[..., 1 + candidates]`, how many columns of a `Best` stage took none of its candidates,
        the first, and so on. `None`: no such stage.
    """

    error: Float[Array, "*stack"]
    damping: Float[Array, "*stack"]
    attempts: Int[Array, "*stack"]
    fallback: Bool[Array, "*stack"]
    dead: Int[Array, "*stack"]
    finite: Bool[Array, "*stack"]
    choices: Int[Array, "*stack options"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """Integers on a grid, unpacked, with diagnostics; a pytree, so roundings `vmap` over stacked layers.

    Attributes:
      codes: uint8 `[..., in, out]`; row k belongs to input `order[k]` (or k where `order` is `None`).
      scale, zero: `[..., groups, out]` as in `QArray`.
      order: int32 `[..., in]` or `None`.
      stats: see `Stats`.
      grid: static.
      group_bits: as in `Problem`.
    """

    codes: UInt[Array, "*stack in out"]
    scale: Float[Array, "*stack groups out"]
    zero: Float[Array, "*stack groups out"] | None
    order: Int[Array, "*stack in"] | None
    stats: Stats
    grid: Grid = dataclasses.field(metadata={"static": True})
    group_bits: Int[Array, "*stack groups"] | None = None

    def pack(self) -> Packed:
        """The packed weight; with `group_bits` of one matrix, and not under `jit`."""
        if self.group_bits is not None:
            widths = np.unique(np.asarray(self.group_bits))
            if len(widths) == 1:
                grid = grid_at(self.grid, int(widths[0]))
                return QArray.from_codes(self.codes, self.scale, self.zero, grid)
            return MixedQArray.from_codes(self.codes, self.scale, self.zero, self.grid, self.group_bits)
        return QArray.from_codes(self.codes, self.scale, self.zero, self.grid, order=self.order)

    def values(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*stack in out"]:
        """What `pack().dequantize(dtype)` gives."""
        values = self.grid.dequantize(self.codes, self.scale, self.zero, dtype)
        if self.order is None:
            return values
        return jnp.take_along_axis(values, jnp.argsort(self.order, axis=-1)[..., None], axis=-2)

    def bits_of(self, group: Int[Array, ""]) -> Int[Array, " one"] | None:
        """`group_bits` of one group."""
        return None if self.group_bits is None else self.group_bits[group][None]


def layer_error(
    rounded: Float[Array, "*stack in out"],
    weight: Float[Array, "*stack in out"],
    second: Float[Array, "*stack in in"],
) -> Float[Array, "*stack"]:
    """`tr(D^T H D) / tr(W^T H W)` with `D = rounded - weight`: the share of output energy that is lost.

    `second` is H or any positive multiple of it. 0 where the inputs or the weight were all 0, NaN for NaN.
    """

    return relative_energy(output_energy(rounded - weight, second), output_energy(weight, second))


def output_energy(a: Float[Array, "*stack in out"], second: Float[Array, "*stack in in"]) -> Array:
    """`tr(A^T H A)`."""
    return jnp.sum(column_energies(a, second), axis=-1)


def column_energies(
    a: Float[Array, "*stack in out"], second: Float[Array, "*stack in in"]
) -> Float[Array, "*stack out"]:
    """`a_i^T H a_i` of every column."""
    return jnp.sum(a * product(second, a), axis=-2)


def relative_energy(part: Array, total: Array) -> Array:
    """`part / total`; 0 where `total` is."""
    return jnp.where(total == 0, 0, part / jnp.where(total == 0, 1, total))
