"""The TPU kernel for integers, interpreted and lowered where there is no TPU; tests/aot compiles it."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_problem import close, problem
from jax.experimental.pallas import tpu as pltpu

from jaxquant.errors import UsageError
from jaxquant.kernels import use_backend
from jaxquant.kernels.integer_matmul import integer_matmul, tpu

# One tile; groups of x inside a block; ragged tiles of every axis; groups that do not divide each other.
CASES = {
    "one tile": (3, 2, 32, 2, 1, 40, 3, 4),
    "narrow groups of x": (2, 2, 64, 1, 4, 24, 4, 8),
    "several tiles": (300, 12, 128, 12, 12, 1100, 4, 4),
    "other groups": (5, 6, 96, 3, 9, 130, 8, 8),
}


@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c != "one tile")) for c in CASES]
)
def test_tiles_and_races(case, hardware):
    """On `hardware` memory is emulated: unsynchronized accesses raise, fresh memory reads as NaN."""
    arrays, expected = problem(*CASES[case])
    _, _, block, _, _, _, bits, x_bits = CASES[case]
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan") if hardware else True
    multiply = functools.partial(tpu.integer_matmul, x_bits=x_bits, bits=bits, block=block)
    close(multiply(*arrays, interpret=interpret), expected)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 40),
    groups=st.integers(1, 6),
    blocks_of_group=st.integers(1, 3),
    block=st.sampled_from([32, 64, 96, 128]),
    out=st.integers(1, 300),
    bits=st.integers(1, 8),
    x_bits=st.integers(1, 8),
    scale_dtype=st.sampled_from([jnp.float16, jnp.float32]),
)
def test_equals_float64(data, rows, groups, blocks_of_group, block, out, bits, x_bits, scale_dtype):
    channels = groups * blocks_of_group * block
    x_groups = data.draw(
        st.sampled_from(
            [n for n in range(1, 50) if channels % n == 0 and math.gcd(block, channels // n) % 32 == 0]
        )
    )
    blocks = groups * blocks_of_group
    arrays, expected = problem(rows, blocks, block, groups, x_groups, out, bits, x_bits, scale_dtype)
    close(tpu.integer_matmul(*arrays, x_bits=x_bits, bits=bits, block=block, interpret=True), expected)


@pytest.mark.parametrize(("rows", "x_groups", "bits"), [(1, 1, 4), (600, 16, 3)])
def test_lowers_to_one_call(rows, x_groups, bits):
    arrays, _ = problem(rows, 16, 128, 16, x_groups, 1100, bits, 8)
    product = jax.jit(functools.partial(integer_matmul, x_bits=8, bits=bits, block=128))
    with use_backend("kernel"):
        insisting = product.trace(*arrays).lower(lowering_platforms=("tpu",))
    assert insisting.as_text().count("@tpu_custom_call") == 1
    for platform in ("cpu", "tpu"):  # which TPU is not known: it may be one that cannot multiply int8
        lowered = product.trace(*arrays).lower(lowering_platforms=(platform,))
        assert "@tpu_custom_call" not in lowered.as_text()


def test_what_the_kernel_does_not_take_is_scanned():
    arrays, _ = problem(2, 2, 48, 2, 1, 40, 3, 4)
    product = functools.partial(integer_matmul, x_bits=4, bits=3, block=48)
    traced = jax.jit(product).trace(*arrays)
    assert "@tpu_custom_call" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    with pytest.raises(UsageError, match=r"multiples of 32, not x of \(2, 96\) in 1 groups and blocks of 48"):
        jax.jit(functools.partial(product, backend="kernel")).trace(*arrays).lower(
            lowering_platforms=("tpu",)
        )
    many = jax.ShapeDtypeStruct((4096, 40), jnp.float16)
    reason = tpu.KERNEL.refuses(*arrays[:4], many, many, x_bits=4, bits=3, block=32)
    assert reason == "4096 groups of the weight and 1 of x do not fit into VMEM"
