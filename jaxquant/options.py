"""Dataclasses of options from the tables that people write."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from jaxquant.errors import UsageError

_T = TypeVar("_T")


def build(kind: type[_T], name: str, options: Mapping[str, Any]) -> _T:
    """`kind(**options)`.

    Raises:
      UsageError: options that `kind` does not have; begins with `name`.
    """
    known = {field.name for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    if unknown := set(options) - known:
        raise UsageError(
            f"{name}: unknown options {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
        )
    return kind(**options)
