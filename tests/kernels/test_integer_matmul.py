"""Every implementation of the integer matmul against its specification, and quantized activations into it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_problem import close
from integer_problem import problem as exact_problem

from jaxquant.kernels import use_backend
from jaxquant.kernels.integer_matmul import integer_matmul, reference, scan
from jaxquant.quant import ActivationGrid, Grid, QActivation, QArray, pack
from jaxquant.quant import quantize as nearest
from jaxquant.quant.packing import unpack

packed, quantize = jax.jit(pack, static_argnums=1), jax.jit(nearest, static_argnums=1)


@functools.partial(jax.jit, static_argnums=2)
def product_of(x, w, grid):
    return QActivation.of(x, grid) @ w


@functools.partial(jax.jit, static_argnums=2)
def product_of_values(x, w, grid):
    return jnp.matmul(grid.fake_quantize(x), w.dequantize(), precision="highest")


def problem(x_bits: int, bits: int, x_groups: int, groups: int, blocks: int, block: int, rows=5, out=24):
    rng = np.random.default_rng(x_bits)
    channels = blocks * block
    x = jnp.asarray(rng.integers(0, 2**x_bits, (rows, channels)), jnp.uint8)
    x_scale = jnp.asarray(rng.uniform(0.5, 2, (rows, x_groups)), jnp.float32)
    x_lo = jnp.asarray(rng.standard_normal((rows, x_groups)) * 20, jnp.float32)
    words = packed(jnp.asarray(rng.integers(0, 2**bits, (blocks, block, out)), jnp.uint8), bits)
    scale = jnp.asarray(rng.uniform(0.5, 2, (groups, out)), jnp.float16)
    # A refit leaves zeros that are no integers.
    zero = jnp.asarray(rng.uniform(0, 2**bits - 1, (groups, out)), jnp.float16)
    return x, x_scale, x_lo, words, scale, zero


# Equal groups; narrower on either side; neither divides the other; one for all; all 8 bits; 1-bit weights.
CASES = [
    pytest.param((4, 4, 9, 9, 9, 64), marks=pytest.mark.slow),
    (4, 3, 12, 6, 6, 32),
    (4, 4, 3, 6, 12, 16),
    (3, 2, 4, 6, 6, 32),
    (8, 4, 1, 1, 4, 24),
    (8, 8, 2, 2, 4, 128),
    (2, 1, 2, 2, 2, 48),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scan_equals_reference(case):
    x_bits, bits, *_, block = case
    arrays = problem(*case)
    options = {"x_bits": x_bits, "bits": bits, "block": block}
    expected = jax.jit(functools.partial(reference.integer_matmul, **options))(*arrays)
    tolerance = 1e-5 * float(jnp.max(jnp.abs(expected)))
    for implementation in (scan.integer_matmul, integer_matmul):
        y = jax.jit(lambda *a, f=implementation: f(*a, **options))(*arrays)
        np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_equals_numpy(case):
    x_bits, bits, *_, block = case
    with jax.enable_x64(True):
        x, x_scale, x_lo, words, scale, zero = problem(*case)
        x_scale, x_lo = x_scale.astype(jnp.float64), x_lo.astype(jnp.float64)
        product = jax.jit(functools.partial(integer_matmul, x_bits=x_bits, bits=bits, block=block))
        y = product(x, x_scale, x_lo, words, scale, zero)
    channels = x.shape[1]
    x, x_scale, x_lo, big_s, big_z = (np.asarray(a, np.float64) for a in (x, x_scale, x_lo, scale, zero))
    per_x, per_w = channels // x_lo.shape[1], channels // big_s.shape[0]
    values = np.repeat(x_lo, per_x, axis=1) + np.repeat(x_scale, per_x, axis=1) * x
    codes = np.float64(jax.jit(unpack, static_argnums=(1, 2))(words, bits, block)).reshape(channels, -1)
    dense = np.repeat(big_s, per_w, axis=0) * (codes - np.repeat(big_z, per_w, axis=0))
    np.testing.assert_allclose(y, values @ dense, rtol=1e-12, atol=1e-10)


@settings(max_examples=8, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    blocks_of_group=st.integers(1, 3),
    block=st.integers(1, 40),
    out=st.integers(1, 150),
    bits=st.integers(1, 8),
    x_bits=st.integers(1, 8),
    tile_rows=st.sampled_from([8, 512]),
    seed=st.integers(0, 2**16),
)
def test_scan_equals_float64(
    data, rows, groups, blocks_of_group, block, out, bits, x_bits, tile_rows, seed
):  # fmt: skip
    """Whole blocks, and parts of their outputs."""
    blocks = groups * blocks_of_group
    divisors = [n for n in range(1, blocks * block + 1) if blocks * block % n == 0]
    x_groups = data.draw(st.sampled_from(divisors))
    arrays, expected = exact_problem(rows, blocks, block, groups, x_groups, out, bits, x_bits, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "TILE_ROWS", tile_rows)
        product = jax.jit(lambda *a: scan.integer_matmul(*a, x_bits=x_bits, bits=bits, block=block))
        close(product(*arrays), expected)


def test_one_block_of_all_inputs_is_cut():
    """The codes of 14330 x 4096 are 59 MB; their words 29 MB."""
    array = jax.ShapeDtypeStruct
    one, half = array((1, 1), jnp.float32), array((1, 4096), jnp.float16)
    arrays = (array((1, 14330), jnp.uint8), one, one, array((1, 7165, 4096), jnp.uint8), half, half)
    product = functools.partial(integer_matmul, x_bits=4, bits=4, block=14330, backend="portable")
    assert jax.jit(product).lower(*arrays).compile().memory_analysis().temp_size_in_bytes < 40e6


@pytest.mark.parametrize("backend", ["portable", None])
@pytest.mark.parametrize("rows", [0, 2])
def test_no_outputs_and_no_rows(rows, backend):
    *x, words, scale, zero = problem(4, 4, 2, 2, 2, 32, rows=rows)
    multiply = functools.partial(integer_matmul, x_bits=4, bits=4, block=32, backend=backend)
    assert multiply(*x, words, scale, zero).shape == (rows, 24)
    assert multiply(*x, words[..., :0], scale[:, :0], zero[:, :0]).shape == (rows, 0)


def test_products_are_those_of_integers():
    """No float enters a product: the compiled program multiplies int8 and adds int32."""
    arrays = problem(4, 4, 9, 9, 9, 64)
    product = jax.jit(lambda *a: integer_matmul(*a, x_bits=4, bits=4, block=64, backend="portable"))
    text = product.lower(*arrays).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert sum("xi8>" in line and "xi32>" in line for line in products) == 1
    assert len(products) == 2  # the other one: scales, offsets and sums, one row a group


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [None, 16, 32])
def test_activations_times_weights(symmetric, size):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 7, 96)) + 3, jnp.float32)
    w = quantize(
        jnp.asarray(rng.standard_normal((96, 40)), jnp.float32),
        Grid(bits=4, group_size=32, symmetric=symmetric),
    )
    grid = ActivationGrid(bits=4, group_size=size, clip=0.95)
    y, expected = product_of(x, w, grid), product_of_values(x, w, grid)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))
    assert product_of(x.astype(jnp.bfloat16), w, grid).dtype == jnp.bfloat16


def test_gradients_are_those_of_the_values():
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 64), (3, 8)))
    w = quantize(jnp.asarray(rng.standard_normal((64, 8)), jnp.float32), Grid(bits=4, group_size=32))
    grid = ActivationGrid(bits=4, group_size=32)

    def loss(x, scale):
        return jnp.sum((QActivation.of(x, grid) @ dataclasses.replace(w, scale=scale)) * cotangent)

    by_x, by_scale = jax.jit(jax.grad(loss, (0, 1)))(x, w.scale.astype(jnp.float32))
    in_floats = jax.jit(jax.grad(lambda x: jnp.sum(grid.fake_quantize(x) @ w.dequantize() * cotangent)))(x)
    np.testing.assert_allclose(by_x, in_floats, rtol=1e-4, atol=1e-4)
    steps = np.asarray(w.codes(), np.float64) - np.repeat(np.asarray(w.zero, np.float64), 32, axis=0)
    by_weight = np.asarray(grid.fake_quantize(x), np.float64).T @ np.asarray(cotangent, np.float64)
    expected = (by_weight * steps).reshape(2, 32, 8).sum(1)
    np.testing.assert_allclose(by_scale, expected, rtol=1e-3, atol=1e-3)


def test_without_a_gradient_only_integers_are_multiplied():
    x = jnp.ones((3, 64), jnp.float32)
    w = quantize(jnp.ones((64, 8)), Grid(bits=4, group_size=32))
    product = jax.jit(lambda x, w: QActivation.of(x, ActivationGrid(bits=4, group_size=32)) @ w)
    with use_backend("portable"):
        text = product.lower(x, w).compile().as_text()
    products = [line for line in text.splitlines() if " dot(" in line]
    dtypes = [line.split("[")[0].split()[-1] for line in products]
    assert dtypes.count("s32") == 1
    assert dtypes.count("f32") <= 1  # scales and offsets


@pytest.mark.parametrize("value", [0.0, 1e-6, 1e-3, 7.0, -3e4])
@pytest.mark.parametrize("size", [None, 48, 64])
def test_constant_tokens_are_exact(value, size):
    rng = np.random.default_rng(1)
    w = quantize(jnp.asarray(rng.standard_normal((192, 8)), jnp.float32), Grid(bits=4, group_size=64))
    x, grid = jnp.full((1, 192), value, jnp.float32), ActivationGrid(bits=8, group_size=size)
    expected = value * np.asarray(w.dequantize(), np.float64).sum(0)
    np.testing.assert_allclose(product_of(x, w, grid)[0], expected, rtol=1e-5, atol=1e-5 * abs(value))


def test_an_order_of_inputs_falls_back_to_values():
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 16, (64, 8)), jnp.uint8)
    scale, zero = jnp.ones((2, 8), jnp.float16), jnp.full((2, 8), 7, jnp.float16)
    order = jnp.asarray(rng.permutation(64), jnp.int32)
    w = QArray.from_codes(codes, scale, zero, Grid(bits=4, group_size=32), order=order)
    x, grid = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32), ActivationGrid(bits=4, group_size=16)
    expected = jnp.matmul(grid.fake_quantize(x), w.dequantize(), precision="highest")
    np.testing.assert_allclose(QActivation.of(x, grid) @ w, expected, atol=1e-4)


def test_widths_must_agree():
    w = quantize(jnp.ones((64, 8)), Grid(bits=4))
    with pytest.raises(ValueError, match="x has 32 features, the weight 64 inputs"):
        QActivation.of(jnp.ones((3, 32)), ActivationGrid(bits=4)) @ w
