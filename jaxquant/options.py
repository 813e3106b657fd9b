"""Options from the tables that people write, and tables for people to edit."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxquant.errors import InputError, UsageError

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


def table_text(table: Mapping[str, Any]) -> str:
    """`table` as TOML, an entry of a list a line; `None` is left out below the first level."""

    def value(v: Any) -> str:
        if isinstance(v, Mapping):
            return "{ " + ", ".join(f"{k} = {value(x)}" for k, x in v.items() if x is not None) + " }"
        if isinstance(v, (list, tuple)):
            return "[" + "".join(f"\n  {value(x)}," for x in v) + ("\n]" if v else "]")
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
