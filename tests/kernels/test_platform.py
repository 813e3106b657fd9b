"""What operations with kernels have in common, by the packed matmul: where programs are lowered, and how."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxquant.errors import InputError
from jaxquant.kernels.dequant_matmul import dequant_matmul, paired_matmul, reference
from jaxquant.kernels.integer_matmul import integer_matmul
from jaxquant.kernels.platform import Kernel, by_platform
from jaxquant.quant import Grid, quantize
from jaxquant.quant.packing import pair


@pytest.fixture(scope="module")
def arrays():
    q = quantize(jax.random.normal(jax.random.key(0), (64, 128)), Grid(bits=4, group_size=32))
    return jax.random.normal(jax.random.key(1), (2, 64)), q.words, q.scale, q.zero


product = functools.partial(dequant_matmul, bits=4, block=32)


def test_nothing_is_run_step_by_step(arrays):
    expected = reference.dequant_matmul(*arrays, bits=4, block=32)
    with jax.disable_jit():
        np.testing.assert_allclose(product(*arrays), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [None, "portable"])
def test_calls_outside_of_jit_are_compiled_once(arrays, backend, caplog):
    x, *weight = arrays

    def everything():
        multiply = functools.partial(product, backend=backend)
        loss = lambda x, scale: jnp.sum(multiply(x, weight[0], scale, weight[2]))  # noqa: E731
        return multiply(*arrays), jax.grad(loss, argnums=(0, 1))(x, weight[1])

    def compiled():
        caplog.clear()
        with jax.log_compiles():
            everything()
        return sum("Finished XLA compilation" in message for message in caplog.messages)

    everything()
    assert compiled() == 0
    jax.clear_caches()
    assert compiled() > 0


def test_an_axis_of_size_0_is_mapped(arrays):
    x, *weight = arrays
    assert jax.vmap(lambda x: product(x, *weight))(jnp.zeros((0, *x.shape))).shape == (0, 2, 128)


@pytest.mark.parametrize("x64", [False, True])
def test_lowers_for_tpus_inside_shard_map_and_with_wide_integers(arrays, x64):
    x, *weight = arrays
    x = x.astype(jnp.bfloat16)
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("d")
    mapped = jax.shard_map(lambda x: product(x, *weight), mesh=mesh, in_specs=spec, out_specs=spec)
    with jax.enable_x64(x64):
        for f in (mapped, lambda x: product(x, *weight)):
            text = jax.jit(f).trace(x).lower(lowering_platforms=("tpu",)).as_text()
            assert text.count("@tpu_custom_call") == 1


def test_rows_may_be_symbolic_in_an_exported_program(arrays):
    _, *weight = arrays
    rows = jax.export.symbolic_shape("rows, 64")
    exported = jax.export.export(jax.jit(lambda x: product(x, *weight)), platforms=["tpu"])
    assert exported(jax.ShapeDtypeStruct(rows, jnp.float32)).out_avals[0].shape[1] == 128


def split(x, weight, *, step):
    """Whole steps, an integer, and what is left of a row, a float."""
    steps = jnp.floor(x / step).astype(jnp.int32)
    return steps, jnp.sum(weight * (x - step * steps.astype(x.dtype)), axis=1)


def by_remainder(x, weight, *, step):
    left = jnp.mod(x, step)
    return jnp.round((x - left) / step).astype(jnp.int32), jnp.sum(weight * left, axis=1)


@pytest.mark.parametrize("over", ["rows", "both"])
def test_several_results_of_several_dtypes(over):
    parts = functools.partial(
        by_platform(split, {"cpu": [Kernel(by_remainder, lambda *_, step: "")]}, rows=1), step=2.0
    )
    x, weight = jnp.asarray([[0.5, 3.0], [-1.25, 7.0], [2.0, 9.5]]), jnp.asarray([[1.0, 2.0]])
    assert "remainder" in jax.jit(parts).lower(x, weight).as_text()
    expected = split(x, weight, step=2.0)
    jax.tree.map(np.testing.assert_array_equal, parts(x, weight), expected)
    (steps, left), (no_steps, moved) = jax.jvp(parts, (x, weight), (jnp.ones_like(x), jnp.zeros_like(weight)))
    jax.tree.map(np.testing.assert_array_equal, (steps, left), expected)
    assert no_steps.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(moved, [3, 3, 3])
    gradient = jax.jit(jax.grad(lambda x, weight: jnp.sum(parts(x, weight)[1]), (0, 1)))(x, weight)
    np.testing.assert_array_equal(gradient[0], jnp.broadcast_to(weight, x.shape))
    np.testing.assert_array_equal(gradient[1], [[0.5 + 0.75, 1 + 1 + 1.5]])
    axes = (0, None) if over == "rows" else (0, 0)
    weights = weight if over == "rows" else jnp.broadcast_to(weight, (3, 1, 2))
    mapped = jax.jit(jax.vmap(parts, in_axes=axes))(x[:, None], weights)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 0], b), mapped, expected)


def test_shapes_that_do_not_agree(arrays):
    x, words, scale, zero = arrays
    with pytest.raises(InputError, match=r"scales \(2, 128\) and zeros \(1, 128\) do not fit 2 blocks"):
        product(x, words, scale, zero[:1])
    with pytest.raises(InputError, match="give both one row for each group"):
        product(x, words, jnp.repeat(scale, 2, 0), jnp.repeat(zero, 2, 0))
    with pytest.raises(InputError, match="do not hold 64 rows of 3-bit codes in blocks of 32"):
        dequant_matmul(x, words, scale, zero, bits=3, block=32)
    codes, ranges = jnp.zeros((2, 64), jnp.uint8), jnp.ones((2, 2))
    multiply = functools.partial(integer_matmul, x_bits=4, bits=4, block=32)
    with pytest.raises(InputError, match=r"scales \(2, 2\) and offsets \(2, 1\) do not fit x \(2, 64\)"):
        multiply(codes, ranges, ranges[:, :1], words, scale, zero)
    with pytest.raises(InputError, match=r"scales \(2, 0\) .* give both one for each group of channels"):
        multiply(codes, ranges[:, :0], ranges[:, :0], words, scale, zero)
    with pytest.raises(
        InputError, match=r"words \(2, 128\) of uint8 do not fit: .* \(blocks, words, outputs\)"
    ):
        product(x, words[:, 0], scale, zero)
    with pytest.raises(InputError, match=r"x \(\) and words .* do not fit: give x an axis of inputs"):
        product(jnp.float32(1), words, scale, zero)
    with pytest.raises(InputError, match=r"scales \(\) and zeros \(\) do not fit 2 blocks"):
        product(x, words, jnp.float16(1), jnp.float16(1))


def test_dtypes_and_bits_that_are_not_multiplied(arrays):
    x, words, scale, zero = arrays
    with pytest.raises(InputError, match="dequant_matmul: x is int32; convert it to a float dtype"):
        product(x.astype(jnp.int32), words, scale, zero)
    with pytest.raises(InputError, match="dequant_matmul: x is uint8"):
        paired_matmul(x.astype(jnp.uint8), words, pair(scale, zero), bits=4, block=32)
    with pytest.raises(InputError, match=r"words .* of float32 do not fit: .* unsigned"):
        product(x, words.astype(jnp.float32), scale, zero)
    with pytest.raises(InputError, match="9 bits in blocks of 32 cannot be packed; use 1 to 8"):
        dequant_matmul(x, words, scale, zero, bits=9, block=32)
    codes, ranges = jnp.zeros((2, 64), jnp.uint8), jnp.ones((2, 1))
    for given, x_bits in ((codes, 0), (codes, 9), (codes.astype(jnp.int32), 4), (x, 4)):
        with pytest.raises(
            InputError, match=rf"x is {given.dtype}, x_bits={x_bits}; give codes of 1 to 8 bits"
        ):
            integer_matmul(given, ranges, ranges, words, scale, zero, x_bits=x_bits, bits=4, block=32)
