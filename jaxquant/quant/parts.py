"""Arrays that are computed a part of their last axis at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def by_parts(compute: Callable[[Any, int], Any], size: int, largest: int) -> Any:
    """What `compute(0, size)` gives, from parts of at most `largest`, one after another.

    Parts are equally wide. Where no number of them, up to twice the least, divides the axis, the last one
    overlaps the one before, and the result is written twice.

    Args:
      compute: `(start, width)` to arrays, or trees of them, whose last axis are the `width` entries from
        `start` on; `start` is an array where there are several parts, `width` an int.
      size: of the last axis.
      largest: width of a part.
    """
    least = max(-(-size // largest), 1)
    count = next((n for n in range(least, 2 * least) if size % n == 0), least)
    width = -(-size // count)
    if count == 1:
        return compute(0, size)
    starts = jnp.minimum(jnp.arange(count) * width, size - width)
    left = size - (count - 1) * width

    def join(found: Array) -> Array:
        *lead, _ = found.shape[1:]
        found = jnp.moveaxis(found, 0, -2)
        if left == width:
            return found.reshape(*lead, size)
        whole = found[..., :-1, :].reshape(*lead, size - left)
        return jnp.concatenate([whole, found[..., -1, width - left :]], axis=-1)

    return jax.tree.map(join, jax.lax.map(lambda start: compute(start, width), starts))
