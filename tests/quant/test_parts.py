"""Parts of an axis: together they are what is computed at once."""

from __future__ import annotations

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from jaxquant.quant.parts import by_parts


@settings(max_examples=10, deadline=None)
@given(size=st.integers(0, 40), largest=st.integers(1, 12))
def test_parts_are_the_whole(size, largest):
    a = jnp.arange(2 * size, dtype=jnp.float32).reshape(2, size)
    widths = []

    def compute(start, width):
        widths.append(width)
        part = jax.lax.dynamic_slice_in_dim(a, start, width, axis=1)
        return {"square": part**2, "none": None, "first": part[0]}

    found = by_parts(compute, size, largest)
    np.testing.assert_array_equal(found["square"], a**2)
    np.testing.assert_array_equal(found["first"], a[0])
    assert found["none"] is None
    assert max(widths) <= largest
