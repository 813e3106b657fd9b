"""`allocate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jaxquant.cli.options import (
    GroupSizeOption,
    JsonOption,
    ModelArgument,
    named_sources,
    print_json,
    refuse_flags,
    resumable,
)
from jaxquant.errors import UsageError

# What a finished table has decided already.
_MEASURED = ("widths", "recipe", "group_size", "unit", "items", "samples", "seqlen", "seed")


def allocate(
    context: typer.Context,
    model: ModelArgument,
    bits: Annotated[float, typer.Option("--bits", help="Budget: stored bits per weight, scales included.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Recipe to write, a .toml file.")],
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME=FILE", help="Rows of a task, as in evaluate; repeatable."),
    ] = None,
    general: Annotated[
        list[str] | None,
        typer.Option("--general", metavar="NAME=TEXT", help="Text: a file, corpus or hub:NAME; repeatable."),
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--table", help="Where losses are kept; mixed.table.json for mixed.toml.")
    ] = None,
    beta: Annotated[float, typer.Option("--beta", help="Weight of the tasks, 0 to 1.")] = 0.7,
    metric: Annotated[
        str, typer.Option("--metric", help="kl (divergence from the original) or nll (growth of the loss).")
    ] = "kl",
    widths: Annotated[
        str, typer.Option("--widths", metavar="A,B,...", help="Bits to choose from.")
    ] = "2,3,4",
    recipe: Annotated[
        str,
        typer.Option("--recipe", help="How linears are rounded: a name without awq, fine, tune, offq."),
    ] = "gptq",
    group_size: GroupSizeOption = 64,
    unit: Annotated[
        str, typer.Option("--unit", help="What gets bits of its own: block or linear.")
    ] = "block",
    items: Annotated[
        int, typer.Option("--items", min=2, help="Rows, or windows of 128 tokens, that are measured.")
    ] = 64,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration windows of each text.")] = 16,
    seqlen: Annotated[int, typer.Option("--seqlen", help="Tokens of each.")] = 512,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Choice of the windows.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Give bits to the layers whose rounding tasks and texts feel (TASA).

    [bold]Examples[/bold]

      jaxquant allocate smollm2-135m --bits 3.5 --task gsm8k=train.jsonl \\
        --general wikitext=wiki.train.raw -o mixed.toml
      jaxquant allocate smollm2-135m --bits 4 --table mixed.table.json -o m4.toml
      jaxquant quantize smollm2-135m --recipe mixed.toml --out q \\
        --calibration gsm8k=train.jsonl --calibration wiki.train.raw --mix 1,3

    Every unit is quantized alone, at every width, and what each domain loses
    is kept in a table that serves all budgets. An interrupted measurement
    goes on with the same command. Give training rows, not those that you
    evaluate on: the first --items of a task are measured, and the windows
    from the first half of a text; the other rows and the second half
    calibrate, in shares that are searched and printed as --calibration and
    --mix of the next command. Pictures go to mixed.html for mixed.toml.
    """
    from jaxquant.allocation import measure_table, write_recipe
    from jaxquant.io import open_model
    from jaxquant.report import terminal

    if out.suffix != ".toml":
        raise UsageError(f"-o {out}: a recipe is a .toml file")
    table = table or out.with_suffix(".table.json")
    source = open_model(model)
    if task or general:
        tasks, texts = named_sources("--task", task or []), named_sources("--general", general or [])
        with resumable(), terminal.bar("measuring") as progress:
            measure_table(
                source,
                table,
                tasks=tasks,
                general=texts,
                widths=_widths(widths),
                recipe=recipe,
                group_size=group_size or None,
                unit=unit,
                items=items,
                samples=samples,
                seqlen=seqlen,
                seed=seed,
                budget=bits,
                beta=beta,
                metric=metric,
                on_cell=progress,
            )
    else:
        refuse_flags(context, _MEASURED, f"--table {table}, which is measured already")
    # The next command needs the model as it was named here.
    result = {**write_recipe(source, table, out, budget=bits, beta=beta, metric=metric), "model": model}
    (print_json if as_json else terminal.print_allocation)(result)


def _widths(text: str) -> list[int]:
    try:
        widths = sorted({int(bits) for bits in text.split(",")})
    except ValueError:
        raise UsageError(f"--widths {text}: write numbers of bits, such as 2,3,4") from None
    if len(widths) < 2:
        raise UsageError(f"--widths {text}: give two at least")
    return widths
