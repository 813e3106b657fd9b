"""What a quantized SmolLM2-135M has lost on tasks, item by item, so that rows can be compared in pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sensitivity import ITEMS, TEXTS
from windows import SAMPLES, SEQLEN, Bench

from jaxquant.calibrate.collect import embed_all
from jaxquant.calibrate.text import windows
from jaxquant.evaluate import evaluate_task, load_items
from jaxquant.evaluate.probe import Domain, Probe
from jaxquant.io import Source, load_params
from jaxquant.quant import QStack, is_packed

GSM8K, ROWS = "gsm8k/gsm8k_test_even.jsonl", 128
CHOICES = {
    "arc_easy": "arc/arc_easy_test.jsonl",
    "arc_challenge": "arc/arc_challenge_test_even.jsonl",
    "hellaswag": "hellaswag/hellaswag_val_1000.jsonl",
    "piqa": "piqa/piqa_valid.jsonl",
    "winogrande": "winogrande/winogrande_dev_even.jsonl",
}


class Judge:
    """NLL and KL on gold solutions of GSM8K and on WikiText-2, accuracy on `items` of each choice task."""

    def __init__(self, bench: Bench, items: int) -> None:
        source, data = bench.source, bench.data
        self.tokenizer = source.tokenizer()
        self.items = {
            name: load_items(name, str(data / file))[:items] for name, file in CHOICES.items() if items
        }
        config = dataclasses.replace(source.config, dtype="float32")
        solutions = Domain.of_items(load_items("gsm8k", str(data / GSM8K)), self.tokenizer, config)
        self.domains = {
            "gsm8k": Domain(solutions.tokens[:ROWS], solutions.scored[:ROWS]),
            "wikitext2": Domain.of_windows(bench.windows["wikitext2"]),
        }
        original = load_params(source, "float32")
        self.probes = {name: Probe.of(original, config, domain) for name, domain in self.domains.items()}
        bench.protocol |= {
            "choice_items": items,
            "domains": {
                name: {
                    **domain.facts(),
                    "original_nll": float(self.probes[name].nll.mean()),
                    "tokens": domain.scored.sum(axis=1).tolist(),
                }
                for name, domain in self.domains.items()
            },
        }

    def __call__(self, params: Any, config: Any) -> dict:
        params, config = in_floats(params), dataclasses.replace(config, dtype="float32")
        first = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
        losses, tasks = {}, {}
        for name, probe in self.probes.items():
            state = embed_all(params, config, self.domains[name].tokens)
            found = zip(("nll", "kl"), probe.by_token(params, config, first, state, 0), strict=True)
            # Sums over the tokens of a text, in nats; NLL as growth.
            losses[name] = {
                metric: [float(f"{total:.6g}") for total in np.bincount(probe.text, values)]
                for metric, values in found
            }
        for name, items in self.items.items():
            result = evaluate_task(params, config, self.tokenizer, name, items)
            tasks[name] = {
                metric: "".join(str(int(answer[key] == answer["gold"])) for answer in result.answers)
                for metric, key in (("acc", "prediction"), ("acc_norm", "prediction_norm"))
            }
        return {"losses": losses, "right": tasks}


def in_floats(params: Any) -> Any:
    """Dequantized parameters: whole tasks pass faster through float kernels."""

    def values(kernel: Any) -> jax.Array:
        return kernel.dequantize() if is_packed(kernel) else kernel

    def stacked(leaf: Any) -> jax.Array:
        if not isinstance(leaf, QStack):
            return values(leaf)
        layers = [jax.tree.map(lambda x, i=i: x[i], leaf.parts[k]) for k, i in np.asarray(leaf.places)]
        return jnp.stack([values(layer) for layer in layers])

    return jax.tree.map(stacked, params, is_leaf=lambda leaf: isinstance(leaf, QStack) or is_packed(leaf))


def parts_of(source: Source, data: Path) -> dict[str, tuple[Domain, str, str]]:
    """By name of the text, what the table is measured on, and what is left to calibrate on."""
    texts = [dataclasses.replace(text, source=str(data / text.source)) for text in TEXTS]
    return {text.name: text.parts(source, items=ITEMS) for text in texts}


def calibration(source: Source, texts: dict[str, str], shares: dict[str, float], seed: int) -> np.ndarray:
    """Windows of the texts in these shares, in random order: AWQ looks at the first ones."""
    tokenizer, config = source.tokenizer(), source.config
    counts = {name: round(share * SAMPLES) for name, share in shares.items()}
    parts = [
        windows(texts[name], tokenizer, config, samples=count, seqlen=SEQLEN, seed=seed)
        for name, count in counts.items()
        if count
    ]
    return np.random.default_rng(seed).permutation(np.concatenate(parts))


def per_token(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """A mean over tokens from sums over texts, and its standard error over texts, the ratio linearized."""
    mean = sums.sum() / tokens.sum()
    return float(mean), float(np.std(sums - mean * tokens, ddof=1) / tokens.mean() / len(tokens) ** 0.5)
