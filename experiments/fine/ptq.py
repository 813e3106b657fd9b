"""What FINE gives and takes on SmolLM2-135M, at 2 and 3 bits.

    python experiments/fine/ptq.py --data DIR [--bits 3 2] [--seeds 0 1 2] [--methods NAME ...]

DIR as for experiments/osaq/table.py, whose pipeline, grids and windows these are. Besides perplexity every
row has the mean forward error of the linears (on their inputs behind quantized blocks), their mean backward
error (by the gradients of the original model), KL from the original on the WikiText-2 windows, the ratio and
cosine of input gradients against the original on 16 windows of 256 tokens, and of greedy continuations of 6
prompts (48 tokens behind 32 of WikiText-2) the share of distinct pairs of tokens, the share of repeated
quadruples, and the share that passes before they leave the original's. Rows are added to results/ptq.json one
by one; those already there are kept. results/ptq.md is made from the JSON.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from windows import Bench, mean

from jaxquant.calibrate.fisher import output_moments
from jaxquant.evaluate import divergence, generate_batch
from jaxquant.io import load_params
from jaxquant.methods import backward_error
from jaxquant.named import named
from jaxquant.quant import Grid
from jaxquant.recipe import chain
from jaxquant.smoothness import gradient_comparison
from jaxquant.stages import FINE, GPTQ, CoordinateDescent, Tune

RESULTS = Path(__file__).parent / "results"
GENERATION = ("distinct_2", "repetition_4", "agreement")
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 6, 32, 48
METHODS = {
    "RTN": lambda grid: named("rtn", grid),
    "GPTQ": lambda grid: named("gptq", grid),
    "GPTQ + CD": lambda grid: named("gptq-cd", grid),
    "GPTQ + FINE": lambda grid: named("gptq-fine", grid),
    "GPTQ + CD + tuned": lambda grid: named("gptq-tune", grid),
    "GPTQ + CD + tuned on outputs": lambda grid: chain(
        GPTQ(), CoordinateDescent(), Tune(weight=0.0), grid=grid
    ),
    "GPTQ + FINE everywhere": lambda grid: chain(GPTQ(), FINE(), grid=grid),
    "GPTQ + FINE backward": lambda grid: chain(GPTQ(), FINE(objective="backward"), grid=grid),
    "OSAQ + GPTQ": lambda grid: named("osaq-gptq", grid),
    "OSAQ + GPTQ + CD": lambda grid: named("osaq-dagger", grid),
    "OSAQ + GPTQ + FINE": lambda grid: named("osaq-gptq-fine", grid),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    arguments = parser.parse_args()
    bench = Bench(arguments.data, RESULTS / "ptq.json")
    original, config = load_params(bench.source), bench.source.config
    continuations = continued(bench, original, config)
    for seed in arguments.seeds:
        tokens = bench.calibration(seed)
        gradients = output_moments(bench.source, tokens)

        def also(params: Any, own: Any, gradients: Any = gradients) -> dict:
            apart = divergence(params, original, own, config, bench.windows["wikitext2"])
            smooth = gradient_comparison((params, own), (original, config), windows_of_256(bench))
            return {
                "backward_error": statistics.fmean(backward(params, original, gradients)),
                "kl": apart.kl,
                "kl_stderr": apart.kl_stderr,
                "gradient_ratio": smooth.ratio,
                "gradient_ratio_stderr": smooth.ratio_stderr,
                "gradient_cosine": smooth.cosine,
                "gradient_cosine_stderr": smooth.cosine_stderr,
                "generation": compare(continued(bench, params, own), continuations),
            }

        for bits in arguments.bits:
            for method in arguments.methods:
                recipe = METHODS[method](Grid(bits=bits, group_size=64, clip="mse"))
                bench.run({"method": method, "bits": bits, "seed": seed}, recipe, tokens, also)
                write(bench)


def windows_of_256(bench: Bench) -> Any:
    return bench.windows["wikitext2"][:8].reshape(16, 256)


def continued(bench: Bench, params: Any, config: Any) -> list[list[int]]:
    prompts = bench.windows["wikitext2"][:PROMPTS, :PROMPT_TOKENS]
    return generate_batch(params, config, prompts, max_tokens=NEW_TOKENS)


def compare(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, float]:
    """How rich continuations are, and how long they stay with the original's; means over prompts."""

    def distinct(tokens: list[int], n: int) -> float:
        runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        return len(set(runs)) / len(runs) if runs else 1.0

    def together(a: list[int], b: list[int]) -> float:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
        return sum(1 for _ in same) / max(len(a), len(b), 1)

    return {
        "distinct_2": statistics.fmean(distinct(tokens, 2) for tokens in ours),
        "repetition_4": statistics.fmean(1 - distinct(tokens, 4) for tokens in ours),
        "agreement": statistics.fmean(together(a, b) for a, b in zip(ours, theirs, strict=True)),
    }


def backward(params: Any, original: Any, gradients: list[dict]) -> list[float]:
    errors = []
    for index, moments in enumerate(gradients):
        for path, outputs in moments.items():
            part, name = path.split(".")
            packed = jax.tree.map(lambda leaf, i=index: leaf[i], params["blocks"][part][name]["kernel"])
            weight = original["blocks"][part][name]["kernel"][index]
            errors.append(float(backward_error(packed.dequantize(), weight, jnp.asarray(outputs))))
    return errors


def write(bench: Bench) -> None:
    lines = []
    for bits in sorted({row["bits"] for row in bench.rows}, reverse=True):
        for method in METHODS:
            own, cells = bench.cells({"bits": bits, "method": method})
            if own:
                forward, back = (
                    f"{statistics.fmean(row[key] for row in own):.2e}"
                    for key in ("mean_layer_error", "backward_error")
                )
                smooth = [mean([row[k] for row in own]) for k in ("kl", "gradient_ratio", "gradient_cosine")]
                texts = [row["generation"] for row in own if "generation" in row]
                wrote = [mean([t[k] for t in texts]) if texts else "" for k in GENERATION]
                lines.append([str(bits), method, *cells, forward, back, *smooth, *wrote, str(len(own))])
    bench.write_table(
        "Asymmetric grids, groups of 64, clip search, GPTQ with act-order and static groups, CD with 4 "
        "sweeps. FINE: by the loss, strength 4, at queries and keys behind GPTQ and CD; the same "
        "everywhere; or by backward errors, strength .1, everywhere. Tuned: scales of a block learned on "
        "what it puts out and, at a tenth of the price, passes back; or on outputs alone. Errors are means "
        "over linears; KL from the original on WikiText-2; input gradients against the original's; "
        "greedy continuations of 6 prompts.",
        ["bits", "method", "WikiText-2", "C4", "forward error", "backward error", "KL", "gradient ratio",
         "gradient cosine", "distinct pairs", "repeated quadruples", "agreement", "seeds"],
        lines,
    )  # fmt: skip


if __name__ == "__main__":
    main()
