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
from jaxquant.folder import versions
from jaxquant.io import load_checkpoint, load_params, open_model
from jaxquant.pipeline import quantize_model
from jaxquant.recipe import Recipe
from jaxquant.records import read_rows

SAMPLES, SEQLEN, WINDOWS = 24, 512, 12
#: Titles of columns that hold words.
WORDS = ("method", "setting", "models", "gradients", "model", "grid", "loss")


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
        stored = json.loads(self.path.read_text()) if self.path.exists() else {"rows": []}
        self.rows: list[dict] = stored["rows"]
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
        for key in self.protocol.keys() - {"versions", "original"} if self.rows else ():
            if stored["protocol"].get(key) != self.protocol[key]:
                raise SystemExit(f"{self.path} has rows of another {key}; move it away to begin anew")

    def calibration(self, seed: int, text: Path | None = None, samples: int = SAMPLES):
        tokenizer, config = self.source.tokenizer(), self.source.config
        content = read_text(str(text or self.train))
        return windows(content, tokenizer, config, samples=samples, seqlen=SEQLEN, seed=seed)

    def find(self, key: dict) -> dict | None:
        """The row with `key`, if there is one."""
        return next((row for row in self.rows if all(row.get(k) == v for k, v in key.items())), None)

    def has(self, key: dict) -> bool:
        return self.find(key) is not None

    def run(
        self, key: dict, recipe: Recipe, tokens: Any, also: Callable[[Any, Any], dict] = lambda *_: {}
    ) -> None:
        """Quantizes and adds the row of `recipe`, unless a row with `key` is there.

        `also` finds more facts, given the quantized model's parameters and config.
        """
        if found := self.find(key):
            if found["recipe"] != str(recipe):
                raise SystemExit(f"{self.path}: the row {key} is of {found['recipe']}, not of {recipe}")
            return
        with tempfile.TemporaryDirectory() as folder:
            summary = quantize_model(self.source, recipe, tokens, Path(folder) / "q")
            rows, _ = read_rows(Path(folder) / "q")
            params, config = load_checkpoint(Path(folder) / "q")
        facts = {
            "recipe": str(recipe),
            "effective_bits": summary["effective_bits"],
            "mean_layer_error": summary["mean_error"],
            "layers_above_rtn": sum(row["error"] > row["error_rtn"] for row in rows),
            "choices": sum((collections.Counter(row.get("choices")) for row in rows), collections.Counter()),
        }
        self.add(key, params, config, {**facts, **also(params, config)})

    def add(self, key: dict, params: Any, config: Any, facts: dict) -> None:
        """Evaluates a model and adds its row, with `facts`."""
        results = {name: perplexity(params, config, batch) for name, batch in self.windows.items()}
        self.keep({
            **key,
            **facts,
            "perplexity": {name: result.perplexity for name, result in results.items()},
            "window_nll": {name: result.window_nll for name, result in results.items()},
        })  # fmt: skip
        figures = ", ".join(f"{name} {value:.2f}" for name, value in self.rows[-1]["perplexity"].items())
        print(f"{key}: {figures}", flush=True)

    def keep(self, row: dict) -> None:
        """Adds a row as it is, and writes all of them."""
        self.rows.append(row)
        self.path.parent.mkdir(exist_ok=True)
        report = {"protocol": self.protocol, "rows": self.rows}
        self.path.write_text(json.dumps(report, indent=1) + "\n")

    def write_table(
        self,
        about: str,
        columns: list[str],
        lines: list[list[str]],
        *,
        calibration: str = "the WikiText-2 train part",
    ) -> None:
        """A markdown table beside the JSON; words are aligned left and numbers right."""
        protocol = self.protocol
        original = ", ".join(f"{name} {value:.2f}" for name, value in protocol["original"].items())
        text = [
            f"# {protocol['model']}, {WINDOWS} windows of {SEQLEN} of WikiText-2 test and of C4, float32",
            "",
            f"Original perplexity: {original}. Its weights are dequantized Q4_1 and lie on a 4-bit grid "
            "already.",
            f"{about} Calibration: {SAMPLES} x {SEQLEN} tokens of {calibration}. Mean over seeds,"
            " +- standard deviation where there are several.",
            "",
            table(columns, lines),
        ]
        self.path.with_suffix(".md").write_text("\n".join(text))

    def cells(self, wanted: dict) -> tuple[list[dict], list[str]]:
        """The rows with `wanted`, and their two perplexities."""
        own = [row for row in self.rows if all(row.get(k) == v for k, v in wanted.items())]
        names = ("wikitext2", "c4") if own else ()
        return own, [mean([row["perplexity"][name] for row in own]) for name in names]


def table(columns: list[str], lines: list[list[str]]) -> str:
    """Markdown; columns of words are aligned left, those of numbers right."""
    rule = "|".join(" --- " if name in WORDS else " ---: " for name in columns)
    rows = [f"| {' | '.join(cells)} |" for cells in (columns, *lines)]
    return "\n".join([rows[0], f"|{rule}|", *rows[1:]]) + "\n"


def mean(values: list[float], *, digits: int = 2) -> str:
    """The mean, and the standard deviation where there are several."""
    middle = f"{statistics.fmean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} +- {statistics.stdev(values):.{digits}f}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
