"""The decoder as a Flax NNX module, for those who train, shard or checkpoint with Flax."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxquant.models.cache import KVCache
from jaxquant.models.config import ModelConfig
from jaxquant.models.decoder import Output, forward


class Decoder(nnx.Module):
    """Holds `params` as `nnx.Param`s under the same names and calls `forward`.

    `nnx.to_pure_dict(nnx.split(model)[1])` is exactly the tree of `params`; a packed `QArray` kernel is the
    value of one `nnx.Param`.
    """

    def __init__(self, params: dict[str, Any], config: ModelConfig):
        self.config = config
        for name, subtree in params.items():
            variables = jax.tree.map(nnx.Param, subtree, is_leaf=lambda leaf: not isinstance(leaf, dict))
            setattr(self, name, nnx.data(variables))

    def __call__(self, tokens: jax.Array, *, cache: KVCache | None = None) -> Output:
        """Logits of every position of `tokens` int32 `[B, T]`; see `decoder.forward`."""
        return forward(nnx.to_pure_dict(nnx.state(self)), self.config, tokens, cache=cache)
