"""Arguments of the integer matmul with its result, for the tests of its kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.quant import pack


def problem(rows, blocks, block, groups, x_groups, out, bits, x_bits, scale_dtype=jnp.float16, seed=0):
    """Arguments of the matmul, and its result in float64."""
    rng = np.random.default_rng(seed)
    channels = blocks * block
    x = rng.integers(0, 2**x_bits, (rows, channels), dtype=np.uint8)
    x_scale = np.float32(rng.uniform(0.5, 2, (rows, x_groups)))
    x_lo = np.float32(rng.standard_normal((rows, x_groups)) * 2 ** (x_bits - 1))
    codes = rng.integers(0, 2**bits, (blocks, block, out), dtype=np.uint8)
    scale = np.asarray(rng.uniform(0.5, 2, (groups, out)) * rng.choice([-1, 1], (groups, out)), scale_dtype)
    zero = np.asarray(rng.uniform(0, 2**bits, (groups, out)), scale_dtype)
    per_x, per_w = channels // x_groups, channels // groups
    values = np.repeat(np.float64(x_lo), per_x, axis=1) + np.repeat(np.float64(x_scale), per_x, axis=1) * x
    steps = codes.reshape(channels, out) - np.repeat(np.float64(zero), per_w, axis=0)
    words = jax.jit(pack, static_argnums=1)(codes, bits)
    weight = np.repeat(np.float64(scale), per_w, axis=0) * steps
    return tuple(map(jnp.asarray, (x, x_scale, x_lo, words, scale, zero))), values @ weight


def close(y, expected, tolerance=1e-5):
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))
