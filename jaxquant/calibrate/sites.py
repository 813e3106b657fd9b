"""How large activations are where they are quantized, channel by channel, and what quantizing them costs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.models.config import ModelConfig, Precision
from jaxquant.models.decoder import CACHE_TAPS, block
from jaxquant.quant import ActivationGrid


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Site:
    """One tap of a block, over some tokens.

    Attributes:
      peak: `[n]`, `max_t |x_tc|` of every channel.
      rest: `[n]`, the same less the middle of the range of each group of a token, which an asymmetric grid
        with a free offset does not pay for.
      error: `sum (x' - x)^2 / sum x^2`, x' quantized on the site's grid.
      error_massive: the same of the largest token (maximum norm) of every sample alone.
    """

    peak: jax.Array
    rest: jax.Array
    error: jax.Array
    error_massive: jax.Array


def block_sites(
    params: Any, config: ModelConfig, x: jax.Array | np.ndarray, precision: Precision, *, sliding: bool
) -> dict[str, Site]:
    """A `Site` for every tap that `precision` quantizes, in its order, in a block that quantizes nothing.

    Args:
      params: of the block, float.
      config: of the model; what it quantizes is ignored, its `hidden_hadamard` is not.
      x: what enters the block, `[samples, seqlen, d]`.
      precision: the grids.
      sliding: whether the block's attention is windowed.
    """
    sites = _measure(params, config.in_floats(), jnp.asarray(x), precision, sliding=sliding)
    return {name: sites[name] for name in precision.grids}


@functools.partial(jax.jit, static_argnames=("config", "precision", "sliding"))
def _measure(
    params: Any, config: ModelConfig, x: jax.Array, precision: Precision, *, sliding: bool
) -> dict[str, Site]:
    grids = precision.grids
    _, _, taps = block(params, config, x.astype(config.dtype), sliding=sliding, taps=tuple(grids))
    return {
        name: _site(taps[name], grid, config.head_dim if name in CACHE_TAPS else None)
        for name, grid in grids.items()
    }


def _site(tap: jax.Array, grid: ActivationGrid, head_dim: int | None) -> Site:
    """`tap` is `[samples, seqlen, n]`; with `head_dim` every head of it has a grid of its own."""
    samples, seqlen, n = tap.shape
    x = tap.astype(jnp.float32).reshape(samples, seqlen, -1, head_dim or n)
    grouped = x.reshape(*x.shape[:-1], grid.groups(x.shape[-1]), -1)
    middle = (grouped.max(axis=-1, keepdims=True) + grouped.min(axis=-1, keepdims=True)) / 2
    lost = jnp.square(grid.fake_quantize(x) - x).sum(axis=(-2, -1))
    energy = jnp.square(x).sum(axis=(-2, -1))
    largest = jnp.abs(x).max(axis=(-2, -1)).argmax(axis=1)[:, None]
    of_largest = [jnp.take_along_axis(a, largest, axis=1).sum() for a in (lost, energy)]
    return Site(
        peak=jnp.abs(x).max(axis=(0, 1)).ravel(),
        rest=jnp.abs(grouped - middle).max(axis=(0, 1)).ravel(),
        error=lost.sum() / energy.sum(),
        error_massive=of_largest[0] / of_largest[1],
    )
