"""What OffQ needs to know of a model: where its largest tokens point; its keys, values and hidden units."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibrate.collect import batches, embed_all
from jaxquant.errors import NonFiniteError
from jaxquant.io.source import Source
from jaxquant.models.config import ModelConfig
from jaxquant.models.decoder import block

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


def offsets(source: Source, tokens: np.ndarray) -> Offsets:
    """Collects `Offsets` of the model as it is, a block at a time; its norms should be folded.

    Args:
      source: the model.
      tokens: int32 `[samples, seqlen]`; every sample is a sequence with one largest token.

    Raises:
      NonFiniteError: NaN or infinity somewhere; names the block.
    """
    config, count = source.config, tokens.size
    hidden = embed_all(source.outer(), config, tokens)
    layers = []
    for index in range(config.num_layers):
        params = jax.tree.map(jnp.asarray, source.block(index))
        sums = []
        for part in batches(hidden):
            hidden[part], reduced = _reduce_block(params, config, hidden[part], sliding=config.slides(index))
            sums.append({name: np.asarray(leaf, np.float64) for name, leaf in reduced.items()})
        layers.append(functools.reduce(_add, sums))
        if not all(np.all(np.isfinite(leaf)) for leaf in layers[-1].values()):
            raise NonFiniteError(
                f"blocks.{index}: NaN or infinity in its weights or activations; check the model file, or "
                "run the model in float32"
            )
    stacked = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    mean = stacked["keys_sum"] / count
    return Offsets(
        top=np.mean([_mean_site(stacked[f"{tap}_top"]) for tap in _STREAM], axis=0),
        all=np.mean([_mean_site(stacked[f"{tap}_all"]) for tap in _STREAM], axis=0),
        values=stacked["values_second"] / count,
        keys=stacked["keys_second"] / count - mean[..., :, None] * mean[..., None, :],
        key_mean=mean,
        hidden_peak=stacked["hidden_peak"],
    )


@functools.partial(jax.jit, static_argnames=("config", "sliding"))
def _reduce_block(
    params: Any, config: ModelConfig, x: jax.Array, *, sliding: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The block's output, and its sums over the tokens of the batch."""
    taps = (*_STREAM, "mlp_hidden", "keys", "values")
    y, _, read = block(params, config, x.astype(config.dtype), sliding=sliding, taps=taps)
    read = {tap: values.astype(jnp.float32) for tap, values in read.items()}
    sums = {"hidden_peak": jnp.max(jnp.abs(read["mlp_hidden"]), axis=(0, 1))}
    for tap in _STREAM:
        values = read[tap]
        at = jnp.argmax(jnp.max(jnp.abs(values), axis=-1), axis=-1)
        top = jnp.take_along_axis(values, at[:, None, None], axis=1)[:, 0]
        for kind, rows in (("top", top), ("all", values.reshape(-1, values.shape[-1]))):
            sums[f"{tap}_{kind}"] = jnp.matmul(rows.T, rows, precision="highest")
    for tap in ("keys", "values"):
        heads = read[tap].reshape(-1, config.num_kv_heads, config.head_dim)
        sums[f"{tap}_second"] = jnp.einsum("thi,thj->hij", heads, heads, precision="highest")
        sums[f"{tap}_sum"] = jnp.sum(heads, axis=0)
    return y.astype(jnp.float32), sums


def _add(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: (np.maximum if name == "hidden_peak" else np.add)(a[name], b[name]) for name in a}


def _mean_site(second: np.ndarray) -> np.ndarray:
    return np.mean(second / np.trace(second, axis1=-2, axis2=-1)[:, None, None], axis=0)
