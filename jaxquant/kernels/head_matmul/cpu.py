"""For CPUs, where XLA writes out the whole of a narrow `w` in float32 before it multiplies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.kernels.platform import Kernel
from jaxquant.quant.parts import by_parts

# Weights that are widened at once, so that they stay in the second cache, and their tokens: a product needs
# some.
_TILE, _LEAST_TOKENS = 2**20, 64


def head_matmul(
    x: Float[Array, "rows d"], w: Float[Array, "vocabulary d"] | Float[Array, "d vocabulary"], *, axis: int
) -> Float[Array, "rows vocabulary"]:
    """`y = x @ w.T`, or `x @ w`, by parts of the vocabulary; shapes as in `reference`.

    Nothing is rounded: where their dtypes differ, x and w are widened to float32.
    """
    dtype = x.dtype if x.dtype == w.dtype else jnp.dtype(jnp.float32)
    x = x.astype(dtype)

    def part(start: Any, width: int) -> Array:
        # Else XLA takes the conversion out of the loop, and widens all of w.
        whole, start = jax.lax.optimization_barrier((w, start))
        own = jax.lax.dynamic_slice_in_dim(whole, start, width, axis).astype(dtype)
        return jnp.matmul(x, own.T if axis == 0 else own, preferred_element_type=jnp.float32)

    return by_parts(part, w.shape[axis], max(_TILE // max(x.shape[1], 1), _LEAST_TOKENS))


def _refuses(x: Any, w: Any, *, axis: int) -> str:
    narrow = (jnp.bfloat16, jnp.float16)
    if x.dtype in (jnp.float32, *narrow) and w.dtype in narrow:
        return ""
    return f"it widens bfloat16 or float16 w, not {x.str_short()} by {w.str_short()}"


KERNEL = Kernel(head_matmul, _refuses)
