"""The specification, and the implementation where XLA widens what it multiplies."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def head_matmul(
    x: Float[Array, "rows d"], w: Float[Array, "vocabulary d"]
) -> Float[Array, "rows vocabulary"]:
    """`y = x @ w.T`, w rounded to the dtype of x; sums and result in float32."""
    return jnp.einsum("rd,vd->rv", x, w.astype(x.dtype), preferred_element_type=jnp.float32)
