from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.models import Rope
from jaxquant.models.rotary import frequencies, rotate, tables


def test_rotation_is_a_complex_product():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = np.array([0, 1, 4, 9, 30], np.int32)
    rotated = np.asarray(rotate(jnp.asarray(x), *tables(Rope(theta=100.0), 8, jnp.asarray(positions))))
    angles = positions[:, None] * 100.0 ** (-np.arange(4) / 4)
    expected = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[None, :, None]
    np.testing.assert_allclose(rotated[..., :4] + 1j * rotated[..., 4:], expected, atol=1e-5)


def test_linear_scaling_stretches_positions():
    plain, _ = frequencies(Rope(), 16)
    stretched, factor = frequencies(Rope(kind="linear", factor=4.0), 16)
    np.testing.assert_allclose(stretched * 4, plain)
    assert factor == 1.0


def test_llama3_keeps_short_and_divides_long_wavelengths():
    rope = Rope(theta=5e5, kind="llama3", factor=8.0, original_max_position=8192)
    plain, _ = frequencies(Rope(theta=5e5), 128)
    scaled, _ = frequencies(rope, 128)
    ratio, wavelength = plain / scaled, 2 * np.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 8192 / 4], 1.0)
    np.testing.assert_allclose(ratio[wavelength > 8192], 8.0)
    assert np.all(np.diff(ratio) >= -1e-9)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 0.1 * np.log(4.0) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * np.log(4.0) + 1) / (0.1 * np.log(4.0) + 1)),
    ],
)
def test_yarn_attention_factor(fields, expected):
    rope = Rope(kind="yarn", factor=4.0, original_max_position=32, **fields)
    inverse, factor = frequencies(rope, 16)
    assert factor == pytest.approx(expected)
    plain, _ = frequencies(Rope(), 16)
    assert inverse[0] == pytest.approx(plain[0])
    assert inverse[-1] == pytest.approx(plain[-1] / 4)
