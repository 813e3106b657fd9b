"""The portable transform that quantizes, and quantized activations that are transformed on the way."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hadamard_problem import GRIDS, SHAPES, activations, check

from jaxquant.errors import UsageError
from jaxquant.kernels import use_backend
from jaxquant.kernels.hadamard import factors, hadamard_quantize, reference
from jaxquant.linalg import hadamard_transform
from jaxquant.quant import ActivationGrid, Grid, QActivation, quantize

portable = jax.jit(functools.partial(hadamard_quantize, backend="portable"), static_argnums=(1, 2))


@pytest.mark.parametrize(("shape", "grid"), list(zip(SHAPES, itertools.cycle(GRIDS), strict=False)), ids=str)
def test_equals_the_product_with_the_whole_matrix(shape, grid):
    rows, n, block, group = SHAPES[shape]
    grid = dataclasses.replace(grid, group_size=group)
    x = activations(rows, n)
    for f in (reference.hadamard_quantize, factors.hadamard_quantize):
        check(jax.jit(functools.partial(f, grid=grid, block=block))(x), x, grid, block)


def test_float64_equals_float64():
    grid = ActivationGrid(bits=4, group_size=48)
    with jax.enable_x64(True):
        x = activations(3, 192, jnp.float64)
        results = portable(x, grid, 96)
        expected = reference.hadamard_quantize(x, grid=grid, block=96)
    np.testing.assert_array_equal(results[0], expected[0])
    for a, b in zip(results[1:], expected[1:], strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_leading_axes_and_none_at_all():
    grid, x = ActivationGrid(bits=4, group_size=32), activations(6, 128)
    stacked = portable(x.reshape(2, 3, 128), grid, 64)
    assert [a.shape for a in stacked] == [(2, 3, 128), (2, 3, 4), (2, 3, 4)]
    check([a.reshape(6, -1) for a in stacked], x, grid, 64)
    check([a[None] for a in portable(x[0], grid, 64)], x[:1], grid, 64)
    none = jax.jit(lambda x: QActivation.of(x, grid, hadamard=64))(x[:0])
    assert [a.shape for a in (none.codes, none.scale, none.lo)] == [(0, 128), (0, 4), (0, 4)]


@pytest.mark.parametrize(
    ("x", "grid", "block", "message"),
    [
        (jnp.ones((1, 96)), ActivationGrid(), 64, "blocks of 64 do not divide 96 channels"),
        (jnp.ones((1, 92)), ActivationGrid(), 92, "no Hadamard matrix of order 92 is known"),
        (jnp.ones((1, 96)), ActivationGrid(group_size=64), 32, "96 channels are not divisible"),
        (jnp.ones((1, 96), jnp.int32), ActivationGrid(), 32, "x is int32; cast it to a float dtype"),
    ],
)
def test_what_cannot_be(x, grid, block, message):
    with pytest.raises(UsageError, match=message):
        hadamard_quantize(x, grid, block)
    with pytest.raises(UsageError, match=message):
        QActivation.of(x, grid, hadamard=block)


def test_an_unknown_backend():
    with pytest.raises(UsageError, match="unknown backend 'fast'"):
        hadamard_quantize(jnp.ones((1, 64)), ActivationGrid(), 64, backend="fast")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_activations_are_those_of_the_transformed(dtype):
    grid, x = ActivationGrid(bits=4, group_size=32, clip=0.9), activations(4, 192, dtype)
    with use_backend("portable"):
        q = jax.jit(lambda x: QActivation.of(x, grid, hadamard=96))(x)
    check((q.codes, q.scale, q.lo), x, grid, 96)
    assert q.values.dtype == dtype
    # One program may contract a product and a sum, and the other may not.
    expected = grid.dequantize(q.codes, q.scale, q.lo)
    atol = 2 * np.finfo(np.float32).eps * float(abs(expected).max())
    rtol = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(q.values.astype(jnp.float32), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradients_are_those_of_both_steps(order):
    grid, x = ActivationGrid(bits=3, group_size=32), jax.random.normal(jax.random.key(1), (3, 64))
    w = quantize(jax.random.normal(jax.random.key(0), (64, 8)), Grid(bits=4, group_size=32))

    def loss(quantized):
        return lambda x: jnp.sum(jnp.tanh(quantized(x) @ w / 16))

    def in_steps(x):
        return QActivation.of(hadamard_transform(x), grid)

    def at_once(x):
        return QActivation.of(x, grid, hadamard=64)

    ours, expected = (
        functools.reduce(lambda f, _: jax.grad(lambda x: jnp.sum(f(x))), range(order), loss(quantized))
        for quantized in (at_once, in_steps)
    )
    expected = jax.jit(expected)(x)
    np.testing.assert_allclose(jax.jit(ours)(x), expected, atol=1e-3 * float(jnp.abs(expected).max()))
