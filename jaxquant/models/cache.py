"""The key/value cache of incremental decoding, in floating point or packed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.errors import InputError
from jaxquant.models.config import ModelConfig, Precision
from jaxquant.quant import ActivationGrid, PackedHeads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """Keys (rotated) and values of the tokens seen so far, in preallocated arrays.

    Attributes:
      k, v: `[L, B, S, num_kv_heads, head_dim]` for a model, without the leading axis for one block; arrays,
        or `PackedHeads` of that shape.
      length: int32 scalar, how many of the `S` places are filled; the same for the whole batch. It may be
        traced, so it is the caller who sees to it that no more than `S` tokens are ever appended.
    """

    k: jax.Array | PackedHeads
    v: jax.Array | PackedHeads
    length: jax.Array

    @property
    def size(self) -> int:
        """`S`, the number of tokens that fit."""
        return jax.tree.leaves(self.k)[0].shape[-3]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, with scales and offsets."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.k, self.v)))

    def append(self, k: jax.Array, v: jax.Array, precision: Precision) -> KVCache:
        """The cache of one block with `k` and `v` `[B, T, num_kv_heads, head_dim]` behind what it holds.

        They are quantized as `precision` says; a cache of arrays keeps the values that a packed one stands
        for.
        """
        at = (0, self.length, 0, 0)

        def write(store: Any, heads: jax.Array, grid: ActivationGrid | None) -> Any:
            if isinstance(store, PackedHeads):
                new = PackedHeads.of(heads, store.grid)
            else:
                new = heads if grid is None else grid.fake_quantize(heads)
            return jax.tree.map(lambda old, new: lax.dynamic_update_slice(old, new, at), store, new)

        k_store, v_store = write(self.k, k, precision.keys), write(self.v, v, precision.values)
        return KVCache(k=k_store, v=v_store, length=self.length + k.shape[1])

    def heads(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values of all places."""
        k, v = (
            store.dequantize(dtype) if isinstance(store, PackedHeads) else store for store in (self.k, self.v)
        )
        return k, v


def init_cache(config: ModelConfig, batch: int, length: int) -> KVCache:
    """An empty cache for `batch` texts of at most `length` tokens.

    Packed where `config.precision` quantizes keys or values, otherwise in the dtype of the activations.

    Raises:
      InputError: `length` exceeds the positions the model was trained for.
    """
    if length > config.max_position:
        raise InputError(
            f"a context of {length} tokens exceeds the model's max_position = {config.max_position}; "
            "shorten the text or ask for fewer tokens"
        )
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)

    def empty(grid: ActivationGrid | None) -> Any:
        def build(heads: jax.Array) -> Any:
            return heads if grid is None else PackedHeads.of(heads, grid)

        spec = jax.eval_shape(build, jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype)))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), spec)

    # Two buffers, not one twice: a donated cache may not hold the same buffer in two leaves.
    keys, values = empty(config.precision.keys), empty(config.precision.values)
    return KVCache(k=keys, v=values, length=jnp.zeros((), jnp.int32))
