"""What the parts of OSAQ are worth: temperature, strength, rank, support, calibration; SmolLM2-135M, W3.

    python experiments/osaq/ablations.py --data DIR

The setting of the paper's ablations: one grid per column, OSAQ on every linear (no choice between it and
nothing unless a row says so) before GPTQ with act-order and clip search, 3 bits. Pipeline, windows and
evaluation are those of table.py. Rows are added to results/ablations.json one by one; those already there are
kept, and results/ablations.md is made from them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from windows import SAMPLES, SEQLEN, Bench

from jaxquant.quant import Grid
from jaxquant.recipe import Recipe, chain
from jaxquant.stages import GPTQ, OSAQ, Best

RESULTS = Path(__file__).parent / "results"
GRID = Grid(bits=3, clip="mse")
STRENGTH = 1e3


def recipes() -> dict[str, Recipe]:
    """Varied part: recipe."""
    steps = {
        "GPTQ alone": (),
        "OSAQ (soft, eta 1000, tau .2)": (OSAQ(eta=STRENGTH),),
        "chosen per column": (Best((OSAQ(eta=STRENGTH),)),),
        **{f"tau {tau:g}": (OSAQ(eta=STRENGTH, tau=tau),) for tau in (0.05, 0.1, 0.4)},
        # At this temperature every weight pulls alike.
        "plain l2 (tau 1e6), all weights": (OSAQ(eta=STRENGTH, tau=1e6, support=10**6),),
        "tau .2, all weights": (OSAQ(eta=STRENGTH, support=10**6),),
        "64 largest together": (OSAQ(eta=STRENGTH, support=64),),
        **{f"eta {eta:g}": (OSAQ(eta=eta),) for eta in (1e2, 3e2, 3e3, 1e4)},
        **{f"hard, gamma {gamma:g}": (OSAQ(form="hard", gamma=gamma),) for gamma in (1e-4, 1e-3, 1e-2)},
    }
    return {name: chain(*before, GPTQ(), grid=GRID) for name, before in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    bench = Bench(data, RESULTS / "ablations.json")
    tokens, variants = bench.calibration(0), recipes()
    for name, recipe in variants.items():
        bench.run({"variant": name, "samples": SAMPLES, "corpus": "wikitext2"}, recipe, tokens)
    both = ("GPTQ alone", "OSAQ (soft, eta 1000, tau .2)")
    for samples in (6, 96):
        for name in both:
            key = {"variant": name, "samples": samples, "corpus": "wikitext2"}
            bench.run(key, variants[name], bench.calibration(0, samples=samples))
    text = data / "c4" / "c4_calib.txt"
    for name in both:
        key = {"variant": name, "samples": SAMPLES, "corpus": "c4"}
        bench.run(key, variants[name], bench.calibration(0, text))
    write(bench)


def write(bench: Bench) -> None:
    lines = []
    for row in bench.rows:
        perplexity = [f"{row['perplexity'][name]:.2f}" for name in ("wikitext2", "c4")]
        tokens = f"{row['samples']} x {SEQLEN} of {row['corpus']}"
        lines.append([row["variant"], tokens, *perplexity, f"{row['mean_layer_error']:.2e}"])
    bench.write_table(
        "3 bits, one asymmetric grid per column, clip search, then GPTQ with act-order; OSAQ before it on "
        "every linear, soft with eta 1000 and tau .2 and without a support unless a row says otherwise. One "
        "seed: table.md tells how far seeds lie apart.",
        ["varied", "calibration", "WikiText-2", "C4", "layer error"],
        lines,
        calibration="the train part of WikiText-2, or of C4, as the rows say",
    )


if __name__ == "__main__":
    main()
