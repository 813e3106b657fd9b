"""`smoothness`."""

from __future__ import annotations

from typing import Annotated

import typer

from jaxquant.cli.options import JsonOption, QuantizedArgument, print_json


def smoothness(
    model: QuantizedArgument,
    against: Annotated[str, typer.Option("--against", metavar="MODEL", help="The original model.")],
    text: Annotated[
        str, typer.Option("--text", help="Text file, -, corpus:evaluation (built in), or hub:NAME.")
    ] = "corpus:evaluation",
    windows: Annotated[int, typer.Option("--windows", min=1, help="At most so many windows.")] = 8,
    seqlen: Annotated[int, typer.Option("--seqlen", help="Tokens per window.")] = 256,
    as_json: JsonOption = False,
) -> None:
    """How differently a model reacts to a text than its original does.

    [bold]Examples[/bold]

      jaxquant smoothness q3 --against smollm2-135m
      jaxquant smoothness q3 --against smollm2-135m --text wiki.test.raw --json

    Gradients at the input: ratio of their norms and cosine. Candidates: next
    tokens of probability 1e-3 or more, and the share of the original's that
    remain. Trees: likely continuations of up to 4 tokens behind the first 64 of
    each window, and the share of the original's that remain. Errors are
    standard errors over windows. Pictures go to report.html of a quantized
    folder.
    """
    from jaxquant import jobs
    from jaxquant.report import terminal

    with terminal.bar("measuring") as progress:
        result = jobs.smoothness(
            model, against=against, text=text, limit=windows, seqlen=seqlen, progress=progress
        )
    (print_json if as_json else terminal.print_smoothness)(result)
