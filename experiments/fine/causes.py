"""Why gradients of a quantized SmolLM2-135M turn away: what its activations do to them, what its weights.

    python experiments/fine/causes.py --data DIR

Every third block at 2 bits (groups of 64, clip search), on the inputs it has in the original model, 12 x 512
tokens of the WikiText-2 train part; compared on 8 windows of 256 tokens of WikiText-2 test. Rows have KL from
the original and the cosine of input gradients against the original's; for some also the cosine where only
the way forward is quantized (gradients flow back through the original weights), and where only the way back
is. Writes results/causes.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from windows import Bench

from jaxquant.calibrate.collect import model_moments
from jaxquant.calibrate.fisher import output_moments
from jaxquant.evaluate import divergence
from jaxquant.io import load_params
from jaxquant.methods import Problem, backward_error
from jaxquant.models.config import LINEARS
from jaxquant.quant import Grid
from jaxquant.recipe import chain, masked
from jaxquant.smoothness import gradient_comparison
from jaxquant.stages import FINE, GPTQ, CoordinateDescent

RESULTS = Path(__file__).parent / "results"
GRID = Grid(bits=2, group_size=64, clip="mse")
EVERY, SAMPLES = 3, 12
RECIPES = {
    "GPTQ": (),
    "GPTQ + CD": (CoordinateDescent(),),
    "FINE backward": (FINE(objective="backward"),),
    "FINE loss": (FINE(),),
    "CD + FINE loss at queries and keys": (CoordinateDescent(), masked(FINE(), r"attn\.[qk]$")),
}
TAKEN_APART = ("GPTQ", "FINE backward")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoWays:
    """A kernel that multiplies by one matrix and passes gradients back through another."""

    forward: jax.Array
    back: jax.Array

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        y = x @ self.back
        return y + jax.lax.stop_gradient(x @ self.forward - y)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    bench = Bench(parser.parse_args().data, RESULTS / "ptq.json")
    original, config = load_params(bench.source), bench.source.config
    original = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), original)
    windows = bench.windows["wikitext2"].reshape(-1, 256)[:8]
    tokens = bench.calibration(0, samples=SAMPLES)
    moments, gradients = model_moments(original, config, tokens), output_moments(bench.source, tokens)
    rows = []
    for name, stages in RECIPES.items():
        recipe = chain(GPTQ(), *stages, grid=GRID)
        errors: list[tuple[float, float]] = []

        def rounded(index: int, tap: str, path: str, kernel: Any, recipe=recipe, errors=errors) -> Any:
            own = jax.tree.map(lambda leaf: leaf[index], moments[tap])
            outputs = jnp.asarray(gradients[index][path])
            found = recipe.at(f"blocks.{index}.{path}")(Problem.of(kernel, own, GRID, outputs=outputs))
            values = found.pack().dequantize()
            errors.append((float(found.stats.error), float(backward_error(values, kernel, outputs))))
            return values

        quantized = replaced(original, rounded)
        apart = divergence(quantized, original, config, config, windows)
        row = {"method": name, "kl": apart.kl, "kl_stderr": apart.kl_stderr}
        row["forward_error"], row["backward_error"] = map(statistics.fmean, zip(*errors, strict=True))
        ways = {"cosine": quantized}
        if name in TAKEN_APART:
            ways["cosine_forward_only"] = both_ways(quantized, original)
            ways["cosine_backward_only"] = both_ways(original, quantized)
        for key, params in ways.items():
            row[key] = gradient_comparison((params, config), (original, config), windows).cosine
        rows.append(row)
        print(row, flush=True)
        report = {"protocol": bench.protocol, "bits": 2, "every": EVERY, "samples": SAMPLES, "rows": rows}
        (RESULTS / "causes.json").write_text(json.dumps(report, indent=1) + "\n")


def replaced(params: Any, values_of: Callable[..., Any]) -> Any:
    """`params` with the kernels of every third block replaced."""
    blocks = dict(params["blocks"])
    for tap, path in [(tap, path) for tap, paths in LINEARS for path in paths]:
        part, name = path.split(".")
        kernels = np.array(blocks[part][name]["kernel"])
        for index in range(0, len(kernels), EVERY):
            kernels[index] = values_of(index, tap, path, jnp.asarray(kernels[index]))
        blocks[part] = {**blocks[part], name: {**blocks[part][name], "kernel": jnp.asarray(kernels)}}
    return {**params, "blocks": blocks}


def both_ways(forward: Any, back: Any) -> Any:
    """Parameters that compute as `forward` and whose gradients flow through `back`."""
    blocks = dict(forward["blocks"])
    for part, name in (path.split(".") for _, paths in LINEARS for path in paths):
        kernels = (params["blocks"][part][name]["kernel"] for params in (forward, back))
        blocks[part] = {**blocks[part], name: {**blocks[part][name], "kernel": TwoWays(*kernels)}}
    return {**forward, "blocks": blocks}


if __name__ == "__main__":
    main()
