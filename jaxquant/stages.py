"""Stages: what recipes are chained of - the options of one method each, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxquant.calibrate.moments import Moments, merge
from jaxquant.errors import UsageError
from jaxquant.kinds import (
    Finish,
    Fold,
    Refinement,
    Rounding,
    Stage,
    Transform,
    register,
    required,
    stage_from_dict,
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
    refit_grid,
    rtn,
    salience_swap,
    tune_scales,
    two_sided_descent,
)
from jaxquant.methods.gptq import Groups
from jaxquant.quant import Grid, working_dtype
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

    def __call__(self, problem: Problem) -> Problem:
        """See `methods.magr.magr`."""
        return magr(problem, alpha=self.alpha, iterations=self.iterations)

    def __str__(self) -> str:
        return "MagR" if self.alpha is None else f"MagR (alpha {self.alpha:g})"


@register("osaq")
@dataclasses.dataclass(frozen=True, kw_only=True)
class OSAQ(Transform):
    """Outliers absorbed along flat directions; options as in `methods.osaq.osaq`."""

    form: str = "soft"
    eta: float = 1e3
    gamma: float = 1e-4
    tau: float = 0.2
    support: int | None = None

    def __call__(self, problem: Problem) -> Problem:
        """See `methods.osaq.osaq`."""
        options = {"eta": self.eta, "gamma": self.gamma, "tau": self.tau, "support": self.support}
        return osaq(problem, form=self.form, **options)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        strength = f"eta {self.eta:g}" if self.form == "soft" else f"gamma {self.gamma:g}"
        temperature = "" if self.tau == 0.2 else f", tau {self.tau:g}"
        support = "" if self.support is None else f", support {self.support}"
        return f"OSAQ ({self.form}, {strength}{temperature}{support})"


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


@register("best")
@dataclasses.dataclass(frozen=True)
class Best(Stage):
    """The transform among `candidates`, or none, that leaves the least error after rounding.

    The results are tried on `columns` columns of the layer with the rest of the chain, and judged against
    `problem.target` on the held-out tokens where there are some: an error on the tokens that the transform
    and the rounding saw over-fits. The rest of the chain then rounds the winner with all tokens. What follows
    must round columns independently, as all stages here do but a second `Best`; refinements that say that
    they couple columns are left out of the trial.

    Attributes:
      candidates: transforms; none of them is always tried, too.
      columns: how many are tried.
      sample: which. `"spread"`: at equal distances. `"loudest"`: those that put out most by the diagonal of
        the second moment, `sum_j H_jj w_jc^2`, which hardly ever leaves a layer with a larger error than
        without the stage; where a few columns make most of the output, equal distances may miss them.
        Perplexity at 2 bits does not tell which is better (`experiments/osaq`).
    """

    candidates: tuple[Transform, ...]
    columns: int = 64
    sample: Literal["spread", "loudest"] = "spread"

    def __post_init__(self) -> None:
        if self.sample not in ("spread", "loudest"):
            raise UsageError(f"unknown sample {self.sample!r}; use spread or loudest")
        if self.columns < 1:
            raise UsageError(f"best: columns={self.columns} must be positive; 64 to 128 is usual")

    def choose(self, problem: Problem, then: Callable[[Problem], Rounded]) -> tuple[Problem, Int[Array, ""]]:
        """The transformed problem and which candidate it took (0: none); `then` is the rest of the chain."""
        # Some transforms answer a half-precision weight in float32.
        dtype = working_dtype(problem.weight.dtype, problem.moments.second.dtype)
        judge = problem.moments if problem.held_out is None else problem.held_out
        problem = dataclasses.replace(problem, weight=problem.weight.astype(dtype), held_out=None)
        weights = [problem.weight, *(option(problem).weight.astype(dtype) for option in self.candidates)]
        target, width = problem.target.astype(dtype), problem.target.shape[1]
        if self.sample == "spread":
            tried = jnp.arange(0, width, max(1, width // self.columns))[: self.columns]
        else:
            put_out = jnp.sum(jnp.diagonal(judge.second).astype(dtype)[:, None] * jnp.square(target), axis=0)
            tried = jax.lax.top_k(put_out, min(self.columns, width))[1]
        target = target[:, tried]
        # Columns are rounded independently, so all candidates are rounded as one layer, side by side.
        trial = dataclasses.replace(
            problem,
            outputs=None,
            weight=jnp.concatenate([weight[:, tried] for weight in weights], axis=1),
            target=jnp.tile(target, (1, len(weights))),
        )
        values = jnp.split(then(trial).values(dtype), len(weights), axis=1)
        errors = jnp.stack([layer_error(part, target, judge.second.astype(dtype)) for part in values])
        # NaN would count as the least.
        choice = jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors))
        moments = problem.moments if judge is problem.moments else merge(problem.moments, judge)
        weight = weights[0]
        for number, other in enumerate(weights[1:], start=1):
            weight = jnp.where(choice == number, other, weight)
        return dataclasses.replace(problem, weight=weight, moments=moments), choice

    def to_dict(self) -> dict[str, Any]:
        """See `Stage`."""
        candidates = [candidate.to_dict() for candidate in self.candidates]
        sample = {} if self.sample == "spread" else {"sample": self.sample}
        return {"stage": self.name, "columns": self.columns, **sample, "candidates": candidates}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Stage:
        """See `Stage`."""
        candidates = tuple(map(stage_from_dict, required(options, "candidates", cls.name)))
        return super().from_options({**options, "candidates": candidates})

    def __str__(self) -> str:
        by = "" if self.sample == "spread" else " by the loudest columns"
        return f"best{by} of (off, {', '.join(map(str, self.candidates))})"


@register("coordinate-descent")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordinateDescent(Refinement):
    """Integers moved one input at a time while the error falls; see `methods.coordinate`."""

    sweeps: int = 4

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
