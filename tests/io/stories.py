"""Reads llama2.c's files: the stories260K model and its tokenizer."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from jaxquant.models.config import ModelConfig, Rope


def read_tok512(path: Path) -> dict[str, Any]:
    """The tokenizer (int32 longest, then float score, int32 length, bytes) as fields of GGUF metadata."""
    data, at = path.read_bytes(), 4
    tokens, scores = [], []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        tokens.append(data[at + 8 : at + 8 + length].decode().replace(" ", "▁"))
        scores.append(score)
        at += 8 + length
    tokens[1:3] = ["<s>", "</s>"]
    unknown, control, byte, normal = 2, 3, 6, 1
    types = [unknown, control, control, *[byte] * 256, *[normal] * (len(tokens) - 259)]
    return {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores, "unknown_token_id": 0}


def read_stories260K(path: Path) -> tuple[ModelConfig, dict[str, Any]]:  # noqa: N802
    """Config and params; q and k rows go from adjacent rotation pairs to the two halves of each head."""
    data = path.read_bytes()
    d, f, layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", data)
    head_dim = d // heads
    values = np.frombuffer(data, "<f4", offset=28)
    at = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        at += int(np.prod(shape))
        return values[at - int(np.prod(shape)) : at].reshape(shape)

    def halves(rows: np.ndarray) -> np.ndarray:
        pairs = rows.reshape(layers, -1, head_dim // 2, 2, d)
        return pairs.swapaxes(2, 3).reshape(rows.shape)

    def linear(rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"kernel": np.ascontiguousarray(rows.swapaxes(1, 2))}

    embed, attn_norm = take(vocab, d), take(layers, d)
    q, k = halves(take(layers, d, d)), halves(take(layers, kv_heads * head_dim, d))
    v, o = take(layers, kv_heads * head_dim, d), take(layers, d, d)
    mlp_norm = take(layers, d)
    gate, down, up = take(layers, f, d), take(layers, d, f), take(layers, f, d)
    params = {
        "embed": embed,
        "norm": take(d),
        "blocks": {
            "attn_norm": attn_norm,
            "attn": {"q": linear(q), "k": linear(k), "v": linear(v), "o": linear(o)},
            "mlp_norm": mlp_norm,
            "mlp": {"gate": linear(gate), "up": linear(up), "down": linear(down)},
        },
    }
    config = ModelConfig(
        family="llama", vocab_size=vocab, hidden_size=d, intermediate_size=f, num_layers=layers,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, norm_eps=1e-5, query_scale=head_dim**-0.5,
        rope=Rope(theta=1e4), tie_embeddings=True, max_position=length, bos_id=1, eos_ids=(2,), add_bos=True,
    )  # fmt: skip
    return config, params
