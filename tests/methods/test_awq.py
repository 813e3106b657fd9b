"""AWQ: the block computes what it computed, the scale is the one that a float64 search finds."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_reference import correlated_layer, fit, moments_of, nearest, relative_layer_error

from jaxquant.calibrate.moments import observe
from jaxquant.errors import UsageError
from jaxquant.methods import awq, awq_scale, layer_error, rtn
from jaxquant.models import ModelConfig
from jaxquant.models.decoder import TAPS, block
from jaxquant.models.init import init_params
from jaxquant.quant import Grid

GROUPED = ModelConfig(
    family="llama",
    vocab_size=16,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    query_scale=8**-0.5,
    max_position=64,
)
EQUAL = dataclasses.replace(GROUPED, num_kv_heads=4, qkv_bias=True, o_bias=True, mlp_bias=True)
GEMMA = dataclasses.replace(GROUPED, num_kv_heads=4, norm_plus_one=True, post_norms=True, qk_norm=True)
CONFIGS = {"grouped heads": GROUPED, "equal heads, biases": EQUAL, "gemma": GEMMA}
GRID = Grid(bits=3, group_size=16)

run = jax.jit(lambda p, config, x: block(p, config, x, sliding=False, taps=TAPS), static_argnums=1)


def blocks_of(config, seed=0):
    """Stacked random parameters with uneven norms, so that inputs differ in magnitude."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))["blocks"]

    def draw(path, leaf):
        norm = "norm" in jax.tree_util.keystr(path)
        values = rng.lognormal(0, 1, leaf.shape) if norm else rng.standard_normal(leaf.shape) * 32**-0.5
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map_with_path(draw, shapes)


def inputs_of(config, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, 40, config.hidden_size)), jnp.float32)


def moments_by_tap(params, config, x):
    return {tap: observe(values) for tap, values in run(params, config, x)[2].items()}


def scale_block(params, config, moments, grid=GRID):
    equal = config.num_heads == config.num_kv_heads
    return awq(params, moments, grid, norm_plus_one=config.norm_plus_one, equal_heads=equal)


def layer(stacked, index=0):
    return jax.tree.map(lambda leaf: leaf[index], stacked)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_block_and_its_moments_agree(config):
    params, x = layer(blocks_of(config)), inputs_of(config)
    moments = moments_by_tap(params, config, x)
    scaled, scaled_moments = scale_block(params, config, moments)
    before, after = run(params, config, x)[0], run(scaled, config, x)[0]
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(before))))
    seen = moments_by_tap(scaled, config, x)
    for tap in TAPS:
        top = float(jnp.max(seen[tap].second))
        np.testing.assert_allclose(scaled_moments[tap].second, seen[tap].second, rtol=1e-4, atol=1e-5 * top)
        np.testing.assert_allclose(scaled_moments[tap].max_abs, seen[tap].max_abs, rtol=1e-4)
    changed = {tap for tap in TAPS if np.any(scaled_moments[tap].second != moments[tap].second)}
    assert changed == set(TAPS) - ({"attn_out"} if config is GROUPED else set())
    assert jax.tree.structure(scaled) == jax.tree.structure(params)


def test_only_the_given_taps_are_scaled():
    params, x = layer(blocks_of(EQUAL)), inputs_of(EQUAL)
    moments = moments_by_tap(params, EQUAL, x)
    scaled, _ = scale_block(params, EQUAL, {"mlp_in": moments["mlp_in"]})
    for path in (("attn", "q"), ("attn", "v"), ("mlp", "down")):
        before, after = (p[path[0]][path[1]]["kernel"] for p in (params, scaled))
        np.testing.assert_array_equal(after, before)
    assert np.any(scaled["mlp"]["gate"]["kernel"] != params["mlp"]["gate"]["kernel"])
    np.testing.assert_array_equal(params["mlp_norm"], layer(blocks_of(EQUAL))["mlp_norm"])


def test_linears_err_less_than_with_rounding_to_nearest():
    """Rounded where they stand in the scaled block, q, k, v and down lose less of their outputs."""
    params, x = layer(blocks_of(GROUPED)), inputs_of(GROUPED)
    moments = moments_by_tap(params, GROUPED, x)
    scaled, scaled_moments = scale_block(params, GROUPED, moments)
    for tap, part, names in (("attn_in", "attn", "qkv"), ("mlp_hidden", "mlp", ["down"])):
        errors = []
        for p, m in ((params, moments), (scaled, scaled_moments)):
            w = jnp.concatenate([p[part][name]["kernel"] for name in names], axis=1)
            errors.append(float(rtn(w, m[tap], GRID).stats.error))
        assert errors[1] < 0.9 * errors[0]


def search(weights, x, grid, steps):
    """The loop of the paper in float64, with the root mean square for the magnitude."""
    w = np.concatenate(weights, axis=1)
    magnitude, size = np.sqrt(np.mean(x * x, axis=0)), len(w) // grid.groups(len(w))
    best = (np.inf, None)
    for i in range(steps):
        s = np.maximum(magnitude ** (i / steps), 1e-4)
        s = s / np.sqrt(s.max() * s.min())
        values = np.zeros_like(w)
        for g in range(0, len(w), size):
            part = (w * s[:, None])[g : g + size]
            scale, zero = fit(grid, part)
            values[g : g + size] = scale * (nearest(part, scale, zero, grid.bits) - zero)
        error = relative_layer_error(values / s[:, None], w, x)
        best = min(best, (error, s), key=lambda pair: pair[0])
    return best


@pytest.mark.parametrize("grid", [GRID, Grid(bits=4, symmetric=True, convention="restricted")], ids=str)
def test_scale_equals_a_search_in_float64(grid):
    w, x = correlated_layer(48, 20)
    weights = (w[:, :12], w[:, 12:])
    error, expected = search(weights, x, grid, 20)
    with jax.enable_x64(True):
        scale, ours = awq_scale(tuple(map(jnp.asarray, weights)), moments_of(x, jnp.float64), grid)
        np.testing.assert_allclose(scale, expected, rtol=1e-9)
        assert float(ours) == pytest.approx(error, rel=1e-9)
        plain = rtn(jnp.asarray(w), moments_of(x, jnp.float64), grid).stats.error
    assert float(ours) < float(plain)
    scale, ours = awq_scale(tuple(jnp.asarray(v, jnp.bfloat16) for v in weights), moments_of(x), grid)
    assert scale.dtype == ours.dtype == jnp.float32
    assert float(ours) == pytest.approx(error, rel=0.1)


def test_never_worse_than_rounding_to_nearest():
    layers = [correlated_layer(48, 20, seed=seed, dead=seed % 3) for seed in range(20)]
    weight = jnp.asarray(np.stack([w for w, _ in layers]), jnp.float32)
    moments = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[moments_of(x) for _, x in layers])
    scale, error = jax.jit(jax.vmap(lambda w, m: awq_scale((w,), m, GRID)))(weight, moments)
    plain = jax.jit(jax.vmap(lambda w, m: rtn(w, m, GRID).stats.error))(weight, moments)
    assert np.all(np.asarray(error) <= np.asarray(plain) * (1 + 1e-6))
    assert np.mean(np.asarray(error)) < 0.9 * np.mean(np.asarray(plain))
    for i in (0, 1, 2):
        one = awq_scale((weight[i],), layer(moments, i), GRID)
        np.testing.assert_allclose(scale[i], one[0], rtol=1e-5)
        # The error that is reported is that of the scaled weight on the scaled inputs.
        rounded = GRID.fake_quantize(weight[i] * one[0][:, None]) / one[0][:, None]
        np.testing.assert_allclose(layer_error(rounded, weight[i], moments.second[i]), one[1], rtol=1e-3)


def test_dead_inputs_do_not_stretch_the_scale():
    w, x = correlated_layer(48, 20, dead=4)
    dead = np.abs(x).max(0) == 0
    scale, _ = awq_scale((jnp.asarray(w, jnp.float32),), moments_of(x), GRID)
    scale = np.asarray(scale)
    np.testing.assert_array_equal(scale[dead], scale[~dead].min())
    assert scale.max() * scale.min() == pytest.approx(1, rel=1e-5)
    scale, error = awq_scale((jnp.asarray(w, jnp.float32),), moments_of(np.zeros((3, 48))), GRID)
    np.testing.assert_array_equal(scale, 1)
    assert float(error) == 0


def test_non_finite_moments_do_not_reach_the_scale():
    w, x = correlated_layer(48, 20)
    broken = dataclasses.replace(moments_of(x), second=jnp.full((48, 48), jnp.nan))
    scale, error = awq_scale((jnp.asarray(w, jnp.float32),), broken, GRID)
    np.testing.assert_array_equal(scale, 1)
    assert np.isnan(error)


def test_vmap_over_blocks_equals_a_loop():
    stacked, x = blocks_of(EQUAL), inputs_of(EQUAL)
    moments = [moments_by_tap(layer(stacked, i), EQUAL, x) for i in range(2)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *moments)
    batched = jax.jit(jax.vmap(lambda p, m: scale_block(p, EQUAL, m)))(stacked, together)
    for i in range(2):
        one = scale_block(layer(stacked, i), EQUAL, moments[i])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), layer(batched, i), one
        )


def test_half_precision_blocks_come_out_wide_where_they_change():
    params, x = layer(blocks_of(GEMMA)), inputs_of(GEMMA)
    moments = moments_by_tap(params, GEMMA, x)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    scaled, _ = scale_block(half, GEMMA, moments)
    assert scaled["attn_norm"].dtype == scaled["attn"]["v"]["kernel"].dtype == jnp.float32
    assert scaled["attn_post_norm"].dtype == scaled["attn"]["q_norm"].dtype == jnp.bfloat16
    before, after = (
        run(p, GEMMA, x)[0] for p in (jax.tree.map(lambda a: a.astype(jnp.float32), half), scaled)
    )
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(before))))


def test_the_block_objective_is_the_error_of_the_block():
    config, x = GROUPED, inputs_of(GROUPED)
    params = jax.tree.map(lambda leaf: leaf[0], blocks_of(config))
    moments = moments_by_tap(params, config, x)
    options = {"norm_plus_one": False, "equal_heads": False}

    def apply(block_params, x):
        return run(block_params, config, x)[0]

    def error(exponent):
        magnitude = jnp.sqrt(
            jnp.diagonal(moments["mlp_in"].second) / moments["mlp_in"].count.astype(jnp.float32)
        )
        scale = jnp.maximum(magnitude**exponent, 1e-4)
        scale = (scale / jnp.sqrt(jnp.max(scale) * jnp.min(scale)))[:, None]
        mlp = dict(params["mlp"])
        for name in ("gate", "up"):
            mlp[name] = {"kernel": GRID.fake_quantize(mlp[name]["kernel"] * scale) / scale}
        return float(jnp.sum((apply({**params, "mlp": mlp}, x) - apply(params, x)) ** 2)), scale[:, 0]

    tried = [error(jnp.float32(i / 8)) for i in range(8)]
    expected = min(tried, key=lambda pair: pair[0])[1]
    assert max(tried)[0] > 1.05 * min(tried)[0]
    scaled, _ = awq(params, {"mlp_in": moments["mlp_in"]}, GRID, steps=8, apply=apply, inputs=x, **options)
    np.testing.assert_allclose(params["mlp_norm"] / scaled["mlp_norm"], expected, rtol=1e-5)
    np.testing.assert_allclose(apply(scaled, x), apply(params, x), atol=1e-4)
    with pytest.raises(UsageError, match="both apply and inputs"):
        awq(params, moments, GRID, apply=apply, **options)


def test_impossible_options():
    params, x = layer(blocks_of(GROUPED)), inputs_of(GROUPED)
    moments = moments_by_tap(params, GROUPED, x)
    with pytest.raises(UsageError, match=r"unknown taps \['hidden'\]"):
        scale_block(params, GROUPED, {"hidden": moments["mlp_in"]})
    with pytest.raises(UsageError, match="32 inputs are not divisible by group_size=24"):
        scale_block(params, GROUPED, moments, Grid(group_size=24))
    with pytest.raises(UsageError, match="steps=0 is not positive"):
        awq_scale((params["attn"]["q"]["kernel"],), moments["attn_in"], GRID, steps=0)
