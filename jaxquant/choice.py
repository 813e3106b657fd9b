"""`Best`: the one among several transforms, or none, that a trial of the rest of the chain speaks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxquant.calibrate.moments import merge
from jaxquant.errors import UsageError
from jaxquant.kinds import Stage, Transform, register, required, stage_from_dict
from jaxquant.methods import Problem, Rounded, layer_error
from jaxquant.quant import working_dtype


@register("best")
@dataclasses.dataclass(frozen=True)
class Best(Stage):
    """The transform among `candidates`, or none, that leaves the least error after rounding.

    The results are tried on `columns` columns of the layer with the rest of the chain, and judged against
    `problem.target` on the held-out tokens where there are some: an error on the tokens that the transform
    and the rounding saw over-fits. The rest of the chain then rounds the winner with all tokens; inputs that
    were 0 on those that the transform saw keep their weights. What follows must round columns independently;
    refinements that say that they couple columns are left out of the trial.

    With columns in the order of what they put out, `sum_j H_jj w_jc^2`, the first `loudest` are tried and the
    others at equal distances, each for all of its share: an estimate of the error of the whole layer. Where
    activations are massive a few columns make most of it, and a plain sample misses them. If all tried are
    the loudest, the choice goes by these alone: it takes fewer steps, and hardly ever a wrong one
    (`experiments/osaq/linears.py`).

    Attributes:
      candidates: transforms; none of them is always tried, too.
      columns: how many are tried.
      loudest: how many of these are the loudest; `None` is half of them.
    """

    candidates: tuple[Transform, ...]
    columns: int = 64
    loudest: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(self.candidates))
        for candidate in self.candidates:
            if not isinstance(candidate, Transform):
                raise UsageError(f"best: {candidate} is no change of the weight; give OSAQ, MagR or your own")
        if self.columns < 1:
            raise UsageError(f"best: columns={self.columns} must be positive; 64 to 128 is usual")
        if self.loudest is not None and not 0 <= self.loudest <= self.columns:
            raise UsageError(
                f"best: loudest={self.loudest} of columns={self.columns} must be 0 or more of them"
            )

    def choose(self, problem: Problem, then: Callable[[Problem], Rounded]) -> tuple[Problem, Int[Array, ""]]:
        """The transformed problem and which candidate it took (0: none); `then` is the rest of the chain."""
        # Some transforms answer a half-precision weight in float32.
        dtype = working_dtype(problem.weight.dtype, problem.moments.second.dtype)
        judge = problem.moments if problem.held_out is None else problem.held_out
        problem = dataclasses.replace(problem, weight=problem.weight.astype(dtype), held_out=None)
        weights = [problem.weight, *(option(problem).weight.astype(dtype) for option in self.candidates)]
        target = problem.target.astype(dtype)
        tried, stands_for = self.sample(target, jnp.diagonal(judge.second).astype(dtype))
        target = target[:, tried]
        # Columns are rounded independently, so all candidates are rounded as one layer, side by side.
        trial = dataclasses.replace(
            problem,
            outputs=None,
            weight=jnp.concatenate([weight[:, tried] for weight in weights], axis=1),
            target=jnp.tile(target, (1, len(weights))),
        )
        values = jnp.split(then(trial).values(dtype), len(weights), axis=1)
        root = jnp.sqrt(stands_for)[None, :]
        h = judge.second.astype(dtype)
        errors = jnp.stack([layer_error(part * root, target * root, h) for part in values])
        # NaN would count as the least.
        choice = jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors))
        moments = problem.moments if judge is problem.moments else merge(problem.moments, judge)
        weight = weights[0]
        for number, other in enumerate(weights[1:], start=1):
            weight = jnp.where(choice == number, other, weight)
        # Transforms are free to drop inputs that they saw at 0, and the judge's tokens may need them.
        seen = jnp.diagonal(problem.moments.second) > 0
        weight = jnp.where(seen[:, None], weight, weights[0])
        return dataclasses.replace(problem, weight=weight, moments=moments), choice

    def sample(
        self, target: Float[Array, "in out"], energies: Float[Array, " in"]
    ) -> tuple[Int[Array, " columns"], Float[Array, " columns"]]:
        """The columns that are tried, and how many each stands for; `energies`: mean squares of inputs."""
        width = target.shape[1]
        if width <= self.columns:
            return jnp.arange(width), jnp.ones(width, target.dtype)
        ranked = jnp.argsort(-jnp.sum(energies[:, None] * jnp.square(target), axis=0))
        loudest = self.columns // 2 if self.loudest is None else self.loudest
        others = self.columns - loudest
        share = (width - loudest) / max(others, 1)
        places = np.concatenate([np.arange(loudest), loudest + (np.arange(others) + 0.5) * share])
        stands_for = np.concatenate([np.ones(loudest), np.full(others, share)])
        return ranked[places.astype(int)], jnp.asarray(stands_for, target.dtype)

    def to_dict(self) -> dict[str, Any]:
        """See `Stage`."""
        candidates = [candidate.to_dict() for candidate in self.candidates]
        loudest = {} if self.loudest is None else {"loudest": self.loudest}
        return {"stage": self.name, "columns": self.columns, **loudest, "candidates": candidates}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Stage:
        """See `Stage`."""
        candidates = tuple(map(stage_from_dict, required(options, "candidates", cls.name)))
        return super().from_options({**options, "candidates": candidates})

    def __str__(self) -> str:
        by = "" if self.loudest is None else f" by {self.loudest} loudest of {self.columns} columns"
        return f"best{by} of (off, {', '.join(map(str, self.candidates))})"
