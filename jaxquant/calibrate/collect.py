"""Moments of the inputs of every linear: of one block that streams by, or of a whole model at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibrate.moments import Mask, Moments, massive_tokens, merge, observe
from jaxquant.models.config import ModelConfig
from jaxquant.models.decoder import TAPS, block, embed, reduce_taps

# Tokens that go through a block at once: enough for full-speed products, little memory.
BATCH_TOKENS = 8192


def batches(array: np.ndarray | jax.Array) -> Iterator[slice]:
    """Equal slices of the samples with at most `BATCH_TOKENS` tokens (equal, so that nothing recompiles)."""
    samples, seqlen = array.shape[:2]
    size = max(
        d for d in range(1, samples + 1) if samples % d == 0 and (d == 1 or d * seqlen <= BATCH_TOKENS)
    )
    for start in range(0, samples, size):
        yield slice(start, start + size)


def embed_all(params: dict[str, Any], config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """What enters the first block, by `params["embed"]`: float32 `[samples, seqlen, d]`, on the host."""
    table = {"embed": jnp.asarray(params["embed"])}
    rows = [np.asarray(embed(table, config, jnp.asarray(tokens[part]))) for part in batches(tokens)]
    return np.concatenate(rows).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("config", "sliding"))
def pass_block(params: Any, config: ModelConfig, x: jax.Array, *, sliding: bool) -> jax.Array:
    """What leaves one block, `[B, T, d]`, of what enters it."""
    return block(params, config, x, sliding=sliding)[0]


def block_moments(
    params: Any,
    config: ModelConfig,
    hidden: np.ndarray,
    *,
    sliding: bool,
    taps: tuple[str, ...] = TAPS,
    mask: Mask = "none",
    weights: Mapping[str, np.ndarray] | None = None,
    original: tuple[Any, np.ndarray] | None = None,
) -> dict[str, Moments]:
    """Moments at the taps of one block.

    Args:
      params: the block's parameters, float or packed.
      hidden: what enters the block, `[samples, seqlen, d]`.
      sliding: whether its attention is windowed.
      taps: which to observe.
      mask: tokens left out.
      weights: by tap, of the tokens `[samples, seqlen]` (see `calibrate.fisher`).
      original: the block and what enters it in the original model, for moments with `drift`.
    """

    def observe_part(part: slice) -> dict[str, Moments]:
        own = None if weights is None else {tap: weights[tap][part] for tap in taps}
        then = None if original is None else (original[0], original[1][part])
        return _observe_block(params, config, hidden[part], own, then, sliding=sliding, taps=taps, mask=mask)

    moments = functools.reduce(merge_taps, map(observe_part, batches(hidden)))
    return jax.block_until_ready(moments)  # else their time would count as that of the first linear


def model_moments(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: np.ndarray,
    *,
    taps: tuple[str, ...] = TAPS,
    mask: Mask = "none",
) -> dict[str, Moments]:
    """Moments at the taps of all blocks of a model that fits in memory, in one compiled pass per batch.

    One `lax.scan` over the blocks; activations are reduced block by block and never stacked. Every block
    sees the activations of the model as it is: for those behind quantized blocks use `quantize_model`.
    The result suits `jax.vmap(recipe)` over the stacked kernels.

    Args:
      params: of the whole model, blocks stacked.
      tokens: int32 `[samples, seqlen]`.
      taps, mask: as in `block_moments`.

    Returns:
      By tap `Moments` with a leading layer axis: `second` `[L, n, n]`.
    """
    parts = (jnp.asarray(tokens[part]) for part in batches(tokens))
    return functools.reduce(
        merge_taps, (_observe_model(params, config, part, taps=taps, mask=mask) for part in parts)
    )


def merge_taps(a: Mapping[str, Moments], b: Mapping[str, Moments]) -> dict[str, Moments]:
    """`merge` of the moments of the same taps."""
    return {tap: merge(a[tap], b[tap]) for tap in a}


def _observe(
    x: jax.Array, mask: Mask, weights: jax.Array | None = None, original: jax.Array | None = None
) -> Moments:
    kept = None
    if mask == "first":
        kept = jnp.broadcast_to(jnp.arange(x.shape[1]) > 0, x.shape[:2])
    elif mask == "massive":
        kept = ~massive_tokens(x)
    return observe(x, mask=kept, weights=weights, original=original)


@functools.partial(jax.jit, static_argnames=("config", "sliding", "taps", "mask"))
def _observe_block(
    params: Any,
    config: ModelConfig,
    x: jax.Array,
    weights: dict[str, jax.Array] | None,
    original: tuple[Any, jax.Array] | None,
    *,
    sliding: bool,
    taps: tuple[str, ...],
    mask: Mask,
) -> dict[str, Moments]:
    _, _, tapped = block(params, config, x.astype(config.dtype), sliding=sliding, taps=taps)
    known: dict[str, jax.Array] = {}
    if original is not None:
        params, x = original
        _, _, known = block(params, config.in_floats(), x.astype(config.dtype), sliding=sliding, taps=taps)
    own = {} if weights is None else weights
    return {tap: _observe(tapped[tap], mask, own.get(tap), known.get(tap)) for tap in taps}


@functools.partial(jax.jit, static_argnames=("config", "taps", "mask"))
def _observe_model(
    params: dict[str, Any], config: ModelConfig, tokens: jax.Array, *, taps: tuple[str, ...], mask: Mask
) -> dict[str, Moments]:
    return reduce_taps(params, config, tokens, lambda x: _observe(x, mask), taps=taps)
