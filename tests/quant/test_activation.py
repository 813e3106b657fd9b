"""Grids of activations: against numpy, their invariances, and their corner cases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax

from jaxquant.errors import UsageError
from jaxquant.linalg import hadamard_transform
from jaxquant.quant import ActivationGrid, QActivation
from jaxquant.quant.activation import straight_through

GRIDS = [
    ActivationGrid(bits=4),
    ActivationGrid(bits=4, group_size=16, clip=0.9),
    ActivationGrid(bits=8, group_size=32, symmetric=True),
    ActivationGrid(bits=3, group_size=16, range="zero", clip=0.9),
]
HALF = ActivationGrid(bits=4, scale_dtype="float16")


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) + rng.standard_normal((*shape[:-1], 1))


def reference(x: np.ndarray, grid: ActivationGrid) -> np.ndarray:
    result = np.empty_like(x)
    size = grid.group_size or x.shape[-1]
    top = 2**grid.bits - 1
    for index in np.ndindex(*x.shape[:-1]):
        for start in range(0, x.shape[-1], size):
            v = x[index][start : start + size]
            if grid.symmetric:
                scale = grid.clip * np.abs(v).max() / (2 ** (grid.bits - 1) - 1)
                lo = -scale * 2 ** (grid.bits - 1)
            elif grid.range == "zero":
                lo, hi = min(v.min(), 0) * grid.clip, max(v.max(), 0) * grid.clip
                scale = (hi - lo) / top
            else:
                middle, half = (v.max() + v.min()) / 2, (v.max() - v.min()) / 2 * grid.clip
                lo, scale = middle - half, 2 * half / top
            result[index][start : start + size] = lo + scale * np.clip(np.round((v - lo) / scale), 0, top)
    return result


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_the_reference(grid):
    x = tokens(3, 5, 64)
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            jax.jit(grid.fake_quantize)(jnp.asarray(x)), reference(x, grid), atol=1e-12
        )
    narrow = jnp.asarray(x, jnp.float32)
    ours = np.asarray(jax.jit(grid.fake_quantize)(narrow))
    # A tie may fall the other way; all else is equal.
    assert np.mean(np.abs(ours - reference(x, grid)) > 1e-5) < 2e-3
    np.testing.assert_array_equal(jax.jit(jax.vmap(grid.fake_quantize))(narrow), ours)


@given(
    hnp.arrays(np.float32, (2, 32), elements=st.floats(-1e4, 1e4, width=32)),
    st.integers(2, 8),
    st.sampled_from([None, 8, 32]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_codes_fit_their_bits_and_values_are_near(x, bits, group_size, symmetric):
    grid = ActivationGrid(bits=bits, group_size=group_size, symmetric=symmetric)
    scale, lo = grid.fit(jnp.asarray(x))
    codes = grid.quantize(jnp.asarray(x), scale, lo)
    assert codes.dtype == jnp.uint8
    assert int(codes.max()) < 2**bits
    values = np.asarray(grid.dequantize(codes, scale, lo))
    step = np.repeat(np.asarray(scale), 32 // grid.groups(32), axis=-1)
    # Subnormals are flushed to 0.
    assert np.all(np.abs(values - x) <= 0.5001 * step + 1e-5 * np.abs(x).max() + 1e-37)


def test_a_constant_group_is_reproduced_exactly():
    x = jnp.asarray(np.repeat([0.1, -3.7, 0.0, 1e-30], 16)[None], jnp.float32)
    np.testing.assert_array_equal(ActivationGrid(bits=4, group_size=16).fake_quantize(x), x)


def test_an_offset_of_a_group_costs_nothing_unless_0_is_kept_in_the_range():
    x, offset = tokens(8, 64), np.repeat(tokens(8, 4, seed=1) * 50, 16, axis=-1)
    x -= np.repeat(x.reshape(8, 4, 16).mean(-1), 16, axis=-1)
    with jax.enable_x64(True):
        for clip in (1.0, 0.9):
            grid = ActivationGrid(bits=4, group_size=16, clip=clip)
            alone, moved = (np.asarray(jax.jit(grid.fake_quantize)(a)) for a in (x, x + offset))
            np.testing.assert_allclose(moved - offset, alone, atol=1e-10)
        for worse in (
            ActivationGrid(bits=4, group_size=16, range="zero"),
            ActivationGrid(bits=4, group_size=16, symmetric=True),
        ):
            error = np.asarray(jax.jit(worse.fake_quantize)(x + offset)) - x - offset
            assert np.linalg.norm(error) > 5 * np.linalg.norm(alone - x)


def test_the_leader_of_a_hadamard_group_can_be_anything():
    """OffQ's mechanism: times 100, the first channel of a group changes no quantization error."""
    z = tokens(16, 64)
    loud = z.copy()
    loud[:, 0] *= 100
    with jax.enable_x64(True):
        x, moved = (np.asarray(jax.jit(hadamard_transform)(a)) for a in (z, loud))
        np.testing.assert_allclose(np.mean(moved, axis=-1), loud[:, 0] / 8, atol=1e-12)
        grid = ActivationGrid(bits=4)
        errors = [np.asarray(jax.jit(grid.fake_quantize)(a)) - a for a in (x, moved)]
        np.testing.assert_allclose(np.linalg.norm(errors[1]), np.linalg.norm(errors[0]), rtol=1e-6)
        kept = ActivationGrid(bits=4, range="zero")
        errors = [np.linalg.norm(np.asarray(jax.jit(kept.fake_quantize)(a)) - a) for a in (x, moved)]
        assert errors[1] > 1.5 * errors[0]


def test_scales_are_rounded_before_they_are_used():
    x = jnp.asarray(tokens(8, 64) * 5, jnp.float32)
    scale, lo = HALF.fit(x)
    for a in (scale, lo):
        np.testing.assert_array_equal(a.astype(jnp.float16).astype(jnp.float32), a)
    codes = HALF.quantize(x, scale, lo)
    np.testing.assert_array_equal(HALF.fake_quantize(x), lo + scale * codes.astype(jnp.float32))
    whole = GRIDS[0].fake_quantize(x)
    assert 0 < float(jnp.abs(HALF.fake_quantize(x) - whole).max()) < float(scale.max())
    # Beyond float16 a value is wrong but finite; a group too narrow for it becomes its offset.
    assert bool(jnp.all(jnp.isfinite(HALF.fake_quantize(jnp.asarray([[1e6, -1e6]], jnp.float32)))))
    narrow = jnp.asarray([[1.0, 1.0 + 1e-7]], jnp.float32)
    np.testing.assert_array_equal(HALF.fake_quantize(narrow), jnp.ones((1, 2)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_pass_through_the_rounding_but_feel_the_range(grid):
    """Against numpy: rounding errors and clipped ends are constants, all else is differentiated."""
    x, weight, step = (tokens(2, 64, seed=seed) for seed in (0, 1, 2))

    def smooth(x: np.ndarray, at: np.ndarray) -> np.ndarray:
        """The values at x with the errors made at `at`."""
        ranges = [np.asarray(a)[..., None] for a in jax.jit(grid.fit)(jnp.asarray(x))]
        others = [np.asarray(a)[..., None] for a in jax.jit(grid.fit)(jnp.asarray(at))]
        place, place_at = (
            np.clip((a.reshape(2, scale.shape[1], -1) - lo) / scale, 0, 2**grid.bits - 1)
            for a, (scale, lo) in ((x, ranges), (at, others))
        )
        return (ranges[1] + ranges[0] * (place + np.round(place_at) - place_at)).reshape(x.shape)

    with jax.enable_x64(True):
        value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(grid.fake_quantize(x) * weight)))(x)
        h = 1e-6
        difference = np.sum((smooth(x + h * step, x) - smooth(x - h * step, x)) * weight) / (2 * h)
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * step), difference, rtol=1e-6)
        np.testing.assert_allclose(value, np.sum(reference(x, grid) * weight), rtol=1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_nan_and_infinity_are_not_hidden(symmetric, scale_dtype):
    grid = ActivationGrid(bits=4, symmetric=symmetric, scale_dtype=scale_dtype)
    for bad in (np.nan, np.inf, -np.inf):
        values = grid.fake_quantize(jnp.asarray([[1.0, 2.0, -3.0, bad]], jnp.float32))
        assert not bool(jnp.all(jnp.isfinite(values)))


@pytest.mark.parametrize("factor", [1e-7, 1e4])
def test_gradients_are_not_rounded_with_the_scales(factor):
    x, weight = (jnp.asarray(tokens(4, 16, seed=seed), jnp.float32) for seed in (0, 1))
    half = ActivationGrid(bits=4, clip=0.9, scale_dtype="float16")
    gradient = jax.jit(jax.grad(lambda x, f: f * jnp.sum(weight * half.fake_quantize(x))))
    np.testing.assert_allclose(
        gradient(x, jnp.float32(factor)) / factor, gradient(x, jnp.float32(1)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_of_tiny_ranges_are_finite(symmetric):
    x = jnp.asarray(np.append(tokens(1, 8), np.ones((1, 8)), axis=0) * 1e-30, jnp.float32)
    grid = ActivationGrid(bits=4, symmetric=symmetric)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(grid.fake_quantize(x))))(x)
    assert bool(jnp.all(jnp.isfinite(gradient)))


def test_no_tokens_give_no_codes():
    assert QActivation.of(jnp.zeros((0, 32)), GRIDS[1]).codes.shape == (0, 32)


def test_a_wider_range_is_felt():
    """The gradient of the squared error by the value that sets the range points inwards."""
    x = np.append(np.linspace(-1, 1, 63), 8.0).astype(np.float32)[None]
    grid = ActivationGrid(bits=3)
    gradient = jax.grad(lambda x: jnp.sum((grid.fake_quantize(x) - lax.stop_gradient(x))[0, :63] ** 2))(
        jnp.asarray(x)
    )
    assert float(gradient[0, -1]) > 0.05


def test_the_pytree_of_quantized_activations():
    x = jnp.asarray(tokens(3, 64), jnp.bfloat16)
    q = jax.jit(QActivation.of, static_argnums=1)(x, GRIDS[1])
    assert q.codes.dtype == jnp.uint8
    assert q.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(q.values, jax.jit(GRIDS[1].fake_quantize)(x))
    np.testing.assert_array_equal(GRIDS[1].dequantize(q.codes, q.scale, q.lo, jnp.bfloat16), q.values)


@pytest.mark.parametrize(("grid", "bits"), [(GRIDS[0], 5.0), (HALF, 4.5), (GRIDS[2], 9.0)], ids=str)
def test_effective_bits_count_scales_and_offsets(grid, bits):
    assert grid.effective_bits(64) == bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "activation bits=1 is out of range; use 2 to 8"),
        ({"bits": 16}, "or leave the grid out"),
        ({"bits": 4.5}, "activation bits=4.5 is out of range"),
        ({"group_size": 0}, "use None for one group a token"),
        ({"clip": 1.1}, "activation clip=1.1 is out of range"),
        ({"range": "raw"}, "unknown activation range 'raw'; use midpoint or zero"),
        ({"scale_dtype": "bfloat16"}, "unknown scale_dtype 'bfloat16'; use float16 or float32"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(UsageError, match=message):
        ActivationGrid(**options)


def test_a_group_that_does_not_divide_the_channels_names_those_that_do():
    with pytest.raises(UsageError, match="group_size=128; use 16, 18, 24, 32, 36, 48, None"):
        ActivationGrid(group_size=128).fit(jnp.zeros((1, 576)))


def test_straight_through_is_exact_and_passes_gradients_of_any_order():
    x = jnp.asarray([[0.3, 1.7], [-2.2, 0.5]])

    def cubed(a):
        return straight_through(a, jnp.round(a)) ** 3

    np.testing.assert_array_equal(straight_through(x, jnp.round(x)), jnp.round(x))
    np.testing.assert_array_equal(jax.jit(jax.vmap(cubed))(x), jnp.round(x) ** 3)
    one = jax.vmap(straight_through, in_axes=(1, None), out_axes=1)(x, jnp.ones(2))
    np.testing.assert_array_equal(one, jnp.ones((2, 2)))
    for value in (0.3, 1.7, -2.2):
        assert jax.grad(cubed)(value) == 3 * round(value) ** 2
        assert jax.grad(jax.grad(cubed))(value) == 6 * round(value)
        assert jax.jvp(jax.grad(cubed), (value,), (1.0,))[1] == 6 * round(value)


def test_straight_through_survives_a_scan_differentiated_twice_in_reverse():
    """JAX forgets a custom derivative of what a scan does not differentiate the first time."""
    places = jax.random.normal(jax.random.key(0), (3, 4, 4))

    def through_primitive(a):
        return straight_through(a, jnp.round(2 * a))

    def by_sums(a):
        return jax.lax.stop_gradient(jnp.round(2 * a) - a) + a

    def gradient_of_gradient(through):
        def inner(x, places):
            return jnp.sum(jax.lax.scan(lambda x, a: (jnp.tanh(x @ through(a)), None), x, places)[0])

        def outer(places):
            return jnp.sum(jax.grad(inner)(jnp.ones((2, 4)), places) ** 2)

        return jax.jit(jax.grad(outer))(places)

    expected = gradient_of_gradient(by_sums)
    assert float(jnp.max(jnp.abs(expected))) > 1e-3
    np.testing.assert_allclose(gradient_of_gradient(through_primitive), expected, rtol=1e-4, atol=1e-6)
