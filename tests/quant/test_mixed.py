"""Weights of several widths, inside a matrix and between layers, are the weights they stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.errors import UsageError
from jaxquant.quant import ActivationGrid, Grid, MixedQArray, QActivation, QArray, QStack
from jaxquant.quant import quantize as round_to_nearest
from jaxquant.quant.mixed import fit, quantize

ROWS, OUT = 96, 24
GRID = Grid(bits=3, group_size=16, clip="mse")
BITS = np.array([3, 2, 4, 3, 4, 2])

nearest = jax.jit(round_to_nearest, static_argnums=1)


def weight(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((ROWS, OUT)), jnp.float32)


@jax.jit
def rounded(w: jax.Array, bits: jax.Array):
    scale, zero = fit(GRID, w, bits)
    return quantize(GRID, w, scale, zero, bits), scale, zero


def mixed(w: jax.Array, bits: np.ndarray = BITS) -> MixedQArray:
    codes, scale, zero = rounded(w, jnp.asarray(bits))
    return MixedQArray.from_codes(codes, scale, zero, GRID, bits)


def by_group(w: jax.Array, bits: np.ndarray = BITS) -> np.ndarray:
    """Every group rounded by itself on its own grid."""
    parts = [Grid(bits=int(b), clip="mse").fake_quantize(w[16 * i : 16 * i + 16]) for i, b in enumerate(bits)]
    return np.concatenate(parts)


@pytest.mark.slow
def test_groups_are_rounded_with_their_own_bits():
    w = weight()
    packed = mixed(w)
    np.testing.assert_array_equal(packed.dequantize(), by_group(w))
    assert packed.widths == {2: 2, 3: 2, 4: 2}
    assert (packed.bits, packed.shape, packed.group_size) == (3.0, (ROWS, OUT), 16)


def test_equal_bits_are_the_plain_grid():
    w = weight()
    bits = np.full(6, 3)
    packed, plain = mixed(w, bits), nearest(w, GRID)
    (part,) = packed.parts
    for ours, theirs in zip(jax.tree.leaves(part), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert packed.nbytes == plain.nbytes + 6 * 4


def test_bytes_are_those_of_the_widths():
    per_weight = sum(BITS) / 6 / 8 + 4 / 16
    assert mixed(weight()).nbytes == ROWS * OUT * per_weight + 6 * 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_and_its_gradient(dtype):
    packed = mixed(weight())
    x = jax.random.normal(jax.random.key(1), (5, ROWS), dtype)
    y = jax.jit(lambda x, q: x @ q)(x, packed)
    assert y.dtype == dtype
    expected = np.asarray(x, np.float64) @ np.asarray(packed.dequantize(dtype), np.float64)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=tolerance * np.abs(expected).max())
    gradient, through = (
        np.asarray(jax.jit(jax.grad(lambda x, q=q: jnp.sum((x @ q) ** 2).astype(jnp.float32)))(x), np.float32)
        for q in (packed, packed.dequantize(dtype))
    )
    np.testing.assert_allclose(gradient, through, rtol=0, atol=tolerance * np.abs(through).max())


def test_quantized_activations_enter_as_values():
    packed = mixed(weight())
    x = QActivation.of(jax.random.normal(jax.random.key(1), (5, ROWS)), ActivationGrid(bits=8))
    np.testing.assert_array_equal(x @ packed, x.values @ packed)


def test_stacks_of_equal_counts_vmap():
    layers = [mixed(weight(seed), np.roll(BITS, seed)) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = jax.random.normal(jax.random.key(1), (3, 5, ROWS))
    expected = [row @ layer for row, layer in zip(x, layers, strict=True)]
    np.testing.assert_allclose(jax.vmap(lambda x, q: x @ q)(x, stack), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(stack.dequantize(), [layer.dequantize() for layer in layers])


def test_unknown_bits_are_not_numbers():
    scale, _ = fit(GRID, weight(), jnp.asarray([3, 3, 6, 3, 3, 3]))
    assert np.isnan(np.asarray(scale[2])).all()
    assert np.isfinite(np.asarray(scale)[[0, 1, 3, 4, 5]]).all()


def test_wrong_use():
    packed = mixed(weight())
    with pytest.raises(ValueError, match="x has 95 features, the weight 96 inputs"):
        jnp.ones((2, 95)) @ packed
    with pytest.raises(ValueError, match=r"needs one matrix, not a stack of \(1,\); use jax\.vmap"):
        jnp.ones((2, ROWS)) @ jax.tree.map(lambda leaf: leaf[None], packed)
    with pytest.raises(UsageError, match="bits by group need an asymmetric grid, not W3 g16 symmetric"):
        fit(Grid(bits=3, group_size=16, symmetric=True), weight(), jnp.asarray(BITS))


def layers_of(depth: int) -> list:
    kinds = [
        lambda w: nearest(w, GRID),
        lambda w: mixed(w),
        lambda w: nearest(w, Grid(bits=8)),
        lambda w: w.astype(jnp.float16),
    ]
    return [kinds[seed % 4](weight(seed)) for seed in range(depth)]


def run(stack: QStack, x: jax.Array) -> jax.Array:
    """Layers one after another, as a decoder runs them."""
    mix = jax.random.normal(jax.random.key(9), (OUT, ROWS)) / OUT

    def step(x, place):
        return jnp.tanh((x @ stack.at(place)) @ mix), None

    return jax.lax.scan(step, x, stack.places)[0]


def dense(layer) -> jax.Array:
    return layer.astype(jnp.float32) if isinstance(layer, jax.Array) else layer.dequantize()


def test_a_stack_of_unequal_layers_scans_in_their_order():
    layers, x = layers_of(7), jax.random.normal(jax.random.key(1), (5, ROWS))
    stack = QStack.of(layers)
    assert [len(jax.tree.leaves(part)[0]) for part in stack.parts] == [2, 2, 2, 1]
    same = QStack.of([dense(layer) for layer in layers])
    assert len(same.parts) == 1
    np.testing.assert_allclose(jax.jit(run)(stack, x), jax.jit(run)(same, x), rtol=1e-4, atol=1e-5)
    slope = jax.jit(jax.grad(lambda x, s: jnp.sum(run(s, x) ** 2)))
    ours, theirs = (slope(x, s) for s in (stack, same))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_scales_of_a_stack_have_gradients():
    stack, x = QStack.of([nearest(weight(), GRID), nearest(weight(1), Grid(bits=8))]), jnp.ones((2, ROWS))

    def loss(stretch, number):
        parts = list(stack.parts)
        part = parts[number]
        assert isinstance(part, QArray)
        parts[number] = QArray(part.words, part.scale.astype(jnp.float32) * stretch, part.zero, part.order,
                               part.grid, part.shape)  # fmt: skip
        return jnp.sum(run(QStack(tuple(parts), stack.places), x))

    slope_of = jax.jit(jax.grad(loss), static_argnums=1)
    loss = jax.jit(loss, static_argnums=1)
    for number in range(2):
        slope = slope_of(1.0, number)
        difference = (loss(1.01, number) - loss(0.99, number)) / 0.02
        assert float(slope) == pytest.approx(float(difference), rel=2e-2, abs=1e-3)


def test_programs_do_not_grow_with_the_depth():
    x = jnp.ones((2, ROWS))
    lines = [jax.jit(run).lower(QStack.of(layers_of(depth)), x).as_text().count("\n") for depth in (8, 16)]
    assert lines[0] == lines[1]
