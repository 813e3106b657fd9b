"""What OSAQ adds to GPTQ's time and memory: single layers, and the whole run on SmolLM2-135M, interleaved.

    python experiments/osaq/overhead.py [--repeats 7] [--runs 3] [--cold 1]

Both sides are the named recipes at W2 g64 with clip search and act-order. `temp` is the memory that the
compiled program needs besides its arguments and results. `moments_seconds` is what the second moment of
GPTQ's usual 128 x 2048 tokens takes, from the median of one sequence, and `ratio_with_moments` compares the
layer's whole work, with them, which both sides need. The run is `quantize_model` on 24 x 512 tokens of the
packaged calibration text, from opening the model to the finished folder, compiled anew in the first `--cold`
pairs and not in the others. Writes results/overhead.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibrate.moments import merge, observe
from jaxquant.calibrate.text import read_text, windows
from jaxquant.folder import versions
from jaxquant.io import open_model
from jaxquant.methods import Problem
from jaxquant.named import named
from jaxquant.pipeline import quantize_model
from jaxquant.quant import Grid

SHAPES = [(576, 576), (576, 1536), (1536, 576), (4096, 4096)]
NAMES = ("gptq", "osaq-gptq")
GRID = Grid(bits=2, group_size=64, clip="mse")
SEQUENCES, SEQLEN = 128, 2048
RESULTS = Path(__file__).parent / "results" / "overhead.json"


def problem_of(rows: int, out: int) -> Problem:
    """One layer: correlated tokens with uneven channels."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((rows, rows)) / rows**0.5 + np.eye(rows)
    x = (rng.standard_normal((2 * rows, rows)) @ mix * rng.lognormal(0, 1, rows)).astype(np.float32)
    weight = jnp.asarray(rng.standard_normal((rows, out)), jnp.float32)
    return Problem.of(weight, observe(jnp.asarray(x)), GRID)


def layer(rows: int, out: int, repeats: int) -> dict:
    row: dict = {"in": rows, "out": out}
    problem, programs = problem_of(rows, out), {}
    for name in NAMES:
        started = time.perf_counter()
        programs[name] = jax.jit(named(name, GRID)).lower(problem).compile()
        row[f"{name}_compile_seconds"] = time.perf_counter() - started
        row[f"{name}_temp_bytes"] = programs[name].memory_analysis().temp_size_in_bytes
        jax.block_until_ready(programs[name](problem))
    seconds = {name: [] for name in NAMES}
    for _ in range(repeats):
        for name in NAMES:
            started = time.perf_counter()
            jax.block_until_ready(programs[name](problem))
            seconds[name].append(time.perf_counter() - started)
    found = {**row, **_compare(seconds), "moments_seconds": SEQUENCES * moments_seconds(rows, repeats)}
    gptq, osaq = (found[f"{name}_seconds"] + found["moments_seconds"] for name in NAMES)
    return {**found, "ratio_with_moments": osaq / gptq}


def moments_seconds(channels: int, repeats: int) -> float:
    """Median time of the second moment of one sequence."""
    x = jax.random.normal(jax.random.key(0), (SEQLEN, channels))
    accumulate = jax.jit(lambda moments, x: merge(moments, observe(x)), donate_argnums=0)
    moments, seconds = observe(x), []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        moments = jax.block_until_ready(accumulate(moments, x))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def run(runs: int, cold: int) -> dict:
    seconds = {name: [] for name in NAMES}
    for number in range(cold + runs):
        for name in NAMES:
            if number < cold:
                jax.clear_caches()
            started = time.perf_counter()
            source = open_model("smollm2-135m")
            tokens = windows(
                read_text("corpus"), source.tokenizer(), source.config, samples=24, seqlen=512, seed=0
            )
            with tempfile.TemporaryDirectory() as folder:
                quantize_model(source, named(name, GRID), tokens, Path(folder) / "q")
            seconds[name].append(time.perf_counter() - started)
    first = {name: values[:cold] for name, values in seconds.items()}
    compiled = {name: values[cold:] for name, values in seconds.items()}
    return {"first": _compare(first), "compiled": _compare(compiled)}


def _compare(seconds: dict[str, list[float]]) -> dict:
    medians = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    ratios = [after / before for before, after in zip(*seconds.values(), strict=True)]
    return {**medians, "ratio": statistics.median(ratios), "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", type=int, default=1)
    arguments = parser.parse_args()
    report: dict = {
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()},
        "versions": versions(),
        "recipes": [str(named(name, GRID)) for name in NAMES],
        "layers": [],
    }
    for shape in SHAPES:
        report["layers"].append(layer(*shape, arguments.repeats))
        print(report["layers"][-1], flush=True)
    report["run"] = run(arguments.runs, arguments.cold)
    print(report["run"], flush=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
