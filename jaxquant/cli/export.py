"""`export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jaxquant.cli.options import JsonOption, print_json


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by quantize or train.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where the files go; a new folder.")
    ],
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="Of scales and of what is not quantized: float16, bfloat16, float32."),
    ] = "float16",
    as_json: JsonOption = False,
) -> None:
    """Write a quantized model as other engines load it: transformers, vLLM (not tested).

    [bold]Examples[/bold]

      jaxquant export q4 --out q4-hf

    A Hugging Face directory in the format compressed-tensors
    (pack-quantized): the same integers, scales and zeros. Linears may differ
    in bits, which transformers itself does not load. float16 keeps the
    scales as they are.
    """
    from jaxquant.io.export import export_compressed_tensors
    from jaxquant.report import terminal

    with terminal.bar("exporting") as progress:
        result = export_compressed_tensors(folder, out, dtype=dtype, progress=progress)  # pyright: ignore[reportArgumentType]
    if as_json:
        print_json(result)
    else:
        schemes = ", ".join(f"{count} linears {words}" for words, count in result["schemes"].items())
        print(f"{result['path']}: {result['bytes'] / 1e6:.1f} MB; {schemes}")
