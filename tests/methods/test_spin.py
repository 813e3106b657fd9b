"""Rotations learned on the orthogonal group: the step, the descent, the blocks in turned bases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_model import run
from tiny_families import tiny_config, tiny_params, tiny_tokens

from jaxquant.errors import NonFiniteError
from jaxquant.linalg import random_orthogonal
from jaxquant.methods import Rotations, cayley_step, fold_norms, rotate, spin
from jaxquant.methods.spin import nearest_orthogonal, turn_blocks


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def orthogonal(*shape: int) -> np.ndarray:
    """Different ones, `[*shape, shape[-1]]`."""
    drawn = [random_orthogonal(shape[-1], seed) for seed in range(int(np.prod(shape[:-1])))]
    return np.array(drawn).reshape(*shape, shape[-1])


def test_steps_against_numpy():
    """`R (I - U/2)^{-1} (I + U/2)` with momentum, by inverses of one matrix at a time."""
    r, velocity = orthogonal(2, 5), np.zeros((2, 5, 5))
    optimizer = optax.sgd(0.2, momentum=0.9)
    with jax.enable_x64(True):
        turns = {"a": jnp.asarray(r)}
        state = optimizer.init(turns)
        for step in range(3):
            g = draw(2, 5, 5, seed=step)
            turns, state = cayley_step(turns, {"a": jnp.asarray(g)}, optimizer, state)
            for one in range(2):
                a = (r[one].T @ g[one] - g[one].T @ r[one]) / 2
                velocity[one] = a + 0.9 * velocity[one]
                u = -0.2 * velocity[one]
                r[one] = r[one] @ np.linalg.inv(np.eye(5) - u / 2) @ (np.eye(5) + u / 2)
        np.testing.assert_allclose(turns["a"], r, atol=1e-12)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adam(0.1)])
def test_100_steps_stay_orthogonal(optimizer):
    turns = {"a": jnp.asarray(orthogonal(3, 16), jnp.float32)}
    gradients = jnp.asarray(draw(100, 3, 16, 16), jnp.float32)

    def step(carry, gradient):
        return cayley_step(carry[0], {"a": gradient}, optimizer, carry[1]), None

    with jax.numpy_dtype_promotion("standard"):  # Adam mixes int32 and float32
        (turns, _), _ = jax.lax.scan(step, (turns, optimizer.init(turns)), gradients)
    last = np.asarray(turns["a"], np.float64)
    assert np.abs(last - orthogonal(3, 16)).max() > 0.1
    assert np.abs(last.mT @ last - np.eye(16)).max() < 1e-6


def test_a_known_rotation_is_found():
    """Procrustes: `|X R - X R*|^2` has its minimum at R*."""
    target = orthogonal(1, 8)[0]
    target[:, 0] *= np.linalg.det(target)  # no path leads from I to a reflection
    x = jnp.asarray(draw(50, 8), jnp.float32)

    def loss(turns, rows):
        return jnp.mean((rows @ (turns["a"] - jnp.asarray(target, jnp.float32))) ** 2)

    found = spin(loss, {"a": jnp.eye(8)}, [x] * 200, optax.sgd(2.0, momentum=0.9))["a"]
    assert found.dtype == np.float64
    assert np.abs(found.T @ found - np.eye(8)).max() <= 1e-12
    np.testing.assert_allclose(found, target, atol=1e-4)


def test_the_nearest_orthogonal_matrix():
    near = nearest_orthogonal((orthogonal(2, 6) + 1e-4 * draw(2, 6, 6)).astype(np.float32))
    assert np.abs(near.mT @ near - np.eye(6)).max() <= 1e-12
    np.testing.assert_allclose(near, orthogonal(2, 6), atol=1e-3)


def test_nan_is_refused_at_its_step():
    data = [jnp.float32(1), jnp.float32(jnp.nan)]
    with pytest.raises(NonFiniteError, match=r"at step 1 the loss is nan .* use a smaller learning_rate"):
        spin(lambda turns, x: x * jnp.sum(turns["a"]), {"a": jnp.eye(3)}, data, optax.sgd(0.1))
    with pytest.raises(NonFiniteError, match="at step 0 the loss is 0"):
        spin(
            lambda turns, x: jnp.sum(jnp.sqrt(x * turns["a"])), {"a": jnp.zeros((2, 2))}, data, optax.sgd(1.0)
        )


@pytest.mark.parametrize("name", ["llama_linear_biases", "qwen3"])
def test_blocks_are_turned_as_rotate_does(name):
    config = tiny_config(name)
    params, config = fold_norms(tiny_params(config), config)
    values = orthogonal(config.num_layers, config.num_kv_heads, config.head_dim)
    rotations = Rotations(residual=random_orthogonal(32, 9), values=values)
    expected, _ = rotate(params, config, rotations)
    turns = {name: jnp.asarray(getattr(rotations, name), jnp.float32) for name in ("residual", "values")}
    turned = turn_blocks(params["blocks"], turns)
    for a, b in zip(jax.tree.leaves(turned), jax.tree.leaves(expected["blocks"]), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)
    tokens = jnp.asarray(tiny_tokens(name))
    before = run(params, config, tokens).logits
    after = run({**expected, "blocks": turned}, config, tokens).logits
    assert float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before))) <= 1e-4
