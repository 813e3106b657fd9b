"""`train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxquant.cli.options import (
    BitsOption,
    ConventionOption,
    GroupSizeOption,
    JsonOption,
    QuantizedArgument,
    SymmetricOption,
    grid_of,
    mixed_texts,
    print_line,
    refuse_flags,
    resumable,
)
from jaxquant.errors import UsageError

if TYPE_CHECKING:
    from jaxquant.quant import Grid


def train(
    context: typer.Context,
    model: QuantizedArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder for the trained model.")],
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="MODEL", help="The original of a folder.")
    ] = None,
    bits: BitsOption = 2,
    group_size: GroupSizeOption = 64,
    symmetric: SymmetricOption = False,
    convention: ConventionOption = "half-step",
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="What to train on, as --calibration of quantize; repeatable."),
    ] = None,
    mix: Annotated[
        str | None, typer.Option("--mix", metavar="A,B,...", help="Shares of the texts; default equal.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates.")] = 200,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows an update.")] = 4,
    accumulate: Annotated[
        int, typer.Option("--accumulate", min=1, help="Parts that a batch is computed in, to save memory.")
    ] = 1,
    seqlen: Annotated[int, typer.Option("--seqlen", help="Tokens per window.")] = 256,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="Peak, in shares of a level of the grid.")
    ] = 5e-3,
    hidden_weight: Annotated[
        float, typer.Option("--hidden-weight", help="Weight of the loss on the residual stream.")
    ] = 1.0,
    smoothness: Annotated[
        str, typer.Option("--smoothness", help="none, gradient, neighborhood, layer or substitution.")
    ] = "none",
    smooth_share: Annotated[
        float, typer.Option("--smooth-share", help="Its weight, as a share of the divergence.")
    ] = 0.2,
    save_every: Annotated[
        int, typer.Option("--save-every", min=1, help="Steps between states on disk.")
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Choice of the windows, noise.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a quantized model to follow its original (QAT).

    [bold]Examples[/bold]

      jaxquant train smollm2-135m --bits 2 --text wiki.train.raw --out t2
      jaxquant train q2 --teacher smollm2-135m --smoothness neighborhood --out q2t
      jaxquant train tiny --bits 2 --steps 100 --out tiny2

    A model starts rounded to nearest on --bits and --group-size; a folder
    that quantize wrote starts from its integers. The result is a folder like
    those of quantize. A killed run goes on with the same command and
    --resume, to the same bits; train/metrics.jsonl has a line for every step.
    """
    from jaxquant import jobs
    from jaxquant.io import checkpoint, open_model
    from jaxquant.report import terminal
    from jaxquant.texts import mixed_windows, text_words
    from jaxquant.train import Training

    start: Grid | Path = Path(model).expanduser()
    if checkpoint.is_checkpoint(start):
        refuse_flags(
            context, ("bits", "group_size", "symmetric", "convention"), f"{model}, which has its grids"
        )
        if teacher is None:
            raise UsageError(f"{model} is quantized; name the model it was made from with --teacher")
        source = open_model(teacher)
    else:
        refuse_flags(context, ("teacher",), f"{model}, which is its own teacher")
        source = open_model(model)
        start = grid_of(
            context,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            convention=convention,
            clip_search=True,
        )
    if not resume:
        checkpoint.check_new_folder(out)
    options = Training(
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        learning_rate=learning_rate,
        hidden_weight=hidden_weight,
        smoothness=smoothness,  # pyright: ignore[reportArgumentType]
        smooth_share=smooth_share,
        save_every=save_every,
        seed=seed,
    )
    texts = mixed_texts("--text", text or ["corpus"], mix)
    tokens = mixed_windows(source, texts, samples=steps * batch, seqlen=seqlen, seed=seed)
    describe = {"text": text_words(texts), "seed": seed}
    show: Any = print_line if as_json else terminal.StepTable()
    with resumable():
        summary = jobs.train(
            source, start, tokens, options, out, resume=resume, describe=describe, on_event=show
        )
    if not as_json:
        terminal.print_summary(out, summary)
