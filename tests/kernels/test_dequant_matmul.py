"""Every implementation of the dequantizing matmul against its specification."""

from __future__ import annotations

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.kernels.dequant_matmul import dequant_matmul, reference, scan
from jaxquant.quant import pack

packed = jax.jit(pack, static_argnums=1)


def problem(bits: int, blocks: int, block: int, groups: int, out: int = 24, rows: int = 3):
    rng = np.random.default_rng(bits)
    words = packed(jnp.asarray(rng.integers(0, 2**bits, (blocks, block, out), dtype=np.uint8)), bits)
    scale = jnp.asarray(rng.uniform(0.5, 2, (groups, out)), jnp.float16)
    zero = jnp.asarray(rng.integers(0, 2**bits, (groups, out)), jnp.float16)
    return jnp.asarray(rng.standard_normal((rows, blocks * block)), jnp.float32), words, scale, zero


# One block, several blocks a group, blocks that fill one tile, a prime number of blocks, blocks above a tile.
@pytest.mark.parametrize(
    ("bits", "blocks", "block", "groups"),
    [(4, 1, 64, 1), (3, 12, 32, 4), (2, 24, 64, 24), (8, 31, 16, 31), (5, 2, 600, 2), (1, 6, 9, 3)],
)
def test_scan_equals_reference(bits, blocks, block, groups):
    x, words, scale, zero = problem(bits, blocks, block, groups)
    expected, *others = (
        jax.jit(functools.partial(f, bits=bits, block=block))(x, words, scale, zero)
        for f in (reference.dequant_matmul, scan.dequant_matmul, dequant_matmul)
    )
    tolerance = 1e-5 * float(jnp.max(jnp.abs(expected)))
    for y in others:
        np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance)


def test_leading_axes_and_dtype():
    x, words, scale, zero = problem(4, 2, 32, 2)
    y = dequant_matmul(x.reshape(3, 1, 64).astype(jnp.bfloat16), words, scale, zero, bits=4, block=32)
    assert y.shape == (3, 1, 24)
    assert y.dtype == jnp.bfloat16


def test_ragged_batch_under_vmap():
    x, words, scale, zero = problem(3, 4, 24, 2)
    stacked = [jnp.stack([a, a[..., ::-1]]) for a in (words, scale, zero)]
    y = jax.vmap(lambda *a: dequant_matmul(x, *a, bits=3, block=24))(*stacked)
    np.testing.assert_allclose(y[1], y[0][:, ::-1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "module",
    [
        "jaxquant.kernels.dequant_matmul",
        *(pytest.param(f"jaxquant.quant{name}", marks=pytest.mark.slow) for name in ("", ".packing")),
    ],
)
def test_either_package_can_be_imported_first(module):
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, capture_output=True)
