"""`Problem`: what a method receives."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from jaxquant.calibrate.moments import Moments
from jaxquant.quant import Grid, working_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """One layer to be rounded; a pytree, so whole stacks of problems `vmap`.

    A *transform* is `Problem -> Problem`: it changes `weight`, or sets `group_bits`. A *rounding* is
    `Problem -> Rounded`. A *refinement* is `(Problem, Rounded) -> Rounded`. All judge errors against
    `target`.

    Attributes:
      weight: `[..., in, out]`, what the next stage works on.
      target: `[..., in, out]`, the original weight; no stage but `qep` touches it.
      moments: of the layer's inputs.
      grid: static; the grid of the result.
      outputs: `[..., out, out]`, second moment of the loss gradients at the outputs, for methods that weigh
        the way back; or `None`.
      group_bits: int32 `[..., groups]`, bits of each group, of those that `quant.mixed.neighbors` names; or
        `None`: all have `grid.bits`.
    """

    weight: Float[Array, "*stack in out"]
    target: Float[Array, "*stack in out"]
    moments: Moments
    grid: Grid = dataclasses.field(metadata={"static": True})
    outputs: Float[Array, "*stack out out"] | None = None
    group_bits: Int[Array, "*stack groups"] | None = None

    def in_order(
        self, order: Int[Array, " in"] | None
    ) -> tuple[Float[Array, "in out"], Float[Array, "in in"]]:
        """`target` and `moments.second` of one layer, inputs in `order` if there is one.

        In float32, or in float64 where either is.
        """
        dtype = working_dtype(self.target.dtype, self.moments.second.dtype)
        w, h = self.target.astype(dtype), self.moments.second.astype(dtype)
        return (w, h) if order is None else (w[order], h[order][:, order])

    @classmethod
    def of(
        cls,
        weight: Float[Array, "*stack in out"],
        moments: Moments,
        grid: Grid,
        *,
        outputs: Float[Array, "*stack out out"] | None = None,
    ) -> Problem:
        """The problem of an untouched layer."""
        return cls(weight=weight, target=weight, moments=moments, grid=grid, outputs=outputs)
