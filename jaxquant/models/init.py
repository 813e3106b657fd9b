"""Random parameters, and with them what the tree of parameters is."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.models.config import LINEARS, ModelConfig
from jaxquant.models.decoder import Params


def init_params(key: jax.Array, config: ModelConfig, *, dtype: Any = jnp.float32) -> Params:
    """Random parameters with the variance-preserving scale `1 / sqrt(in)`; norms are the identity.

    The tree: `embed [V, d]`, `norm [d]`, `head [d, V]` unless tied, and `blocks`, whose leaves carry a
    leading layer axis: `attn_norm`, `mlp_norm` (and `attn_post_norm`, `mlp_post_norm`) `[L, d]`,
    `attn.{q,k,v,o}.kernel [L, in, out]` with `bias [L, out]` where the config says so,
    `attn.{q_norm,k_norm} [L, head_dim]`, `mlp.{gate,up,down}.kernel`.
    """
    layers, d = config.num_layers, config.hidden_size
    key_embed, key_head, *keys = jax.random.split(key, 2 + sum(len(paths) for _, paths in LINEARS))

    def identity(size: int, *leading: int) -> jax.Array:
        return jnp.full((*leading, size), 0.0 if config.norm_plus_one else 1.0, dtype)

    has_bias = {"attn.q": config.qkv_bias, "attn.k": config.qkv_bias, "attn.v": config.qkv_bias,
                "attn.o": config.o_bias}  # fmt: skip
    blocks: Params = {"attn": {}, "mlp": {}}
    for key_linear, path in zip(keys, (path for _, paths in LINEARS for path in paths), strict=True):
        part, name = path.split(".")
        inputs, outputs = config.linear_shape(path)
        kernel = jax.random.normal(key_linear, (layers, inputs, outputs), dtype) / math.sqrt(inputs)
        blocks[part][name] = {"kernel": kernel}
        if has_bias.get(path, config.mlp_bias and part == "mlp"):
            blocks[part][name]["bias"] = jnp.zeros((layers, outputs), dtype)
    norms = ["attn_norm", "mlp_norm"] + (["attn_post_norm", "mlp_post_norm"] if config.post_norms else [])
    blocks |= {name: identity(d, layers) for name in norms}
    if config.qk_norm:
        blocks["attn"] |= {name: identity(config.head_dim, layers) for name in ("q_norm", "k_norm")}
    scale = 1 / math.sqrt(d)
    params = {
        "embed": jax.random.normal(key_embed, (config.vocab_size, d), dtype) * scale,
        "blocks": blocks,
        "norm": identity(d),
    }
    if not config.tie_embeddings:
        params["head"] = jax.random.normal(key_head, (d, config.vocab_size), dtype) * scale
    return params
