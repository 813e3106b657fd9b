"""The specification, and the implementation where XLA widens what it multiplies."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def head_matmul(
    x: Float[Array, "rows d"], w: Float[Array, "vocabulary d"] | Float[Array, "d vocabulary"], *, axis: int
) -> Float[Array, "rows vocabulary"]:
    """`y = x @ w.T`, or `x @ w` for `axis` 1, w rounded to the dtype of x; sums and result in float32."""
    letters = "vd" if axis == 0 else "dv"
    return jnp.einsum(f"rd,{letters}->rv", x, w.astype(x.dtype), preferred_element_type=jnp.float32)
