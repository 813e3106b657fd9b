"""The TPU transform that quantizes, interpreted and lowered where there is no TPU; tests/aot compiles it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from hadamard_problem import GRIDS, SHAPES, activations, check
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from jaxquant.errors import UsageError
from jaxquant.kernels.hadamard import hadamard_quantize, tpu
from jaxquant.quant import ActivationGrid


@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c != "narrow groups")) for c in SHAPES]
)
def test_tiles_and_races(case, hardware, monkeypatch):
    """On `hardware` memory is emulated: unsynchronized accesses raise, fresh memory reads as NaN."""
    monkeypatch.setattr(tpu, "_ROWS", 32)
    rows, n, block, group = SHAPES[case]
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan") if hardware else True
    x, grid = activations(rows, n), ActivationGrid(bits=4, group_size=group)
    check(tpu.hadamard_quantize(x, grid=grid, block=block, interpret=interpret), x, grid, block)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    shape=st.sampled_from([*SHAPES.values(), (3, 128, 2, 16), (2, 7168, 7168, 7168)]),
    grid=st.sampled_from(GRIDS),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    seed=st.integers(0, 3),
)
def test_equals_float64(shape, grid, dtype, seed):
    rows, n, block, group = shape
    grid, x = dataclasses.replace(grid, group_size=group), activations(rows, n, dtype, seed)
    check(tpu.hadamard_quantize(x, grid=grid, block=block, interpret=True), x, grid, block)


@pytest.mark.parametrize(("rows", "block", "group"), [(1, 64, 64), (600, 1536, None)])
def test_lowers_to_one_call(rows, block, group):
    x, grid = jax.ShapeDtypeStruct((rows, 1536), jnp.bfloat16), ActivationGrid(group_size=group)
    traced = jax.jit(lambda x: hadamard_quantize(x, grid, block)).trace(x)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call") == 1
    assert "@tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


HALF = ActivationGrid(scale_dtype="float16")
REFUSED = {
    "it takes nonempty bfloat16 or float32 x, not float16": (jnp.float16, 256, 64, ActivationGrid()),
    "scales are float16, not float32": (jnp.float32, 256, 64, HALF),
    "96 channels, blocks of 32 = 1 x 32 and groups of 96": (jnp.float32, 96, 32, ActivationGrid()),
    "576 channels, blocks of 576 = 36 x 16 and": (jnp.float32, 576, 576, ActivationGrid()),
    "768 channels, blocks of 256 = 1 x 256 and groups of 192": (
        jnp.float32, 768, 256, ActivationGrid(group_size=192),
    ),
    "rows of 65536 channels do not fit into VMEM": (jnp.float32, 65536, 64, ActivationGrid()),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernel_does_not_take(reason):
    dtype, n, block, grid = REFUSED[reason]
    x = jax.ShapeDtypeStruct((2, n), dtype)
    assert tpu.KERNEL.refuses(x, grid=grid, block=block).startswith(reason)
    f = functools.partial(hadamard_quantize, grid=grid, block=block)
    assert "@tpu_custom_call" not in jax.jit(f).trace(x).lower(lowering_platforms=("tpu",)).as_text()
    with pytest.raises(UsageError, match="no kernel, since"):
        jax.jit(functools.partial(f, backend="kernel")).trace(x).lower(lowering_platforms=("tpu",))
