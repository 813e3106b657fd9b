"""`QArray`: a packed weight is the weight it stands for, through every transformation."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.errors import UsageError
from jaxquant.kernels.dequant_matmul import reference
from jaxquant.quant import Grid, QArray
from jaxquant.quant import quantize as nearest

KINDS = [
    Grid(bits=1, group_size=32, symmetric=True),
    Grid(bits=2, group_size=16),
    Grid(bits=3, group_size=24, symmetric=True, convention="full"),
    Grid(bits=4, group_size=64),
    Grid(bits=5),
    Grid(bits=6, group_size=192, scale_dtype="float32"),
    Grid(bits=7, symmetric=True, convention="restricted"),
    Grid(bits=8, group_size=96),
]
ROWS, OUT = 192, 40

quantize = jax.jit(nearest, static_argnums=1)
dequantize = jax.jit(QArray.dequantize, static_argnums=1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def rounded(w: jax.Array, grid: Grid, word=jnp.uint8):
    """Codes, scale, zero, their values and the packed weight."""
    scale, zero = grid.fit(w)
    codes = grid.quantize(w, scale, zero)
    q = QArray.from_codes(codes, scale, zero, grid, word_dtype=word)
    return codes, scale, zero, grid.dequantize(codes, scale, zero), q


def weight(*stack: int, rows: int = ROWS, out: int = OUT, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*stack, rows, out)), jnp.float32)


def activations(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*shape, ROWS)), jnp.float32)


def exact(x, w) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64)


def assert_product(y, x, w, *, tolerance: float = 1e-5) -> None:
    expected = exact(x, w)
    np.testing.assert_allclose(
        np.asarray(y, np.float64), expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


@pytest.mark.parametrize(
    ("grid", "word"),
    [(grid, jnp.uint8) for grid in KINDS] + [(grid, jnp.uint32) for grid in KINDS[2:5]],
    ids=str,
)
def test_product_equals_that_of_the_dequantized_weight(grid, word):
    w, x = weight(), activations(5)
    codes, scale, zero, values, q = rounded(w, grid, word)
    what = dequantize(q)
    np.testing.assert_array_equal(jax.jit(QArray.codes)(q), codes)
    np.testing.assert_array_equal(what, values)
    assert q.words.dtype == word
    assert_product(jax.jit(lambda x, q: x @ q)(x, q), x, what)
    all_zeros = jnp.full_like(scale, grid.constant_zero) if zero is None else zero
    oracle = jax.jit(functools.partial(reference.dequant_matmul, bits=grid.bits, block=q.block))
    assert_product(oracle(x, q.words, scale, all_zeros), x, what)


@pytest.mark.parametrize("grid", [Grid(bits=3, group_size=48), Grid(bits=4, symmetric=True)], ids=str)
def test_order(grid):
    """Packed row k is input order[k]."""
    w, x = weight(), activations(3)
    order = jnp.asarray(np.random.default_rng(2).permutation(ROWS), jnp.int32)
    codes, scale, zero, values, _ = rounded(w[order], grid)
    q = QArray.from_codes(codes, scale, zero, grid, order=order)
    what = dequantize(q)
    np.testing.assert_array_equal(what[order], values)
    assert_product(x @ q, x, what)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), q, dataclasses.replace(q, order=order[::-1]))
    both = dequantize(stacked)
    np.testing.assert_array_equal(both[0], what)
    np.testing.assert_array_equal(both[1][order[::-1]], what[order])


def test_left_operand_forms():
    q = quantize(weight(), Grid(group_size=64))
    w, x = dequantize(q), activations(2, 3)
    assert_product(x @ q, x, w)
    assert_product(np.asarray(x) @ q, x, w)
    assert_product(x[0, 0] @ q, x[0, 0], w)
    assert (x @ q).shape == (2, 3, OUT)
    assert (x[:0] @ q).shape == (0, 3, OUT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)])
def test_half_precision_activations(dtype, tolerance):
    q, x = quantize(weight(), Grid(group_size=64)), activations(4).astype(dtype)
    y = x @ q
    assert y.dtype == dtype
    assert_product(y.astype(jnp.float32), x.astype(jnp.float32), dequantize(q), tolerance=tolerance)


def test_double_precision_activations():
    with jax.enable_x64(True):
        q = quantize(weight(), Grid(group_size=64))
        x = activations(4).astype(jnp.float64)
        y = x @ q
        assert y.dtype == jnp.float64
        assert_product(y, x, dequantize(q, jnp.float64), tolerance=1e-12)


def test_vmap_and_scan_over_a_stack_equal_a_loop():
    w, x = weight(3), activations(3, 5)
    q = quantize(w, Grid(bits=3, group_size=48))
    assert q.shape == (ROWS, OUT)
    loop = jnp.stack([x[i] @ jax.tree.map(lambda leaf, i=i: leaf[i], q) for i in range(3)])
    together = jax.jit(jax.vmap(lambda x, q: x @ q))
    np.testing.assert_allclose(together(x, q), loop, rtol=1e-5, atol=1e-5)
    _, scanned = jax.lax.scan(lambda carry, xq: (carry, xq[0] @ xq[1]), None, (x, q))
    np.testing.assert_allclose(scanned, loop, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(jax.jit(jax.vmap(QArray.dequantize))(q), dequantize(q))


@pytest.mark.parametrize("grid", [Grid(bits=2, group_size=64), Grid(bits=4, symmetric=True)], ids=str)
def test_gradients_equal_those_of_the_dequantized_product(grid):
    q, x = quantize(weight(), grid), activations(5)
    scale = q.scale.astype(jnp.float32)

    def packed(x, scale):
        return jnp.sum(jnp.sin(x @ dataclasses.replace(q, scale=scale)))

    def plain(x, scale):
        return jnp.sum(jnp.sin(jnp.matmul(x, grid.dequantize(q.codes(), scale, q.zero), precision="highest")))

    ours, expected = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, scale) for f in (packed, plain))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("grid", KINDS, ids=str)
def test_bytes_are_those_of_the_buffers(grid):
    q = quantize(weight(2), grid)
    assert q.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(q))
    assert q.effective_bits == pytest.approx(grid.effective_bits(ROWS))


def test_groups_that_end_inside_a_byte_cost_what_they_promise():
    grid = Grid(bits=3, group_size=4)
    q = quantize(weight(), grid)
    assert q.effective_bits == grid.effective_bits(ROWS) == 4 + 32 / 4


@pytest.mark.parametrize("rows", [2048, 576, 1537])
def test_dequantized_weight_is_never_whole_in_memory(rows):
    """Peak temporaries of `x @ q`, as XLA reports them, against one float32 copy of the weight."""
    group = None if rows == 1537 else 64
    q = jax.eval_shape(
        lambda: nearest(jnp.zeros((rows, 2048)), Grid(bits=4, group_size=group, scale_dtype="float16"))
    )
    x = jax.ShapeDtypeStruct((4, rows), jnp.float32)
    memory = jax.jit(lambda x, q: x @ q).lower(x, q).compile().memory_analysis()
    assert memory.temp_size_in_bytes < {2048: 0.45, 576: 1.0, 1537: 2.0}[rows] * rows * 2048 * 4


def test_errors():
    q = quantize(weight(), Grid(group_size=64))
    with pytest.raises(ValueError, match=r"191 features, the weight 192 inputs"):
        jnp.zeros((2, 191)) @ q
    with pytest.raises(ValueError, match=r"stack of \(3,\); use jax.vmap"):
        activations(2) @ quantize(weight(3), Grid())
    with pytest.raises(ValueError, match="int32; convert"):
        jnp.zeros((2, ROWS), jnp.int32) @ q
    with pytest.raises(UsageError, match="192 inputs are not divisible by group_size=128"):
        quantize(weight(), Grid(group_size=128))


def test_tree_keeps_static_parts():
    q = quantize(weight(), Grid(bits=3, group_size=64))
    leaves, tree = jax.tree.flatten(q)
    rebuilt = jax.tree.unflatten(tree, leaves)
    assert rebuilt.grid == q.grid
    assert rebuilt.shape == q.shape
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.uint8), jnp.dtype(jnp.float16)}


@pytest.mark.slow
def test_parts_on_several_devices_and_axes_that_are_explicit():
    code = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, PartitionSpec as P
        from jaxquant.kernels import use_backend
        from jaxquant.kernels.cache_attention import cache_attention
        from jaxquant.quant import ActivationGrid, Grid, PackedHeads, QActivation, quantize

        q = quantize(jax.random.normal(jax.random.key(0), (64, 40)), Grid(bits=4, group_size=32))
        x = jax.random.normal(jax.random.key(1), (4, 64))
        codes = QActivation.of(x, ActivationGrid(bits=8, group_size=32))
        near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        last = lambda tree, axis: jax.tree.map(lambda a: P(*[None] * (a.ndim - 1), axis), tree)

        manual = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
        for own in (x, codes):
            add = lambda x, q: jax.lax.psum(x @ q, "d")
            specs = dict(mesh=manual, in_specs=(P(None, "d"), P("d")), out_specs=P())
            near(jax.shard_map(add, **specs)(own, q), own @ q)
            specs = dict(mesh=manual, in_specs=(P(), last(q, "d")), out_specs=P(None, "d"))
            near(jax.shard_map(lambda x, q: x @ q, **specs)(own, q), own @ q)

        heads = jax.random.normal(jax.random.key(2), (2, 2, 64, 2, 32))
        k, v = (PackedHeads.of(a, ActivationGrid(bits=4)) for a in heads)
        queries = jax.random.normal(jax.random.key(3), (2, 1, 4, 32))
        attend = jax.jit(lambda q, k, v: cache_attention(q, k, v, start=50))
        expected = [x @ q, codes @ q, attend(queries, k, v)]
        explicit = jax.make_mesh((2, 2), ("r", "o"), axis_types=(AxisType.Explicit,) * 2)
        with jax.set_mesh(explicit):
            lay = lambda tree, specs: jax.tree.map(jax.reshard, tree, specs)
            rows = lambda tree: lay(tree, jax.tree.map(lambda a: P("r"), tree))
            for backend in (None, "portable"):
                with use_backend(backend):
                    multiply = jax.jit(lambda x, q: x @ q)
                    found = [multiply(rows(own), lay(q, last(q, "o"))) for own in (x, codes)]
                    found.append(attend(*map(rows, (queries, k, v))))
                assert [jax.typeof(y).sharding.spec[:2] for y in found[:2]] == [("r", "o")] * 2
                assert jax.typeof(found[2]).sharding.spec[0] == "r"
                for y, of in zip(found, expected):
                    near(jax.device_get(y), of)
    """
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, check=True)


def test_inputs_in_order_of_activation_cannot_be_cut():
    q = quantize(jnp.ones((64, 8)), Grid(bits=4, group_size=32))
    whole = dataclasses.replace(q, order=jnp.arange(64))
    half = dataclasses.replace(whole, words=q.words[: len(q.words) // 2])
    with pytest.raises(ValueError, match="order of activation cannot be cut"):
        jnp.ones((1, 32)) @ half
