"""Arguments and output that commands share."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxquant.errors import UsageError

if TYPE_CHECKING:
    from jaxquant.quant import Grid

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Known name, directory, .gguf or hub id.")
]
QuantizedArgument = Annotated[
    str, typer.Argument(metavar="MODEL_OR_DIR", help="A model, or a folder written by quantize or train.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
BitsOption = Annotated[int, typer.Option("--bits", help="Bits per weight, 1 to 8.")]
ConventionOption = Annotated[
    str,
    typer.Option("--convention", help="Range of a symmetric grid: half-step, restricted, narrow or full."),
]
SymmetricOption = Annotated[bool, typer.Option("--symmetric", help="Symmetric grid, no zero points.")]
GroupSizeOption = Annotated[
    int, typer.Option("--group-size", help="Inputs that share a scale; 0: one scale per output column.")
]


def refuse_flags(context: typer.Context, names: tuple[str, ...], case: str) -> None:
    """`UsageError` if one of the options was given, since it would be ignored."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} has no effect with {case}; leave it out")


def grid_of(
    context: typer.Context, *, bits: int, group_size: int, symmetric: bool, convention: str, clip_search: bool
) -> Grid:
    """The grid that the options name.

    Raises:
      UsageError: a convention was given that has no effect, or a value is out of range.
    """
    from jaxquant.quant import Grid

    if not symmetric:
        refuse_flags(context, ("convention",), "an asymmetric grid")
    return Grid(
        bits=bits,
        group_size=group_size or None,
        symmetric=symmetric,
        convention=convention,  # pyright: ignore[reportArgumentType]
        clip="mse" if clip_search else "minmax",
    )


def named_sources(flag: str, arguments: list[str]) -> dict[str, str]:
    """`NAME=SOURCE` arguments of one flag."""
    sources = {}
    for argument in arguments:
        name, _, source = argument.partition("=")
        if not name or not source:
            raise UsageError(f"{flag} {argument}: write NAME=FILE, such as arc_easy=arc.jsonl")
        if name in sources:
            raise UsageError(f"{flag} {name}: given twice; join its files, or take one at a time")
        sources[name] = source
    return sources


def mixed_texts(flag: str, texts: list[str], mix: str | None) -> dict[str, float]:
    """Texts with their shares, which `--mix` lists; equal ones without it."""
    if len(set(texts)) < len(texts):
        raise UsageError(f"{flag} names a text twice; give it a larger share with --mix")
    try:
        shares = [1.0] * len(texts) if mix is None else [float(share) for share in mix.split(",")]
    except ValueError:
        shares = []
    if len(shares) != len(texts) or not all(0 < share < float("inf") for share in shares):
        raise UsageError(f"--mix {mix}: give one positive number for each of the {len(texts)} texts")
    return dict(zip(texts, shares, strict=True))


def print_json(value: Any) -> None:
    """One JSON object, for people too."""
    print(json.dumps(value, indent=1), flush=True)


def print_line(event: Any) -> None:
    """One JSON object a line, at once: a pipe shows events as they come."""
    print(json.dumps(event), flush=True)


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Tells how to go on when the user interrupts a run."""
    try:
        yield
    except KeyboardInterrupt:
        command = [argument for argument in sys.argv[1:] if argument != "--resume"]
        flag = [] if command[:1] in (["demo"], ["allocate"]) else ["--resume"]
        print(f"interrupted; go on with: {shlex.join(['jaxquant', *command, *flag])}", file=sys.stderr)
        raise
