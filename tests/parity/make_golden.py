"""Writes golden/*.npz: transformers outputs of the tiny models; `python tests/parity/make_golden.py`.

The weights are not stored: `tiny_families.tiny_params` draws them from a seeded numpy generator.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from huggingface_reference import huggingface_outputs
from tiny_families import RAW, tiny_config, tiny_params, tiny_tokens

if __name__ == "__main__":
    folder = Path(__file__).parent / "golden"
    folder.mkdir(exist_ok=True)
    for name, raw in RAW.items():
        config, tokens = tiny_config(name), tiny_tokens(name)
        logits, hidden = huggingface_outputs(raw, config, tiny_params(config), tokens)
        np.savez_compressed(folder / f"{name}.npz", tokens=tokens, logits=logits, hidden=hidden)
        print(name, (folder / f"{name}.npz").stat().st_size, "bytes")
