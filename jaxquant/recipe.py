"""`Recipe`: a named method with its grid and options - what is done to every linear of a model."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxtyping import Array, Float

from jaxquant.calibrate.moments import Moments
from jaxquant.errors import UsageError
from jaxquant.methods import Rounded, gptq, rtn
from jaxquant.quant import Grid

Method = Literal["rtn", "gptq"]
METHODS: tuple[str, ...] = ("rtn", "gptq")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One method on one grid; `recipe(weight, moments)` rounds one layer, under `jit` and `vmap` too.

    Attributes:
      method: `"rtn"` or `"gptq"`.
      grid: see `Grid`. The named recipes search the clip (`clip="mse"`).
      act_order, groups, percdamp: options of `gptq`.
      true_sequential: linears of a block are calibrated with the block's earlier linears already quantized.
    """

    method: Method = "gptq"
    grid: Grid
    act_order: bool = True
    groups: Literal["static", "dynamic"] = "static"
    percdamp: float = 0.01
    true_sequential: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown recipe {self.method!r}; use one of {', '.join(METHODS)}")
        if self.groups not in ("static", "dynamic"):
            raise UsageError(f"unknown groups {self.groups!r}; use static or dynamic")
        if not self.percdamp > 0:
            raise UsageError(f"percdamp={self.percdamp} must be positive; 0.001 to 0.05 is usual")

    def __call__(self, weight: Float[Array, "in out"], moments: Moments) -> Rounded:
        """The rounded layer; see `jaxquant.methods`."""
        if self.method == "rtn":
            return rtn(weight, moments, self.grid)
        return gptq(
            weight, moments, self.grid, act_order=self.act_order, groups=self.groups, percdamp=self.percdamp
        )

    def __str__(self) -> str:
        parts = [self.method.upper(), str(self.grid)]
        if self.method == "gptq":
            parts.append("act-order" if self.act_order else "no act-order")
            parts.append(f"{self.groups} groups")
            parts.append(f"damping {self.percdamp:g}")
        if self.true_sequential:
            parts.append("true-sequential")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` inverts it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote."""
        return cls(**{**fields, "grid": Grid(**fields["grid"])})
