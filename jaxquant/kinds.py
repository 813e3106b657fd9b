"""Kinds of stages, what each gets and gives, and the registry of those that files can name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from jaxtyping import Array

from jaxquant.calibrate.moments import Moments
from jaxquant.errors import UsageError
from jaxquant.methods import Problem, Rounded
from jaxquant.options import build
from jaxquant.quant import Grid

#: Registered stages by the name that files use.
STAGES: dict[str, type[Stage]] = {}
_S = TypeVar("_S", bound="type[Stage]")


class Stage:
    """Base of all stages, frozen dataclasses of their options; `name` is the one that files use."""

    name: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `stage_from_dict` inverts it.

        Raises:
          UsageError: the class is not registered.
        """
        if "name" not in vars(type(self)):  # a subclass would be read back as its parent
            raise UsageError(
                f"{type(self).__name__} cannot be saved; decorate the class with @register(name)"
            )
        return {"stage": self.name, **dataclasses.asdict(self)}  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Stage:
        """The stage with the options that `to_dict` wrote; missing ones keep their defaults."""
        return build(cls, cls.name, options)


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


def stage_from_dict(fields: Mapping[str, Any]) -> Stage:
    """The stage that `to_dict` wrote.

    Raises:
      UsageError: an unknown stage or option, or one is missing.
    """
    if not isinstance(fields, Mapping):
        raise UsageError(f'a stage is a table, {{ stage = "gptq" }}; got {fields!r}')
    options = dict(fields)
    name = options.pop("stage", None)
    if not isinstance(name, str) or name not in STAGES:
        raise UsageError(f"unknown stage {name!r}; there are {', '.join(sorted(STAGES))}")
    return STAGES[name].from_options(options)


def required(fields: Mapping[str, Any], key: str, name: str) -> Any:
    """`fields[key]`; `UsageError` where it is missing from what `name` has."""
    if key not in fields:
        raise UsageError(f"{name}: {key} is missing")
    return fields[key]
