"""The GPU kernel, interpreted and lowered where there is no GPU; tests/aot compiles it."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import interpreted, strict
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.errors import UsageError
from jaxquant.kernels.dequant_matmul import dequant_matmul, gpu, reference
from jaxquant.quant import pack


def problem(rows, groups, blocks_per_group, block, out, bits, *, scale_dtype=jnp.float16, dtype=jnp.bfloat16):
    rng = np.random.default_rng(rows * out + bits)
    blocks = groups * blocks_per_group
    codes = jnp.asarray(rng.integers(0, 2**bits, (blocks, block, out)), jnp.uint8)
    scale = jnp.asarray(rng.uniform(0.5, 2, (groups, out)), scale_dtype)
    zero = jnp.asarray(rng.integers(0, 2**bits, (groups, out)), scale_dtype)
    x = jnp.asarray(rng.standard_normal((rows, blocks * block)), dtype)
    return x, pack(codes, bits), scale, zero


generations = pytest.mark.parametrize("blackwell", [False, True], ids=["hopper", "blackwell"])


def assert_equals_reference(shape, blackwell, **dtypes):
    arrays, options = problem(*shape, **dtypes), {"bits": shape[-1], "block": shape[3]}
    assert not gpu.HOPPER.refuses(*arrays, **options)
    y = gpu.dequant_matmul(*arrays, **options, blackwell=blackwell, interpret=strict())
    assert y.dtype == arrays[0].dtype
    exact = reference.dequant_matmul(arrays[0].astype(jnp.float32), *arrays[1:], **options)
    np.testing.assert_allclose(
        y.astype(jnp.float32), exact, rtol=0, atol=1e-2 * float(jnp.max(jnp.abs(exact)))
    )


# One step of one tile; a split contraction; several blocks a step in a group, of a group each, and of a part;
# several tiles of rows, the last one ragged.
CASES = {
    "one step": (1, 1, 1, 64, 64, 4),
    "split": (3, 6, 1, 128, 192, 3),
    "group a step": (9, 4, 4, 16, 64, 4),
    "groups a step": (1, 8, 1, 32, 128, 2),
    "steps a group": (20, 1, 3, 128, 128, 8),
    "tiles of rows": (130, 2, 1, 128, 64, 3),
}


@interpreted
@generations
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c != "groups a step")) for c in CASES]
)
def test_tiles_and_races(case, blackwell):
    assert_equals_reference(CASES[case], blackwell)


@interpreted
@generations
@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 6),
    blocks_per_group=st.integers(1, 3),
    block=st.sampled_from([64, 128]),
    out=st.sampled_from([64, 128, 192]),
    bits=st.integers(1, 8),
    scale_dtype=st.sampled_from([jnp.float16, jnp.float32]),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float16]),
)
def test_equals_reference(blackwell, rows, groups, blocks_per_group, block, out, bits, scale_dtype, dtype):
    shape = (rows, groups, blocks_per_group, block, out, bits)
    assert_equals_reference(shape, blackwell, scale_dtype=scale_dtype, dtype=dtype)


def lowered(backend, *shape, **dtypes):
    arrays = jax.eval_shape(functools.partial(problem, *shape, **dtypes))
    product = functools.partial(dequant_matmul, backend=backend, bits=shape[-1], block=shape[3])
    return jax.jit(product).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lowers_to_one_call_where_asked(bits, rows):
    assert lowered("kernel", rows, 4, 1, 128, 192, bits).count("@mosaic_gpu") == 1


def test_scans_where_the_device_is_not_known():
    """The kernel is for one generation of GPUs, and nothing tells which will run the program."""
    assert "@mosaic_gpu" not in lowered(None, 1, 2, 1, 128, 64, 4)


def test_generations():
    devices = [SimpleNamespace(compute_capability=c) for c in ("8.0", "9.0", "10.0", "10.3", "12.0")]
    taken = [[not kernel.lacks(d) for d in devices] for kernel in (gpu.HOPPER, gpu.BLACKWELL)]
    assert taken == [[False, True, False, False, False], [False, False, True, True, False]]
    assert "not 8.0" in gpu.HOPPER.lacks(devices[0])


@pytest.mark.parametrize(
    ("shape", "dtypes", "reason"),
    [
        ((2, 3, 1, 24, 64, 4), {}, "blocks that fill 64 or 128 inputs"),
        ((2, 2, 1, 32, 64, 3), {}, "fields of a multiple of 8 rows"),
        ((2, 2, 1, 64, 96, 4), {}, "outputs in multiples of 64"),
        ((2, 2, 1, 64, 64, 4), {"dtype": jnp.float32}, "float16 x, not float32"),
        ((2, 2, 1, 64, 64, 4), {"scale_dtype": jnp.bfloat16}, "not both float16 or float32"),
    ],
)
def test_refuses(shape, dtypes, reason):
    with pytest.raises(UsageError, match=reason):
        lowered("kernel", *shape, **dtypes)
