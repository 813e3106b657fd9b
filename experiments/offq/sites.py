"""What 4-bit activations and caches cost, site by site, and the massive tokens behind it; SmolLM2-135M.

    python experiments/offq/sites.py --data DIR

Calibration windows are those of table.py, seed 0. The float32 model runs in three bases: as it is (norms
folded), QuaRot's and OffQ's. Per site: the share of the energy that the grids of table.py lose, of all tokens
and of the largest token of each window, mean over blocks. Per block: the largest token of the stream that
enters it, where it stands, how much larger it is than others, how alike those of different windows are.
Writes results/sites.json, sites.md and magnitudes.png.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from windows import Bench

from jaxquant.calibrate.collect import embed_all
from jaxquant.calibrate.sites import block_sites
from jaxquant.models import ModelConfig, Precision
from jaxquant.models.decoder import block
from jaxquant.named import named
from jaxquant.quant import Grid
from jaxquant.surgery import RotatedSource, operate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
BASES = {"as it is": "rtn", "QuaRot": "quarot", "OffQ": "offq"}
GRID = Grid(bits=4, group_size=64)
SAMPLES, PICTURED = 8, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    bench = Bench(parser.parse_args().data, RESULTS / "table.json")
    tokens, config = bench.calibration(0), bench.source.config
    folded = RotatedSource(bench.source, dataclasses.replace(config, tie_embeddings=False))
    report = {"protocol": bench.protocol, "massive": massive(folded, tokens), "errors": {}}
    pictures = {}
    for name, kind in BASES.items():
        recipe = named(f"{kind}-w16a4kv4", GRID)
        surgery, source = recipe.surgery, folded
        if surgery is not None:
            source = operate(bench.source, surgery, recipe.runtime(config), tokens)
        report["errors"][name], pictures[name] = errors(source, recipe.precision, tokens[:SAMPLES])
        print(name, report["errors"][name], flush=True)
    (RESULTS / "sites.json").write_text(json.dumps(report, indent=1) + "\n")
    write(report)
    draw(pictures)


def blocks_of(source: RotatedSource, tokens: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """Every block of the float model, and what enters it."""
    config = source.config.in_floats()
    hidden = embed_all(source.outer(), config, tokens)
    for index in range(config.num_layers):
        params = jax.tree.map(jnp.asarray, source.block(index))
        yield params, hidden
        hidden = np.asarray(_advance(params, config, hidden))


@functools.partial(jax.jit, static_argnames="config")
def _advance(params: Any, config: ModelConfig, x: jax.Array) -> jax.Array:
    return block(params, config, x, sliding=False)[0]


def errors(source: RotatedSource, precision: Precision, tokens: np.ndarray) -> tuple[dict, dict]:
    """Mean losses by site, and the magnitudes in one block."""
    losses, picture = collections.defaultdict(list), {}
    for index, (params, hidden) in enumerate(blocks_of(source, tokens)):
        sites = block_sites(params, source.config, hidden, precision, sliding=False)
        for name, site in sites.items():
            losses[name].append((float(site.error), float(site.error_massive)))
        if index == PICTURED:
            picture = {name: (np.asarray(site.peak), np.asarray(site.rest)) for name, site in sites.items()}
    means = {name: np.mean(pairs, axis=0).tolist() for name, pairs in losses.items()}
    return {name: {"all": mean[0], "massive": mean[1]} for name, mean in means.items()}, picture


def massive(source: RotatedSource, tokens: np.ndarray) -> list[dict]:
    """The largest token of every window in the stream that enters each block."""
    tokenizer, rows = source.tokenizer(), []
    for index, (_, hidden) in enumerate(blocks_of(source, tokens)):
        peaks = np.abs(hidden).max(axis=-1)
        at = peaks.argmax(axis=1)
        top = np.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0].astype(np.float64)
        unit = top / np.linalg.norm(top, axis=-1, keepdims=True)
        cosines = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
        words = collections.Counter(tokenizer.decode([int(w[t])]) for w, t in zip(tokens, at, strict=True))
        rows.append({
            "block": index,
            "first": float(np.mean(at == 0)),
            "ratio": float(np.median(np.take_along_axis(peaks, at[:, None], axis=1)) / np.median(peaks)),
            "cosine": float(np.mean(np.abs(cosines))),
            "leading_share": float(np.linalg.svd(top, compute_uv=False)[0] ** 2 / np.sum(top**2)),
            "words": words.most_common(3),
        })  # fmt: skip
    return rows


def write(report: dict[str, Any]) -> None:
    lines = [
        f"# {report['protocol']['model']}: share of the energy lost by 4 bits, mean over blocks",
        "",
        f"Float32 model, {SAMPLES} windows of the calibration text. Sites of linears: asymmetric, groups of "
        "64, 95 % of the range; keys and values: a head of a token. In brackets the largest token of each "
        "window alone.",
        "",
        f"| site | {' | '.join(BASES)} |",
        f"| --- |{' ---: |' * len(BASES)}",
    ]
    for site in report["errors"]["OffQ"]:
        cells = [report["errors"][name][site] for name in BASES]
        shown = [f"{100 * c['all']:.2f} % ({100 * c['massive']:.3f} %)" for c in cells]
        lines.append(f"| {site} | {' | '.join(shown)} |")
    lines += [
        "",
        f"## The largest token of the stream that enters a block, {report['protocol']['samples']} windows",
        "",
        "At the start: windows where it is the first token. Ratio: its largest channel to that of the median "
        "token. Cosine: mean absolute cosine between those of two windows. Leading share: energy of these "
        "tokens along one direction.",
        "",
        "| block | at the start | ratio | cosine | leading share | most frequent |",
        "| ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in report["massive"][:3] + report["massive"][3::6] + report["massive"][-1:]:
        words = ", ".join(f"{word!r} {count}" for word, count in row["words"]).replace("|", "\\|")
        lines.append(
            f"| {row['block']} | {100 * row['first']:.0f} % | {row['ratio']:.1f} | {row['cosine']:.2f} | "
            f"{row['leading_share']:.2f} | {words} |"
        )
    (RESULTS / "sites.md").write_text("\n".join(lines) + "\n")


def draw(pictures: dict[str, dict]) -> None:
    names = list(pictures["OffQ"])
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), layout="constrained")
    colors = {"as it is": "#8a8a8a", "QuaRot": "#e69f00", "OffQ": "#0072b2"}
    for axis, name in zip(axes.flat, names, strict=True):
        for basis, sites in pictures.items():
            peak, rest = sites[name]
            axis.semilogy(np.sort(peak)[::-1], color=colors[basis], label=basis, linewidth=1.6)
            axis.semilogy(np.sort(rest)[::-1], color=colors[basis], linewidth=1.2, linestyle="--")
        axis.set_title(name, loc="left", fontsize=10)
        axis.grid(True, axis="y", alpha=0.3, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].plot(
        [], [], color="black", linestyle="--", linewidth=1.2, label="less the offset of the group"
    )
    axes[0, 0].legend(frameon=False, fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("channels by size")
    for axis in axes[:, 0]:
        axis.set_ylabel("largest |x| over tokens")
    figure.suptitle(f"Activations of block {PICTURED}, channel by channel", fontsize=11)
    figure.savefig(RESULTS / "magnitudes.png", dpi=130)


if __name__ == "__main__":
    main()
