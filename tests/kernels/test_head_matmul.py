"""The product with an embedding in a narrower dtype: values, no widened copy, derivatives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.errors import UsageError
from jaxquant.kernels.head_matmul import head_matmul


def problem(rows, vocabulary, dtype, x_dtype=jnp.float32):
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, 24)), x_dtype)
    w = jnp.asarray(rng.standard_normal((vocabulary, 24)), dtype)
    return x, w, np.float64(x) @ np.float64(w).T


@pytest.mark.parametrize(("rows", "dtype"), [(1, jnp.bfloat16), (1, jnp.float16), (5, jnp.float16)])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
def test_kernel_equals_float64(rows, dtype, x_dtype):
    x, w, expected = problem(rows, 600, dtype, x_dtype)
    y = head_matmul(x, w, backend="kernel")
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("vocabulary", [600, 257])
def test_every_case_has_an_implementation(rows, dtype, vocabulary):
    x, w, expected = problem(rows, vocabulary, dtype)
    y = jax.jit(head_matmul)(x.reshape(rows, 1, 24), w)
    np.testing.assert_allclose(y[:, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "dtype"), [(1, jnp.bfloat16), (4, jnp.float16)])
def test_no_widened_copy_is_made(rows, dtype):
    """Temporaries are smaller than the 49152 x 24 floats that the portable product writes out."""
    x, w, _ = problem(rows, 49152, dtype)
    temporaries = {
        backend: jax.jit(functools.partial(head_matmul, backend=backend))
        .lower(x, w)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for backend in ("kernel", "portable")
    }
    assert temporaries["kernel"] < 0.4 * w.size * 4 <= 0.4 * temporaries["portable"]


def test_derivatives_and_batches_are_those_of_the_product():
    x, w, _ = problem(1, 600, jnp.float16)

    def loss(backend, x, w):
        return jnp.sum(jnp.sin(jax.vmap(lambda row: head_matmul(row, w, backend=backend))(x)))

    ours, expected = (jax.grad(functools.partial(loss, b), argnums=(0, 1))(x, w) for b in (None, "portable"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), ours, expected)


def test_what_no_kernel_takes():
    x, w, _ = problem(1, 600, jnp.float32)
    with pytest.raises(UsageError, match=r"not float32\[1,24\] by float32\[600,24\]; use backend='portable'"):
        head_matmul(x, w, backend="kernel")
