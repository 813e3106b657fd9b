"""The key/value cache of incremental decoding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxquant.errors import InputError
from jaxquant.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """Keys (rotated) and values of the tokens seen so far, in preallocated arrays.

    Attributes:
      k, v: `[L, B, S, num_kv_heads, head_dim]` for a model, without the leading axis for one block.
      length: int32 scalar, how many of the `S` places are filled; the same for the whole batch. It may be
        traced, so it is the caller who sees to it that no more than `S` tokens are ever appended.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array

    @property
    def size(self) -> int:
        """`S`, the number of tokens that fit."""
        return self.k.shape[-3]


def init_cache(config: ModelConfig, batch: int, length: int) -> KVCache:
    """An empty cache for `batch` texts of at most `length` tokens, in the dtype of the activations.

    Raises:
      InputError: `length` exceeds the positions the model was trained for.
    """
    if length > config.max_position:
        raise InputError(
            f"a context of {length} tokens exceeds the model's max_position = {config.max_position}; "
            "shorten the text or ask for fewer tokens"
        )
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    # Two buffers, not one twice: a donated cache may not hold the same buffer in two leaves.
    k, v = jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
    return KVCache(k=k, v=v, length=jnp.zeros((), jnp.int32))
