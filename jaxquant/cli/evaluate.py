"""`evaluate` and `generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from jaxquant.cli.options import JsonOption, QuantizedArgument, print_json


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
