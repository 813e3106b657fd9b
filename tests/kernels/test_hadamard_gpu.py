"""The GPU transform that quantizes, interpreted and lowered where there is no GPU; tests/aot compiles it."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import interpreted, strict
from hadamard_problem import GRIDS, SHAPES, activations, check
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.errors import UsageError
from jaxquant.kernels.hadamard import gpu, hadamard_quantize
from jaxquant.quant import ActivationGrid

# Slices that are no multiple of 8; more of them than a tile; several rows a program, the last one with fewer;
# programs that begin between two copies, with groups of slices and of rows; slices that are groups.
OTHERS = {
    "5 slices": (2, 640, 128, 64),
    "two tiles": (1, 9216, 9216, None),
    "shared": (7, 768, 256, 16),
    "shifted": (8, 1152, 64, 64),
    "shifted, wide": (3, 4864, 256, None),
    "groups of 128": (3, 2560, 2560, 128),
}


def equals(shape, grid, dtype=jnp.bfloat16, seed=0):
    rows, n, block, group = shape
    grid, x = dataclasses.replace(grid, group_size=group), activations(rows, n, dtype, seed)
    assert not gpu.KERNEL.refuses(x, grid=grid, block=block)
    check(gpu.hadamard_quantize(x, grid=grid, block=block, interpret=strict()), x, grid, block)


@interpreted
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c != "equal")) for c in SHAPES | OTHERS]
)
def test_tiles_and_races(case):
    equals((SHAPES | OTHERS)[case], ActivationGrid(bits=4))


@interpreted
@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    shape=st.sampled_from([*SHAPES.values(), (3, 128, 2, 16), (2, 7168, 7168, 7168), (9, 1536, 1536, 64)]),
    grid=st.sampled_from(GRIDS),
    dtype=st.sampled_from([jnp.float16, jnp.bfloat16]),
    seed=st.integers(0, 3),
)
def test_equals_float64(shape, grid, dtype, seed):
    # The largest of these activations is within float16.
    equals(shape, grid, dtype, seed)


@interpreted
@pytest.mark.slow
def test_nan_stays_in_its_slice():
    x, grid = activations(1, 256, jnp.bfloat16).at[0, 3].set(jnp.nan), ActivationGrid(group_size=64)
    _, scale, _ = gpu.hadamard_quantize(x, grid=grid, block=64, interpret=strict())
    np.testing.assert_array_equal(np.isfinite(scale), [[False, False, True, True]])


def test_programs_begin_where_copies_do():
    """TMA drops what is left of a division by 8, which no interpreter shows."""
    for rows, slices in itertools.product((1, 2, 7, 8, 9, 64, 300), range(1, 230)):
        own, aligned, tiles = gpu._plan(rows, slices * 128)
        starts = np.arange(0, rows, own) * slices
        assert aligned == (starts % 8 == 0).all()
        assert (starts % 8 + own * slices <= 64 * tiles).all()


def lowered(backend, x, grid, block):
    program = jax.jit(functools.partial(hadamard_quantize, grid=grid, block=block, backend=backend))
    return program.trace(x).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("rows", "n", "block", "group"), [(1, 1536, 1536, None), (600, 28672, 64, 64), (9, 11008, 256, None)]
)
def test_lowers_to_one_call_where_asked(rows, n, block, group):
    x, grid = jax.ShapeDtypeStruct((rows, n), jnp.bfloat16), ActivationGrid(group_size=group)
    assert lowered("kernel", x, grid, block).count("@mosaic_gpu") == 1
    assert "@mosaic_gpu" not in lowered(None, x, grid, block)


HALF = ActivationGrid(scale_dtype="float16")
REFUSED = {
    "it takes nonempty bfloat16 or float16 x, not float32": (jnp.float32, 256, 64, ActivationGrid()),
    "scales are float16, not float32": (jnp.bfloat16, 256, 64, HALF),
    "576 channels, blocks of 576 = 36 x 16 and": (jnp.bfloat16, 576, 576, ActivationGrid()),
    "768 channels, blocks of 256 = 1 x 256 and groups of 192": (
        jnp.bfloat16, 768, 256, ActivationGrid(group_size=192),
    ),
    "256 channels, blocks of 64 = 1 x 64 and groups of 8": (
        jnp.bfloat16, 256, 64, ActivationGrid(group_size=8),
    ),
    "a factor of 60 has too many values": (jnp.bfloat16, 7680, 7680, ActivationGrid()),
    "rows of 65536 channels do not fit into shared": (jnp.bfloat16, 65536, 64, ActivationGrid()),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernel_does_not_take(reason):
    dtype, n, block, grid = REFUSED[reason]
    with pytest.raises(UsageError, match=f"no kernel, since {reason}"):
        lowered("kernel", jax.ShapeDtypeStruct((2, n), dtype), grid, block)
