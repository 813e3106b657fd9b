"""Learned scales of a block: never worse where they are judged, better where something is to be found."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.errors import UsageError
from jaxquant.methods.tune import tune_scales
from jaxquant.quant import Grid, QArray, quantize

WIDTH, HIDDEN = 16, 32


def apply(params, h):
    """A block with a stream and a gate."""
    params = jax.tree.map(lambda leaf: leaf.astype(h.dtype), params)
    up, gate = h @ params["up"], h @ params["gate"]
    return h + (up * jax.nn.sigmoid(gate)) @ params["down"] + params["bias"][None, None]


def dense(params):
    packed = lambda leaf: isinstance(leaf, QArray)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.dequantize() if packed(leaf) else leaf, params, is_leaf=packed)


@pytest.fixture(scope="module")
def blocks():
    """The original, the one with wrong scales, and inputs."""
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = {"up": (WIDTH, HIDDEN), "gate": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    original = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    original["bias"] = jnp.ones(WIDTH)
    rounded = {}
    for name, leaf in original.items():
        if leaf.ndim == 2:
            q = quantize(leaf, Grid(bits=4, group_size=8))
            off = 1 + 0.15 * jax.random.normal(keys[4], q.scale.shape)
            leaf = dataclasses.replace(q, scale=(q.scale.astype(jnp.float32) * off).astype(q.scale.dtype))
        rounded[name] = leaf
    return original, rounded, jax.random.normal(keys[5], (8, 12, WIDTH))


def judged(params, original, inputs, weight, seed=0):
    """The objective on the samples that judge, by other means: forward-mode rows of the Jacobian."""
    key, _ = jax.random.split(jax.random.key(seed))
    cotangents = jax.random.normal(key, inputs.shape).at[:, 0].set(0)
    found = []
    for i in (3, 7):
        h, v = inputs[i][None], cotangents[i][None]
        sides = []
        for p in (dense(params), original):
            jacobian = jax.jacfwd(lambda h, p=p: apply(p, h))(h).reshape(v.size, v.size)
            sides.append((apply(p, h) - h, (v.reshape(-1) @ jacobian).reshape(v.shape) - v))
        (y, back), (y0, back0) = [[np.asarray(a)[:, 1:] for a in side] for side in sides]
        forward, backward = (np.sum((a - b) ** 2) / np.sum(b**2) for a, b in ((y, y0), (back, back0)))
        found.append(forward + weight * backward)
    return np.mean(found)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_wrong_scales_are_mended(blocks, weight):
    original, rounded, inputs = blocks
    tuned, (before, after) = tune_scales(
        rounded, original, inputs, apply=apply, weight=weight, steps=80, learning_rate=0.02
    )
    assert after < 0.5 * before
    np.testing.assert_allclose(before, judged(rounded, original, inputs, weight), rtol=1e-3)
    np.testing.assert_allclose(after, judged(tuned, original, inputs, weight), rtol=1e-3)
    for name in ("up", "gate", "down"):
        np.testing.assert_array_equal(tuned[name].words, rounded[name].words)
        np.testing.assert_array_equal(tuned[name].zero, rounded[name].zero)
        assert tuned[name].scale.dtype == jnp.float16
    np.testing.assert_array_equal(tuned["bias"], original["bias"])


@pytest.mark.slow
def test_it_is_never_worse_and_repeats_itself(blocks):
    original, rounded, inputs = blocks
    wild = {"apply": apply, "weight": 0.1, "steps": 8, "learning_rate": 3.0}
    tuned, (before, after) = tune_scales(rounded, original, inputs, **wild)
    assert after <= before
    again, _ = tune_scales(rounded, original, inputs, **wild)
    jax.tree.map(np.testing.assert_array_equal, tuned, again)
    same, (before, after) = tune_scales(rounded, original, inputs, apply=apply, steps=0)
    assert before == after
    jax.tree.map(np.testing.assert_array_equal, same, rounded)
    few, (before, after) = tune_scales(rounded, original, inputs[:2], apply=apply, steps=8)
    assert after <= before
    assert few["up"].shape == rounded["up"].shape


def test_half_precision_inputs_leave_the_scales_alone(blocks):
    original, rounded, inputs = blocks
    found, pair = tune_scales(rounded, original, inputs.astype(jnp.bfloat16), apply=apply, steps=0)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(rounded), strict=True):
        np.testing.assert_array_equal(one, other)
    assert float(pair[0]) == float(pair[1]) > 0


def test_a_block_that_adds_nothing(blocks):
    _, rounded, inputs = blocks
    _, pair = tune_scales(rounded, rounded, inputs, apply=lambda params, h: h, steps=8)
    np.testing.assert_array_equal(pair, 0)
    with pytest.raises(UsageError, match="no samples"):
        tune_scales(rounded, rounded, inputs[:0], apply=apply)


@pytest.mark.parametrize(
    "options", [{"weight": -1.0}, {"steps": -1}, {"learning_rate": 0.0}, {"batch": 0}], ids=str
)
def test_impossible_options(blocks, options):
    original, rounded, inputs = blocks
    with pytest.raises(UsageError, match="tune: weight"):
        tune_scales(rounded, original, inputs, apply=apply, **options)
