"""What is kept of a run besides parameters: a row for every linear, and what is pictured of some blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibrate.sites import block_sites
from jaxquant.errors import NonFiniteError
from jaxquant.io import checkpoint
from jaxquant.io.source import Source
from jaxquant.models.config import ModelConfig
from jaxquant.quant import MixedQArray, Packed
from jaxquant.surgery import RotatedSource

Event = dict[str, Any]

# Channels of a site that are pictured.
_CHANNELS = 96


def read_rows(folder: Path) -> tuple[list[Event], dict[str, list[Event]]]:
    """Rows of all finished blocks of `folder`, in order, and what is to be pictured: histograms and sites."""
    records = [checkpoint.load_block(folder, i)[1] for i in range(checkpoint.finished_blocks(folder))]
    pictures = {kind: [p for r in records for p in r.get(kind, [])] for kind in ("histograms", "sites")}
    return [row for r in records for row in r["rows"]], pictures


def packed_row(packed: Packed, index: int, path: str) -> Event:
    """Place and size of a packed linear; where groups differ in bits their mean, and how many have which."""
    mixed = isinstance(packed, MixedQArray)
    bits = packed.bits if mixed else packed.grid.bits
    row = {
        "module": f"blocks.{index}.{path}",
        "block": index,
        "linear": path,
        "shape": list(packed.shape),
        "bits": int(bits) if bits == int(bits) else bits,
        "group_size": packed.group_size if mixed else packed.grid.group_size,
        "bytes": packed.nbytes,
    }
    if mixed:
        row["widths"] = {str(bits): count for bits, count in packed.widths.items()}
    return row


def kept_row(kernel: jax.Array, index: int, path: str) -> Event:
    """The row of a linear that stays in floating point; what storing it in 16 bits loses is not counted."""
    module = f"blocks.{index}.{path}"
    if not bool(jnp.all(jnp.isfinite(kernel))):
        raise NonFiniteError(f"{module}: NaN or infinity in its weight; check the model file")
    return {
        "module": module,
        "block": index,
        "linear": path,
        "shape": list(kernel.shape),
        "bits": 16,
        "group_size": None,
        "error": 0.0,
        "error_rtn": 0.0,
        "damping": 0.0,
        "attempts": 0,
        "fallback": False,
        "dead": 0,
        "bytes": 2 * kernel.size,
        "seconds": 0.0,
    }


def histogram(kernel: jax.Array, packed: Packed, module: str) -> Event:
    """Distribution of the original weights in units of the grid: level k of a group lies at k.

    Of groups that differ in bits, those with the most.
    """
    w = kernel.astype(jnp.float32)
    if isinstance(packed, MixedQArray):
        count = packed.parts[-1].scale.shape[0]
        groups = w.reshape(len(packed.order), -1, w.shape[1])[packed.order[-count:]]
        w, packed = groups.reshape(-1, w.shape[1]), packed.parts[-1]
    grid, scale, zero = packed.grid, packed.scale.astype(jnp.float32), packed.zero
    w = w if packed.order is None else w[packed.order]
    w = w.reshape(scale.shape[0], -1, scale.shape[1])
    shift = grid.constant_zero if zero is None else zero.astype(jnp.float32)[:, None, :]
    top = 2**grid.bits - 1
    edges = np.linspace(-1.5, top + 1.5, 16 * min(top + 3, 16) + 1)
    units = np.clip(np.asarray(w / scale[:, None, :] + shift).ravel(), edges[0], edges[-1])
    counts, _ = np.histogram(units, edges)
    return {
        "module": module,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "levels": list(range(top + 1)),
    }


def sites(
    source: Source, index: int, params: dict[str, Any], config: ModelConfig, hidden: np.ndarray
) -> list[Event]:
    """Sizes of the activations that will be quantized, and where a surgery moved them, of those before it."""
    sliding = config.slides(index)
    measured = before = block_sites(params, config, hidden, config.precision, sliding=sliding)
    if isinstance(source, RotatedSource):
        plain, turned = source.unrotated(hidden)
        block = jax.tree.map(jnp.asarray, plain.block(index))
        before = block_sites(block, plain.config, turned, config.precision, sliding=sliding)
    return [
        {
            "module": f"blocks.{index}.{name}",
            "before": _descending(before[name].peak),
            "after": _descending(site.peak),
            "rest": _descending(site.rest),
            "error_before": float(before[name].error),
            "error": float(site.error),
        }
        for name, site in measured.items()
    ]


def _descending(peaks: jax.Array) -> list[float]:
    """Channels by size, at most `_CHANNELS` of them: the first, the last, evenly in between."""
    ordered = np.sort(np.asarray(peaks))[::-1]
    at = np.linspace(0, len(ordered) - 1, min(len(ordered), _CHANNELS)).round().astype(int)
    return ordered[at].tolist()
