"""How much a process grows by a packed model that it loads from a folder and lets write.

    jaxquant quantize smollm2-135m --recipe rtn --bits 4 --group-size 64 --out q4
    python experiments/bench/memory.py q4

Resident memory beyond that of a process that has used a small model already, so that libraries and what the
compiler allocates once do not count: after the model is loaded, with its tokenizer, after 32 tokens, and at
its largest. "loaded", "with_tokenizer" and "trimmed", the last, are after the allocator gave back what it
holds free (glibc's malloc_trim). Beside it the arrays, the embedding among them, and what all parameters
would take in bfloat16. Writes results/memory.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import orbax.checkpoint  # noqa: F401  (libraries do not count)
import tokenizers

from jaxquant.evaluate import generate
from jaxquant.io import load_checkpoint, load_model
from jaxquant.models.config import LINEARS

RESULTS = Path(__file__).resolve().parent / "results"


def resident(field: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def trimmed() -> int:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    small = load_model("tiny")
    generate(small.params, small.config, [1, 2, 3], max_tokens=8)
    del small
    gc.collect()
    before = trimmed()

    params, config = load_checkpoint(folder)
    jax.block_until_ready(params)
    grown = {"loaded": trimmed() - before}
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    grown["with_tokenizer"] = trimmed() - before
    prompt = tokenizer.encode("Memory is what is left when all else is forgotten").ids
    generate(params, config, prompt, max_tokens=32)
    grown |= {
        "written": resident() - before,
        "largest": resident("VmHWM") - before,
        "trimmed": trimmed() - before,
    }
    linears = sum(math.prod(config.linear_shape(path)) for _, paths in LINEARS for path in paths)
    embedding = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    row = {
        **{name: round(nbytes / 1e6, 1) for name, nbytes in grown.items()},
        "arrays": round(sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6, 1),
        "embedding": round(params["embed"].nbytes / 1e6, 1),
        "bfloat16": round(2 * (config.num_layers * linears + embedding) / 1e6, 1),
    }
    (RESULTS / "memory.json").write_text(json.dumps({"unit": "MB", **row}, indent=1) + "\n")
    print(row)


if __name__ == "__main__":
    main()
