"""The C++ kernel for CPUs: values, derivatives, transformations, and the paths that go around it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.errors import UsageError
from jaxquant.kernels.dequant_matmul import cpu, dequant_matmul
from jaxquant.quant import Grid, pack, quantize

TARGET = "jaxquant_dequant_matmul"


@pytest.fixture
def kernel():
    (x, words, scale, zero), _ = problem(1, 1, 8, 1, 8, 4)
    if reason := cpu.KERNEL.refuses(x, words, scale, zero, bits=4, block=8):
        pytest.skip(reason)


def problem(rows, blocks, block, groups, out, bits, dtype=jnp.float32, scale_dtype=jnp.float16, seed=0):
    """Arguments of the matmul, and its result in float64."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (blocks, block, out), dtype=np.uint8)
    scale = jnp.asarray(rng.uniform(0.5, 2, (groups, out)) * rng.choice([-1, 1], (groups, out)), scale_dtype)
    zero = jnp.asarray(rng.uniform(0, 2**bits, (groups, out)), scale_dtype)
    x = jnp.asarray(rng.standard_normal((rows, blocks * block)) + rng.uniform(-1, 1), dtype)
    step, shift = (np.repeat(np.float64(a), blocks // groups, axis=0)[:, None] for a in (scale, zero))
    weight = (step * (codes - shift)).reshape(-1, out)
    return (x, jax.jit(pack, static_argnums=1)(codes, bits), scale, zero), np.float64(x) @ weight


def close(y, expected, tolerance=1e-5):
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * np.max(np.abs(expected)))


@pytest.mark.usefixtures("kernel")
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 3),
    blocks_of_group=st.integers(1, 3),
    block=st.integers(1, 70),
    out=st.integers(1, 200),
    bits=st.integers(1, 8),
    scale_dtype=st.sampled_from([jnp.float16, jnp.float32]),
    seed=st.integers(0, 2**16),
)
def test_equals_float64(rows, groups, blocks_of_group, block, out, bits, scale_dtype, seed):
    blocks = groups * blocks_of_group
    arguments, expected = problem(rows, blocks, block, groups, out, bits, scale_dtype=scale_dtype, seed=seed)
    y = dequant_matmul(*arguments, bits=bits, block=block, backend="kernel")
    assert y.dtype == jnp.float32
    close(y, expected)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("rows", [1, 5])
def test_tasks_of_several_threads(rows):
    arguments, expected = problem(rows, 8, 128, 8, 4200, 4)
    for _ in range(3):
        close(dequant_matmul(*arguments, bits=4, block=128), expected)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_rounds_the_result_alone(dtype):
    arguments, expected = problem(3, 2, 32, 2, 40, 4, dtype=dtype)
    y = dequant_matmul(*arguments, bits=4, block=32, backend="kernel")
    assert y.dtype == dtype
    rounding = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.float64(y), expected, rtol=rounding, atol=1e-5 * np.max(np.abs(expected)))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("grid", [Grid(bits=3, group_size=16), Grid(bits=4, group_size=32, symmetric=True)])
def test_product_with_a_qarray(grid):
    rng = np.random.default_rng(1)
    q = quantize(jnp.asarray(rng.standard_normal((64, 24)), jnp.float32), grid)
    x = jnp.asarray(rng.standard_normal((2, 3, 64)), jnp.float32)
    assert TARGET in jax.jit(lambda x, q: x @ q).lower(x, q).as_text()
    close(x @ q, np.float64(x) @ np.float64(q.dequantize()))


@pytest.mark.usefixtures("kernel")
def test_derivatives_are_those_of_the_reference():
    (x, words, scale, zero), _ = problem(2, 2, 12, 2, 6, 3, scale_dtype=jnp.float32)

    def loss(backend, x, scale, zero):
        multiply = functools.partial(dequant_matmul, bits=3, block=12, backend=backend)
        return jnp.sum(jnp.sin(0.05 * multiply(x, words, scale, zero)))

    moving, direction = (x, scale, zero), (0.3 * x, scale**2, jnp.cos(zero))

    def everything(backend):
        of = functools.partial(loss, backend)
        gradient = jax.grad(of, argnums=(0, 1, 2))
        return gradient(*moving), jax.jvp(of, moving, direction)[1], jax.jvp(gradient, moving, direction)[1]

    ours, expected = (jax.jit(everything, static_argnums=0)(name) for name in ("kernel", "portable"))
    jax.tree.map(lambda a, b: close(a, b, 1e-4), ours, expected)


@pytest.mark.usefixtures("kernel")
def test_vmap_over_activations_is_one_call():
    (x, *weight), expected = problem(6, 2, 16, 2, 20, 4)
    product = jax.jit(jax.vmap(lambda x: dequant_matmul(x, *weight, bits=4, block=16), in_axes=1))
    batched = jnp.moveaxis(x.reshape(2, 3, 32), 0, 1)
    assert product.lower(batched).as_text().count(f"@{TARGET}(") == 1
    close(product(batched).reshape(6, 20), expected)


def test_vmap_over_weights_and_gradients():
    (x, *weight), expected = problem(3, 2, 16, 2, 20, 4)
    stacked = [jnp.stack([a, a[..., ::-1]]) for a in weight]

    def loss(x, *weight):
        y = dequant_matmul(x, *weight, bits=4, block=16)
        return jnp.sum(y), y

    gradient, y = jax.vmap(jax.grad(loss, has_aux=True), in_axes=(None, 0, 0, 0))(x, *stacked)
    close(y, np.stack([expected, expected[:, ::-1]]))
    close(gradient[0], gradient[1])


@pytest.mark.usefixtures("kernel")
def test_inside_scan_and_switch():
    problems = [problem(2, 1, 32, 1, 32, 4, seed=seed)[0] for seed in range(3)]
    stacked = [jnp.stack(a) for a in zip(*(p[1:] for p in problems), strict=True)]

    def forward(x, backend):
        def layer(x, weight):
            multiply = functools.partial(dequant_matmul, bits=4, block=32, backend=backend)
            branches = [lambda x: multiply(x, *weight), lambda x: -multiply(x, *weight)]
            return jnp.tanh(0.01 * jax.lax.switch(jnp.int32(x[0, 0] > 0), branches, x)), None

        return jnp.sum(jax.lax.scan(layer, x, stacked)[0])

    both = jax.jit(jax.value_and_grad(forward), static_argnums=1)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), both(problems[0][0], None), both(problems[0][0], "portable"))


def test_other_platforms_see_the_scan():
    arguments, _ = problem(1, 2, 16, 2, 20, 4)
    multiply = jax.jit(functools.partial(dequant_matmul, bits=4, block=16))
    text = multiply.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call" not in text
    assert "while" in text


def test_an_exported_program_holds_the_scan():
    arguments, expected = problem(1, 2, 16, 2, 20, 4)
    exported = jax.export.export(jax.jit(functools.partial(dequant_matmul, bits=4, block=16)))(*arguments)
    assert TARGET not in exported.mlir_module()
    close(exported.call(*arguments), expected)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("bits", "out"), [(3, 600), (4, 509), (7, 600)])
@pytest.mark.parametrize("scale_dtype", [jnp.float16, jnp.float32])
def test_many_rows_multiply_tiles(monkeypatch, bits, out, scale_dtype):
    monkeypatch.setattr(cpu, "_TILE", 120 * 200)
    arguments, expected = problem(cpu.LARGEST_ROWS + 1, 6, 20, 2, out, bits, scale_dtype=scale_dtype)
    multiply = jax.jit(functools.partial(dequant_matmul, bits=bits, block=20))
    assert "jaxquant_dequantize" in multiply.lower(*arguments).as_text()
    close(multiply(*arguments), expected)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("blocks", "out"), [(224, 8192), (32, 32003)])
def test_tiles_stay_narrow(blocks, out):
    """28672 x 8192 is a linear of Llama-3-70B, 940 MB in float32; 32003 outputs have no divisor."""
    array = jax.ShapeDtypeStruct
    half = array((blocks, out), jnp.float16)
    arguments = (array((65, 128 * blocks), jnp.float32), array((blocks, 64, out), jnp.uint8), half, half)
    multiply = jax.jit(functools.partial(dequant_matmul, bits=4, block=128, backend="kernel"))
    assert multiply.lower(*arguments).compile().memory_analysis().temp_size_in_bytes < 30e6


@pytest.mark.parametrize("case", ["words", "scale"])
def test_what_the_kernel_does_not_take(case):
    (x, words, scale, zero), expected = problem(1, 2, 16, 2, 20, 4)
    if case == "words":
        words, expected = jnp.zeros((2, 2, 20), jnp.uint32), np.zeros((1, 20))
        zero = jnp.zeros_like(zero)
    else:
        scale = scale.astype(jnp.float32)
    multiply = jax.jit(functools.partial(dequant_matmul, bits=4, block=16))
    assert TARGET not in multiply.lower(x, words, scale, zero).as_text()
    close(multiply(x, words, scale, zero), expected)
    with pytest.raises(UsageError, match="use backend='portable'"):
        dequant_matmul(x, words, scale, zero, bits=4, block=16, backend="kernel")


@pytest.mark.usefixtures("kernel")
def test_wider_activations_are_refused():
    arguments, _ = problem(1, 2, 16, 2, 20, 4)
    wide = jax.ShapeDtypeStruct(arguments[0].shape, np.float64)
    assert "not float64 by uint8" in cpu.KERNEL.refuses(wide, *arguments[1:], bits=4, block=16)


def test_without_a_kernel(monkeypatch):
    arguments, expected = problem(2, 2, 16, 2, 30, 4)
    monkeypatch.setenv("JAXQUANT_NATIVE", "0")
    multiply = jax.jit(functools.partial(dequant_matmul, bits=4, block=16))
    assert TARGET not in multiply.lower(*arguments).as_text()
    close(multiply(*arguments), expected)
    with pytest.raises(UsageError, match="JAXQUANT_NATIVE is 0"):
        dequant_matmul(*arguments, bits=4, block=16, backend="kernel")
    with pytest.raises(UsageError, match="unknown backend"):
        dequant_matmul(*arguments, bits=4, block=16, backend="cuda")


@pytest.mark.slow
def test_kernels_run_inside_shard_map():
    """On two devices, inputs cut between them; a program that XLA divides holds the scan."""
    code = """
        import functools, jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from jaxquant.kernels.dequant_matmul import cpu, dequant_matmul
        from jaxquant.quant import Grid, quantize

        mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        q = quantize(jax.random.normal(jax.random.key(0), (64, 48)), Grid(bits=4, group_size=32))
        x = jax.random.normal(jax.random.key(1), (2, 64))
        multiply = functools.partial(dequant_matmul, bits=4, block=q.block)
        cut, weight = P("d"), (q.words, q.scale.astype(jnp.float32), q.zero.astype(jnp.float32))
        mapped = jax.jit(jax.shard_map(
            lambda *a: jax.lax.psum(multiply(*a), "d"), mesh=mesh,
            in_specs=(P(None, "d"), cut, cut, cut), out_specs=P(),
        ))
        near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        near(mapped(x, *weight), multiply(x, *weight))
        slope = lambda f: jax.grad(lambda s: f(x, weight[0], s, weight[2]).sum())(weight[1])
        near(slope(mapped), slope(multiply))
        target = "jaxquant_dequant_matmul"
        usable = not cpu.KERNEL.refuses(x, *weight, bits=4, block=q.block)
        assert (target in mapped.lower(x, *weight).as_text()) == usable
        divided = jax.device_put((x, *weight), tuple(NamedSharding(mesh, s) for s in (P(), cut, cut, cut)))
        near(jax.jit(multiply)(*divided), multiply(x, *weight))
        assert target not in jax.jit(multiply).lower(*divided).as_text()
    """
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, check=True)
