"""`PairedArray`: the product of the `QArray` it was, from scales and zeros in pairs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.errors import InputError
from jaxquant.kernels.dequant_matmul import paired_matmul
from jaxquant.quant import (
    ActivationGrid,
    Grid,
    MixedQArray,
    PairedArray,
    QActivation,
    QArray,
    QStack,
    paired,
    unpaired,
)
from jaxquant.quant import quantize as nearest
from jaxquant.quant.packing import pair, unpair
from jaxquant.train.latent import latent_params

GRID = Grid(bits=3, group_size=24)


def weight(*stack: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((*stack, 96, 40)), jnp.float32)


def activations(rows: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((rows, 96)), jnp.float32)


def test_pairs_hold_every_float16_bit_by_bit():
    bits = jnp.arange(2**16, dtype=jnp.uint16).reshape(1, 64, 1024)
    scale = jax.lax.bitcast_convert_type(bits, jnp.float16)
    pairs = pair(scale, scale[:, ::-1])
    assert pairs.shape == (1, 64, 1, 1024)
    assert pairs.dtype == jnp.uint32
    for half, expected in zip(unpair(pairs), (bits, bits[:, ::-1]), strict=True):
        np.testing.assert_array_equal(jax.lax.bitcast_convert_type(half, jnp.uint16), expected)


@pytest.mark.parametrize("ordered", [False, True])
def test_product_and_its_gradient_are_those_of_the_qarray(ordered: bool):
    q, x = nearest(weight(), GRID), activations(5)
    if ordered:
        order = jnp.asarray(np.random.default_rng(2).permutation(96), jnp.int32)
        q = QArray(q.words, q.scale, q.zero, order, q.grid, q.shape)
    p = paired(q)
    assert isinstance(p, PairedArray)
    np.testing.assert_allclose(x @ p, x @ q, rtol=0, atol=1e-4)
    slope_p, slope_q = (jax.jit(jax.grad(lambda x, a=a: jnp.sum(jnp.sin(x @ a))))(x) for a in (p, q))
    np.testing.assert_allclose(slope_p, slope_q, rtol=0, atol=1e-4)


def test_quantized_activations_are_multiplied_as_integers():
    q, x = nearest(weight(), GRID), QActivation.of(activations(5), ActivationGrid(bits=8))
    np.testing.assert_array_equal(x @ paired(q), x @ q)


def test_stacks_go_through_vmap_and_scan_and_come_back():
    q, x = jax.vmap(lambda w: nearest(w, GRID))(weight(3)), activations(5)
    p = paired(q)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(p)) == q.nbytes
    jax.tree.map(np.testing.assert_array_equal, unpaired({"kernel": p})["kernel"], q)
    expected = jax.vmap(lambda q: x @ q)(q)
    np.testing.assert_allclose(jax.vmap(lambda p: x @ p)(p), expected, rtol=0, atol=1e-4)
    _, scanned = jax.lax.scan(lambda carry, p: (carry, x @ p), 0, p)
    np.testing.assert_allclose(scanned, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="not a stack of"):
        x @ p


def test_layers_of_a_stack_may_be_pairs():
    q, x = nearest(weight(), GRID), activations(5)
    stack = QStack.of([paired(q), weight()])
    np.testing.assert_allclose(x @ stack.at(stack.places[0]), x @ q, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "spoil", [lambda p: p[:, 0], lambda p: jnp.tile(p, (1, 2, 1)), lambda p: p.astype("int32")]
)
def test_what_are_no_pairs_is_refused(spoil):
    p = paired(nearest(weight(), GRID))
    with pytest.raises(InputError, match="make them with"):
        paired_matmul(activations(5), p.words, spoil(p.pairs), bits=3, block=24)


def test_training_starts_from_the_qarray():
    params = {"blocks": {"mlp": {"up": {"kernel": jax.vmap(lambda w: nearest(w, GRID))(weight(2))}}}}
    of_pairs, expected = (latent_params(p) for p in (paired(params), params))
    assert jax.tree.structure(of_pairs) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, of_pairs, expected)


def test_what_has_no_such_pairs_stays():
    symmetric, wide = Grid(bits=4, group_size=24, symmetric=True), Grid(bits=4, scale_dtype="float32")
    group_bits = jnp.asarray([2, 3, 3, 4])
    mixed = MixedQArray.from_codes(
        jnp.zeros((96, 40), jnp.uint8), jnp.ones((4, 40), jnp.float16), jnp.ones((4, 40), jnp.float16),
        GRID, group_bits,
    )  # fmt: skip
    params = {
        "symmetric": nearest(weight(), symmetric), "wide": nearest(weight(), wide), "mixed": mixed,
        "bias": jnp.ones(3),
    }  # fmt: skip
    found = paired(params | {"own": nearest(weight(), GRID)})
    assert isinstance(found.pop("own"), PairedArray)
    assert jax.tree.structure(found) == jax.tree.structure(params)
