"""Training at 1 to 2 bits with and without each smoothness loss: equal steps, equal tokens, equal compute.

    python experiments/fine/qat.py [--model tiny] [--grids W2 ...] [--seeds 0 1 2] [--steps 300] [--windows N]
        [--losses none gradient ...]
    python experiments/fine/qat.py --model smollm2-135m --data DIR --grids W2 --seeds 0 --steps 40

`tiny` is trained on the embedded corpus and judged on its held-out part; SmolLM2-135M on the WikiText-2 train
part of DIR from the integers of GPTQ, and judged on the first WINDOWS test windows. A row is one run: KL from
the original and perplexity on held-out text, ratio and cosine of input gradients. "longer" rows are
distillation alone for as much time as the smoothness loss of that name takes: the price of a step is measured
first, all kinds in turn (the moments of the layer loss, taken once, are not counted); one that costs no more
than 5 % has none. With `--windows` the text is scarce: N windows; the layer loss, whose moments come from
other windows, is left out. Rows are added to results/qat.json one by one; those already there are kept.
results/qat.md is made from the JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from windows import mean, table

from jaxquant.calibrate.fisher import output_moments
from jaxquant.calibrate.text import eval_windows, read_text, token_ids, windows
from jaxquant.evaluate import divergence
from jaxquant.folder import versions
from jaxquant.io import load_checkpoint, load_params, open_model
from jaxquant.named import named
from jaxquant.pipeline import quantize_model
from jaxquant.quant import Grid
from jaxquant.smoothness import gradient_comparison
from jaxquant.train import State, Training, latent_params, packed_params, split, train, train_step

RESULTS = Path(__file__).parent / "results"
LOSSES = ("none", "gradient", "neighborhood", "layer", "substitution")
#: Model: tokens of a window, windows of a step, group size, peak of the learning rate.
SETTINGS = {"tiny": (128, 4, 32, 1e-2), "smollm2-135m": (128, 2, 64, 5e-3)}
WINDOWS = 16


def grids(group_size: int) -> dict[str, Grid]:
    ternary = {"symmetric": True, "convention": "narrow"}
    return {
        "W2": Grid(bits=2, group_size=group_size, clip="mse"),
        "W1.58": Grid(bits=2, group_size=group_size, clip="mse", **ternary),
        "W1": Grid(bits=1, group_size=group_size, symmetric=True, clip="mse"),
    }


class Bench:
    """A teacher, its texts, and the rows so far."""

    def __init__(self, name: str, data: Path | None, steps: int):
        self.name, self.steps = name, steps
        self.seqlen, self.batch, group_size, self.rate = SETTINGS[name]
        self.grids = grids(group_size)
        self.source = open_model(name)
        self.config = self.source.config
        self.params = load_params(self.source, "float32")
        wiki = None if data is None else data / "wikitext2"
        self.train_text = read_text("corpus" if wiki is None else str(wiki / "wiki.train.part.raw"))
        text = read_text("corpus:evaluation" if wiki is None else str(wiki / "wiki.test.raw"))
        self.text_tokens = len(token_ids(self.train_text, self.source.tokenizer(), self.config))
        self.held_out = eval_windows(
            text, self.source.tokenizer(), self.config, seqlen=2 * self.seqlen, limit=WINDOWS
        )
        self.path = RESULTS / "qat.json"
        self.rows: list[dict] = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        few = self.windows(16, 99)
        found = output_moments(self.source, few)
        self.outputs = {path: jnp.asarray(np.stack([block[path] for block in found])) for path in found[0]}

    def windows(self, samples: int, seed: int) -> np.ndarray:
        return windows(
            self.train_text, self.source.tokenizer(), self.config,
            samples=samples, seqlen=self.seqlen, seed=seed,
        )  # fmt: skip

    def start(self, grid: Grid, seed: int) -> dict[str, Any]:
        """Rounded to nearest; SmolLM2 by GPTQ, since at these bits too little is left of it otherwise."""
        if self.name == "tiny":
            return latent_params(self.params, grid)
        with tempfile.TemporaryDirectory() as folder:
            tokens = self.windows(48, seed)
            quantize_model(self.source, named("gptq", grid), tokens, Path(folder) / "q")
            return latent_params(load_checkpoint(Path(folder) / "q")[0])

    def options(self, smoothness: str, seed: int, steps: int) -> Training:
        return Training(
            steps=steps, batch=self.batch, learning_rate=self.rate, smoothness=smoothness,  # pyright: ignore[reportArgumentType]
            seed=seed, remat=self.name != "tiny",
        )  # fmt: skip

    def step_arguments(self, loss: str) -> tuple[tuple, dict]:
        """What `train_step` is given for one step with a loss."""
        trained, rest = split(latent_params(self.params, self.grids["W2"]))
        options = self.options(loss, 0, self.steps)
        state = jax.tree.map(jnp.copy, State.start(trained, options))
        tokens = jnp.asarray(self.windows(self.batch, 0))
        configs = {"config": self.config, "teacher_config": self.config}
        return (state, rest, self.params, tokens, self.outputs), {**configs, "options": options}

    def prices(self, losses: Iterable[str] = LOSSES, repeats: int = 5) -> dict[str, float]:
        """Median time of a step with each loss over that of a step without one, all kinds in turn."""
        seconds: dict[str, list[float]] = {loss: [] for loss in ("none", *losses)}
        for number in range(repeats + 1):
            for loss in seconds:
                positional, static = self.step_arguments(loss)
                jax.block_until_ready(positional)
                begun = time.perf_counter()
                jax.block_until_ready(train_step(*positional, **static))
                if number:  # the first compiles
                    seconds[loss].append(time.perf_counter() - begun)
        plain = statistics.median(seconds["none"])
        return {loss: statistics.median(values) / plain for loss, values in seconds.items()}

    def memory(self) -> dict[str, float]:
        """Bytes that a step allocates besides its arguments, over those of a step without a loss."""
        found = {}
        for loss in LOSSES:
            positional, static = self.step_arguments(loss)
            compiled = train_step.lower(*positional, **static).compile()
            found[loss] = compiled.memory_analysis().temp_size_in_bytes
        return {loss: size / found["none"] for loss, size in found.items()}

    def run(self, key: dict, student: dict[str, Any], loss: str) -> None:
        """Trains for `key["run_steps"]` and adds the row."""
        begun, seed, steps = time.monotonic(), key["seed"], key["run_steps"]
        options = self.options(loss, seed, max(steps, 1))
        if steps:
            tokens = self.windows(key["windows"] or steps * self.batch, seed)
            teacher = (self.params, self.config)
            student = train((student, self.config), teacher, tokens, options, outputs=self.outputs)
        packed = packed_params(student)
        apart = divergence(packed, self.params, self.config, self.config, self.held_out)
        smooth = gradient_comparison((packed, self.config), (self.params, self.config), self.held_out)
        self.rows.append({
            **key,
            "text_tokens": self.text_tokens if key["windows"] is None else key["windows"] * self.seqlen,
            "options": dataclasses.asdict(options),
            "kl": apart.kl,
            "perplexity": apart.model.perplexity,
            "original": apart.reference.perplexity,
            "top1": apart.top1,
            "gradient_ratio": smooth.ratio,
            "gradient_cosine": smooth.cosine,
            "seconds": time.monotonic() - begun,
        })  # fmt: skip
        print(f"{key}: KL {apart.kl:.4f}, perplexity {apart.model.perplexity:.2f}, "
              f"cosine {smooth.cosine:.3f}", flush=True)  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        report = {"versions": versions(), "rows": self.rows}
        self.path.write_text(json.dumps(report, indent=1) + "\n")

    def has(self, key: dict) -> bool:
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(SETTINGS), default="tiny")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--grids", nargs="+", default=["W2", "W1.58", "W1"], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--windows", type=int, metavar="N")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    arguments = parser.parse_args()
    if (arguments.data is None) != (arguments.model == "tiny"):
        parser.error("--data belongs to smollm2-135m, and tiny needs none")
    if arguments.windows is not None and "layer" in arguments.losses:
        arguments.losses.remove("layer")
    bench = Bench(arguments.model, arguments.data, arguments.steps)
    prices = bench.prices(arguments.losses)
    print("time of a step:", {loss: round(price, 2) for loss, price in prices.items()}, flush=True)
    for name in arguments.grids:
        for seed in arguments.seeds:
            runs = [("start", "none", 0)]
            runs += [(loss, loss, arguments.steps) for loss in arguments.losses]
            runs += [
                (f"longer ({loss})", "none", round(prices[loss] * arguments.steps))
                for loss in arguments.losses
                if prices[loss] > 1.05  # else it is the row without one
            ]
            student = None
            for row, loss, steps in runs:
                key = {"model": arguments.model, "grid": name, "row": row, "steps": arguments.steps,
                       "windows": arguments.windows, "seed": seed}  # fmt: skip
                if bench.has(key):
                    continue
                student = student or bench.start(bench.grids[name], seed)
                bench.run({**key, "run_steps": steps, "price": prices[loss]}, student, loss)
                write(bench)


def write(bench: Bench) -> None:
    lines = []

    def key_of(row: dict) -> tuple:
        return row["model"], row["steps"], row["grid"], row["text_tokens"]

    for key in sorted(set(map(key_of, bench.rows))):
        of_key = [row for row in bench.rows if key_of(row) == key]
        for name in dict.fromkeys(row["row"] for row in of_key):
            own = [row for row in of_key if row["row"] == name]
            cells = [
                mean([row[k] for row in own], digits=4)
                for k in ("kl", "perplexity", "top1", "gradient_ratio", "gradient_cosine")
            ]
            steps = statistics.fmean(row["run_steps"] for row in own)
            seqlen, batch, *_ = SETTINGS[key[0]]
            read = f"{steps * batch * seqlen / key[3]:.1f}"
            lines.append([key[0], key[2], name, str(key[3]), read, f"{steps:.0f}", *cells, str(len(own))])
    columns = ["model", "grid", "loss", "tokens of text", "times read", "steps", "KL", "perplexity", "top-1",
               "gradient ratio", "gradient cosine", "seeds"]  # fmt: skip
    text = [
        "# Training at 1 to 2 bits, with and without smoothness losses",
        "",
        "Held-out text, against the original; mean over seeds of windows and noise, +- standard deviation. "
        "`start`: before training. `longer (x)`: without a smoothness loss, for as many steps as fit the time"
        " of x. Times read: what the steps read, over the tokens of the text. The smoothness term weighs .2 "
        "of the KL; substitution replaces .2 of the tokens.",
        "",
        table(columns, lines),
    ]
    (RESULTS / "qat.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
