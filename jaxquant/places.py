"""Stages that act in some places of a model only."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxquant.errors import UsageError
from jaxquant.kinds import Finish, Fold, Stage, register, required, stage_from_dict
from jaxquant.surgery import Surgery


@register("masked")
@dataclasses.dataclass(frozen=True)
class Masked(Stage):
    """`stage` where `pattern` (a regular expression) is found in the module's path, nothing elsewhere."""

    stage: Stage
    pattern: str

    def to_dict(self) -> dict[str, Any]:
        """See `Stage`."""
        return {"stage": self.name, "pattern": self.pattern, "of": self.stage.to_dict()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Masked:
        """See `Stage`."""
        stage = stage_from_dict(required(options, "of", cls.name))
        return masked(stage, required(options, "pattern", cls.name))

    def __str__(self) -> str:
        return f"{self.stage} where {self.pattern}"


def masked(stage: Stage, pattern: str) -> Masked:
    """`stage` only for modules in whose path the regular expression `pattern` is found."""
    check_pattern(pattern)
    if isinstance(stage, (Surgery, Fold, Finish)):
        raise UsageError(f"{stage} changes a whole block and cannot be masked")
    return Masked(stage, pattern)


def check_pattern(pattern: str) -> str:
    """`pattern`; `UsageError` unless it is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UsageError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern
