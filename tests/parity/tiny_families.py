"""Tiny random models of every family: Hugging Face config dicts, and weights from a numpy recipe."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import numpy as np

from jaxquant.models.config import ModelConfig
from jaxquant.models.families import from_hf
from jaxquant.models.init import init_params

LENGTH = 24

_BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}

RAW: dict[str, dict[str, Any]] = {
    "llama2": {**_BASE, "model_type": "llama", "num_key_value_heads": 4, "rope_theta": 1e4},
    "llama3": {
        **_BASE,
        "model_type": "llama",
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama_linear_biases": {
        **_BASE,
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    },
    "llama_yarn": {
        **_BASE,
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral_sliding": {**_BASE, "model_type": "mistral", "sliding_window": 7, "head_dim": 16},
    "qwen2": {**_BASE, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**_BASE, "model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6},
    "gemma3": {
        **_BASE,
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 6,
        "query_pre_attn_scalar": 24,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "sliding_window_pattern": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}


def tiny_config(name: str) -> ModelConfig:
    return from_hf(RAW[name])


def tiny_tokens(name: str) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).integers(0, 61, (2, LENGTH)).astype(np.int32)


def tiny_params(config: ModelConfig) -> dict[str, Any]:
    """float32 weights, a function of the shapes: kernels `N(0, 1/in)`, vectors `0.1 N` around identity."""
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    rng = np.random.default_rng(7)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "kernel":
            return noise / np.float32(np.sqrt(leaf.shape[-2]))
        if name in ("embed", "head"):
            return noise * np.float32(0.2)
        center = 1.0 if "norm" in name and not config.norm_plus_one else 0.0
        return np.float32(center) + np.float32(0.1) * noise

    return jax.tree_util.tree_map_with_path(draw, shapes)
