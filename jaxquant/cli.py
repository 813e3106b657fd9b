"""The command line: parses, calls the library, prints. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxquant.errors import InputError, JaxquantError, UsageError

if TYPE_CHECKING:
    from jaxquant.io import LoadedModel
    from jaxquant.models.config import ModelConfig
    from jaxquant.pipeline import Plan
    from jaxquant.report.tables import ProgressTable

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


@app.command()
def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder for the quantized model.")],
    recipe: Annotated[str, typer.Option("--recipe", help="gptq or rtn.")] = "gptq",
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
    seed: Annotated[int, typer.Option("--seed", help="Choice of the windows.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize every linear of a model, block by block, into a folder.

    [bold]Examples[/bold]

      jaxquant quantize smollm2-135m --out q4
      jaxquant quantize tiny --bits 3 --calibration notes.txt --out t3
      jaxquant quantize ./Llama-3.2-1B --group-size 128 --out q --dry-run

    The folder holds packed weights, tokenizer, recipe, log and report.html.
    A killed run goes on with the same command and --resume, to the same
    bits. Both recipes search the clip of each range; gptq also takes inputs
    in order of activation, with static groups. Flags turn each off. With
    --json every event is one JSON line.
    """
    from jaxquant.quant import Grid
    from jaxquant.recipe import Recipe

    chosen = Recipe(
        method=recipe,  # pyright: ignore[reportArgumentType]
        grid=Grid(
            bits=bits,
            group_size=group_size or None,
            symmetric=symmetric,
            convention=convention,  # pyright: ignore[reportArgumentType]
            clip="mse" if clip_search else "minmax",
        ),
        act_order=act_order,
        groups=groups,  # pyright: ignore[reportArgumentType]
        percdamp=percdamp,
        true_sequential=true_sequential,
    )
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
    windows: Annotated[int | None, typer.Option("--windows", help="Only the first N windows.")] = None,
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
    print_evaluation = _print_json if as_json else _print_evaluation
    print_evaluation(_evaluate(model, text, seqlen, windows, against, show=not as_json))


@app.command()
def generate(
    model: QuantizedArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="At most this many new tokens.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, greedily or by sampling.

    [bold]Examples[/bold]

      jaxquant generate tiny --prompt "Once upon a time"
      jaxquant generate q4 --prompt "Paris is" --temperature 0.8 --seed 1
    """
    from jaxquant.io import load_model

    result = _generate(load_model(model), prompt, max_tokens, temperature, seed)
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
    from jaxquant.io import checkpoint
    from jaxquant.models.config import ModelConfig
    from jaxquant.pipeline import read_rows
    from jaxquant.recipe import Recipe

    manifest = checkpoint.read_manifest(folder)
    rows, _ = read_rows(folder)
    config = ModelConfig.from_dict(manifest["config"])
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    packed = sum(row["bytes"] for row in rows)
    result = {
        "model": manifest["source"]["name"],
        "recipe": str(Recipe.from_dict(manifest["recipe"])),
        "state": manifest["state"],
        "blocks": [checkpoint.finished_blocks(folder), config.num_layers],
        "effective_bits": 8 * packed / weights if weights else None,
        "bytes": packed,
        "disk_bytes": checkpoint.disk_bytes(folder),
        "calibration": manifest["calibration"],
        "versions": manifest["versions"],
        "modules": rows,
    }
    if as_json:
        _print_json(result)
        return
    bits = (
        "none yet" if not weights else f"{result['effective_bits']:.3f} effective bits, {packed / 1e6:.2f} MB"
    )
    print(f"{result['model']}: {result['recipe']}")
    print(f"{len(rows)} quantized linears: {bits}; folder {result['disk_bytes'] / 1e6:.2f} MB")
    print(f"state: {result['state']}, {result['blocks'][0]} of {result['blocks'][1]} blocks")
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        print(f"{row['module']:24} {shape:>11}  error {row['error']:.3e}  (RTN {row['error_rtn']:.3e})")


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
    from jaxquant.io import load_model
    from jaxquant.quant import Grid
    from jaxquant.recipe import Recipe

    out = out or Path(f"jaxquant-demo-{Path(model).name}-w{bits}")
    recipe = Recipe(grid=Grid(bits=bits, group_size=group_size or None, clip="mse"))
    _quantize(model, recipe, out, "corpus", 16, 512, 0, resume=True, dry_run=False, as_json=False)
    print("\nOn text that was not used for calibration:")
    _print_evaluation(_evaluate(str(out), "corpus:evaluation", 512, None, model, show=True))
    prompt = "The old lighthouse keeper"
    for name in (model, str(out)):
        spoken = _generate(load_model(name), prompt, 40, 0.0, 0)["text"].strip("\n")
        print(f"\n{name}:\n  {prompt}{spoken}")
    print(f"\nReport with pictures: {out / 'report.html'}")


def _quantize(
    model: str,
    recipe: Any,
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
    from jaxquant.calibrate.text import read_text, windows
    from jaxquant.io import open_model
    from jaxquant.pipeline import plan, quantize_model
    from jaxquant.report.tables import ProgressTable

    source = open_model(model)
    config = source.config
    _check_seqlen(seqlen, config)
    estimate = plan(config, recipe, samples=samples, seqlen=seqlen)
    if as_json:
        _print_json({"event": "plan", "recipe": str(recipe), **_plan_dict(estimate)}, indent=None)
    else:
        _print_plan(source.name, recipe, estimate)
    if dry_run:
        return
    tokens = windows(
        read_text(calibration), source.tokenizer(), config, samples=samples, seqlen=seqlen, seed=seed
    )
    describe = {"text": calibration, "seed": seed}
    try:
        if as_json:
            summary = quantize_model(
                source, recipe, tokens, out, resume=resume, describe=describe,
                on_event=lambda event: _print_json(event, indent=None),
            )  # fmt: skip
        else:
            with ProgressTable(estimate.linears) as table:
                summary = quantize_model(
                    source, recipe, tokens, out, resume=resume, describe=describe,
                    on_event=lambda event: _show(table, event, estimate.linears),
                )  # fmt: skip
    except KeyboardInterrupt:
        command = [arg for arg in sys.argv[1:] if arg != "--resume"]
        hint = [] if "demo" in command[:1] else ["--resume"]
        print(f"\ninterrupted; go on with: {shlex.join(['jaxquant', *command, *hint])}", file=sys.stderr)
        raise
    _write_report(out, recipe, summary)
    if not as_json:
        print(
            f"{out}: {summary['effective_bits']:.3f} effective bits, {summary['disk_bytes'] / 1e6:.1f} MB "
            f"(16-bit original {summary['source_bytes'] / 1e6:.1f} MB); "
            f"layer error {summary['mean_error']:.2e}, RTN {summary['mean_error_rtn']:.2e}; "
            f"{summary['seconds']:.0f} s; see {out / 'report.html'}"
        )


def _show(table: ProgressTable, event: dict[str, Any], linears: int) -> None:
    if event["event"] == "row":
        table.row(event)
    elif event["event"] == "resume":
        table.skip(linears * event["block"] // event["blocks"])


def _write_report(folder: Path, recipe: Any, summary: dict[str, Any]) -> None:
    from jaxquant.io import checkpoint
    from jaxquant.pipeline import read_rows
    from jaxquant.report import write_report

    manifest = checkpoint.read_manifest(folder)
    rows, histograms = read_rows(folder)
    calibration = manifest["calibration"]
    run = {
        "model": manifest["source"]["name"],
        "recipe_name": recipe.method,
        "recipe": recipe.to_dict(),
        "grid": str(recipe.grid),
        "effective_bits": summary["effective_bits"],
        "bytes_before": summary["source_bytes"],
        "bytes_after": summary["disk_bytes"],
        "calibration": calibration["text"],
        "samples": calibration["samples"],
        "seqlen": calibration["seqlen"],
        "tokens": calibration["samples"] * calibration["seqlen"],
        "seed": calibration["seed"],
        "seconds": summary["seconds"],
        "versions": manifest["versions"],
    }
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(folder, run, rows, histograms=histograms)


def _evaluate(
    spec: str, text: str, seqlen: int | None, limit: int | None, against: str | None, *, show: bool
) -> dict[str, Any]:
    from jaxquant.calibrate.text import eval_windows, read_text
    from jaxquant.evaluate import divergence, perplexity
    from jaxquant.io import load_model

    content = read_text(text)
    model = load_model(spec)
    reference = load_model(against) if against else None
    seqlen = seqlen or min(2048, model.config.max_position)
    _check_seqlen(seqlen, model.config)
    windows = eval_windows(content, model.tokenizer, model.config, seqlen=seqlen, limit=limit)
    common = {"model": model.name, "text": text, "seqlen": seqlen, "windows": len(windows)}
    if reference is None:
        result = perplexity(model.params, model.config, windows)
        return {**common, "nll": result.nll, "nll_stderr": result.stderr, "perplexity": result.perplexity,
                "tokens": result.tokens}  # fmt: skip
    if reference.config.vocab_size != model.config.vocab_size:
        raise UsageError(
            f"{against} has a vocabulary of {reference.config.vocab_size}, {spec} one of "
            f"{model.config.vocab_size}: give the original of the quantized model"
        )
    pair = divergence(model.params, reference.params, model.config, reference.config, windows)
    return {**common, **pair.to_dict(), "against": reference.name}


def _generate(
    model: LoadedModel, prompt: str, max_tokens: int, temperature: float, seed: int
) -> dict[str, Any]:
    import jax

    from jaxquant.evaluate import generate as continue_tokens

    config = model.config
    tokens = model.tokenizer.encode(prompt, add_special_tokens=False).ids
    if config.add_bos and config.bos_id is not None:
        tokens = [config.bos_id, *tokens]
    if not tokens:
        raise InputError("the prompt is empty; give at least one word with --prompt")
    new = continue_tokens(
        model.params, config, tokens, max_tokens=max_tokens, temperature=temperature, key=jax.random.key(seed)
    )
    return {"prompt": prompt, "text": model.tokenizer.decode(new), "tokens": new}


def _check_seqlen(seqlen: int, config: ModelConfig) -> None:
    if not 2 <= seqlen <= config.max_position:
        raise UsageError(f"--seqlen {seqlen}: the model takes 2 to {config.max_position} tokens")


def _plan_dict(plan: Plan) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(plan)


def _print_plan(name: str, recipe: Any, plan: Plan) -> None:
    print(f"{name}: {recipe}")
    print(
        f"plan: {plan.linears} linears at {plan.effective_bits:.3f} effective bits; about "
        f"{plan.output_bytes / 1e6:.0f} MB on disk ({plan.source_bytes / 1e6:.0f} MB in 16 bits), "
        f"peak memory {plan.peak_bytes / 1e9:.1f} GB, {max(1, round(plan.seconds / 60))} min"
    )


def _print_evaluation(result: dict[str, Any]) -> None:
    where = f"{result['text']}, {result['windows']} windows of {result['seqlen']}, {result['tokens']} tokens"
    print(f"{result['model']}: perplexity {result['perplexity']:.4f} (nll {result['nll']:.5f}) on {where}")
    if "kl" in result:
        print(
            f"against {result['against']}: its perplexity {result['reference_perplexity']:.4f}; "
            f"KL {result['kl']:.5f} +- {result['kl_stderr']:.5f} nats per token, "
            f"same top-1 token {100 * result['top1']:.2f} %"
        )


def _print_json(value: Any, indent: int | None = 1) -> None:
    print(json.dumps(value, indent=indent), flush=True)


def main() -> None:
    """Entry point: maps errors to exit codes (0 done, 1 failed, 2 usage, 130 interrupted)."""
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
