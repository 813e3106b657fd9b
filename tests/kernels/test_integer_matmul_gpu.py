"""The GPU kernel for integers, interpreted and lowered where there is no GPU; tests/aot compiles it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from gpu_interpreter import interpreted, strict
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_problem import close, problem

from jaxquant.errors import UsageError
from jaxquant.kernels.integer_matmul import gpu, integer_matmul


def check(*shape, scale_dtype=jnp.float16):
    arrays, expected = problem(*shape, scale_dtype)
    options = {"block": shape[2], "bits": shape[6], "x_bits": shape[7]}
    assert not gpu.KERNEL.refuses(*arrays, **options)
    close(gpu.integer_matmul(*arrays, **options, interpret=strict()), expected)


# One step; a split contraction and groups of x; two groups of the weight a step; one group of x for all of
# the weight, largest codes, tiles of rows, the last one ragged; more steps than are in memory at once.
CASES = {
    "one step": (1, 1, 64, 1, 1, 64, 4, 4),
    "split": (5, 9, 64, 9, 9, 64, 4, 4),
    "groups a step": (3, 4, 64, 4, 2, 128, 3, 8),
    "tiles of rows": (70, 8, 128, 4, 1, 192, 8, 8),
    "steps in one place": (17, 7, 64, 7, 1, 64, 1, 1),
}


@interpreted
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c != "one step")) for c in CASES]
)
def test_tiles_and_races(case):
    check(*CASES[case])


@interpreted
@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    blocks_of_group=st.integers(1, 3),
    block=st.sampled_from([64, 128]),
    out=st.sampled_from([64, 128, 192]),
    bits=st.integers(1, 8),
    x_bits=st.integers(1, 8),
    scale_dtype=st.sampled_from([jnp.float16, jnp.float32]),
)
def test_equals_float64(data, rows, groups, blocks_of_group, block, out, bits, x_bits, scale_dtype):
    blocks = groups * blocks_of_group
    x_groups = data.draw(st.sampled_from([n for n in range(1, 31) if blocks * block // 64 % n == 0]))
    check(rows, blocks, block, groups, x_groups, out, bits, x_bits, scale_dtype=scale_dtype)


def lowered(backend, *shape):
    arrays, _ = problem(*shape)
    product = functools.partial(
        integer_matmul, x_bits=shape[7], bits=shape[6], block=shape[2], backend=backend
    )
    return jax.jit(product).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("rows", "x_groups", "bits"), [(1, 1, 4), (300, 8, 3)])
def test_lowers_to_one_call_where_asked(rows, x_groups, bits):
    assert lowered("kernel", rows, 4, 128, 4, x_groups, 192, bits, 8).count("@mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("shape", "scale_dtype"),
    [((33, 4, 64, 2, 1, 128, 7, 8), jnp.float16), ((64, 4, 128, 2, 4, 128, 7, 8), jnp.float32)],
)
def test_what_nearly_fills_shared_memory_lowers(shape, scale_dtype):
    assert "@mosaic_gpu" in lowered("kernel", *shape, scale_dtype)


def test_scans_where_the_device_is_not_known():
    assert "@mosaic_gpu" not in lowered(None, 1, 2, 64, 2, 1, 64, 4, 4)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((2, 4, 64, 4, 8, 64, 4, 4), "64 or 128 channels that groups of x and blocks share, not 32"),
        ((2, 2, 64, 2, 1, 96, 4, 4), "outputs in multiples of 64"),
        ((2, 3, 48, 3, 1, 64, 4, 4), "blocks that fill 64 or 128 inputs"),
    ],
)
def test_what_the_kernel_does_not_take(shape, reason):
    with pytest.raises(UsageError, match=reason):
        lowered("kernel", *shape)
