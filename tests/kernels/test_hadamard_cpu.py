"""The C++ transform that quantizes: values, derivatives, transformations, and the paths that go around it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hadamard_problem import GRIDS, SHAPES, activations, check
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.errors import UsageError
from jaxquant.kernels.hadamard import cpu, hadamard_quantize
from jaxquant.quant import ActivationGrid, Grid, QActivation, quantize

TARGET = "jaxquant_hadamard_quantize"
GRID = ActivationGrid(bits=4, group_size=64)
kernel_of = functools.partial(hadamard_quantize, backend="kernel")


@pytest.fixture
def kernel():
    if reason := cpu.KERNEL.refuses(activations(1, 64), grid=GRID, block=64):
        pytest.skip(reason)


@pytest.mark.usefixtures("kernel")
@settings(max_examples=12, deadline=None)
@given(
    shape=st.sampled_from([*SHAPES.values(), (1, 16, 16, 16), (3, 96, 32, 48), (2, 2240, 2240, None)]),
    grid=st.sampled_from(GRIDS),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 3),
)
def test_equals_float64(shape, grid, dtype, scale_dtype, seed):
    rows, n, block, group = shape
    grid = dataclasses.replace(grid, group_size=group, scale_dtype=scale_dtype)
    x = activations(rows, n, dtype, seed)
    check(kernel_of(x, grid, block), x, grid, block)


@pytest.mark.usefixtures("kernel")
def test_tasks_of_several_threads():
    x = activations(300, 256)
    for _ in range(3):
        check(hadamard_quantize(x, GRID, 128), x, GRID, 128)


@pytest.mark.usefixtures("kernel")
def test_constant_groups_and_what_is_no_number():
    first = jnp.zeros((1, 64)).at[0, 0].set(8.0)  # one everywhere, transformed
    codes, scale, lo = kernel_of(first, GRID, 64)
    np.testing.assert_array_equal(codes, 0)
    np.testing.assert_array_equal([scale, lo], [[[0.0]], [[1.0]]])
    for bad in (jnp.nan, jnp.inf):
        for symmetric in (False, True):
            x = activations(2, 128).at[1, 70].set(bad)
            _, *ends = kernel_of(x, dataclasses.replace(GRID, symmetric=symmetric), 64)
            for a in ends:
                np.testing.assert_array_equal(np.isnan(a), [[False, False], [False, True]])


@pytest.mark.usefixtures("kernel")
def test_derivatives_are_those_of_the_portable_implementation():
    x, w = activations(2, 64), np.random.default_rng(0).standard_normal((2, 2, 2))

    def loss(backend, x):
        _, scale, lo = hadamard_quantize(x, ActivationGrid(group_size=32), 64, backend=backend)
        return jnp.sum(jnp.sin(jnp.stack([scale, lo])) * w)

    def everything(backend):
        gradient = jax.grad(functools.partial(loss, backend))
        return gradient(x), jax.jvp(gradient, (x,), (x,))[1]

    ours, expected = (jax.jit(everything, static_argnums=0)(name) for name in ("kernel", "portable"))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


@pytest.mark.usefixtures("kernel")
def test_vmap_is_one_call():
    x = activations(6, 128)
    mapped = jax.jit(jax.vmap(lambda x: hadamard_quantize(x, GRID, 64), in_axes=1, out_axes=1))
    stacked = x.reshape(2, 3, 128)
    assert mapped.lower(stacked).as_text().count(f"@{TARGET}(") == 1
    check([a.reshape(6, -1) for a in mapped(stacked)], x, GRID, 64)


@pytest.mark.usefixtures("kernel")
def test_without_a_gradient_nothing_transformed_is_written():
    """The compiled program calls twice; what it computes besides is smaller than x in float32."""
    w = quantize(jax.random.normal(jax.random.key(0), (128, 8)), Grid(bits=4, group_size=32))
    product = jax.jit(lambda x: QActivation.of(x, GRID, hadamard=64) @ w)
    program = product.lower(activations(96, 128)).compile()
    text = program.as_text()
    assert text.count(f'custom_call_target="{TARGET}"') == 1
    assert " dot(" not in text
    assert program.memory_analysis().temp_size_in_bytes < 2 * 96 * 128
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(product(x))))
    assert " dot(" in gradient.lower(activations(96, 128)).compile().as_text()


REFUSED = {
    "x is float64, not float32": (jnp.float64, 64, 64),
    "blocks of 48 = 12 x 4 channels and groups of 64 do not fill vectors of 16": (jnp.float32, 48, 64),
    "blocks of 64 = 1 x 64 channels and groups of 24 do not fill vectors of 16": (jnp.float32, 64, 24),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernel_does_not_take(reason):
    dtype, block, group = REFUSED[reason]
    x, grid = jax.ShapeDtypeStruct((2, 192), dtype), ActivationGrid(group_size=group)
    assert cpu.KERNEL.refuses(x, grid=grid, block=block).startswith(reason)


def test_without_a_kernel(monkeypatch):
    x = activations(2, 256)
    monkeypatch.setenv("JAXQUANT_NATIVE", "0")
    check(jax.jit(lambda x: hadamard_quantize(x, GRID, 256))(x), x, GRID, 256)
    with pytest.raises(UsageError, match="JAXQUANT_NATIVE is 0"):
        kernel_of(x, GRID, 256)
