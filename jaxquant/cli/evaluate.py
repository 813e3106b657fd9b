"""`evaluate` and `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jaxquant.cli.options import JsonOption, QuantizedArgument, named_sources, print_json, refuse_flags

# Which options go with a text, and which with tasks.
_TEXT = ("text", "seqlen", "windows", "against")
_TASK = ("shots", "shots_from", "limit", "exact_match", "answers")


def evaluate(
    context: typer.Context,
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
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME=FILE", help="Instead of a text; repeatable. Or NAME=hub:ID."),
    ] = None,
    shots: Annotated[int, typer.Option("--shots", min=0, help="Solved examples before each item.")] = 0,
    shots_from: Annotated[
        str | None, typer.Option("--shots-from", metavar="FILE", help="Their rows; default: the task's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N items.")] = None,
    exact_match: Annotated[
        bool, typer.Option(help="GSM8K: also generate solutions, which takes long.")
    ] = True,
    answers: Annotated[
        Path | None, typer.Option("--answers", metavar="FILE", help="JSON file for every answer.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a model on a text and its divergence from another, or what it can do in tasks.

    [bold]Examples[/bold]

      jaxquant evaluate q4 --text wiki.test.raw --windows 31
      jaxquant evaluate q4 --against smollm2-135m --json
      jaxquant evaluate q4 --task arc_easy=arc.jsonl --task piqa=piqa.jsonl
      jaxquant evaluate q4 --task gsm8k=test.jsonl --shots 8 --shots-from train.jsonl

    Windows follow one another without overlap; the mean runs over the
    seqlen - 1 targets of each. A file that ends in .raw is joined as WikiText
    usually is. KL is KL(reference || model) in nats per token.

    Tasks: arc_easy, arc_challenge, hellaswag, piqa, winogrande, boolq,
    openbookqa, copa, mmlu, lambada, gsm8k, with the prompts of
    lm-evaluation-harness.
    """
    from jaxquant import jobs
    from jaxquant.report import terminal

    if task:
        refuse_flags(context, _TEXT, "--task")
        with terminal.bar("answering") as progress:
            result = jobs.evaluate_tasks(
                model,
                named_sources("--task", task),
                shots=shots,
                shots_from=shots_from,
                limit=limit,
                exact_match=exact_match,
                answers=answers,
                progress=progress,
            )
        (print_json if as_json else terminal.print_tasks)(result)
        return
    refuse_flags(context, _TASK, "a text, only with --task")
    with terminal.bar("evaluating") as progress:
        result = jobs.evaluate(
            model, text=text, seqlen=seqlen, limit=windows, against=against, progress=progress
        )
    (print_json if as_json else terminal.print_evaluation)(result)


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
        print_json(result)
    else:
        print(prompt + result["text"])
