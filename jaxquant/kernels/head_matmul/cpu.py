"""For CPUs, where XLA writes out the whole of a narrow `w` in float32 before it multiplies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.kernels.platform import Kernel

# Rows of w that are widened at once, so that they stay in the caches; with fewer the loop costs more than it
# spares.
_MOST, _LEAST = 4096, 256


def head_matmul(
    x: Float[Array, "rows d"], w: Float[Array, "vocabulary d"]
) -> Float[Array, "rows vocabulary"]:
    """`y = x @ w.T` in float32; shapes as in `reference`.

    One row by bfloat16 is a sum that XLA fuses with the conversion; a loop over such a w it would widen as a
    whole. Over float16 it loops, and what it fuses it converts one by one.
    """
    wide = x.astype(jnp.float32)
    if w.dtype == jnp.bfloat16:
        return jnp.sum(w.astype(jnp.float32) * wide, axis=-1)[None]
    parts = w.reshape(-1, _part(len(w)), w.shape[1])
    y = jax.lax.map(lambda part: jnp.matmul(wide, part.astype(jnp.float32).T), parts)
    return jnp.moveaxis(y, 0, 1).reshape(len(x), -1)


def _part(rows: int) -> int:
    return max(d for d in range(1, _MOST + 1) if rows % d == 0)


def _refuses(x: Any, w: Any) -> str:
    row_by_bfloat16 = x.shape[0] == 1 and w.dtype == jnp.bfloat16
    by_parts = w.dtype == jnp.float16 and _part(w.shape[0]) >= _LEAST
    if x.dtype in (jnp.float32, jnp.bfloat16) and (row_by_bfloat16 or by_parts):
        return ""
    return (
        "it takes one row by bfloat16, or rows by float16 in even parts, "
        f"not {x.str_short()} by {w.str_short()}"
    )


KERNEL = Kernel(head_matmul, _refuses)
