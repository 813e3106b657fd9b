"""What kernels for TPUs do with integers because no vector unit does it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.kernels.mosaic import bits_of_half, widened


def test_every_float16_is_widened_exactly():
    every = jnp.arange(2**16, dtype=jnp.uint16)
    half = jax.lax.bitcast_convert_type(every, jnp.float16)
    finite = np.isfinite(np.asarray(half))
    wide = np.asarray(widened(bits_of_half(half)))
    np.testing.assert_array_equal(wide[finite], np.asarray(half, np.float32)[finite])
    np.testing.assert_array_equal(np.isfinite(wide), finite)
    np.testing.assert_array_equal(np.isnan(wide), np.isnan(np.asarray(half, np.float32)))
