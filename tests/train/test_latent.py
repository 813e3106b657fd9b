"""Weights in training: values are those of the packed model, gradients pass the rounding, nothing is lost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import CONFIG, run

from jaxquant.calibrate.moments import observe
from jaxquant.methods import Problem
from jaxquant.models.init import init_params
from jaxquant.named import named
from jaxquant.quant import Grid, QArray, quantize
from jaxquant.stages import GPTQ
from jaxquant.train import Latent, latent_params, merge, packed_params, split

GRIDS = [
    Grid(bits=1, group_size=8, symmetric=True),
    Grid(bits=2, group_size=8, clip="mse"),
    Grid(bits=2, group_size=16, symmetric=True, convention="narrow", clip="mse"),
    Grid(bits=3, group_size=16, symmetric=True, convention="restricted", clip="mse"),
    Grid(bits=4, symmetric=True, convention="full", scale_dtype="float32"),
]


@pytest.fixture(scope="module")
def weight():
    return jax.random.normal(jax.random.key(0), (32, 12)) * 0.1


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_starts_where_rounding_to_nearest_ends(weight, grid):
    latent = Latent.of(weight, grid)
    packed = quantize(weight, grid)
    np.testing.assert_array_equal(latent.pack().codes(), packed.codes())
    np.testing.assert_allclose(latent.values(), packed.dequantize(), rtol=1e-6)
    assert float(jnp.max(jnp.abs(latent.values() - weight))) > 0


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_are_those_of_the_packed_weight_wherever_training_takes_it(weight, grid):
    latent = Latent.of(weight, grid)
    key = jax.random.key(1)
    moved = Latent(
        latent.place + jax.random.normal(key, latent.place.shape),
        jax.random.normal(key, latent.stretch.shape) * 0.3,
        latent.scale, latent.zero, latent.order, grid,
    ).project()  # fmt: skip
    np.testing.assert_array_equal(moved.values(), moved.pack().dequantize())
    x = jax.random.normal(key, (3, 32))
    np.testing.assert_allclose(x @ moved, x @ moved.values(), rtol=1e-6)
    again = Latent.of(moved.pack())
    np.testing.assert_array_equal(again.place, jnp.round(moved.place))
    np.testing.assert_array_equal(again.values(), moved.values())


def test_packed_weights_in_another_order_keep_it(weight):
    x = jax.random.normal(jax.random.key(2), (64, 32)) * jnp.arange(32.0)[None]
    dynamic = named("gptq", Grid(bits=3, group_size=8), gptq=GPTQ(groups="dynamic"))
    packed = dynamic(Problem.of(weight, observe(x), dynamic.grid)).pack()
    assert packed.order is not None
    latent = Latent.of(packed)
    np.testing.assert_allclose(latent.values(), packed.dequantize(), rtol=1e-6)
    np.testing.assert_array_equal(latent.pack().dequantize(), packed.dequantize())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.booleans(), st.floats(-50, 50))
def test_projection_keeps_codes_in_the_range(bits, symmetric, push):
    grid = Grid(bits=bits, group_size=4, symmetric=symmetric)
    latent = Latent.of(jnp.linspace(-1, 1, 8)[:, None], grid)
    pushed = Latent(
        latent.place + jnp.float32(push), latent.stretch, latent.scale, latent.zero, None, grid
    ).project()
    codes = np.asarray(jnp.round(pushed.place))
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    np.testing.assert_array_equal(pushed.project().place, pushed.place)


def test_narrow_two_bits_hold_three_levels(weight):
    grid = Grid(bits=2, group_size=16, symmetric=True, convention="narrow", clip="mse")
    latent = Latent.of(weight, grid)
    pushed = Latent(latent.place - 9.0, latent.stretch, latent.scale, None, None, grid).project()
    assert np.unique(np.round(np.concatenate([pushed.place, latent.place]))).tolist() == [1.0, 2.0, 3.0]
    assert np.unique(quantize(weight, grid).codes()).tolist() == [1, 2, 3]


def test_gradients_are_those_of_the_unrounded_place_and_of_the_scale(weight):
    grid = Grid(bits=2, group_size=8, scale_dtype="float32")
    latent = Latent.of(weight, grid)
    target = jax.random.normal(jax.random.key(3), weight.shape)

    def loss(place, stretch):
        return jnp.sum(target * Latent(place, stretch, latent.scale, latent.zero, None, grid).values())

    by_place, by_stretch = jax.grad(loss, argnums=(0, 1))(latent.place, latent.stretch)
    scale = np.repeat(np.asarray(latent.scale, np.float64), 8, axis=0)
    np.testing.assert_allclose(by_place, target * scale, rtol=1e-6)
    # d what / d stretch = what, the codes being what they are.
    products = (np.asarray(target, np.float64) * np.asarray(latent.values())).reshape(4, 8, 12).sum(axis=1)
    np.testing.assert_allclose(by_stretch, products, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_models_are_split_packed_and_put_together_again():
    params = init_params(jax.random.key(0), CONFIG)
    grid = Grid(bits=3, group_size=16)
    student = latent_params(params, grid)
    trained, rest = split(student)
    names = {jax.tree_util.keystr(path[-1:]) for path, _ in jax.tree_util.tree_leaves_with_path(trained)}
    assert names == {".place", ".stretch", "['attn_norm']", "['mlp_norm']"}
    assert jax.tree.structure(merge(trained, rest)) == jax.tree.structure(student)
    tokens = jnp.arange(10)[None]
    packed = packed_params(student)
    assert isinstance(packed["blocks"]["mlp"]["down"]["kernel"], QArray)
    np.testing.assert_allclose(
        run(student, CONFIG, tokens).logits, run(packed, CONFIG, tokens).logits, atol=1e-4
    )
    again = latent_params(packed)
    np.testing.assert_array_equal(
        again["blocks"]["attn"]["q"]["kernel"].values(), student["blocks"]["attn"]["q"]["kernel"].values()
    )


def test_floats_without_a_grid_stay_floats():
    params = init_params(jax.random.key(0), CONFIG)
    student = latent_params(params)
    assert isinstance(student["blocks"]["attn"]["q"]["kernel"], jax.Array)
