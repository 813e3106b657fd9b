"""What the steps of TASA cost on SmolLM2-135M, as multiples of one GPTQ run: all in one process, in order.

    python experiments/tasa/cost.py --data DIR

DIR as for sensitivity.py. `moments`: second moments of 16 x 512 tokens of one text at all taps, without their
first tokens for the search and with them for GPTQ; `search`: the objective of five mixtures of two texts;
`cell`: the mean over 30 blocks of one block's GPTQ at 3 bits and both losses (sensitivity.py's domains), what
is computed once included; `allocate`: 1000 units of uneven sizes at three widths, exactly; `quantize`: GPTQ
at 3 bits on 24 x 512 tokens, all blocks in sequence. Each is done once with compilation, as in use. Ratios
mean more than seconds on a busy machine.
Writes results/cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from judge import calibration, parts_of
from sensitivity import GRIDS, RESULTS, TEXTS

from jaxquant.calibrate.collect import model_moments
from jaxquant.calibrate.mixture import energy_traces, mix, search_mixture
from jaxquant.calibrate.moments import Mask
from jaxquant.calibrate.text import windows
from jaxquant.folder import versions
from jaxquant.io import load_params, open_model
from jaxquant.methods import allocate, isotonic
from jaxquant.named import named
from jaxquant.pipeline import quantize_model
from jaxquant.sensitivity import measure_sensitivity

UNITS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    source = open_model("smollm2-135m")
    parts = parts_of(source, parser.parse_args().data)
    tokenizer, config, params = source.tokenizer(), source.config, load_params(source, "float32")
    recipe = named("gptq", GRIDS[3])
    seconds: dict[str, float] = {}

    def timed(name: str, step: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = step()
        seconds[name] = time.perf_counter() - started
        print(f"{name}: {seconds[name]:.2f} s", flush=True)
        return result

    def moments(mask: Mask) -> dict[str, Any]:
        return {
            name: timed(f"moments of {name}, mask {mask}", lambda own=own: collect(own, mask=mask))
            for name, own in tokens.items()
        }

    domains = {name: domain for name, (domain, _, _) in parts.items()}
    texts = {name: rest for name, (_, _, rest) in parts.items()}
    tokens = {
        name: windows(text, tokenizer, config, samples=16, seqlen=512, seed=0) for name, text in texts.items()
    }

    def collect(own: np.ndarray, *, mask: Mask) -> Any:
        return jax.block_until_ready(model_moments(params, config, own, mask=mask))

    found = moments("first")
    target = np.mean([energy_traces(own) for own in found.values()], axis=0)
    shares = timed("search", lambda: search_mixture(found, target)).best
    with tempfile.TemporaryDirectory() as folder:
        mixed = mix(moments("none"), shares)
        timed("table, one width", lambda: measure_sensitivity(
            source, {3: recipe}, mixed, domains, Path(folder) / "table.json",
        ))  # fmt: skip
        rng = np.random.default_rng(0)
        sizes = rng.integers(1, 100, UNITS) * 4096
        losses = isotonic(rng.lognormal(size=(UNITS, 1)) * 4.0 ** -np.arange(3))
        costs = np.outer(sizes, [5, 7, 9]) // 2
        timed(f"allocate, {UNITS} units", lambda: allocate(losses, costs, sizes, 3.5))
        mixture = calibration(source, texts, shares, seed=0)
        timed("quantize", lambda: quantize_model(source, recipe, mixture, Path(folder) / "q"))
    seconds["cell"] = seconds["table, one width"] / config.num_layers
    report = {
        "model": source.name,
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()},
        "versions": versions(),
        "recipe": str(recipe),
        "texts": [text.name for text in TEXTS],
        "shares": shares,
        "seconds": seconds,
        "of_quantize": {name: spent / seconds["quantize"] for name, spent in seconds.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cost.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
