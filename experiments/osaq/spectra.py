"""Spectra of SmolLM2-135M's layer inputs, stability of their null spaces, weight ranges around OSAQ's step.

    python experiments/osaq/spectra.py --data DIR [--blocks 2 15 28] [--eta 300]

Moments are those of the original model: two disjoint halves of table.py's calibration windows,
and as many tokens of C4. For every tap of the chosen blocks:
  spectrum   eigenvalues of the first half, relative to the largest;
  stability  of the hard null space that holds `energy` of the first half, in the second half and in C4: mean
             squared cosine with the space found there (random: K/n), and the energy there (`cross_energy`);
  ranges     of the groups of 64 of every linear before and after OSAQ's step (soft, eta), without rounding.
Writes results/spectra.json, spectra.png and ranges.png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from windows import Bench

from jaxquant.calibrate.collect import model_moments
from jaxquant.calibrate.moments import Moments
from jaxquant.io import load_params
from jaxquant.linalg import hard_null_space, subspace_stability
from jaxquant.methods import Problem, osaq
from jaxquant.models.config import LINEARS
from jaxquant.quant import Grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ENERGIES = (1e-3, 1e-2)
COLORS = {"attn_in": "#4269d0", "attn_out": "#efb118", "mlp_in": "#ff725c", "mlp_hidden": "#3ca951"}

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 15, 28])
    parser.add_argument("--eta", type=float, default=300.0)
    arguments = parser.parse_args()
    bench = Bench(arguments.data, RESULTS / "table.json")
    config, params = bench.source.config, load_params(bench.source)
    tokens = bench.calibration(0)
    c4 = bench.calibration(0, arguments.data / "c4" / "c4_calib.txt", samples=len(tokens) // 2)
    first, second, other = (
        model_moments(params, config, part)
        for part in (tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :], c4)
    )

    grid = Grid(bits=2, group_size=64, clip="mse")
    spectra, stability, ranges = [], [], []
    for index in arguments.blocks:
        for tap, paths in LINEARS:
            a, b, c = (_layer(moments[tap], index) for moments in (first, second, other))
            eigenvalues = np.linalg.eigvalsh(np.asarray(a.second, np.float64))[::-1]
            spectra.append({"block": index, "tap": tap, "eigenvalues": eigenvalues.tolist()})
            for energy in ENERGIES:
                stability.append(
                    {"block": index, "tap": tap, "energy": energy, **_stability(a, b, c, energy)}
                )
            for path in paths:
                part, name = path.split(".")
                w = params["blocks"][part][name]["kernel"][index]
                moved = osaq(Problem.of(w, a, grid), eta=arguments.eta).weight
                before, after = (_ranges(values, grid) for values in (w, moved))
                ranges.append({
                    "block": index,
                    "linear": path,
                    "mean_ratio": float(np.mean(after / before)),
                    "worst_ratio": float(np.max(after / before)),
                    "before": np.quantile(before, np.linspace(0, 1, 21)).tolist(),
                    "after": np.quantile(after, np.linspace(0, 1, 21)).tolist(),
                })  # fmt: skip
    report = {
        "protocol": bench.protocol,
        "eta": arguments.eta,
        "stability": stability,
        "ranges": ranges,
        "spectra": spectra,
    }
    (RESULTS / "spectra.json").write_text(json.dumps(report) + "\n")
    for row in stability:
        print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})
    _draw_spectra(spectra, arguments.blocks)
    _draw_ranges(ranges, arguments)


def _layer(moments: Moments, index: int) -> Moments:
    return jax.tree.map(lambda leaf: leaf[index], moments)


def _stability(a: Moments, b: Moments, c: Moments, energy: float) -> dict[str, Any]:
    spaces = [hard_null_space(m.second, gamma=energy) for m in (a, b, c)]
    found: dict[str, Any] = {
        "dimensions": int(spaces[0].rank),
        "inputs": a.second.shape[0],
        "own_energy": float(spaces[0].energy),
    }
    for name, space, moments in (("second_half", spaces[1], b), ("c4", spaces[2], c)):
        s = subspace_stability(spaces[0].projector, space.projector, moments.second)
        found[name] = {
            "mean_squared_cosine": float(s.mean_squared_cosine),
            "random": float(s.random_baseline),
            "cross_energy": float(s.cross_energy),
            "random_energy": float(s.random_energy),
        }
    return found


def _ranges(w: jax.Array, grid: Grid) -> np.ndarray:
    grouped = w.reshape(grid.groups(w.shape[0]), -1, w.shape[1])
    wide = jnp.maximum(grouped.max(axis=1), 0) - jnp.minimum(grouped.min(axis=1), 0)
    return np.asarray(wide, np.float64).ravel()


def _draw_spectra(spectra: list[dict], blocks: list[int]) -> None:
    figure, axes = plt.subplots(1, len(blocks), figsize=(4 * len(blocks), 3.4), sharey=True, squeeze=False)
    for axis, index in zip(axes[0], blocks, strict=True):
        for row in (row for row in spectra if row["block"] == index):
            values = np.asarray(row["eigenvalues"])
            share = np.arange(1, len(values) + 1) / len(values)
            axis.semilogy(share, values / values[0], label=row["tap"], color=COLORS[row["tap"]])
        axis.set(title=f"block {index}", xlabel="share of directions")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("eigenvalue / largest")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "spectra.png", dpi=120)


def _draw_ranges(ranges: list[dict], arguments: argparse.Namespace) -> None:
    blocks = arguments.blocks
    figure, axes = plt.subplots(1, len(blocks), figsize=(4 * len(blocks), 3.4), sharey=True, squeeze=False)
    for axis, index in zip(axes[0], blocks, strict=True):
        own = [row for row in ranges if row["block"] == index]
        at = np.arange(len(own))
        for key, offset, color in (("before", -0.15, "#9498a0"), ("after", 0.15, "#4269d0")):
            low, middle, high = (np.asarray([row[key][q] for row in own]) for q in (1, 10, 19))
            axis.errorbar(
                at + offset, middle, yerr=[middle - low, high - middle], fmt="o", ms=4, color=color, label=key
            )
        axis.set(title=f"block {index}", xticks=at)
        axis.set_xticklabels([row["linear"] for row in own], rotation=45, ha="right")
        axis.grid(alpha=0.25, axis="y")
    axes[0][0].set_ylabel("range of a group (5 - 50 - 95 %)")
    axes[0][0].legend(frameon=False, title=f"OSAQ, eta {arguments.eta:g}")
    figure.tight_layout()
    figure.savefig(RESULTS / "ranges.png", dpi=120)


if __name__ == "__main__":
    main()
