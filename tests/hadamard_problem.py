"""What the Hadamard transform that quantizes has to return, for the tests of its implementations."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxquant.linalg import hadamard
from jaxquant.quant import ActivationGrid

# Rows, channels, order of the matrix and channels of a group.
SHAPES = {
    "equal": (3, 256, 64, 64),
    "whole": (2, 512, 512, None),
    "odd part": (5, 1536, 1536, None),
    "narrow groups": (1, 512, 256, 32),
    "wide groups": (4, 1024, 128, 512),
    "other groups": (2, 1536, 256, 384),
    "many rows": (70, 256, 256, 128),
}
GRIDS = [
    ActivationGrid(bits=4),
    ActivationGrid(bits=3, clip=0.9),
    ActivationGrid(bits=8, symmetric=True, clip=0.95),
    ActivationGrid(bits=2, range="zero"),
]


def activations(rows: int, n: int, dtype=jnp.float32, seed: int = 0):
    """Rows of different size, each with an offset."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, n)) + rng.standard_normal((rows, 1))
    return jnp.asarray(x * 10 ** rng.uniform(-2, 2, (rows, 1)), dtype)


def check(results, x, grid: ActivationGrid, block: int) -> None:
    """Ranges are those of y in float64, and no code is further from y than rounding goes."""
    codes, scale, lo = (np.asarray(a) for a in results)
    assert codes.dtype == np.uint8
    assert scale.dtype == lo.dtype == np.float32
    rows, n = x.shape
    groups, top = grid.groups(n), 2**grid.bits - 1
    y = np.float64(x).reshape(-1, block) @ (hadamard(block) * block**-0.5)
    y = y.reshape(rows, groups, -1)
    low, high, largest = y.min(-1), y.max(-1), np.abs(y).max(-1)
    if grid.symmetric:
        own = grid.clip * np.maximum(-low, high) / (top // 2)
        ends = own, -own * (top // 2 + 1)
    elif grid.range == "zero":
        low, high = grid.clip * np.minimum(low, 0), grid.clip * np.maximum(high, 0)
        ends = (high - low) / top, low
    else:
        middle, half = (low + high) / 2, grid.clip * (high - low) / 2
        ends = 2 * half / top, middle - half
    tolerance = 4e-6 * largest + 2**-11 * np.abs(ends) * (grid.scale_dtype == "float16")
    assert np.all(np.abs(np.stack([scale, lo]) - ends) <= tolerance)
    step = np.float64(scale)[..., None]
    place = np.clip((y - np.float64(lo)[..., None]) / step, 0, top)
    assert np.all(np.abs(codes.reshape(y.shape) - place) <= 0.5 + 4e-6 * largest[..., None] / step)
