"""Every implementation of the dequantizing matmul against its specification."""

from __future__ import annotations

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_problem import close
from integer_problem import problem as codes_problem

from jaxquant.kernels.dequant_matmul import dequant_matmul, reference, scan
from jaxquant.quant import Grid, QArray, pack
from jaxquant.quant.packing import packed_rows

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


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    blocks_of_group=st.integers(1, 3),
    block=st.integers(1, 40),
    out=st.integers(1, 150),
    bits=st.integers(1, 8),
    tile_rows=st.sampled_from([8, 64]),
    seed=st.integers(0, 2**16),
)
def test_scan_equals_float64(rows, groups, blocks_of_group, block, out, bits, tile_rows, seed):
    """Tiles of several blocks, of one, and of some of the outputs of one."""
    blocks = groups * blocks_of_group
    (codes, scale, lo, *weight), expected = codes_problem(
        rows, blocks, block, groups, 1, out, bits, 8, seed=seed
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "TILE_ROWS", tile_rows)
        multiply = jax.jit(lambda *a: scan.dequant_matmul(*a, bits=bits, block=block))
        close(multiply(lo + scale * codes.astype(jnp.float32), *weight), expected)


@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 4),
    size=st.integers(1, 20),
    out=st.integers(1, 40),
    bits=st.integers(1, 8),
    seed=st.integers(0, 2**16),
)
def test_order_of_inputs(rows, groups, size, out, bits, seed):
    """Packed row k holds input `order[k]`."""
    rng = np.random.default_rng(seed)
    channels = groups * size
    codes = rng.integers(0, 2**bits, (channels, out), dtype=np.uint8)
    scale, zero = rng.uniform(0.5, 2, (groups, out)), rng.uniform(0, 2**bits, (groups, out))
    scale, zero = (jnp.asarray(a, jnp.float16) for a in (scale, zero))
    order, x = rng.permutation(channels).astype(np.int32), np.float32(rng.standard_normal((rows, channels)))

    @jax.jit
    def product(x, codes, scale, zero, order):
        q = QArray.from_codes(codes, scale, zero, Grid(bits=bits, group_size=size), order=order)
        return x @ q

    dense = np.zeros((channels, out))
    step, shift = (np.repeat(np.float64(a), size, axis=0) for a in (scale, zero))
    dense[order] = step * (codes - shift)
    close(product(x, codes, scale, zero, order), np.float64(x) @ dense)


@pytest.mark.parametrize("moving", [False, True])
def test_one_block_of_all_inputs_is_cut(moving):
    """14330 inputs have no divisor that makes blocks; the weight is 235 MB in float32, the words 29 MB."""
    array = jax.ShapeDtypeStruct
    half = array((1, 4096), jnp.float16)
    arguments = (array((1, 14330), jnp.float32), array((1, 7165, 4096), jnp.uint8), half, half)
    product = functools.partial(dequant_matmul, bits=4, block=14330, backend="portable")
    f = jax.grad(lambda *a: jnp.sum(product(*a)), argnums=(0, 2)) if moving else product
    program = jax.jit(f).lower(*arguments).compile()
    assert program.memory_analysis().temp_size_in_bytes < 80e6


@pytest.mark.parametrize("backend", ["portable", "kernel"])
def test_programs_do_not_grow_with_the_weight(backend):
    def text(size):
        array = jax.ShapeDtypeStruct
        half = array((size // 128, size), jnp.float16)
        words = array((size // 128, packed_rows(128, 3), size), jnp.uint8)
        product = jax.jit(functools.partial(dequant_matmul, bits=3, block=128, backend=backend))
        traced = product.trace(array((4, size), jnp.bfloat16), words, half, half)
        return traced.lower(lowering_platforms=("tpu",)).as_text()

    small, large = text(1024), text(8192)
    assert ("tpu_custom_call" in small) == (backend == "kernel")
    assert small.count("\n") == large.count("\n")
    assert len(large) < 1.05 * len(small)


@pytest.mark.parametrize("backend", ["portable", None])
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_no_outputs_and_no_rows(rows, backend):
    x, words, scale, zero = problem(4, 2, 32, 2, rows=rows)
    multiply = functools.partial(dequant_matmul, bits=4, block=32, backend=backend)
    assert multiply(x, words, scale, zero).shape == (rows, 24)
    assert multiply(x, words[..., :0], scale[:, :0], zero[:, :0]).shape == (rows, 0)


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
