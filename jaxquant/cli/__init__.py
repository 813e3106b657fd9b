"""The command line: parses, calls the library, prints. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from jaxquant.cli.allocate import allocate
from jaxquant.cli.bench import bench
from jaxquant.cli.evaluate import evaluate, generate
from jaxquant.cli.export import export
from jaxquant.cli.quantize import demo, inspect, quantize
from jaxquant.cli.smoothness import smoothness
from jaxquant.cli.train import train
from jaxquant.errors import JaxquantError, UsageError

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
    a .gguf file, a hub id, or, where nothing is quantized, a folder that
    quantize or train wrote.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (resumable).""",
)

for command in (quantize, allocate, train, evaluate, smoothness, generate, bench, export, inspect, demo):
    app.command()(command)


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
