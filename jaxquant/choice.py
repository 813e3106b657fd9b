"""`Best`: for every output the one among several transforms, or none, that rounds with the least error."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxquant.errors import UsageError
from jaxquant.kinds import Stage, Transform, register, required, stage_from_dict
from jaxquant.methods import Problem, Rounded
from jaxquant.methods.rounded import column_energies, relative_energy

# With so many outputs to an input, and weights, tries take turns: most of the memory goes to columns there.
_WIDE, _LARGE = 2, 2**18


@register("best")
@dataclasses.dataclass(frozen=True)
class Best(Stage):
    """The transform among `candidates`, or none, that leaves the least error, column by column.

    The weight and what the candidates make of it go through the rest of the chain side by side, as one layer
    (in turn, where a large layer has twice as many outputs as inputs, to the same end in less memory), and of
    every column the rounding with the least `d^T H d` is kept, `d` its distance from `problem.target` and `H`
    the second moment. So no column is worse than without candidates on the tokens of the moments, and no
    layer, but for what float32 makes of the errors. What follows must treat columns independently, as all
    roundings here do; refinements that say that they couple columns come after the choice. The rounding takes
    the time of `1 + len(candidates)` layers, side by side with one factorization.

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

        tries, columns = len(weights), target.shape[1]
        moments = problem.moments
        moments = dataclasses.replace(moments, second=_after(weights[-1], moments.second))

        def attempt(weight: Array) -> tuple[Rounded, Array]:
            """The rest of the chain for one try, or for several as one layer; errors of columns."""
            beside = weight.shape[1] // columns
            rounded = then(
                dataclasses.replace(
                    problem,
                    weight=weight,
                    moments=moments,
                    target=jnp.tile(problem.target, (1, beside)),
                    outputs=None,
                )
            )
            return rounded, column_energies(rounded.values(target.dtype) - jnp.tile(target, (1, beside)), h)

        if columns >= _WIDE * target.shape[0] and target.size >= _LARGE:
            stacked, errors = jax.lax.map(attempt, jnp.stack(weights))
            together = jax.tree.map(lambda a: a[0], stacked)  # what is not of columns is the same for all
            finite = jnp.all(stacked.stats.finite)
            by_try = list
        else:
            stacked, errors = attempt(jnp.concatenate(weights, axis=1))
            errors = errors.reshape(tries, -1)
            together, finite = stacked, stacked.stats.finite
            by_try = functools.partial(jnp.split, indices_or_sections=tries, axis=1)
        # A candidate may overflow; what is wrong without any has to show.
        own = jnp.arange(tries)[:, None] == 0
        errors = jnp.where(own | jnp.isfinite(errors), errors, jnp.inf)
        choice = jnp.argmin(errors, axis=0)

        def chosen(options: Iterable[Array]) -> Array:
            own, *others = options
            for number, other in enumerate(others, start=1):
                own = jnp.where(choice == number, other, own)
            return own

        stats = dataclasses.replace(
            together.stats,
            error=relative_energy(jnp.sum(jnp.min(errors, axis=0)), jnp.sum(column_energies(target, h))),
            finite=finite & jnp.all(jnp.isfinite(target)),
            choices=jnp.sum(choice[None] == jnp.arange(tries)[:, None], axis=1, dtype=jnp.int32),
        )
        rounded = dataclasses.replace(
            together,
            codes=chosen(by_try(stacked.codes)),
            scale=chosen(by_try(stacked.scale)),
            zero=None if stacked.zero is None else chosen(by_try(stacked.zero)),
            stats=stats,
        )
        return dataclasses.replace(problem, weight=chosen(weights)), rounded

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
