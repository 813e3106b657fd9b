"""What a step of training costs with each smoothness loss, over one without: time and memory.

    python experiments/bench/train.py [--repeats 5] [--data DIR]

The models and batches of experiments/fine/qat.py: `tiny`, and with DIR all of SmolLM2-135M. Kinds of steps
take turns in one run; ratios are of medians. Memory is what the compiled program allocates besides its
arguments. Writes results/train.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "fine"))

from qat import Bench

from jaxquant.folder import versions

RESULTS = Path(__file__).parent / "results" / "train.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    report: dict = {"versions": versions(), "repeats": arguments.repeats}
    for model in ("tiny", *(["smollm2-135m"] if arguments.data else [])):
        bench = Bench(model, arguments.data if model != "tiny" else None, 1)
        report[model] = {
            "batch": bench.batch,
            "seqlen": bench.seqlen,
            "time": bench.prices(repeats=arguments.repeats),
            "memory": bench.memory(),
        }
        print(model, json.dumps(report[model]), flush=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
