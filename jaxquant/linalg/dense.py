"""Two operations that loops over rows are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array


def product(a: Array, b: Array) -> Array:
    """`a @ b` in the full precision of its dtype, on every backend."""
    return jnp.matmul(a, b, precision="highest")


def rows_from(a: Array, start: Array, size: int, axis: int = 0) -> Array:
    """`size` consecutive entries of `axis`, the first at `start`, which may be traced."""
    return jax.lax.dynamic_slice_in_dim(a, start, size, axis)
