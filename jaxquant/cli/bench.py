"""`bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from jaxquant.cli.options import JsonOption, QuantizedArgument, print_json


def bench(
    model: QuantizedArgument,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens that are read at once.")] = 512,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens that are written after it.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of both; medians are taken.")] = 5,
    backend: Annotated[
        str | None,
        typer.Option("--backend", help="portable: no kernels; kernel: where there are some, the default."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """How fast a model reads and writes here, and how much memory each token moves.

    [bold]Examples[/bold]

      jaxquant bench q4
      jaxquant bench smollm2-135m --json
      jaxquant bench q4 --backend portable

    One text at a time, compilation left out. The roofline is what the weights
    and the cache would take at the bandwidth of a large dense product, which
    is measured beside them: run it on an idle machine.
    """
    from jaxquant import jobs
    from jaxquant.report import terminal

    result = jobs.bench(model, prompt=prompt, tokens=tokens, repeats=repeats, backend=backend)
    (print_json if as_json else terminal.print_speed)(result)
