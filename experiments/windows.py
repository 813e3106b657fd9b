"""What the tables of perplexity share: SmolLM2-135M, windows to calibrate and evaluate on, a file of rows."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxquant.calibrate.text import eval_windows, read_text, windows
from jaxquant.evaluate import perplexity
from jaxquant.io import load_checkpoint, load_params, open_model
from jaxquant.pipeline import quantize_model, read_rows, versions
from jaxquant.recipe import Recipe

SAMPLES, SEQLEN, WINDOWS = 24, 512, 12


@dataclasses.dataclass
class Bench:
    """The model, its evaluation windows, and the results so far."""

    data: Path
    path: Path

    def __post_init__(self) -> None:
        self.source = open_model("smollm2-135m")
        tokenizer, config = self.source.tokenizer(), self.source.config
        texts = {"wikitext2": "wikitext2/wiki.test.raw", "c4": "c4/c4_eval.jsonl"}
        self.windows = {
            name: eval_windows(
                read_text(str(self.data / file)), tokenizer, config, seqlen=SEQLEN, limit=WINDOWS
            )
            for name, file in texts.items()
        }
        self.train = self.data / "wikitext2" / "wiki.train.part.raw"
        self.rows: list[dict] = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        params = load_params(self.source)
        self.protocol = {
            "model": self.source.name,
            "fingerprint": self.source.fingerprint(),
            "calibration": f"{self.train.name} sha256 {_sha256(self.train)}",
            "samples": SAMPLES,
            "seqlen": SEQLEN,
            "evaluation": {n: f"{f} sha256 {_sha256(self.data / f)}" for n, f in texts.items()},
            "evaluation_windows": WINDOWS,
            "evaluation_seqlen": SEQLEN,
            "versions": versions(),
            "original": {
                n: perplexity(params, config, batch).perplexity for n, batch in self.windows.items()
            },
        }

    def calibration(self, seed: int, text: Path | None = None, samples: int = SAMPLES):
        tokenizer, config = self.source.tokenizer(), self.source.config
        content = read_text(str(text or self.train))
        return windows(content, tokenizer, config, samples=samples, seqlen=SEQLEN, seed=seed)

    def run(self, key: dict, recipe: Recipe, tokens: Any) -> None:
        """Quantizes and adds the row of `recipe`, unless a row with `key` is there."""

        def quantized() -> tuple[Any, Any, dict]:
            with tempfile.TemporaryDirectory() as folder:
                summary = quantize_model(self.source, recipe, tokens, Path(folder) / "q")
                rows, _ = read_rows(Path(folder) / "q")
                params, config = load_checkpoint(Path(folder) / "q")
            return params, config, {
                "recipe": str(recipe),
                "effective_bits": summary["effective_bits"],
                "mean_layer_error": summary["mean_error"],
                "layers_above_rtn": sum(row["error"] > row["error_rtn"] for row in rows),
                "choices": collections.Counter(row["choice"] for row in rows if "choice" in row),
            }  # fmt: skip

        self.add(key, quantized)

    def add(self, key: dict, make: Callable[[], tuple[Any, Any, dict]]) -> None:
        """Evaluates the `(params, config, facts)` that `make` gives, unless a row with `key` is there."""
        if any(all(row.get(k) == v for k, v in key.items()) for row in self.rows):
            return
        params, config, facts = make()
        results = {name: perplexity(params, config, batch) for name, batch in self.windows.items()}
        self.rows.append({
            **key,
            **facts,
            "perplexity": {name: result.perplexity for name, result in results.items()},
            "window_nll": {name: result.window_nll for name, result in results.items()},
        })  # fmt: skip
        figures = ", ".join(f"{name} {value:.2f}" for name, value in self.rows[-1]["perplexity"].items())
        print(f"{key}: {figures}", flush=True)
        self.path.parent.mkdir(exist_ok=True)
        report = {"protocol": self.protocol, "rows": self.rows}
        self.path.write_text(json.dumps(report, indent=1) + "\n")


def mean(values: list[float]) -> str:
    """The mean, and the standard deviation where there are several."""
    middle = statistics.fmean(values)
    return f"{middle:.2f}" if len(values) == 1 else f"{middle:.2f} +- {statistics.stdev(values):.2f}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
