"""Recipes by name: the baselines, the methods, and their combinations as they are usually compared."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from jaxquant.errors import UsageError
from jaxquant.kinds import Stage
from jaxquant.models.config import Precision
from jaxquant.quant import ActivationGrid, Grid
from jaxquant.recipe import Recipe, chain, masked
from jaxquant.stages import (
    AWQ,
    FINE,
    GPTQ,
    OSAQ,
    QEP,
    RTN,
    Best,
    CoordinateDescent,
    GroupBits,
    Keep,
    MagR,
    Refit,
    Tune,
)
from jaxquant.surgery import OffQ, QuaRot, SpinQuant


def _osaq(bits: int) -> Best:
    """Finer grids err less, so output energy costs more; below 1000 other texts see the step."""
    eta = {1: 100.0, 2: 1e3, 3: 1e3}.get(bits, 3e3)
    return Best((OSAQ(eta=eta),))


def _fine() -> Stage:
    """Where gradients have few directions, so that their moments are known well: at queries and keys."""
    return masked(FINE(), r"attn\.[qk]$")


#: How the names of recipes that quantize activations and caches are made.
ROTATED = "{rtn,quarot,spinquant,offq}-wXaYkvZ"
# Share of the range of activations that is kept, for all recipes alike.
_CLIP = 0.95

#: Named recipes: their stages, given the GPTQ stage and the bits.
NAMES: dict[str, Callable[[GPTQ, int], tuple[Stage, ...]]] = {
    "rtn": lambda gptq, bits: (RTN(),),
    "gptq": lambda gptq, bits: (gptq,),
    "gptq-refit": lambda gptq, bits: (gptq, Refit()),
    "gptq-cd": lambda gptq, bits: (gptq, CoordinateDescent()),
    "gptq-fine": lambda gptq, bits: (gptq, CoordinateDescent(), _fine()),
    "gptq-tune": lambda gptq, bits: (gptq, CoordinateDescent(), Tune()),
    "qep-gptq": lambda gptq, bits: (QEP(), gptq),
    "awq-rtn": lambda gptq, bits: (AWQ(), RTN()),
    "awq-gptq": lambda gptq, bits: (AWQ(), gptq),
    "group-bits-gptq": lambda gptq, bits: (GroupBits(), gptq),
    "magr-rtn": lambda gptq, bits: (MagR(), RTN()),
    "magr-gptq": lambda gptq, bits: (MagR(), gptq),
    "osaq-rtn": lambda gptq, bits: (_osaq(bits), RTN()),
    "osaq-gptq": lambda gptq, bits: (_osaq(bits), gptq),
    "osaq-gptq-fine": lambda gptq, bits: (_osaq(bits), gptq, CoordinateDescent(), _fine()),
    "osaq-dagger": lambda gptq, bits: (_osaq(bits), gptq, CoordinateDescent()),
    "osaq-refit": lambda gptq, bits: (_osaq(bits), gptq, Refit()),
    "osaq-awq": lambda gptq, bits: (AWQ(), _osaq(bits), RTN()),
}


def named(name: str, grid: Grid, *, gptq: GPTQ | None = None, true_sequential: bool = False) -> Recipe:
    """The recipe of that name on `grid`; `gptq` replaces its GPTQ stage where it has one.

    Names such as `offq-w4a4kv4` state the bits of weights, activations and cache themselves (16: as they
    are); the grid's group size is that of the activations too.

    Raises:
      UsageError: there is no such name.
    """
    if (rotated := _rotated(name, grid, gptq or GPTQ())) is not None:
        stages, grid, precision = rotated
        return chain(*stages, grid=grid, precision=precision, true_sequential=true_sequential)
    if name not in NAMES:
        raise UsageError(
            f"unknown recipe {name!r}; use one of {', '.join(NAMES)}, {ROTATED}, or a .toml file"
        )
    return chain(*NAMES[name](gptq or GPTQ(), grid.bits), grid=grid, true_sequential=true_sequential)


def _rotated(name: str, grid: Grid, gptq: GPTQ) -> tuple[tuple[Stage, ...], Grid, Precision] | None:
    """Stages, grid and precision of a name such as `offq-w4a4kv4`; `None` for other names."""
    found = re.fullmatch(r"(rtn|quarot|spinquant|offq)-w(\d+)a(\d+)kv(\d+)", name)
    if found is None:
        return None
    weight, activation, cache = (int(bits) for bits in found.groups()[1:])
    for what, least, bits in (("w", 1, weight), ("a", 2, activation), ("kv", 2, cache)):
        if not (least <= bits <= 8 or bits == 16):
            raise UsageError(
                f"{name}: {what}{bits} is out of range; use {what}{least} to {what}8, or {what}16 for none"
            )
    rounding = Keep() if weight == 16 else RTN() if found[1] == "rtn" else gptq
    stages: tuple[Stage, ...]
    if found[1] == "rtn":
        stages = (rounding,)
    elif found[1] == "quarot":
        stages = (QuaRot(), rounding)
    elif found[1] == "spinquant":
        stages = (SpinQuant(), rounding)
    elif grid.group_size is None:
        raise UsageError(f"{name} needs groups: give a group_size that divides the channels")
    else:
        stages = (OffQ(group_size=grid.group_size), rounding)
    tokens = (
        ActivationGrid(bits=activation, group_size=grid.group_size, clip=_CLIP) if activation < 16 else None
    )
    heads = ActivationGrid(bits=cache, clip=_CLIP, scale_dtype="float16") if cache < 16 else None
    grid = grid if weight == 16 else dataclasses.replace(grid, bits=weight)
    return stages, grid, Precision.uniform(tokens, heads)
