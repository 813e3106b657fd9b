"""Stages: what recipes are chained of - the options of one method each, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array

from jaxquant.calibrate.moments import Moments
from jaxquant.choice import Best as Best  # one of the stages
from jaxquant.errors import UsageError
from jaxquant.kinds import (
    Finish,
    Fold,
    Refinement,
    Rounding,
    Transform,
    register,
)
from jaxquant.methods import (
    Problem,
    Rounded,
    awq,
    better_columns,
    coordinate_descent,
    gptq,
    group_salience,
    layer_error,
    loss_descent,
    magr,
    osaq,
    qep,
    refit_grid,
    rtn,
    salience_swap,
    tune_scales,
    two_sided_descent,
)
from jaxquant.methods.gptq import Groups
from jaxquant.quant import Grid
from jaxquant.quant.mixed import grid_at, neighbors


@register("rtn")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RTN(Rounding):
    """Rounding to nearest; see `methods.rtn`."""

    def __call__(self, problem: Problem) -> Rounded:
        """See `methods.rtn.rtn`."""
        return rtn(problem.weight, problem.moments, problem.grid, group_bits=problem.group_bits)

    def __str__(self) -> str:
        return "RTN"


@register("keep")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep(Rounding):
    """The weight as it is, in 16 bits: for linears that are left alone, and for rotated float models."""

    def __call__(self, problem: Problem) -> Rounded:
        """Refuses: nothing is rounded, so there is nothing to return."""
        raise UsageError("keep rounds nothing; it only has a meaning in the recipe of a model")

    def __str__(self) -> str:
        return "weights in 16 bits"


@register("gptq")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ(Rounding):
    """Error feedback through the inverse Hessian; options as in `methods.gptq.gptq`."""

    act_order: bool = True
    groups: Groups = "static"
    percdamp: float = 0.01

    def __post_init__(self) -> None:
        if not self.percdamp > 0:
            raise UsageError(f"percdamp={self.percdamp} must be positive; 0.001 to 0.05 is usual")
        if self.groups not in ("static", "dynamic"):
            raise UsageError(f"unknown groups {self.groups!r}; use static or dynamic")

    def __call__(self, problem: Problem) -> Rounded:
        """See `methods.gptq.gptq`."""
        return gptq(
            problem.weight,
            problem.moments,
            problem.grid,
            act_order=self.act_order,
            groups=self.groups,
            percdamp=self.percdamp,
            group_bits=problem.group_bits,
        )

    def __str__(self) -> str:
        order = "act-order" if self.act_order else "no act-order"
        return f"GPTQ ({order}, {self.groups} groups, damping {self.percdamp:g})"


@register("magr")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MagR(Transform):
    """Smaller largest weights at equal output; options as in `methods.magr.magr`."""

    alpha: float | None = None
    iterations: int = 150

    def __post_init__(self) -> None:
        if not (self.alpha is None or self.alpha >= 0) or self.iterations < 0:
            raise UsageError(
                f"magr: alpha={self.alpha} and iterations={self.iterations} must not be negative"
            )

    def __call__(self, problem: Problem) -> Problem:
        """See `methods.magr.magr`."""
        return magr(problem, alpha=self.alpha, iterations=self.iterations)

    def __str__(self) -> str:
        alpha = "" if self.alpha is None else f"alpha {self.alpha:g}"
        steps = "" if self.iterations == 150 else f"{self.iterations} iterations"
        options = ", ".join(filter(None, (alpha, steps)))
        return f"MagR ({options})" if options else "MagR"


@register("osaq")
@dataclasses.dataclass(frozen=True, kw_only=True)
class OSAQ(Transform):
    """Outliers absorbed along flat directions; options as in `methods.osaq.osaq`, which has more."""

    form: str = "soft"
    eta: float = 1e3
    gamma: float = 1e-4
    tau: float = 0.2
    support: int | None = None

    def __post_init__(self) -> None:
        if self.form not in ("soft", "hard"):
            raise UsageError(f"unknown form {self.form!r}; use soft or hard")
        if not all(x > 0 for x in (self.eta, self.gamma, self.tau)) or (
            self.support is not None and self.support < 1
        ):
            raise UsageError(
                f"osaq: eta={self.eta}, gamma={self.gamma}, tau={self.tau} and support={self.support} "
                "must be positive"
            )

    def __call__(self, problem: Problem) -> Problem:
        """See `methods.osaq.osaq`."""
        options = {"eta": self.eta, "gamma": self.gamma, "tau": self.tau, "support": self.support}
        return osaq(problem, form=self.form, **options)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        strength = f"eta {self.eta:g}" if self.form == "soft" else f"gamma {self.gamma:g}"
        temperature = "" if self.tau == 0.2 else f", tau {self.tau:g}"
        support = "" if self.support is None else f", support {self.support}"
        return f"OSAQ ({self.form}, {strength}{temperature}{support})"


@register("qep")
@dataclasses.dataclass(frozen=True, kw_only=True)
class QEP(Transform):
    """Weights that make up for the errors of the layers before them; options as in `methods.qep.qep`."""

    alpha: float = 0.5
    percdamp: float = 0.01

    def __post_init__(self) -> None:
        if not (0 <= self.alpha <= 1 and self.percdamp > 0):
            raise UsageError(f"qep: alpha={self.alpha} must be 0 to 1, and percdamp={self.percdamp} positive")

    def __call__(self, problem: Problem) -> Problem:
        """See `methods.qep.qep`."""
        return qep(problem, alpha=self.alpha, percdamp=self.percdamp)

    def __str__(self) -> str:
        return f"QEP (alpha {self.alpha:g}, damping {self.percdamp:g})"


@register("group-bits")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupBits(Transform):
    """Bits by group of inputs, those of the grid on average; see `methods.tasa.salience_swap`.

    The trial roundings are to nearest. The grid must have groups, and be asymmetric.

    Attributes:
      shares: of the groups that lend a bit to as many others.
    """

    shares: tuple[float, ...] = (1 / 8, 1 / 4)

    def __post_init__(self) -> None:
        if not isinstance(self.shares, Iterable):
            raise UsageError(f"group-bits: shares={self.shares} is no tuple of shares; use (1 / 4,)")
        object.__setattr__(self, "shares", tuple(self.shares))  # files hold lists

    def __call__(self, problem: Problem) -> Problem:
        """`problem` with `group_bits`."""
        w, h = problem.in_order(None)
        grid = problem.grid
        groups = grid.groups(w.shape[0])
        rounded = {bits: grid_at(grid, bits).fake_quantize(w) for bits in neighbors(grid)}

        def error(group_bits: Array) -> Array:
            own = jnp.repeat(group_bits, w.shape[0] // groups)[:, None]
            values = jnp.zeros_like(w)
            for bits, trial in rounded.items():
                values = jnp.where(own == bits, trial, values)
            return layer_error(values, w, h)

        salience = group_salience(w, h, grid.group_size)
        return dataclasses.replace(
            problem, group_bits=salience_swap(salience, grid.bits, error, shares=self.shares)
        )

    def __str__(self) -> str:
        return f"bits by group (shares {', '.join(f'{share:g}' for share in self.shares)})"


@register("coordinate-descent")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordinateDescent(Refinement):
    """Integers moved one input at a time while the error falls; see `methods.coordinate`."""

    sweeps: int = 4

    def __post_init__(self) -> None:
        if self.sweeps < 0:
            raise UsageError(f"coordinate-descent: sweeps={self.sweeps} is negative; 2 to 4 suffice")

    def __call__(self, problem: Problem, rounded: Rounded) -> Rounded:
        """See `methods.coordinate.coordinate_descent`."""
        return coordinate_descent(problem, rounded, sweeps=self.sweeps)

    def __str__(self) -> str:
        return f"coordinate descent ({self.sweeps} sweeps)"


@register("refit")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Refit(Refinement):
    """Grids fitted anew and integers moved in turns; see `methods.refit` and `methods.coordinate`.

    Attributes:
      rounds: refits, each followed by `sweeps` of coordinate descent.
      sweeps: 2 suffice between refits.
      passes: rounds are repeated that often; between them GPTQ (act-order, damping `percdamp`) rounds
        `problem.weight` anew on the grids found so far, and every column goes on with the better of its two
        roundings. More than one pass needs static groups.
      integer_zero: keep integer zeros.
    """

    rounds: int = 3
    sweeps: int = 2
    passes: int = 2
    percdamp: float = 0.01
    integer_zero: bool = False

    def __post_init__(self) -> None:
        if min(self.rounds, self.sweeps) < 0 or self.passes < 1 or not self.percdamp > 0:
            raise UsageError(
                f"{self!r}: rounds and sweeps must be 0 or more, passes 1 or more, percdamp positive"
            )

    def __call__(self, problem: Problem, rounded: Rounded) -> Rounded:
        """The improved rounding."""
        best = rounded
        for number in range(self.passes):
            if number > 0:
                again = gptq(
                    problem.weight, problem.moments, problem.grid, percdamp=self.percdamp, fixed=best
                )
                rounded = dataclasses.replace(again, stats=best.stats)
            for _ in range(self.rounds):
                rounded = refit_grid(problem, rounded, integer_zero=self.integer_zero)
                rounded = coordinate_descent(problem, rounded, sweeps=self.sweeps)
            best = better_columns(problem, rounded, best)
        return best

    def __str__(self) -> str:
        zeros = ", integer zeros" if self.integer_zero else ""
        return f"refit ({self.passes} x {self.rounds} rounds, {self.sweeps} sweeps{zeros})"


@register("fine")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FINE(Refinement):
    """Integers that keep what the loss feels of a layer, or what gradients meet on their way back.

    Attributes:
      objective: `"loss"`, `methods.fine.loss_descent`; or `"backward"`, `methods.fine.two_sided_descent`.
      strength: price of that beside the forward error; `None` is 4 for the loss and .1 for the way back.
      sweeps: passes over a layer.
    """

    couples_columns: ClassVar[bool] = True

    objective: Literal["loss", "backward"] = "loss"
    strength: float | None = None
    sweeps: int = 3

    def __post_init__(self) -> None:
        if self.objective not in ("loss", "backward"):
            raise UsageError(f"unknown objective {self.objective!r}; use loss or backward")
        if not self._strength >= 0 or self.sweeps < 0:
            raise UsageError(f"{self!r}: strength and sweeps must not be negative; 3 sweeps are usual")

    @property
    def _strength(self) -> float:
        usual = 4.0 if self.objective == "loss" else 0.1
        return usual if self.strength is None else self.strength

    def __call__(self, problem: Problem, rounded: Rounded) -> Rounded:
        """See `methods.fine`."""
        if problem.outputs is None:
            raise UsageError("fine needs gradients: give Problem outputs, or use it in the recipe of a model")
        descend = loss_descent if self.objective == "loss" else two_sided_descent
        return descend(problem, rounded, problem.outputs, strength=self._strength, sweeps=self.sweeps)

    def __str__(self) -> str:
        return f"FINE ({self.objective}, strength {self._strength:g}, {self.sweeps} sweeps)"


@register("awq")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ(Fold):
    """Activation-aware scales folded into the previous operation; see `methods.awq.awq`.

    The objective `"block"` runs a few samples through the block; masks and token weights do not reach it.
    """

    steps: int = 20
    objective: Literal["linear", "block"] = "linear"

    def __post_init__(self) -> None:
        if self.objective not in ("linear", "block"):
            raise UsageError(f"unknown objective {self.objective!r}; use linear or block")
        if self.steps < 1:
            raise UsageError(f"awq: steps={self.steps} must be positive; the paper takes 20")

    def __call__(
        self, block_params: Mapping[str, Any], moments: Mapping[str, Moments], grid: Grid, **facts: Any
    ) -> tuple[dict[str, Any], dict[str, Moments]]:
        """See `methods.awq.awq`."""
        if self.objective == "linear":
            facts = {**facts, "apply": None, "inputs": None}
        return awq(block_params, moments, grid, steps=self.steps, **facts)

    def __str__(self) -> str:
        return "AWQ" if self.objective == "linear" else "AWQ (output of the block)"


@register("tune")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tune(Finish):
    """Scales of a block learned by gradient descent; options as in `methods.tune.tune_scales`."""

    weight: float = 0.1
    steps: int = 48
    learning_rate: float = 5e-3
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and self.learning_rate > 0) or self.steps < 0 or self.batch < 1:
            raise UsageError(
                f"{self!r}: weight and steps must not be negative, learning_rate and batch must be positive"
            )

    def __call__(self, block_params: Any, original: Any, inputs: Array, **facts: Any) -> Any:
        """See `methods.tune.tune_scales`."""
        return tune_scales(block_params, original, inputs, **facts, **dataclasses.asdict(self))[0]

    def __str__(self) -> str:
        return f"tuned scales (weight {self.weight:g}, {self.steps} steps of {self.learning_rate:g})"
