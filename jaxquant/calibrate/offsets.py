"""What OffQ needs to know of a model: where its largest tokens point; its keys, values and hidden units."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibrate.collect import batches
from jaxquant.models.config import ModelConfig
from jaxquant.models.decoder import reduce_taps

_STREAM = ("attn_in", "mlp_in")


@dataclasses.dataclass(frozen=True, eq=False)
class Offsets:
    """Sums over calibration tokens, float64 on the host.

    Attributes:
      top: `[d, d]`, `sum x x^T` of the largest token (maximum norm) of every sequence, trace 1 for each site
        (what attention and the MLP of each block read), mean over sites.
      all: `[d, d]`, the same of all tokens.
      values: `[layers, kv_heads, head_dim, head_dim]`, mean second moment of the values.
      keys: likewise of the keys behind the position embedding, less their mean.
      key_mean: `[layers, kv_heads, head_dim]`.
      hidden_peak: `[layers, f]`, `max |x|` of the inputs of `down`.
    """

    top: np.ndarray
    all: np.ndarray
    values: np.ndarray
    keys: np.ndarray
    key_mean: np.ndarray
    hidden_peak: np.ndarray


def offsets(params: dict[str, Any], config: ModelConfig, tokens: np.ndarray) -> Offsets:
    """Collects `Offsets` of the float model as it is; fold its norms first.

    Args:
      tokens: int32 `[samples, seqlen]`; every sample is a sequence with one largest token.
    """
    parts = [_reduce(params, config, jnp.asarray(tokens[part])) for part in batches(tokens)]
    sums = functools.reduce(_add, (jax.tree.map(_wide, part) for part in parts))
    top, everything = (
        np.mean([_mean_site(sums[tap][kind]) for tap in _STREAM], axis=0) for kind in ("top", "all")
    )
    count = tokens.size
    mean = sums["keys"]["sum"] / count
    keys = sums["keys"]["second"] / count - mean[..., :, None] * mean[..., None, :]
    return Offsets(
        top=top,
        all=everything,
        values=sums["values"]["second"] / count,
        keys=keys,
        key_mean=mean,
        hidden_peak=sums["mlp_hidden"]["peak"],
    )


@functools.partial(jax.jit, static_argnames="config")
def _reduce(params: dict[str, Any], config: ModelConfig, tokens: jax.Array) -> dict[str, Any]:
    reduced = reduce_taps(params, config, tokens, _largest_and_all, taps=_STREAM)
    heads = functools.partial(_per_head, heads=config.num_kv_heads)
    reduced |= reduce_taps(params, config, tokens, heads, taps=("keys", "values"))
    return reduced | reduce_taps(params, config, tokens, _peak, taps=("mlp_hidden",))


def _largest_and_all(x: jax.Array) -> dict[str, jax.Array]:
    x = x.astype(jnp.float32)
    at = jnp.argmax(jnp.max(jnp.abs(x), axis=-1), axis=-1)
    top = jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
    flat = x.reshape(-1, x.shape[-1])
    return {kind: jnp.matmul(a.T, a, precision="highest") for kind, a in (("top", top), ("all", flat))}


def _per_head(x: jax.Array, *, heads: int) -> dict[str, jax.Array]:
    x = x.astype(jnp.float32).reshape(-1, heads, x.shape[-1] // heads)
    return {"sum": jnp.sum(x, axis=0), "second": jnp.einsum("thi,thj->hij", x, x, precision="highest")}


def _peak(x: jax.Array) -> dict[str, jax.Array]:
    return {"peak": jnp.max(jnp.abs(x), axis=(0, 1)).astype(jnp.float32)}


def _wide(leaf: jax.Array) -> np.ndarray:
    return np.asarray(leaf, np.float64)


def _add(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {
        tap: {
            name: np.maximum(x, b[tap][name]) if name == "peak" else x + b[tap][name]
            for name, x in own.items()
        }
        for tap, own in a.items()
    }


def _mean_site(second: np.ndarray) -> np.ndarray:
    return np.mean(second / np.trace(second, axis1=-2, axis2=-1)[:, None, None], axis=0)
