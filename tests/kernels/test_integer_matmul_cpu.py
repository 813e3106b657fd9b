"""The C++ kernel for integers: values, derivatives, transformations, and the paths that go around it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_problem import close, problem

from jaxquant.errors import UsageError
from jaxquant.kernels.integer_matmul import cpu, integer_matmul
from jaxquant.quant import ActivationGrid, Grid, QActivation, pack, quantize

TARGET = "jaxquant_integer_matmul"


@pytest.fixture
def kernel():
    arrays, _ = problem(1, 1, 8, 1, 1, 8, 4, 4)
    if reason := cpu.KERNEL.refuses(*arrays, x_bits=4, bits=4, block=8):
        pytest.skip(reason)


@pytest.mark.usefixtures("kernel")
@settings(max_examples=15, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 20),
    groups=st.integers(1, 3),
    blocks_of_group=st.integers(1, 3),
    block=st.integers(1, 70),
    out=st.integers(1, 200),
    bits=st.integers(1, 8),
    x_bits=st.integers(1, 8),
    scale_dtype=st.sampled_from([jnp.float16, jnp.float32]),
)
def test_equals_float64(data, rows, groups, blocks_of_group, block, out, bits, x_bits, scale_dtype):
    blocks = groups * blocks_of_group
    x_groups = data.draw(
        st.sampled_from([n for n in range(1, blocks * block + 1) if blocks * block % n == 0])
    )
    arrays, expected = problem(
        rows, blocks, block, groups, x_groups, out, bits, x_bits, scale_dtype=scale_dtype
    )
    y = integer_matmul(*arrays, x_bits=x_bits, bits=bits, block=block, backend="kernel")
    assert y.dtype == jnp.float32
    close(y, expected)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("rows", [1, 130])
def test_tasks_of_several_threads(rows):
    arrays, expected = problem(rows, 8, 128, 8, 1, 1030, 4, 4)
    for _ in range(3):
        close(integer_matmul(*arrays, x_bits=4, bits=4, block=128), expected)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("extreme", [0, 255])
def test_sums_of_extreme_codes_are_exact(bits, extreme):
    """No instruction saturates, even where all codes are at an end; float32 holds these results exactly."""
    channels, top = 512, 2**bits - 1
    x = jnp.full((5, channels), extreme, jnp.uint8)
    words = jax.jit(pack, static_argnums=1)(jnp.full((4, 128, 40), top, jnp.uint8), bits)
    one, zero = jnp.ones((5, 1), jnp.float32), jnp.zeros((5, 1), jnp.float32)
    scale = jnp.ones((1, 40), jnp.float16)
    y = integer_matmul(
        x, one, zero, words, scale, 0 * scale, x_bits=8, bits=bits, block=128, backend="kernel"
    )
    np.testing.assert_array_equal(y, channels * extreme * top)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.parametrize("grid", [Grid(bits=3, group_size=48), Grid(bits=4, group_size=64, symmetric=True)])
def test_activations_times_weights(size, grid):
    rng = np.random.default_rng(1)
    w = quantize(jnp.asarray(rng.standard_normal((192, 24)), jnp.float32), grid)
    x = jnp.asarray(rng.standard_normal((2, 3, 192)) + 3, jnp.float32)
    x_grid = ActivationGrid(bits=4, group_size=size)
    product = jax.jit(lambda x, w: QActivation.of(x, x_grid) @ w)
    assert TARGET in product.lower(x, w).as_text()
    close(product(x, w), np.float64(x_grid.fake_quantize(x)) @ np.float64(w.dequantize()))


@pytest.mark.usefixtures("kernel")
def test_derivatives_are_those_of_the_scan():
    (x, x_scale, x_lo, words, scale, zero), _ = problem(2, 2, 12, 2, 4, 6, 3, 4, scale_dtype=jnp.float32)

    def loss(backend, x_scale, x_lo, scale, zero):
        multiply = functools.partial(integer_matmul, x_bits=4, bits=3, block=12, backend=backend)
        return jnp.sum(jnp.sin(0.001 * multiply(x, x_scale, x_lo, words, scale, zero)))

    moving = (x_scale, x_lo, scale, zero)

    def everything(backend):
        of = functools.partial(loss, backend)
        gradient = jax.grad(of, argnums=(0, 1, 2, 3))
        return gradient(*moving), jax.jvp(gradient, moving, moving)[1]

    ours, expected = (jax.jit(everything, static_argnums=0)(name) for name in ("kernel", "portable"))
    jax.tree.map(lambda a, b: close(a, b, 1e-4), ours, expected)


@pytest.mark.usefixtures("kernel")
def test_vmap_over_activations_is_one_call():
    arrays, expected = problem(6, 2, 16, 2, 4, 20, 4, 4)
    rows = [jnp.moveaxis(a.reshape(2, 3, -1), 0, 1) for a in arrays[:3]]
    multiply = functools.partial(integer_matmul, x_bits=4, bits=4, block=16)
    product = jax.jit(jax.vmap(lambda *rows: multiply(*rows, *arrays[3:]), in_axes=1))
    assert product.lower(*rows).as_text().count(f"@{TARGET}(") == 1
    close(product(*rows).reshape(6, 20), expected)


def test_vmap_over_weights():
    arrays, expected = problem(3, 2, 16, 2, 1, 20, 4, 4)
    stacked = [jnp.stack([a, a[..., ::-1]]) for a in arrays[3:]]
    multiply = functools.partial(integer_matmul, x_bits=4, bits=4, block=16)
    y = jax.vmap(multiply, in_axes=(None, None, None, 0, 0, 0))(*arrays[:3], *stacked)
    close(y, np.stack([expected, expected[:, ::-1]]))


REFUSED = {
    "it multiplies by uint8 words, not uint32": (3, jnp.uint32, 16),
    "x_scale and x_lo are bfloat16 and float32, not float32": (1, jnp.bfloat16, 16),
    "scales and zeros are float32 and float16, not both": (4, jnp.float32, 16),
    "blocks of 65537 rows are larger than 65536": (0, jnp.uint8, 65537),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernel_does_not_take(reason):
    arrays, _ = problem(1, 2, 16, 2, 1, 8, 4, 4)
    place, dtype, block = REFUSED[reason]
    arrays = [a.astype(dtype) if i == place else a for i, a in enumerate(arrays)]
    assert cpu.KERNEL.refuses(*arrays, x_bits=4, bits=4, block=block).startswith(reason)


def test_without_a_kernel(monkeypatch):
    arrays, expected = problem(2, 2, 16, 2, 1, 30, 4, 4)
    monkeypatch.setenv("JAXQUANT_NATIVE", "0")
    multiply = functools.partial(integer_matmul, x_bits=4, bits=4, block=16)
    close(jax.jit(multiply)(*arrays), expected)
    with pytest.raises(UsageError, match="JAXQUANT_NATIVE is 0"):
        multiply(*arrays, backend="kernel")
