"""Rotary position embeddings in the half-split order of Hugging Face checkpoints."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.models.config import Rope


def frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies `[head_dim / 2]` in float64 and the factor on cosine and sine.

    `default`: `theta ** (-2 i / head_dim)`. `linear` divides by `factor`. `llama3` divides the frequencies
    whose wavelength exceeds `original_max_position / low_freq_factor` and blends down to
    `original_max_position / high_freq_factor`. `yarn` (arXiv:2309.00071, section 3.2) blends between the
    dimensions that turn `beta_fast` and `beta_slow` times over the original context, and scales attention
    by `0.1 ln(factor) + 1` through the returned factor.
    """
    inverse = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        return inverse / rope.factor, 1.0
    if rope.kind == "llama3":
        turns = rope.original_max_position * inverse / (2 * np.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        return inverse * (smooth + (1 - smooth) / rope.factor), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, inverse, head_dim)
    return inverse, 1.0


def _yarn(rope: Rope, inverse: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    def dimension(turns: float) -> float:
        return (
            head_dim
            * math.log(rope.original_max_position / (turns * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    blended = inverse * (1 - ramp) + inverse / rope.factor * ramp
    if rope.attention_factor is not None:
        return blended, rope.attention_factor

    def scale(m: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * m * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return blended, scale(rope.mscale) / scale(rope.mscale_all_dim)
    return blended, scale(1.0)


def tables(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[T, head_dim / 2]` in float32 of the angles at `positions` `[T]`."""
    inverse, factor = frequencies(rope, head_dim)
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(inverse, jnp.float32)[None]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs `(i, i + head_dim / 2)` of `x` `[B, T, heads, head_dim]`; tables `[T, head_dim / 2]`."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = (table.astype(x.dtype)[None, :, None] for table in (cos, sin))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
