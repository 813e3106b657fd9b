"""The product with an embedding or a head in a narrower dtype: values, no widened copy, derivatives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.errors import InputError, UsageError
from jaxquant.kernels.head_matmul import cpu, head_matmul

NARROW = [jnp.bfloat16, jnp.float16]


def problem(rows, vocabulary, dtype, x_dtype=jnp.float32, axis=0, d=24):
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, d)), x_dtype)
    w = jnp.asarray(rng.standard_normal((vocabulary, d) if axis == 0 else (d, vocabulary)), dtype)
    return x, w, np.float64(x) @ (np.float64(w).T if axis == 0 else np.float64(w))


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 6),
    vocabulary=st.integers(0, 300),
    axis=st.sampled_from([0, 1]),
    dtype=st.sampled_from(NARROW),
    x_dtype=st.sampled_from([jnp.float32, *NARROW]),
)
def test_kernel_equals_float64(rows, vocabulary, axis, dtype, x_dtype):
    x, w, expected = problem(rows, vocabulary, dtype, x_dtype, axis)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_TILE", 24 * 80)  # several parts, the last ones ragged
        y = jax.jit(lambda x, w: head_matmul(x, w, axis=axis, backend="kernel"))(x, w)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, *NARROW])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_case_has_an_implementation(rows, dtype, axis):
    x, w, expected = problem(rows, 257, dtype, axis=axis)
    y = jax.jit(functools.partial(head_matmul, axis=axis))(x.reshape(rows, 1, 24), w)
    np.testing.assert_allclose(y[:, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("axis", [0, 1])
def test_no_widened_copy_is_made(rows, dtype, axis):
    """Temporaries are a part of the 32003 x 512 floats that the portable product may write out."""
    shape = (32003, 512) if axis == 0 else (512, 32003)
    x, w = jax.ShapeDtypeStruct((rows, 512), jnp.float32), jax.ShapeDtypeStruct(shape, dtype)
    program = jax.jit(functools.partial(head_matmul, axis=axis, backend="kernel")).lower(x, w).compile()
    results = 2 * 4 * rows * 32003
    assert program.memory_analysis().temp_size_in_bytes < results + 0.2 * 4 * w.size


@pytest.mark.parametrize("axis", [0, 1])
def test_derivatives_and_batches_are_those_of_the_product(axis):
    x, w, _ = problem(1, 600, jnp.float16, axis=axis)

    def loss(backend, x, w):
        multiply = functools.partial(head_matmul, axis=axis, backend=backend)
        return jnp.sum(jnp.sin(jax.vmap(lambda row: multiply(row, w))(x)))

    ours, expected = (jax.grad(functools.partial(loss, b), argnums=(0, 1))(x, w) for b in (None, "portable"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), ours, expected)


def test_what_no_kernel_takes():
    x, w, _ = problem(1, 600, jnp.float32)
    with pytest.raises(UsageError, match=r"not float32\[1,24\] by float32\[600,24\]; use backend='portable'"):
        head_matmul(x, w, backend="kernel")


def test_arguments_that_do_not_fit():
    x, w, _ = problem(2, 30, jnp.float16)
    with pytest.raises(InputError, match="head_matmul: x is int32; convert it to a float dtype"):
        head_matmul(x.astype(jnp.int32), w)
    with pytest.raises(InputError, match=r"x \(2, 24\) does not fit w \(30, 24\): .* as long as axis 0 of w"):
        head_matmul(x, w, axis=1)
    with pytest.raises(InputError, match=r"x \(\) does not fit"):
        head_matmul(jnp.float32(1), w)
