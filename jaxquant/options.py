"""Options from the tables that people write, and tables for people to edit."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_type_hints

from jaxquant.errors import InputError, UsageError

_T = TypeVar("_T")


def build(kind: type[_T], name: str, options: Mapping[str, Any]) -> _T:
    """`kind(**options)`.

    Raises:
      UsageError: options that `kind` does not have, or of another type than it names; begins with `name`.
    """
    known = {field.name: field.type for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    if unknown := set(options) - known.keys():
        raise UsageError(
            f"{name}: unknown options {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
        )
    try:
        hints = get_type_hints(kind)
    except NameError:  # of a class inside a function
        hints = {}
    for option, value in options.items():
        if option in hints and not _fits(value, hints[option]):
            raise UsageError(f"{name}: {option} must be {known[option]}, got {value!r}")
    return kind(**options)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from a file is of a type; what is no plain type is left to the class."""
    if isinstance(hint, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return hint not in (bool, str, NoneType) or isinstance(value, hint)


def table_text(table: Mapping[str, Any]) -> str:
    """`table` as TOML, an entry of a list a line; `None` is left out below the first level."""

    def value(v: Any) -> str:
        if isinstance(v, Mapping):
            return "{ " + ", ".join(f"{k} = {value(x)}" for k, x in v.items() if x is not None) + " }"
        if isinstance(v, (list, tuple)):
            return "[" + "".join(f"\n  {value(x)}," for x in v) + ("\n]" if v else "]")
        if isinstance(v, float) and math.isinf(v):
            return str(v)
        return json.dumps(v)

    return "".join(f"{key} = {value(entry)}\n" for key, entry in table.items())


def read_table(path: Path, *, missing: str) -> dict[str, Any]:
    """The table in a TOML file; `missing` is the remedy where it cannot be read.

    Raises:
      InputError: the file is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {missing}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no TOML file: {error}") from None
