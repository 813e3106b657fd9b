"""Grids against published formulas, other people's code, and their own promises."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.errors import UsageError
from jaxquant.quant import Grid

ALL_KINDS = [
    {"symmetric": False},
    {"symmetric": True, "convention": "half-step"},
    {"symmetric": True, "convention": "restricted"},
    {"symmetric": True, "convention": "narrow"},
    {"symmetric": True, "convention": "full"},
]
KIND_IDS = ["asymmetric", "half-step", "restricted", "narrow", "full"]
# For what takes long to compile: the two that differ most, and the others with the slow tests.
SLOW_KINDS = [
    ALL_KINDS[0],
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ALL_KINDS[1:4]),
    ALL_KINDS[4],
]


@pytest.fixture(scope="module")
def gaussian() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((128 * 64, 128)).astype(np.float32)


def mean_squared_error(grid: Grid, w: np.ndarray) -> float:
    return float(jnp.mean((jax.jit(grid.fake_quantize)(jnp.asarray(w)) - w) ** 2))


@functools.partial(jax.jit, static_argnums=0)
def roundtrip(grid: Grid, w: jax.Array):
    scale, zero = grid.fit(w)
    codes = grid.quantize(w, scale, zero)
    return codes, scale, zero, grid.dequantize(codes, scale, zero)


# MSE of N(0, 1) at 2, 3 and 4 bits, groups of 128. The published full-range line, .187/.045/.0111, keeps the
# scale positive; with the sign of the extreme in the scale, as in GGUF's Q4_0, the error is 4 % lower.
@pytest.mark.parametrize(
    ("kind", "table"),
    [
        (ALL_KINDS[0], (0.253, 0.0464, 0.0101)),
        (ALL_KINDS[1], (0.301, 0.056, 0.0122)),
        (ALL_KINDS[2], (0.588, 0.0748, 0.0137)),
        (ALL_KINDS[3], (0.588, 0.0748, 0.0137)),  # nothing lies below -max|w|
        (ALL_KINDS[4], (0.1796, 0.0431, 0.01064)),
    ],
    ids=KIND_IDS,
)
def test_error_of_gaussian_weights(gaussian, kind, table):
    for bits, expected in zip((2, 3, 4), table, strict=True):
        measured = mean_squared_error(Grid(bits=bits, group_size=128, **kind), gaussian)
        assert measured == pytest.approx(expected, rel=0.015), f"{bits} bits"


def test_full_range_with_unsigned_scale_is_the_published_line(gaussian):
    """Shows where the 4 % come from: the same numbers with |scale|."""
    for bits, expected in ((2, 0.187), (3, 0.045), (4, 0.0111)):
        grid = Grid(bits=bits, group_size=128, symmetric=True, convention="full", scale_dtype="float32")
        scale = np.abs(roundtrip(grid, jnp.asarray(gaussian))[1])
        codes = jax.jit(grid.quantize)(gaussian, scale, None)
        what = jax.jit(grid.dequantize)(codes, scale, None)
        assert np.mean((what - gaussian) ** 2) == pytest.approx(expected, rel=0.01)


def published(w: np.ndarray, bits: int, kind: dict) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values of one group `[rows, out]` from the formulas, in float64 with float16 scales."""
    w = w.astype(np.float64)
    lo, hi = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    if not kind["symmetric"]:
        scale = ((hi - lo) / (2**bits - 1)).astype(np.float16).astype(np.float64)
        zero = np.clip(np.round(-lo / scale), 0, 2**bits - 1)
    else:
        extreme = np.maximum(-lo, hi)
        if kind["convention"] == "full":
            extreme = np.where(-lo >= hi, extreme, -extreme)
        half, restricted, full = (2**bits - 1) / 2, 2 ** (bits - 1) - 1, 2 ** (bits - 1)
        steps = {"half-step": half, "restricted": restricted, "narrow": restricted, "full": full}
        scale = extreme / steps[kind["convention"]]
        scale, zero = scale.astype(np.float16).astype(np.float64), np.full(w.shape[1], 2 ** (bits - 1))
    codes = np.clip(np.round(w / scale) + zero, kind.get("convention") == "narrow", 2**bits - 1)
    return codes, scale * (codes - zero)


@pytest.mark.parametrize("kind", ALL_KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_equal_the_published_formula(gaussian, bits, kind):
    w = gaussian[:128]
    with jax.enable_x64(True):
        codes, _, _, what = roundtrip(Grid(bits=bits, **kind), jnp.asarray(w, jnp.float64))
        expected_codes, expected = published(w, bits, kind)
        np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_allclose(what, expected, rtol=1e-6, atol=1e-12)
    codes32 = roundtrip(Grid(bits=bits, **kind), jnp.asarray(w))[0]
    assert np.mean(np.asarray(codes32) != expected_codes) <= 1e-3


@pytest.mark.parametrize(
    ("name", "grid", "extremes"),
    [
        ("Q8_0", Grid(bits=8, group_size=32, symmetric=True, convention="restricted"), (-127 / 32, 127 / 32)),
        ("Q4_0", Grid(bits=4, group_size=32, symmetric=True, convention="full"), (-4.0, 4.0)),
        ("Q4_1", Grid(bits=4, group_size=32), (0.0, 3.75)),
    ],
)
def test_gguf_rounds_to_the_same_values(gaussian, name, grid, extremes):
    """gguf divides by the scale before that is rounded to float16: here the extremes make scales exact.

    Q4_1 has a real offset where ours is an integer zero: its groups have the minimum 0.
    """
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name]
    w = np.clip(gaussian[:4096], -3.9, 3.9)
    w[::32] = extremes[1]
    w[::64] = extremes[0]
    if name == "Q4_1":
        w = np.clip(np.abs(w), 0, 3.7)
        w[::32], w[1::32] = extremes
    theirs = gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(w.T), kind), kind).T
    np.testing.assert_array_equal(jax.jit(grid.fake_quantize)(w), theirs)


@pytest.mark.parametrize("kind", ALL_KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("bits", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_clip_search_never_loses(bits, kind):
    w = np.random.default_rng(bits).standard_t(3, (256, 16)).astype(np.float32)
    plain = Grid(bits=bits, group_size=64, **kind)
    searched = dataclasses.replace(plain, clip="mse")

    def squared_error(grid: Grid) -> np.ndarray:
        d = np.asarray(jax.jit(grid.fake_quantize)(jnp.asarray(w))).astype(np.float64) - w
        return np.sum(d.reshape(4, 64, 16) ** 2, axis=1)

    assert np.all(squared_error(searched) <= squared_error(plain) * (1 + 1e-5))
    assert squared_error(searched).sum() < 0.99 * squared_error(plain).sum()


@pytest.mark.parametrize("bits", [1, 2])
def test_clip_search_finds_the_best_neighbouring_zero(bits):
    """Exhaustive search over the documented candidates, in float64."""
    w = np.random.default_rng(3).standard_normal((32, 24))
    top, best = 2**bits - 1, np.full(24, np.inf)
    for shrink in 1 - np.arange(80) / 100:
        lo, hi = np.minimum(w.min(0), 0) * shrink, np.maximum(w.max(0), 0) * shrink
        scale = ((hi - lo) / top).astype(np.float16).astype(np.float64)
        for shift in (-1, 0, 1):
            zero = np.clip(np.clip(np.round(-lo / scale), 0, top) + shift, 0, top)
            d = scale * (np.clip(np.round(w / scale) + zero, 0, top) - zero) - w
            best = np.minimum(best, np.sum(d * d, axis=0))
    what = jax.jit(Grid(bits=bits, clip="mse").fake_quantize)(jnp.asarray(w, jnp.float32))
    np.testing.assert_allclose(np.sum((np.asarray(what) - w) ** 2, axis=0), best, rtol=1e-4)


@settings(max_examples=8, deadline=None)  # each compiles anew
@given(
    bits=st.integers(1, 8),
    kind=st.sampled_from(ALL_KINDS),
    clip=st.sampled_from(["minmax", "mse"]),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    magnitude=st.floats(-6, 4),
    seed=st.integers(0, 2**31),
)
def test_rounding_what_was_rounded_changes_nothing(bits, kind, clip, scale_dtype, magnitude, seed):
    grid = Grid(bits=bits, group_size=16, clip=clip, scale_dtype=scale_dtype, **kind)
    w = np.random.default_rng(seed).standard_normal((32, 4)).astype(np.float32) * np.float32(10**magnitude)
    codes, scale, zero, what = roundtrip(grid, jnp.asarray(w))
    np.testing.assert_array_equal(grid.quantize(what, scale, zero), codes)
    assert np.asarray(codes).max() <= 2**bits - 1
    assert scale.dtype == scale_dtype
    assert np.all(np.asarray(scale) != 0)
    if kind["symmetric"]:
        assert zero is None
    else:
        zero = np.asarray(zero)
        assert np.all((zero == np.round(zero)) & (zero >= 0) & (zero <= 2**bits - 1))


@pytest.mark.parametrize(("clip", "scale_dtype"), [("minmax", "float32"), ("mse", "float16")])
@pytest.mark.parametrize("kind", ALL_KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("bits", [1, 8])
def test_hard_inputs_stay_finite(bits, kind, clip, scale_dtype):
    columns = [np.zeros(16), np.full(16, 3.0), np.full(16, -3.0), np.full(16, 1e-9), np.full(16, 1e6)]
    columns += [np.r_[-1e-9, np.zeros(15)], np.r_[1e30, -np.ones(15)], np.r_[np.ones(15), -1e-30]]
    w = jnp.asarray(np.stack(columns, axis=1), jnp.float32)
    codes, scale, _, what = roundtrip(Grid(bits=bits, clip=clip, scale_dtype=scale_dtype, **kind), w)
    assert np.all(np.isfinite(np.asarray(scale)))
    assert np.all(np.asarray(scale) != 0)
    assert np.all(np.isfinite(what))
    assert np.asarray(codes).max() <= 2**bits - 1
    np.testing.assert_allclose(what[:, 0], 0, atol=1e-7, err_msg="an all-zero group stays zero")


@pytest.mark.parametrize("kind", ALL_KINDS, ids=KIND_IDS)
def test_constant_columns_survive(kind):
    w = jnp.full((16, 1), 0.37)
    what = roundtrip(Grid(bits=4, **kind), w)[3]
    step = 0.37 / (7 if kind["symmetric"] else 15)
    assert float(jnp.max(jnp.abs(what - w))) <= 0.51 * step


@pytest.mark.parametrize("kind", ALL_KINDS, ids=KIND_IDS)
def test_small_weights_keep_their_bits(gaussian, kind):
    """Eight bits of weights around 1e-3 need scales below the normal float16 numbers."""
    w = gaussian[:128]
    grid = Grid(bits=8, group_size=32, **kind)
    assert mean_squared_error(grid, 1e-3 * w) == pytest.approx(1e-6 * mean_squared_error(grid, w), rel=0.05)


def test_one_bit_levels():
    w = jnp.asarray([[-2.0], [-1.0], [1.0], [0.5]])
    np.testing.assert_array_equal(Grid(bits=1, symmetric=True).fake_quantize(w).ravel(), [-2, -2, 2, 2])
    searched = Grid(bits=1, symmetric=True, clip="mse").fake_quantize(w).ravel()
    np.testing.assert_allclose(np.abs(searched), 1.12, rtol=0.02)  # mean |w| is 1.125
    np.testing.assert_array_equal(np.sign(searched), [-1, -1, 1, 1])


def test_scale_is_rounded_before_it_is_used(gaussian):
    """The codes must be nearest for the stored float16 scale, not for the exact one."""
    w = jnp.asarray(gaussian[:256])
    for kind in ALL_KINDS:
        grid = Grid(bits=8, **kind)
        codes, scale, _, what = roundtrip(grid, w)
        assert scale.dtype == jnp.float16
        inside = (np.asarray(codes) > 0) & (np.asarray(codes) < 255)
        half_step = 0.5 * np.abs(np.asarray(scale, np.float32)) * (1 + 1e-4)
        assert np.all((np.abs(np.asarray(what) - np.asarray(w)) <= half_step) | ~inside)


@pytest.mark.parametrize("grid", [Grid(bits=2, group_size=8, clip="mse"), Grid(symmetric=True)], ids=str)
def test_jit_vmap_and_leading_axes_equal_a_loop(grid):
    w = jax.random.normal(jax.random.key(0), (2, 3, 16, 5))
    compiled = jax.jit(grid.fake_quantize)
    loop = np.stack([[np.asarray(compiled(m)) for m in row] for row in w])
    for form in (grid.fake_quantize, compiled, jax.jit(jax.vmap(jax.vmap(grid.fake_quantize)))):
        np.testing.assert_allclose(form(w), loop, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", SLOW_KINDS, ids=KIND_IDS)
def test_gradients_are_finite(kind):
    w = jax.random.normal(jax.random.key(0), (16, 4)).at[:, 0].set(0)
    grid = Grid(bits=3, clip="mse", **kind)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(grid.fake_quantize(v) ** 2)))(w)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_is_kept(dtype):
    w = jax.random.normal(jax.random.key(0), (16, 4)).astype(dtype)
    assert jax.eval_shape(Grid(clip="mse").fake_quantize, w).dtype == dtype


def test_low_precision_output_is_rounded_once():
    grid = Grid(bits=8, group_size=16)
    w = jax.random.normal(jax.random.key(0), (32, 64))
    codes, scale, zero, what = roundtrip(grid, w)
    np.testing.assert_array_equal(
        grid.dequantize(codes, scale, zero, jnp.bfloat16).astype(jnp.float32),
        what.astype(jnp.bfloat16).astype(jnp.float32),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits=0 .*1 to 8"),
        ({"bits": 9}, "bits=9 .*1 to 8"),
        ({"group_size": 0}, "group_size=0 .*None"),
        ({"convention": "half"}, "'half'.*half-step, restricted, narrow, full"),
        ({"clip": "max"}, "'max'.*minmax or mse"),
        ({"scale_dtype": "bfloat16"}, "'bfloat16'.*float16 or float32"),
    ],
)
def test_impossible_grids(options, message):
    with pytest.raises(UsageError, match=message):
        Grid(**options)


@pytest.mark.parametrize("rows", [576, 1536, 960, 250, 7, 320])
def test_group_that_does_not_divide_names_the_place_and_real_choices(rows):
    grid = Grid(group_size=127)
    with pytest.raises(UsageError, match=f"blocks.3.mlp.down: {rows} inputs .*group_size=127") as error:
        grid.groups(rows, where="blocks.3.mlp.down")
    listed = re.search(r"use ([\d, ]+) or per-channel", str(error.value))
    assert listed
    choices = [int(c) for c in listed[1].split(",")]
    assert choices
    assert all(rows % c == 0 for c in choices)
    with pytest.raises(UsageError, match="group_size=127"):
        grid.fit(jnp.zeros((rows, 2)))


@pytest.mark.parametrize("grid", [Grid(), Grid(bits=2, group_size=64, symmetric=True, clip="mse")], ids=str)
def test_frozen_hashable_and_json(grid):
    assert Grid(**json.loads(json.dumps(grid.to_dict()))) == grid
    assert hash(grid) == hash(dataclasses.replace(grid))
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.bits = 3
    assert grid.effective_bits(576) == pytest.approx(
        grid.bits + (16 if grid.symmetric else 32) / (grid.group_size or 576)
    )


def test_the_name_says_what_decides_the_numbers():
    assert str(Grid(bits=2, group_size=64, symmetric=True, convention="full", clip="mse")) == (
        "W2 g64 symmetric full, mse clip search"
    )
    assert str(Grid(bits=3)) == "W3 per-channel asymmetric, min-max"


@pytest.mark.parametrize(("groups", "out"), [(1, 1921), (5, 577)])
def test_clip_search_by_parts_equals_that_of_each_column(groups: int, out: int):
    grid = Grid(bits=2, group_size=16, clip="mse")
    w = jnp.asarray(np.random.default_rng(0).standard_normal((16 * groups, out)), jnp.float32)
    scale, zero = grid.fit(w)
    for columns in (slice(0, 300), slice(300, out)):
        own_scale, own_zero = grid.fit(w[:, columns])
        np.testing.assert_array_equal(scale[:, columns], own_scale)
        np.testing.assert_array_equal(zero[:, columns], own_zero)


def test_clip_search_takes_sharded_weights_and_symbolic_sizes():
    grid = Grid(bits=3, group_size=32, clip="mse")
    w = jnp.asarray(np.random.default_rng(0).standard_normal((64, 1024)), jnp.float32)
    expected = grid.fit(w)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    for spec in (jax.P(None, "x"), jax.P("x", None)):
        with jax.set_mesh(mesh):
            found = grid.fit(jax.device_put(w, spec))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    (out,) = jax.export.symbolic_shape("m", constraints=["m>=16"])
    exported = jax.export.export(jax.jit(grid.fit))(jax.ShapeDtypeStruct((64, out), jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, exported.call(w), expected)
