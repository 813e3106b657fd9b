"""A random model in memory, for tests that need a `Source`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models

from jaxquant.models.config import ModelConfig
from jaxquant.models.decoder import forward

CONFIG = ModelConfig(
    family="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=8, query_scale=8**-0.5, tie_embeddings=True, max_position=64,
)  # fmt: skip

# `forward` by itself compiles its scan over the blocks at every call.
run = jax.jit(forward, static_argnums=1, static_argnames="taps")


class MemorySource:
    """A model in memory."""

    name, chat_template = "memory", None

    def __init__(self, params, config=CONFIG, fail_at: int | None = None):
        self.params, self.config, self.fail_at = params, config, fail_at

    def fingerprint(self):
        return str(float(jnp.sum(jnp.abs(self.params["embed"]))))

    def tokenizer(self):
        return Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))

    def block(self, index):
        if index == self.fail_at:
            raise KeyboardInterrupt
        return jax.tree.map(lambda leaf: np.asarray(leaf[index]), self.params["blocks"])

    def outer(self):
        return {k: np.asarray(v) for k, v in self.params.items() if k != "blocks"}
