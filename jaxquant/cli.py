"""The command line: parses, calls the library, prints. Heavy imports happen inside the commands."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxquant.errors import JaxquantError, UsageError

if TYPE_CHECKING:
    from jaxquant.recipe import Recipe
    from jaxquant.report import ProgressTable

INTERRUPTED = 130

app = typer.Typer(
    name="jaxquant",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Low-bit quantization of language models in JAX.

    [bold]First steps[/bold]

      jaxquant demo                 the tour on SmolLM2-135M, a few minutes
      jaxquant demo --model tiny    the same in seconds, offline
      jaxquant quantize smollm2-135m --bits 3 --out q3
      jaxquant evaluate q3 --against smollm2-135m
      jaxquant generate q3 --prompt "The sea was"

    MODEL is a known name (smollm2-135m, tiny), a Hugging Face directory,
    a .gguf file, a hub id, or, to evaluate and generate, a folder that
    quantize wrote.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (resumable).""",
)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Known name, directory, .gguf or hub id.")
]
QuantizedArgument = Annotated[
    str, typer.Argument(metavar="MODEL_OR_DIR", help="A model, or a folder written by quantize.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
BitsOption = Annotated[int, typer.Option("--bits", help="Bits per weight, 1 to 8.")]
GroupSizeOption = Annotated[
    int, typer.Option("--group-size", help="Inputs that share a scale; 0: one scale per output column.")
]


_GRID_FLAGS = ("bits", "group_size", "symmetric", "clip_search")
_GPTQ_FLAGS = ("act_order", "groups", "percdamp")


@app.command()
def quantize(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder for the quantized model.")],
    recipe: Annotated[
        str, typer.Option("--recipe", help="rtn, gptq, awq-gptq, osaq-gptq, ... or a .toml file.")
    ] = "gptq",
    bits: BitsOption = 4,
    group_size: GroupSizeOption = 64,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Symmetric grid, no zero points.")] = False,
    convention: Annotated[
        str, typer.Option("--convention", help="Range of a symmetric grid: half-step, restricted or full.")
    ] = "half-step",
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
        str, typer.Option("--calibration", help="Text file, - for stdin, corpus (built in), or hub:NAME.")
    ] = "corpus",
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
    from jaxquant.quant import Grid
    from jaxquant.recipe import read_toml
    from jaxquant.stages import GPTQ

    if recipe.endswith(".toml"):
        _refuse(context, (*_GRID_FLAGS, *_GPTQ_FLAGS, "convention", "true_sequential"), f"--recipe {recipe}")
        chosen = read_toml(Path(recipe))
    else:
        if not symmetric:
            _refuse(context, ("convention",), "an asymmetric grid")
        grid = Grid(
            bits=bits,
            group_size=group_size or None,
            symmetric=symmetric,
            convention=convention,  # pyright: ignore[reportArgumentType]
            clip="mse" if clip_search else "minmax",
        )
        stage = GPTQ(act_order=act_order, groups=groups, percdamp=percdamp)  # pyright: ignore[reportArgumentType]
        chosen = named(recipe, grid, gptq=stage, true_sequential=true_sequential)
        if chosen.keeps or chosen.grid.bits != bits:
            _refuse(context, ("bits",), f"--recipe {recipe}")
        if stage not in chosen.stages:
            _refuse(context, _GPTQ_FLAGS, f"--recipe {recipe}")
    _quantize(
        model,
        chosen,
        out,
        calibration,
        samples,
        seqlen,
        seed,
        resume=resume,
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command()
def evaluate(
    model: QuantizedArgument,
    text: Annotated[
        str, typer.Option("--text", help="Text file, -, corpus:evaluation (built in), or hub:NAME.")
    ] = "corpus:evaluation",
    seqlen: Annotated[
        int | None, typer.Option("--seqlen", help="Tokens per window; default 2048 or the model's limit.")
    ] = None,
    windows: Annotated[int | None, typer.Option("--windows", min=1, help="Only the first N windows.")] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="Reference for KL and top-1 agreement.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a model on a text, and its divergence from another model.

    [bold]Examples[/bold]

      jaxquant evaluate q4 --text wiki.test.raw --windows 31
      jaxquant evaluate q4 --against smollm2-135m --json

    Windows follow one another without overlap; the mean runs over the
    seqlen - 1 targets of each. A file that ends in .raw is joined as WikiText
    usually is. KL is KL(reference || model) in nats per token.
    """
    from jaxquant import jobs
    from jaxquant.report import terminal

    with terminal.bar("evaluating") as progress:
        result = jobs.evaluate(
            model, text=text, seqlen=seqlen, limit=windows, against=against, progress=progress
        )
    (_print_json if as_json else terminal.print_evaluation)(result)


@app.command()
def generate(
    model: QuantizedArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=0, help="At most this many new tokens.")
    ] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, greedily or by sampling.

    [bold]Examples[/bold]

      jaxquant generate tiny --prompt "Once upon a time"
      jaxquant generate q4 --prompt "Paris is" --temperature 0.8 --seed 1
    """
    from jaxquant import jobs
    from jaxquant.io import load_model

    result = jobs.generate(
        load_model(model), prompt, max_tokens=max_tokens, temperature=temperature, seed=seed
    )
    if as_json:
        _print_json(result)
    else:
        print(prompt + result["text"])


@app.command()
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
        _print_json(result)
        return
    terminal.print_inspection(result)


@app.command()
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
    _quantize(model, recipe, out, "corpus", 16, 512, 0, resume=True, dry_run=False, as_json=False)
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


def _refuse(context: typer.Context, names: tuple[str, ...], case: str) -> None:
    """`UsageError` if one of the options was given, since it would be ignored."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} has no effect with {case}; leave it out")


def _quantize(
    model: str,
    recipe: Recipe,
    out: Path,
    calibration: str,
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

    source = open_model(model)
    if not resume:
        checkpoint.check_new_folder(out)
    tokens = jobs.calibration_windows(source, calibration, samples=samples, seqlen=seqlen, seed=seed)
    estimate = plan(source.config, recipe, samples=samples, seqlen=seqlen)
    if as_json:
        _print_line({"event": "plan", "recipe": str(recipe), **dataclasses.asdict(estimate)})
    else:
        terminal.print_plan(source.name, recipe, estimate)
    if dry_run:
        return
    with contextlib.ExitStack() as stack:
        on_event = _print_line
        if not as_json:
            table = stack.enter_context(ProgressTable(estimate.linears))
            on_event = functools.partial(_show, table, estimate.linears)
        try:
            summary = jobs.quantize(
                source,
                recipe,
                tokens,
                out,
                describe={"text": calibration, "seed": seed},
                resume=resume,
                on_event=on_event,
            )
        except KeyboardInterrupt:
            stack.close()
            command = [argument for argument in sys.argv[1:] if argument != "--resume"]
            flag = [] if command[:1] == ["demo"] else ["--resume"]
            print(f"interrupted; go on with: {shlex.join(['jaxquant', *command, *flag])}", file=sys.stderr)
            raise
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


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1), flush=True)


def _print_line(event: Any) -> None:
    print(json.dumps(event), flush=True)


def main() -> None:
    """Entry point: maps errors to exit codes (0 done, 1 failed, 2 usage, 130 interrupted)."""
    # LAPACK's threads wait by spinning: where other processes hold the cores, a Cholesky of 1 ms
    # takes 500 ms. One thread loses little on an idle machine. Read when JAX loads LAPACK: set it before.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Typer vendors click or depends on it, by version; its usage errors derive from this class either way.
    click_exception: Any = typer.BadParameter.__mro__[2]
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except click_exception as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except JaxquantError as error:
        print(f"jaxquant: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
