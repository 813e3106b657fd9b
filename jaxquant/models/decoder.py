"""One decoder-only transformer for every family, as pure functions of `(params, config, tokens)`.

The parameters of all blocks are stacked on axis 0 and scanned, so compile time does not grow with depth;
`block` is the same computation for one block alone. Kernels are float arrays, cast to the dtype of the
activations where they are used, or anything that defines `x @ kernel` (a packed `QArray`), or a `QStack` of
layers that differ; where the precision quantizes activations, x is a `QActivation` there, and for float
kernels the values it stands for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.errors import InputError, UsageError
from jaxquant.kernels.head_matmul import head_matmul
from jaxquant.linalg import hadamard_transform
from jaxquant.models.attention import attention, attention_to_cache
from jaxquant.models.cache import KVCache
from jaxquant.models.config import LINEARS, ModelConfig
from jaxquant.models.rotary import rotate, tables
from jaxquant.quant import ActivationGrid, QActivation, QStack

Params = dict[str, Any]
#: Parameters, dense or packed, and their config.
Model = tuple[Params, ModelConfig]

TAPS = tuple(tap for tap, _ in LINEARS)
#: Taps that no linear reads: what attention reads, and a cache keeps.
CACHE_TAPS = ("keys", "values")
#: The residual stream as it leaves a block.
STREAM = "stream"
_ALL_TAPS = (*TAPS, *CACHE_TAPS, STREAM)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What `forward` returns: logits float32 `[B, T, V]`, the updated cache, taps `{name: [L, B, T, .]}`."""

    logits: jax.Array
    cache: KVCache | None
    taps: dict[str, jax.Array]


def embed(params: Params, config: ModelConfig, tokens: jax.Array) -> jax.Array:
    """Embeds `tokens` int32 `[B, T]` into the activations `[B, T, d]` in `config.dtype`."""
    x = jnp.take(params["embed"], tokens, axis=0).astype(config.dtype)
    # Gemma rounds its factor to the dtype of the activations before multiplying.
    return x if config.embed_scale == 1.0 else x * jnp.asarray(config.embed_scale, config.dtype)


def block(
    block_params: Params,
    config: ModelConfig,
    x: jax.Array,
    *,
    sliding: bool | jax.Array,
    positions: jax.Array | None = None,
    cache: KVCache | None = None,
    taps: Sequence[str] = (),
) -> tuple[jax.Array, KVCache | None, dict[str, jax.Array]]:
    """One block: `x + attention(norm(x))`, then `x + mlp(norm(x))`.

    Args:
      block_params: one block's slice of `params["blocks"]`, without the leading axis.
      x: activations `[B, T, d]`.
      sliding: whether this block's attention is windowed; a Python bool skips the masked work.
      positions: int32 `[T]`, where the rotation places the tokens; by default they follow the cache.
      cache: this block's cache (leaves without the layer axis); `x` is appended to it.
      taps: which of `TAPS`, `CACHE_TAPS` and `STREAM` to return.

    Returns:
      The activations `[B, T, d]`, the updated cache, and the taps: `attn_in` `[B, T, d]` (q, k, v),
      `attn_out` `[B, T, H * head_dim]` (o), `mlp_in` `[B, T, d]` (gate, up), `mlp_hidden` `[B, T, f]` (down),
      `keys` and `values` `[B, T, KV * head_dim]` as a cache keeps them, `stream`: the activations again.
    """
    rotations = _rotations(config, _positions(x.shape[1], cache) if positions is None else positions)
    return _block(block_params, config, x, sliding, rotations, cache, tuple(taps))


def final_hidden(
    params: Params, config: ModelConfig, tokens: jax.Array, *, cache: KVCache | None = None
) -> tuple[jax.Array, KVCache | None]:
    """Activations after the final norm `[B, T, d]`, and the updated cache."""
    x = embed(params, config, tokens)
    hidden, cache, _ = _run(params["blocks"], params["norm"], config, x, cache, ())
    return hidden, cache


def hidden_of_embedded(
    params: Params,
    config: ModelConfig,
    x: jax.Array,
    *,
    shifts: jax.Array | None = None,
    taps: Sequence[str] = (),
    remat: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Activations after the final norm `[B, T, d]` of embedded tokens, and taps `[L, B, T, .]`.

    Args:
      params: of the whole model.
      x: `[B, T, d]`, as `embed` returns it.
      shifts: `[L, B, T, d]`, added to what enters each block; the gradient at 0 is that of the stream there.
      taps: as in `forward`.
      remat: keep only what enters each block for a backward pass, and compute the rest of it again.

    Raises:
      InputError: an unknown tap.
    """
    _check_taps(taps)
    blocks, norm = params["blocks"], params["norm"]
    hidden, _, collected = _run(blocks, norm, config, x, None, tuple(taps), shifts=shifts, remat=remat)
    return hidden, collected


def forward_embedded(
    params: Params,
    config: ModelConfig,
    x: jax.Array,
    *,
    shifts: jax.Array | None = None,
    remat: bool = False,
) -> jax.Array:
    """Logits float32 `[B, T, V]` of embedded tokens x `[B, T, d]`; arguments as in `hidden_of_embedded`."""
    return logits(params, config, hidden_of_embedded(params, config, x, shifts=shifts, remat=remat)[0])


def reduce_taps(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    reduce: Callable[[jax.Array], Any],
    *,
    taps: Sequence[str] = TAPS,
) -> dict[str, Any]:
    """`reduce` of what the linears of every block read, stacked over layers; no tap is kept as a whole.

    Args:
      tokens: int32 `[B, T]`.
      reduce: maps one tap's activations `[B, T, n]` to any pytree of arrays.
      taps: as in `forward`.

    Raises:
      InputError: an unknown tap.
    """
    _check_taps(taps)
    # Not by way of `_run`: a compiled program would remember what `reduce` read when it was traced.
    blocks, norm, x = params["blocks"], params["norm"], embed(params, config, tokens)
    return _scan_blocks(blocks, norm, config, x, None, tuple(taps), reduce=reduce)[2]


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """`hidden @ head` (or the tied embedding), accumulated and returned in float32: `[..., V]`."""
    if config.tie_embeddings:
        return head_matmul(hidden, params["embed"])
    head = params["head"]
    return head_matmul(hidden, head, axis=1) if _is_array(head) else _matmul(hidden, head, jnp.float32)


def forward(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    *,
    cache: KVCache | None = None,
    taps: Sequence[str] = (),
) -> Output:
    """Logits of every position of `tokens` int32 `[B, T]`.

    Args:
      params: see `models.init` for the tree.
      cache: keys and values of the tokens before these; see `init_cache`.
      taps: which of `attn_in`, `attn_out`, `mlp_in`, `mlp_hidden`, `keys`, `values`, `stream` to return,
        stacked over layers; see `block`.

    Raises:
      InputError: more tokens than the cache can hold, or an unknown tap.
      UsageError: the parameters carry a rotation of the inputs of `down` that the config does not name.
    """
    _check_taps(taps)
    x = embed(params, config, tokens)
    hidden, cache, collected = _run(params["blocks"], params["norm"], config, x, cache, tuple(taps))
    return Output(logits=logits(params, config, hidden), cache=cache, taps=collected)


def rms_norm(x: jax.Array, weight: jax.Array, config: ModelConfig) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, with statistics in float32."""
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps)
    weight = lax.expand_dims(weight, range(x.ndim - 1))
    if config.norm_plus_one:
        # Gemma multiplies before it rounds, Llama after.
        return (normed * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
    return normed.astype(x.dtype) * weight.astype(x.dtype)


def _scan_blocks(
    blocks: Params,
    norm: jax.Array,
    config: ModelConfig,
    x: jax.Array,
    cache: KVCache | None,
    taps: tuple[str, ...],
    *,
    reduce: Callable[[jax.Array], Any] = lambda x: x,
    shifts: jax.Array | None = None,
    remat: bool = False,
) -> tuple[jax.Array, KVCache | None, dict[str, Any]]:
    """All blocks by one scan, final norm."""
    length = x.shape[1]
    if cache is not None and length > cache.size:
        raise InputError(f"{length} tokens do not fit into a cache of {cache.size}; make it longer")
    rotations = _rotations(config, _positions(length, cache))
    flags = config.sliding_layers
    # Equal layers keep a Python bool, so that masked work is skipped; only mixed ones pay for a traced flag.
    mixed = len(set(flags)) > 1
    sliding = jnp.asarray(flags) if mixed else None
    slices = None if cache is None else (cache.k, cache.v)

    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        own_params, flag, pair, shift = layer
        block_params = jax.tree.map(
            lambda stack, own: stack.at(own) if isinstance(stack, QStack) else own,
            blocks,
            own_params,
            is_leaf=_is_stack,
        )
        x = x if shift is None else x + shift
        own = None if cache is None else KVCache(k=pair[0], v=pair[1], length=cache.length)
        flag = flag if mixed else any(flags)
        x, own, tapped = _block(block_params, config, x, flag, rotations, own, taps)
        reduced = {tap: reduce(values) for tap, values in tapped.items()}
        return x, (None if own is None else (own.k, own.v), reduced)

    # Inside a scan nothing is merged across iterations, so nothing need be kept from merging.
    step = jax.checkpoint(step, prevent_cse=False) if remat else step
    # Of layers that differ in layout the scan gets the places only.
    scanned = jax.tree.map(
        lambda leaf: leaf.places if isinstance(leaf, QStack) else leaf, blocks, is_leaf=_is_stack
    )
    x, (slices, collected) = lax.scan(step, x, (scanned, sliding, slices, shifts))
    if cache is not None:
        cache = KVCache(k=slices[0], v=slices[1], length=cache.length + length)
    return rms_norm(x, norm, config), cache, collected


# Without `jit` the scan would be compiled at every call; where it is traced it is inlined.
_run = jax.jit(_scan_blocks, static_argnames=("config", "taps", "remat"), inline=True)


def _block(
    block_params: Params,
    config: ModelConfig,
    x: jax.Array,
    sliding: bool | jax.Array,
    rotations: tuple[Any, Any],
    cache: KVCache | None,
    taps: tuple[str, ...],
) -> tuple[jax.Array, KVCache | None, dict[str, jax.Array]]:
    attn, mlp = block_params["attn"], block_params["mlp"]
    batch, length = x.shape[:2]

    precision = config.precision
    order = mlp["hidden_hadamard"].shape[-1] if "hidden_hadamard" in mlp else precision.hidden_hadamard
    if order != precision.hidden_hadamard:
        raise UsageError(
            f"these parameters are rotated by Hadamard matrices of order {order} at the inputs "
            f"of down, this config has {precision.hidden_hadamard or 'none'}; take both from "
            "load_checkpoint, or the config that rotate returned"
        )
    attn_in = _quantize(rms_norm(x, block_params["attn_norm"], config), precision.attn_in, attn["q"])
    q, k, v = (_linear(attn[name], attn_in).reshape(batch, length, -1, config.head_dim) for name in "qkv")
    if config.qk_norm:
        q, k = rms_norm(q, attn["q_norm"], config), rms_norm(k, attn["k_norm"], config)
    cos, sin = _select(sliding, *rotations)
    q, k = rotate(q, cos, sin) * config.query_scale, rotate(k, cos, sin)
    if "key_rotation" in attn:
        q, k = _turn_keys(attn, q, k)
    new = [_fake_quantize(heads, grid) for heads, grid in ((k, precision.keys), (v, precision.values))]
    if cache is None:
        attn_out = attention(q, *new, window=config.sliding_window, sliding=sliding)
    else:
        cache = cache.append(k, v, precision)
        attn_out = attention_to_cache(q, cache, window=config.sliding_window, sliding=sliding)
    attn_out = _quantize(attn_out, precision.attn_out, attn["o"])
    y = _linear(attn["o"], attn_out)
    x = x + _branch(block_params, config, "attn", y)

    mlp_in = _quantize(rms_norm(x, block_params["mlp_norm"], config), precision.mlp_in, mlp["gate"])
    mlp_hidden = _activate(_linear(mlp["gate"], mlp_in), config) * _linear(mlp["up"], mlp_in)
    mlp_hidden = _quantize(mlp_hidden, precision.mlp_hidden, mlp["down"], hadamard=precision.hidden_hadamard)
    y = _linear(mlp["down"], mlp_hidden)
    x = x + _branch(block_params, config, "mlp", y)

    values_by_tap = dict(zip(TAPS, map(_values, (attn_in, attn_out, mlp_in, mlp_hidden)), strict=True))
    values_by_tap |= {
        tap: heads.reshape(batch, length, -1) for tap, heads in zip(CACHE_TAPS, new, strict=True)
    }
    values_by_tap[STREAM] = x
    return x, cache, {tap: values_by_tap[tap] for tap in taps}


def _check_taps(taps: Sequence[str]) -> None:
    if unknown := set(taps) - set(_ALL_TAPS):
        raise InputError(f"unknown taps {sorted(unknown)}; there are {', '.join(_ALL_TAPS)}")


def _quantize(
    x: jax.Array, grid: ActivationGrid | None, reader: Params, *, hadamard: int = 0
) -> jax.Array | QActivation:
    """Integers where the linear that reads `x` has some too, otherwise values that pass gradients on.

    First blocks of `hadamard` channels are transformed, if it is not 0.
    """
    if grid is not None and not _is_array(reader["kernel"]):
        return QActivation.of(x, grid, hadamard=hadamard)
    if hadamard:
        x = hadamard_transform(x.reshape(*x.shape[:-1], -1, hadamard)).reshape(x.shape)
    return _fake_quantize(x, grid)


def _fake_quantize(x: jax.Array, grid: ActivationGrid | None) -> jax.Array:
    return x if grid is None else grid.fake_quantize(x)


def _values(x: jax.Array | QActivation) -> jax.Array:
    return x.values if isinstance(x, QActivation) else x


def _turn_keys(attn: Params, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries and keys in the basis `key_rotation` `[KV, n, n]`; keys less `key_shift` `[KV, n]` first.

    A shift that all keys of a head share changes no softmax; the rotation cancels in the product.
    """
    turn, shift = (attn[name].astype(k.dtype) for name in ("key_rotation", "key_shift"))
    queries = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    queries = jnp.einsum("bthgi,hij->bthgj", queries, turn, precision="highest").reshape(q.shape)
    return queries, jnp.einsum("bthi,hij->bthj", k - shift[None, None], turn, precision="highest")


def _branch(block_params: Params, config: ModelConfig, part: str, y: jax.Array) -> jax.Array:
    """What `part` adds to the residual stream, given the output of its last linear."""
    if config.post_norms:
        y = rms_norm(y, block_params[f"{part}_post_norm"], config)
    rotation = block_params.get(f"{part}_post_rotation")  # see methods.rotate
    return y if rotation is None else _matmul(y, rotation, y.dtype)


def _linear(linear: Params, x: jax.Array | QActivation) -> jax.Array:
    y = _matmul(x, linear["kernel"], _values(x).dtype)
    if "bias" in linear:
        y = y + lax.expand_dims(linear["bias"].astype(y.dtype), range(y.ndim - 1))
    return y


def _matmul(x: jax.Array | QActivation, kernel: Any, dtype: Any) -> jax.Array:
    if _is_array(kernel):
        x = _values(x)
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=dtype)
    return (x @ kernel).astype(dtype)


def _is_stack(leaf: Any) -> bool:
    return isinstance(leaf, QStack)


def _is_array(kernel: Any) -> bool:
    return isinstance(kernel, (jax.Array, np.ndarray))


def _activate(x: jax.Array, config: ModelConfig) -> jax.Array:
    if config.activation == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=config.activation == "gelu_tanh")


def _positions(length: int, cache: KVCache | None) -> jax.Array:
    positions = jnp.arange(length, dtype=jnp.int32)
    return positions if cache is None else positions + cache.length


def _rotations(config: ModelConfig, positions: jax.Array) -> tuple[Any, Any]:
    """Rotation tables of full and of sliding layers."""
    full = tables(config.rope, config.head_dim, positions)
    local = full if config.rope_local is None else tables(config.rope_local, config.head_dim, positions)
    return full, local


def _select(sliding: bool | jax.Array, full: Any, local: Any) -> Any:
    if isinstance(sliding, bool):
        return local if sliding else full
    return jax.tree.map(lambda a, b: jnp.where(sliding, a, b), local, full)
