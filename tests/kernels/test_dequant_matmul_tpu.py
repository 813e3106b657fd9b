"""The TPU kernel, interpreted and lowered where there is no TPU; tests/aot compiles it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from jaxquant.errors import UsageError
from jaxquant.kernels.dequant_matmul import dequant_matmul, paired_matmul, reference, tpu
from jaxquant.quant import pack
from jaxquant.quant.packing import pair


def problem(
    rows, groups, blocks_per_group, block, out, bits, *, word_dtype=jnp.uint8, scale_dtype=jnp.float16
):
    rng = np.random.default_rng(rows * out + bits)
    blocks = groups * blocks_per_group
    codes = jnp.asarray(rng.integers(0, 2**bits, (blocks, block, out)), jnp.uint8)
    scale = jnp.asarray(rng.uniform(0.5, 2, (groups, out)), scale_dtype)
    zero = jnp.asarray(rng.integers(0, 2**bits, (groups, out)), scale_dtype)
    x = jnp.asarray(rng.standard_normal((rows, blocks * block)), jnp.float32)
    return x, pack(codes, bits, word_dtype=word_dtype), scale, zero


def assert_close(y, x, words, scale, zero, *, bits, block):
    exact = reference.dequant_matmul(x.astype(jnp.float32), words, scale, zero, bits=bits, block=block)
    tolerance = 1e-5 if x.dtype == jnp.float32 else 1e-2
    atol = tolerance * float(jnp.max(jnp.abs(exact)))
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0, atol=atol)


def call(x, words, scale, zero, *, paired, **options):
    """The kernel, given scales and zeros apart or in pairs."""
    if paired:
        return tpu.paired_matmul(x, words, pair(scale, zero), **options)
    return tpu.dequant_matmul(x, words, scale, zero, **options)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 20),
    blocks_per_group=st.integers(1, 3),
    block=st.sampled_from([8, 24, 32, 64, 96, 128]),
    out=st.integers(1, 300),
    bits=st.integers(1, 8),
    word_dtype=st.sampled_from([jnp.uint8, jnp.uint32]),
    metadata=st.sampled_from([("float16", False), ("float32", False), ("float16", True)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_equals_reference(
    rows, groups, blocks_per_group, block, out, bits, word_dtype, metadata, dtype
):  # fmt: skip
    scale_dtype, paired = metadata
    shape = (rows, groups, blocks_per_group, block, out, bits)
    x, *weight = problem(*shape, word_dtype=word_dtype, scale_dtype=scale_dtype)
    x = x.astype(dtype)
    y = call(x, *weight, paired=paired, bits=bits, block=block, interpret=True)
    assert_close(y, x, *weight, bits=bits, block=block)


# A ragged block of everything; several tiles of every axis, the last ones ragged, with scales cut and whole.
CASES = {
    "one tile": ((3, 2, 1, 24, 40, 3), jnp.float32),
    "scales cut": ((530, 16, 1, 128, 1100, 4), jnp.bfloat16),
    "scales whole": ((300, 3, 8, 64, 1030, 2), jnp.float32),
    "per channel": ((1, 1, 12, 128, 1537, 8), jnp.bfloat16),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c != "one tile")) for c in CASES]
)
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("hardware", [False, True])
def test_tiles_and_races(case, hardware, paired):
    """On `hardware` memory is emulated: unsynchronized accesses raise, fresh memory reads as NaN."""
    shape, dtype = CASES[case]
    x, *weight = problem(*shape)
    x, options = x.astype(dtype), {"bits": shape[-1], "block": shape[3]}
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan") if hardware else True
    y = call(x, *weight, paired=paired, **options, interpret=interpret)
    assert_close(y, x, *weight, **options)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 600])
@pytest.mark.parametrize("paired", [False, True])
def test_lowers_to_one_call(bits, rows, paired):
    """Mosaic verifies blocks and operations; the default backend is the kernel there, and is not here."""
    x, words, *metadata = problem(rows, 16, 1, 128, 1100, bits)
    if paired:
        metadata = [pair(*metadata)]
    product = jax.jit(functools.partial(paired_matmul if paired else dequant_matmul, bits=bits, block=128))
    traced = product.trace(x.astype(jnp.bfloat16), words, *metadata)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call") == 1
    assert "@tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_lowers_under_vmap_and_scan():
    x, *weight = problem(2, 2, 1, 32, 128, 4)
    stacked = [jnp.stack([a, a]) for a in weight]
    product = functools.partial(dequant_matmul, bits=4, block=32)
    for f in (
        jax.vmap(product, in_axes=(None, 0, 0, 0)),
        lambda x, *w: jax.lax.scan(lambda c, layer: (c, product(c, *layer)), x, w),
    ):
        text = jax.jit(f).trace(x, *stacked).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("@tpu_custom_call") == 1


def test_what_the_kernel_does_not_take_is_scanned():
    x, *weight = problem(2, 3, 1, 9, 40, 3)
    product = jax.jit(functools.partial(dequant_matmul, bits=3, block=9))
    assert "@tpu_custom_call" not in product.trace(x, *weight).lower(lowering_platforms=("tpu",)).as_text()
    insisting = jax.jit(functools.partial(dequant_matmul, bits=3, block=9, backend="kernel"))
    with pytest.raises(UsageError, match=r"blocks of a multiple of 8 rows, not float32 of .* 3 blocks of 9"):
        insisting.trace(x, *weight).lower(lowering_platforms=("tpu",))
    assert dequant_matmul(x[:0], *weight, bits=3, block=9).shape == (0, 40)
