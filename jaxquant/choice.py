"""`Best`: for every output the one among several transforms, or none, that rounds with the least error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxquant.errors import UsageError
from jaxquant.kinds import Stage, Transform, register, required, stage_from_dict
from jaxquant.methods import Problem, Rounded
from jaxquant.methods.rounded import column_energies, relative_energy


@register("best")
@dataclasses.dataclass(frozen=True)
class Best(Stage):
    """The transform among `candidates`, or none, that leaves the least error, column by column.

    The weight and what the candidates make of it go through the rest of the chain side by side, as one layer,
    and of every column the rounding with the least `d^T H d` is kept, `d` its distance from `problem.target`
    and `H = problem.moments.second`. So no column is worse than without candidates on the tokens of the
    moments, and no layer, but for what float32 makes of the errors. What follows must treat columns
    independently, as all roundings here do; refinements that say that they couple columns come after the
    choice. Time and memory of the rounding are those of `1 + len(candidates)` layers with one factorization.

    Attributes:
      candidates: transforms of the weight alone, which print differently; none of them is always tried, too.
    """

    candidates: tuple[Transform, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.candidates, Iterable):
            raise UsageError(f"best: the candidates are {self.candidates}; give a tuple of transforms")
        object.__setattr__(self, "candidates", tuple(self.candidates))
        for candidate in self.candidates:
            if not isinstance(candidate, Transform):
                raise UsageError(f"best: {candidate} is no change of the weight; give OSAQ, MagR or your own")
        if len(set(map(str, self.candidates))) < len(self.candidates):
            raise UsageError(f"{self}: candidates need different names, which the log has; give each its own")

    def round(self, problem: Problem, then: Callable[[Problem], Rounded]) -> tuple[Problem, Rounded]:
        """`problem` with the chosen weight, and its rounding; `then` is the rest of the chain."""
        target, h = problem.in_order(None)
        problem = dataclasses.replace(problem, weight=problem.weight.astype(target.dtype))
        weights = [problem.weight]
        for candidate in self.candidates:
            weight = candidate(problem).weight.astype(target.dtype)
            # A column that is not finite would have the whole layer refused.
            finite = jnp.all(jnp.isfinite(weight), axis=0, keepdims=True)
            weights.append(jnp.where(finite, weight, problem.weight))

        tries = len(weights)
        moments = problem.moments
        moments = dataclasses.replace(moments, second=_after(weights[-1], moments.second))
        together = then(
            dataclasses.replace(
                problem,
                weight=jnp.concatenate(weights, axis=1),
                moments=moments,
                target=jnp.tile(problem.target, (1, tries)),
                outputs=None,
            )
        )
        errors = column_energies(together.values(target.dtype) - jnp.tile(target, (1, tries)), h)
        errors = errors.reshape(tries, -1)
        # A candidate may overflow; what is wrong without any has to show.
        own = jnp.arange(tries)[:, None] == 0
        errors = jnp.where(own | jnp.isfinite(errors), errors, jnp.inf)
        choice = jnp.argmin(errors, axis=0)

        def chosen(a: Array) -> Array:
            own, *others = jnp.split(a, tries, axis=1)
            for number, other in enumerate(others, start=1):
                own = jnp.where(choice == number, other, own)
            return own

        stats = dataclasses.replace(
            together.stats,
            error=relative_energy(jnp.sum(jnp.min(errors, axis=0)), jnp.sum(column_energies(target, h))),
            finite=together.stats.finite & jnp.all(jnp.isfinite(target)),
            choices=jnp.sum(choice[None] == jnp.arange(tries)[:, None], axis=1, dtype=jnp.int32),
        )
        rounded = dataclasses.replace(
            together,
            codes=chosen(together.codes),
            scale=chosen(together.scale),
            zero=None if together.zero is None else chosen(together.zero),
            stats=stats,
        )
        return dataclasses.replace(problem, weight=chosen(jnp.concatenate(weights, axis=1))), rounded

    def to_dict(self) -> dict[str, Any]:
        """See `Stage`."""
        return {**super().to_dict(), "candidates": [candidate.to_dict() for candidate in self.candidates]}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Stage:
        """See `Stage`."""
        candidates = tuple(map(stage_from_dict, required(options, "candidates", cls.name)))
        return super().from_options({**options, "candidates": candidates})

    def __str__(self) -> str:
        return f"by column the best of (off, {', '.join(map(str, self.candidates))})"


def _after(first: Array, a: Array) -> Array:
    """`a`, for computations that must not begin before `first` is there.

    XLA would hold the factorizations of candidates and rounding at once, and drops barriers on CPUs.
    """
    one = first[0, 0].astype(a.dtype)
    return a + 0 * jnp.where(jnp.isfinite(one), one, 0)
