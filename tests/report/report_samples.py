"""A run with made-up numbers, and a reader of pages, for the tests of the report."""

from __future__ import annotations

import math
import random
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input"}

SHAPES = {
    "attn.q": (576, 576),
    "attn.k": (576, 192),
    "attn.v": (576, 192),
    "attn.o": (576, 576),
    "mlp.gate": (576, 1536),
    "mlp.up": (576, 1536),
    "mlp.down": (1536, 576),
}


def make_rows(blocks: int) -> list[dict]:
    rng = random.Random(0)
    rows = []
    for block in range(blocks):
        for place, (linear, shape) in enumerate(SHAPES.items()):
            error = 2e-3 * (1 + place) * math.exp(rng.gauss(0, 0.25) + block / (blocks + 4))
            retried = (block, linear) == (blocks - 1, "mlp.down")
            rows.append(
                {
                    "module": f"blocks.{block}.{linear}",
                    "block": block,
                    "linear": linear,
                    "shape": list(shape),
                    "bits": 4,
                    "group_size": 64,
                    "error_rtn": error,
                    "error": error * rng.uniform(0.4, 0.8),
                    "damping": 0.1 if retried else 0.01,
                    "attempts": 2 if retried else 1,
                    "fallback": False,
                    "seconds": rng.uniform(0.2, 1.4),
                }
            )
    return rows


def make_histogram(module: str, bits: int) -> dict:
    top = 2**bits - 1
    count = 16 * min(top + 3, 16)
    edges = [-1.5 + i * (top + 3) / count for i in range(count + 1)]
    counts = [round(9000 * math.exp(-(((edge - top / 2) / (top / 5)) ** 2))) for edge in edges[:-1]]
    return {"module": module, "edges": edges, "counts": counts, "levels": list(range(top + 1))}


def make_site(module: str) -> dict:
    ranks = range(96)
    return {
        "module": module,
        "before": [60 / (1 + rank) + 0.5 for rank in ranks],
        "after": [6 - 0.03 * rank for rank in ranks],
        "rest": [2.5 - 0.005 * rank for rank in ranks],
        "error_before": 2.1e-2,
        "error": 3.5e-3,
    }


def make_smoothness() -> dict:
    names = ("gradient_ratio", "gradient_cosine", "candidate_retention", "neighborhood_retention",
             "tree_retention")  # fmt: skip
    raw = ("candidates", "neighborhood_candidates", "tree_nodes")
    nodes = [
        {"path": [3], "token": " the", "probability": 0.5, "shared": True},
        {"path": [9], "token": "\n", "probability": 0.2, "shared": False},
        {"path": [3, 4], "token": " <unbelievable>", "probability": 0.1, "shared": True},
        {"path": [3, 5], "token": " old", "probability": 0.05, "shared": True},
    ]
    return {
        "model": "q3", "against": "smollm2-135m", "text": "corpus:evaluation", "windows": 3, "seqlen": 256,
        **{name: 0.75 for name in names}, **{f"{name}_stderr": 0.011 for name in names},
        **{f"{name}{end}": 83.25 for name in raw for end in ("", "_reference")},
        **{f"{name}{end}_stderr": 2.52 for name in raw for end in ("", "_reference")},
        "by_window": {name: [0.7, 0.8, 0.75] for name in names},
        "trees": {"prompt": "Once <upon>", "reference": nodes, "model": nodes[:1]},
    }  # fmt: skip


def make_run(**changes) -> dict:
    return {
        "verb": "quantize",
        "model": "smollm2-135m",
        "recipe": "GPTQ (act-order, static groups, damping 0.01), W4 g64 asymmetric, mse clip search",
        "recipe_name": "gptq",
        "grid": "W4 g64 asymmetric, mse clip search",
        "effective_bits": 4.5,
        "bytes_before": 269_060_736,
        "bytes_after": 116_349_120,
        "calibration": "embedded corpus (calibration split)",
        "samples": 16,
        "seqlen": 512,
        "tokens": 8192,
        "seed": 0,
        "seconds": 254.3,
        "versions": {
            "python": "3.11.9",
            "jaxquant": "0.1.0",
            "jax": "0.10.2",
            "jaxlib": "0.10.2",
            "numpy": "2.4.6",
        },
        **changes,
    }


class Page(HTMLParser):
    """Collects tags, and checks that they nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
