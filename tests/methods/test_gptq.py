"""GPTQ against float64 references, RTN, and its own statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_reference import correlated_layer, gptq_reference, ldlq_reference, moments_of, relative_layer_error

from jaxquant.errors import UsageError
from jaxquant.methods import gptq, rtn
from jaxquant.quant import Grid

ROWS, OUT = 96, 40
CASES = {
    "w4 static act-order": (Grid(group_size=32), {"act_order": True}),
    "w3 static": (Grid(bits=3, group_size=24, symmetric=True), {"act_order": False}),
    "w2 static act-order clip": (Grid(bits=2, group_size=32, clip="mse"), {"act_order": True}),
    "w4 per channel": (Grid(symmetric=True, convention="full"), {"act_order": False}),
    "w8 per channel act-order": (Grid(bits=8, scale_dtype="float32"), {"act_order": True}),
    "w3 dynamic": (Grid(bits=3, group_size=32), {"act_order": False, "groups": "dynamic"}),
    "w4 dynamic act-order": (Grid(group_size=32, symmetric=True), {"act_order": True, "groups": "dynamic"}),
    "w1 static": (Grid(bits=1, group_size=32, symmetric=True), {"act_order": False}),
}
cases = pytest.mark.parametrize(("grid", "options"), CASES.values(), ids=CASES.keys())

unpacked = jax.jit(lambda rounded: rounded.pack().dequantize())


def reference_of(grid, options, w, x, **more):
    dynamic = options.get("groups") == "dynamic"
    x = np.asarray(x, np.float64)
    return gptq_reference(w, x.T @ x, grid, act_order=options["act_order"], dynamic=dynamic, **more)


def in_processing_order(result, order) -> np.ndarray:
    codes = np.asarray(result.codes)
    return codes if result.order is not None else codes[order]


def dequantized(result) -> np.ndarray:
    return np.asarray(unpacked(result), np.float64)


@cases
def test_equals_the_reference(grid, options):
    w, x = correlated_layer(ROWS, OUT, dead=3)
    with jax.enable_x64(True):
        codes, grids, order, values = reference_of(grid, options, w, x)
        result = gptq(jnp.asarray(w), moments_of(x, jnp.float64), grid, **options, block=40)
        np.testing.assert_array_equal(in_processing_order(result, order), codes)
        np.testing.assert_array_equal(result.scale, np.stack([scale for scale, _ in grids]))
        np.testing.assert_allclose(dequantized(result), values, rtol=1e-5, atol=1e-6)
        if result.order is not None:
            np.testing.assert_array_equal(result.order, order)
        assert float(result.stats.error) == pytest.approx(relative_layer_error(values, w, x), rel=1e-9)
    if grid.bits not in (3, 4):
        return  # float32 is compared on the grids in use
    single = gptq(jnp.asarray(w, jnp.float32), moments_of(x), grid, **options)
    mismatch = np.mean(in_processing_order(single, order) != codes)
    assert mismatch <= (2e-3 if options["act_order"] else 1e-3)
    assert float(single.stats.error) == pytest.approx(float(result.stats.error), rel=1e-3)


def test_groups_with_their_own_bits_equal_the_reference():
    w, x = correlated_layer(ROWS, OUT, dead=3)
    grid, bits = Grid(bits=3, group_size=16), np.array([4, 2, 3, 3, 2, 4])
    with jax.enable_x64(True):
        codes, grids, order, values = gptq_reference(w, x.T @ x, grid, act_order=True, bits=bits)
        moments = moments_of(x, jnp.float64)
        result = gptq(jnp.asarray(w), moments, grid, group_bits=jnp.asarray(bits))
        np.testing.assert_array_equal(in_processing_order(result, order), codes)
        np.testing.assert_array_equal(result.scale, np.stack([scale for scale, _ in grids]))
        what = result.pack().dequantize()
        np.testing.assert_allclose(what, values, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(result.values(), what)
        equal = gptq(jnp.asarray(w), moments, grid, group_bits=jnp.full(6, 3))
        plain = gptq(jnp.asarray(w), moments, grid)
    for name in ("codes", "scale", "zero"):
        np.testing.assert_array_equal(getattr(equal, name), getattr(plain, name))
    with pytest.raises(UsageError, match="bits by group need static groups"):
        gptq(jnp.asarray(w), moments_of(x), grid, groups="dynamic", group_bits=jnp.full(6, 3))


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_ldlq_is_the_same_algorithm(bits):
    """The second reference needs no inverse and never updates the weight."""
    w, x = correlated_layer(64, 16, seed=bits, dead=2)
    grid = Grid(bits=bits, group_size=32)
    with jax.enable_x64(True):
        codes, _, order, _ = ldlq_reference(w, x.T @ x, grid, act_order=True)
        result = gptq(jnp.asarray(w), moments_of(x, jnp.float64), grid, act_order=True)
    np.testing.assert_array_equal(np.asarray(result.codes)[order], codes)


def test_block_size_does_not_change_the_result():
    w, x = correlated_layer(ROWS, OUT)
    grid = Grid(bits=3, group_size=48)
    with jax.enable_x64(True):
        moments = moments_of(x, jnp.float64)
        results = [
            np.asarray(gptq(jnp.asarray(w), moments, grid, block=block).codes) for block in (1, 40, 128)
        ]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize(("dtype", "groups"), [(jnp.float32, "static"), (jnp.float64, "dynamic")])
def test_uncorrelated_inputs_give_rtn(dtype, groups):
    with jax.enable_x64(dtype == jnp.float64):
        w, _ = correlated_layer(ROWS, OUT)
        weight, moments = jnp.asarray(w, dtype), moments_of(np.eye(ROWS), dtype)
        grid = Grid(bits=3, group_size=32, clip="mse")
        ours, plain = gptq(weight, moments, grid, groups=groups), rtn(weight, moments, grid)
        np.testing.assert_array_equal(ours.codes, plain.codes)
        np.testing.assert_array_equal(ours.scale, plain.scale)
        np.testing.assert_allclose(ours.stats.error, plain.stats.error, rtol=1e-5)


@pytest.mark.parametrize("options", [{"act_order": False}, {"act_order": True}], ids=str)
def test_beats_rtn(options):
    grid = Grid(bits=3, group_size=32)
    layers = [correlated_layer(64, 24, seed=seed) for seed in range(40)]
    weight = jnp.asarray(np.stack([w for w, _ in layers]), jnp.float32)
    moments = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[moments_of(x) for _, x in layers])
    ours = jax.jit(jax.vmap(lambda w, m: gptq(w, m, grid, **options).stats.error))(weight, moments)
    plain = jax.jit(jax.vmap(lambda w, m: rtn(w, m, grid).stats.error))(weight, moments)
    assert np.mean(np.asarray(ours) <= np.asarray(plain)) >= 0.95
    assert np.mean(np.asarray(ours)) < 0.9 * np.mean(np.asarray(plain))


def test_static_groups_keep_rtns_grids_under_act_order():
    w, x = correlated_layer(ROWS, OUT)
    grid = Grid(group_size=24, clip="mse")
    weight, moments = jnp.asarray(w, jnp.float32), moments_of(x)
    ours, plain = gptq(weight, moments, grid, act_order=True), rtn(weight, moments, grid)
    np.testing.assert_array_equal(ours.scale, plain.scale)
    np.testing.assert_array_equal(ours.zero, plain.zero)
    assert ours.order is None


def test_vmap_over_layers_equals_a_loop():
    """One layer needs a higher rung, one is dead, one is fine."""
    layers = [correlated_layer(48, 16, seed=s, dead=d) for s, d in ((0, 0), (1, 5), (2, 0))]
    second = np.stack([x.T @ x for _, x in layers])
    second[2] -= 0.1 * np.linalg.eigvalsh(second[2])[-1] * np.eye(48)
    weight = jnp.asarray(np.stack([w for w, _ in layers]), jnp.float32)
    moments = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[moments_of(x) for _, x in layers])
    moments = type(moments)(jnp.asarray(second, jnp.float32), moments.count, moments.max_abs)
    grid = Grid(group_size=16)
    for method in (gptq, rtn):
        batched = jax.vmap(lambda w, m, method=method: method(w, m, grid))(weight, moments)
        for i in range(3):
            one = method(weight[i], jax.tree.map(lambda leaf, i=i: leaf[i], moments), grid)
            picked = jax.tree.map(lambda leaf, i=i: leaf[i], batched)
            assert np.mean(np.asarray(picked.codes) != np.asarray(one.codes)) <= 2e-3
            np.testing.assert_array_equal(picked.scale, one.scale)
            for name in ("attempts", "fallback", "dead", "finite"):
                assert getattr(picked.stats, name) == getattr(one.stats, name), name
            np.testing.assert_allclose(picked.stats.error, one.stats.error, rtol=1e-2)
        assert batched.pack().dequantize().shape == (3, 48, 16)
        if method is gptq:
            assert int(batched.stats.attempts[2]) > 1 == int(batched.stats.attempts[0])


@pytest.mark.parametrize("method", [gptq, rtn])
def test_statistics_are_truthful(method):
    w, x = correlated_layer(ROWS, OUT, dead=4)
    result = method(jnp.asarray(w, jnp.float32), moments_of(x), Grid(group_size=32))
    stats = result.stats
    assert float(stats.error) == pytest.approx(relative_layer_error(dequantized(result), w, x), rel=1e-3)
    assert int(stats.dead) == 4
    assert bool(stats.finite)
    assert not bool(stats.fallback)
    expected = (0.01, 1) if method is gptq else (0.0, 0)
    assert (float(stats.damping), int(stats.attempts)) == pytest.approx(expected)


@pytest.mark.parametrize("method", [gptq, rtn])
@pytest.mark.parametrize("place", ["weight", "moments"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_input_is_flagged(method, place, bad):
    w, x = correlated_layer(32, 8)
    weight, moments = jnp.asarray(w, jnp.float32), moments_of(x)
    if place == "weight":
        weight = weight.at[3, 2].set(bad)
    else:
        moments = type(moments)(moments.second.at[3, 4].set(bad), moments.count, moments.max_abs)
    stats = method(weight, moments, Grid()).stats
    assert not bool(stats.finite)
    assert float(stats.error) != 0, "a broken layer must not look perfect"


def test_failed_factorization_is_rtn_and_says_so():
    w, x = correlated_layer(32, 8)
    moments = moments_of(x)
    indefinite = moments.second - 100 * jnp.max(moments.second) * jnp.ones((32, 32))
    moments = type(moments)(indefinite, moments.count, moments.max_abs)
    weight = jnp.asarray(w, jnp.float32)
    ours, plain = gptq(weight, moments, Grid()), rtn(weight, moments, Grid())
    assert bool(ours.stats.fallback)
    np.testing.assert_array_equal(ours.codes, plain.codes)


def test_inputs_that_are_all_dead():
    w, _ = correlated_layer(32, 8)
    result = gptq(jnp.asarray(w, jnp.float32), moments_of(np.zeros((5, 32))), Grid(group_size=16))
    assert int(result.stats.dead) == 32
    assert float(result.stats.error) == 0
    assert bool(result.stats.finite)
    np.testing.assert_array_equal(dequantized(result), 0)


def test_fewer_tokens_than_inputs():
    w, x = correlated_layer(ROWS, OUT, tokens=20)
    weight, moments = jnp.asarray(w, jnp.float32), moments_of(x)
    ours, plain = (method(weight, moments, Grid(bits=3, group_size=32)) for method in (gptq, rtn))
    assert int(ours.stats.attempts) == 1
    assert float(ours.stats.error) < 0.5 * float(plain.stats.error)


def test_half_precision_weights():
    w, x = correlated_layer(32, 8)
    weight = jnp.asarray(w, jnp.float32).astype(jnp.bfloat16)
    for method in (gptq, rtn):
        ours, wide = (method(v, moments_of(x), Grid()) for v in (weight, weight.astype(jnp.float32)))
        np.testing.assert_array_equal(ours.codes, wide.codes)
        assert ours.stats.error.dtype == jnp.float32


def test_dynamic_with_one_group_is_static():
    w, x = correlated_layer(ROWS, OUT)
    weight, moments = jnp.asarray(w, jnp.float32), moments_of(x)
    dynamic, static = (gptq(weight, moments, Grid(), groups=groups) for groups in ("dynamic", "static"))
    np.testing.assert_array_equal(dynamic.codes, static.codes)
    assert dynamic.order is None


@pytest.mark.parametrize(("grid", "options"), [CASES["w4 static act-order"], CASES["w4 dynamic act-order"]])
def test_packed_result_is_usable(grid, options):
    w, x = correlated_layer(ROWS, OUT)
    q = gptq(jnp.asarray(w, jnp.float32), moments_of(x), grid, **options).pack()
    y = jnp.asarray(x, jnp.float32) @ q
    np.testing.assert_allclose(y, x @ np.asarray(q.dequantize(), np.float64), rtol=1e-4, atol=1e-3)
    assert float(np.sum((y - x @ w) ** 2) / np.sum((x @ w) ** 2)) < 0.02


@pytest.mark.slow
def test_program_size_does_not_depend_on_width():
    def lines(rows: int, out: int, **options) -> int:
        weight = jax.ShapeDtypeStruct((rows, out), jnp.float32)
        moments = jax.eval_shape(lambda: moments_of(np.zeros((1, rows))))
        return len(gptq.lower(weight, moments, Grid(group_size=32), **options).as_text().splitlines())

    # Helper functions of one shape are shared, so a few lines may differ; unrolling would add hundreds. The
    # factorization has one panel below 512 inputs and eight from 2048 on.
    for options in ({}, {"groups": "dynamic"}):
        assert lines(480, 256, **options) == pytest.approx(lines(128, 32, **options), rel=0.02)
        assert lines(8192, 256, **options) == pytest.approx(lines(2048, 32, **options), rel=0.02)
        assert lines(8192, 256, **options) < 1.2 * lines(128, 32, **options)


def test_impossible_options():
    w, x = correlated_layer(32, 8)
    weight, moments = jnp.asarray(w, jnp.float32), moments_of(x)
    with pytest.raises(UsageError, match="32 inputs are not divisible by group_size=24"):
        gptq(weight, moments, Grid(group_size=24))
    with pytest.raises(UsageError, match="'Static'; use static or dynamic"):
        gptq(weight, moments, Grid(), groups="Static")
