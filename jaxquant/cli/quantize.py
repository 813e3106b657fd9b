"""`quantize`, `inspect`, `demo`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxquant.cli.options import (
    BitsOption,
    ConventionOption,
    GroupSizeOption,
    JsonOption,
    ModelArgument,
    SymmetricOption,
    grid_of,
    mixed_texts,
    print_json,
    print_line,
    refuse_flags,
    resumable,
)

if TYPE_CHECKING:
    from jaxquant.recipe import Recipe
    from jaxquant.report import ProgressTable

_GRID_FLAGS = ("bits", "group_size", "symmetric", "clip_search")
_GPTQ_FLAGS = ("act_order", "groups", "percdamp")


def quantize(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder for the quantized model.")],
    recipe: Annotated[
        str, typer.Option("--recipe", help="rtn, gptq, awq-gptq, osaq-gptq, ... or a .toml file.")
    ] = "gptq",
    bits: BitsOption = 4,
    group_size: GroupSizeOption = 64,
    symmetric: SymmetricOption = False,
    convention: ConventionOption = "half-step",
    clip_search: Annotated[
        bool, typer.Option("--clip-search/--no-clip-search", help="Shrink ranges to the least squared error.")
    ] = True,
    act_order: Annotated[
        bool, typer.Option("--act-order/--no-act-order", help="gptq: largest activations first.")
    ] = True,
    groups: Annotated[
        str, typer.Option("--groups", help="gptq: static (fitted before any update) or dynamic.")
    ] = "static",
    percdamp: Annotated[
        float, typer.Option("--percdamp", help="gptq: damping relative to mean diag H.")
    ] = 0.01,
    true_sequential: Annotated[
        bool,
        typer.Option("--true-sequential", help="Calibrate each group of linears after the previous one."),
    ] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            help="Text file, - for stdin, corpus (built in, default), hub:NAME, or TASK=FILE; repeatable.",
        ),
    ] = None,
    mix: Annotated[
        str | None, typer.Option("--mix", metavar="A,B,...", help="Shares of the texts; default equal.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Calibration windows.")] = 16,
    seqlen: Annotated[int, typer.Option("--seqlen", help="Tokens per window.")] = 512,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Choice of the windows.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize every linear of a model, block by block, into a folder.

    [bold]Examples[/bold]

      jaxquant quantize smollm2-135m --out q4
      jaxquant quantize tiny --bits 3 --calibration notes.txt --out t3
      jaxquant quantize smollm2-135m --recipe offq-w4a4kv4 --out q444
      jaxquant quantize ./Llama-3.2-1B --group-size 128 --out q --dry-run

    The folder holds packed weights, tokenizer, recipe, log and report.html.
    A killed run goes on with the same command and --resume, to the same
    bits. Every recipe searches the clip of each range; gptq, alone or in
    another, also takes inputs in order of activation, with static groups.
    Flags turn each off. With --json every event is one JSON line.
    """
    from jaxquant.named import named
    from jaxquant.recipe import read_toml
    from jaxquant.stages import GPTQ

    if recipe.endswith(".toml"):
        refuse_flags(
            context, (*_GRID_FLAGS, *_GPTQ_FLAGS, "convention", "true_sequential"), f"--recipe {recipe}"
        )
        chosen = read_toml(Path(recipe))
    else:
        grid = grid_of(
            context,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            convention=convention,
            clip_search=clip_search,
        )
        stage = GPTQ(act_order=act_order, groups=groups, percdamp=percdamp)  # pyright: ignore[reportArgumentType]
        chosen = named(recipe, grid, gptq=stage, true_sequential=true_sequential)
        if chosen.keeps or chosen.grid.bits != bits:
            refuse_flags(context, ("bits",), f"--recipe {recipe}")
        if stage not in chosen.stages:
            refuse_flags(context, _GPTQ_FLAGS, f"--recipe {recipe}")
    _quantize(
        model,
        chosen,
        out,
        mixed_texts("--calibration", calibration or ["corpus"], mix),
        samples,
        seqlen,
        seed,
        resume=resume,
        dry_run=dry_run,
        as_json=as_json,
    )


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by quantize.")],
    as_json: JsonOption = False,
) -> None:
    """What a quantized folder holds: recipe, bits, bytes and every module.

    [bold]Example[/bold]

      jaxquant inspect q4 --json | jq .effective_bits
    """
    from jaxquant import jobs
    from jaxquant.report import terminal

    result = jobs.inspect(folder)
    if as_json:
        print_json(result)
        return
    terminal.print_inspection(result)


def demo(
    model: Annotated[
        str, typer.Option("--model", help="smollm2-135m or tiny; any model works.")
    ] = "smollm2-135m",
    bits: BitsOption = 4,
    group_size: GroupSizeOption = 64,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default jaxquant-demo-MODEL-wBITS.")
    ] = None,
) -> None:
    """Quantize with GPTQ, save, reload, compare with the original, and let both speak.

    [bold]Examples[/bold]

      jaxquant demo
      jaxquant demo --model tiny --bits 3

    An interrupted demo goes on where it stopped.
    """
    from jaxquant import jobs
    from jaxquant.io import load_model
    from jaxquant.named import named
    from jaxquant.quant import Grid
    from jaxquant.report import terminal

    out = out or Path(f"jaxquant-demo-{Path(model).name}-w{bits}")
    recipe = named("gptq", Grid(bits=bits, group_size=group_size or None, clip="mse"))
    _quantize(model, recipe, out, {"corpus": 1.0}, 16, 512, 0, resume=True, dry_run=False, as_json=False)
    print("\nOn text that was not used for calibration:")
    with terminal.bar("evaluating") as progress:
        result = jobs.evaluate(
            str(out), text="corpus:evaluation", seqlen=512, limit=None, against=model, progress=progress
        )
    terminal.print_evaluation(result)
    jobs.report(out, evaluation=result)
    prompt = "The old lighthouse keeper"
    for name in (model, str(out)):
        spoken = jobs.generate(load_model(name), prompt, max_tokens=40, temperature=0.0, seed=0)
        print(f"\n{name}:\n  {prompt}{spoken['text']}")
    print(f"\nReport with pictures: {out / 'report.html'}")


def _quantize(
    model: str,
    recipe: Recipe,
    out: Path,
    texts: dict[str, float],
    samples: int,
    seqlen: int,
    seed: int,
    *,
    resume: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    from jaxquant import jobs
    from jaxquant.io import checkpoint, open_model
    from jaxquant.plan import plan
    from jaxquant.report import ProgressTable, terminal
    from jaxquant.texts import mixed_windows, text_words

    source = open_model(model)
    if not resume:
        checkpoint.check_new_folder(out)
    tokens = mixed_windows(source, texts, samples=samples, seqlen=seqlen, seed=seed)
    estimate = plan(source.config, recipe, samples=samples, seqlen=seqlen)
    if as_json:
        print_line({"event": "plan", "recipe": str(recipe), **dataclasses.asdict(estimate)})
    else:
        terminal.print_plan(source.name, recipe, estimate)
    if dry_run:
        return
    with resumable(), contextlib.ExitStack() as stack:
        on_event = print_line
        if not as_json:
            table = stack.enter_context(ProgressTable(estimate.linears))
            on_event = functools.partial(_show, table, estimate.linears)
        summary = jobs.quantize(
            source,
            recipe,
            tokens,
            out,
            describe={"text": text_words(texts), "seed": seed},
            resume=resume,
            on_event=on_event,
        )
    if not as_json:
        terminal.print_summary(out, summary)


def _show(table: ProgressTable, linears: int, event: dict[str, Any]) -> None:
    if event["event"] == "row":
        table.row(event)
    elif event["event"] == "surgery":
        table.note(f"{event['stage']}: finding the bases")
    elif event["event"] == "gradient":
        table.note(f"loss gradients of the original model: {event['done']} of {event['total']} passes")
    elif event["event"] == "resume":
        table.skip(linears * event["block"] // event["blocks"])
