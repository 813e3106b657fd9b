"""Perplexity of SmolLM2-135M with 4-bit weights, activations and cache: OffQ and QuaRot at equal grids.

    python experiments/offq/table.py --data DIR [--seeds 0 1 2] [--methods NAME ...] [--settings NAME ...]

DIR holds wikitext2/wiki.{train.part,test}.raw and c4/c4_eval.jsonl. Every row runs the whole pipeline with
calibration windows and random rotations drawn by `seed`, and evaluates the saved model; in the settings with
w16 the rotated float weights are evaluated, with OffQ's bases from the same windows. Rows are added to
results/table.json one by one; those already there are kept. results/table.md is made from the JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from windows import Bench, mean

from jaxquant.io import load_params
from jaxquant.named import named
from jaxquant.quant import Grid
from jaxquant.recipe import Recipe, chain
from jaxquant.stages import GPTQ, RTN, OffQ, QuaRot, Surgery
from jaxquant.surgery import RotatedSource

RESULTS = Path(__file__).parent / "results"
GRID = Grid(bits=4, group_size=64, clip="mse")
SETTINGS = ("w16a4kv16", "w4a16kv16", "w4a4kv16", "w4a4kv4")
#: Row: the surgery, and the rounding of weights.
METHODS: dict[str, tuple[str | None, RTN | GPTQ]] = {
    "RTN": (None, RTN()),
    "GPTQ": (None, GPTQ()),
    "QuaRot + RTN": ("quarot", RTN()),
    "QuaRot + GPTQ": ("quarot", GPTQ()),
    "OffQ + RTN": ("offq", RTN()),
    "OffQ + GPTQ": ("offq", GPTQ()),
}


def recipe_of(method: str, setting: str, seed: int) -> Recipe:
    kind, rounding = METHODS[method]
    precision = named(f"rtn-{setting.replace('w16', 'w8')}", GRID).precision
    surgeries: dict[str | None, tuple[Surgery, ...]] = {
        None: (),
        "quarot": (QuaRot(seed=seed),),
        "offq": (OffQ(group_size=64),),
    }
    return chain(*surgeries[kind], rounding, grid=GRID, precision=precision)


def float_model(bench: Bench, recipe: Recipe, tokens: Any) -> tuple[Any, Any, dict]:
    """The model that `recipe` would round, with its precision."""
    source, surgery = bench.source, recipe.surgery
    config = recipe.runtime(source.config)
    if surgery is not None:
        folded = RotatedSource(source, dataclasses.replace(source.config, tie_embeddings=False))
        source = RotatedSource(bench.source, config, surgery.rotations(folded, tokens))
    return load_params(source), config, {"recipe": f"{surgery}, float weights, {recipe.precision}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    arguments = parser.parse_args()
    bench = Bench(arguments.data, RESULTS / "table.json")
    for seed in arguments.seeds:
        tokens = bench.calibration(seed)
        for setting in arguments.settings:
            for method in arguments.methods:
                key = {"method": method, "setting": setting, "seed": seed}
                recipe = recipe_of(method, setting, seed)
                if setting.startswith("w4"):
                    bench.run(key, recipe, tokens)
                elif isinstance(
                    METHODS[method][1], RTN
                ):  # no weight is rounded: the rounding is all the same
                    bench.add(key, lambda recipe=recipe, tokens=tokens: float_model(bench, recipe, tokens))
                (RESULTS / "table.md").write_text(_table(bench.protocol, bench.rows))


def _table(protocol: dict, rows: list[dict]) -> str:
    original = ", ".join(f"{name} {value:.2f}" for name, value in protocol["original"].items())
    lines = [
        f"# {protocol['model']}, {protocol['evaluation_windows']} windows of "
        f"{protocol['evaluation_seqlen']} of WikiText-2 test and of C4",
        "",
        f"Original perplexity: {original}. Its weights are dequantized Q4_1 and lie on a 4-bit grid already.",
        "Weights: asymmetric, group 64, clip search; GPTQ with act-order, static groups, damping .01, on "
        "inputs as quantized (4.5 effective bits). Activations: asymmetric, group 64, 95 % of the range (4.5 "
        "bits). Keys and values: asymmetric, a head of a token, 95 % (4.5 bits). Calibration "
        f"{protocol['samples']} x {protocol['seqlen']} tokens of the WikiText-2 train part. Mean over seeds "
        "of calibration and rotation, +- standard deviation where there are several. With w16 the weights "
        "are those of the rotated float model.",
        "",
        "| setting | method | WikiText-2 | C4 | seeds |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for setting in SETTINGS:
        for method in METHODS:
            own = [row for row in rows if (row["setting"], row["method"]) == (setting, method)]
            if own:
                cells = [mean([row["perplexity"][name] for row in own]) for name in ("wikitext2", "c4")]
                name = method.split(" + ")[0].replace("RTN", "none") if setting.startswith("w16") else method
                lines.append(f"| {setting} | {name} | {cells[0]} | {cells[1]} | {len(own)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
