"""Kinds of stages, what each gets and gives, and the registry of those that files can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from jaxtyping import Array

from jaxquant.calibrate.moments import Moments
from jaxquant.methods import Problem, Rounded
from jaxquant.quant import Grid

#: Registered stages by the name that files use.
STAGES: dict[str, type[Stage]] = {}
_S = TypeVar("_S", bound="type[Stage]")


class Stage:
    """Base of all stages; `name` is the one that files use."""

    name: ClassVar[str] = ""


class Transform(Stage):
    """Changes `problem.weight` before it is rounded."""

    def __call__(self, problem: Problem) -> Problem:
        """The changed problem."""
        raise NotImplementedError


class Rounding(Stage):
    """Puts `problem.weight` on `problem.grid`."""

    def __call__(self, problem: Problem) -> Rounded:
        """The rounded weight; its error is against `problem.weight`."""
        raise NotImplementedError


class Refinement(Stage):
    """Improves a rounding with respect to `problem.target`; `couples_columns`: not each column by itself."""

    couples_columns: ClassVar[bool] = False

    def __call__(self, problem: Problem, rounded: Rounded) -> Rounded:
        """The improved rounding."""
        raise NotImplementedError


class Fold(Stage):
    """Moves scales between the linears and norms of a block before any of it is rounded."""

    def __call__(
        self, block_params: Mapping[str, Any], moments: Mapping[str, Moments], grid: Grid, **facts: Any
    ) -> tuple[dict[str, Any], dict[str, Moments]]:
        """The block that computes the same, and the moments of its new inputs.

        Facts are `norm_plus_one`, `equal_heads`, `apply` and `inputs`, see `methods.awq`; inputs are those of
        a few samples.
        """
        raise NotImplementedError


class Finish(Stage):
    """Improves a block once all its linears are rounded."""

    def __call__(self, block_params: Any, original: Any, inputs: Array, **facts: Any) -> Any:
        """The improved block; `inputs` `[samples, seqlen, d]` are those of both.

        Facts are `apply`, which runs the block, and `reference`, which runs the original.
        """
        raise NotImplementedError


def register(name: str) -> Callable[[_S], _S]:
    """Class decorator: recipes with this stage can be saved, and loaded where the decorator has run."""

    def add(stage: _S) -> _S:
        stage.name = name
        STAGES[name] = stage
        return stage

    return add
