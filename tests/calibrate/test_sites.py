"""What is measured of activations where they are quantized, against numpy on the taps themselves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import tiny_config, tiny_params

from jaxquant.calibrate.sites import block_sites
from jaxquant.models import Precision
from jaxquant.models.decoder import block
from jaxquant.quant import ActivationGrid

GRID = ActivationGrid(bits=4, group_size=16, clip=0.95)
HEADS = ActivationGrid(bits=3)
PRECISION = Precision(attn_in=GRID, mlp_hidden=GRID, keys=HEADS)


@pytest.fixture(scope="module")
def problem():
    config = tiny_config("llama3")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), tiny_params(config)["blocks"])
    x = np.random.default_rng(0).standard_normal((3, 10, config.hidden_size)).astype(np.float32)
    x[1, 4] *= 30
    return params, config, x


@pytest.mark.slow
def test_sites_are_those_of_the_taps(problem):
    params, config, x = problem
    sites = block_sites(params, config, x, PRECISION, sliding=False)
    assert list(sites) == ["attn_in", "mlp_hidden", "keys"]
    _, _, taps = block(params, config, jnp.asarray(x), sliding=False, taps=tuple(sites))
    for name, site in sites.items():
        grid = HEADS if name == "keys" else GRID
        tap = np.asarray(taps[name])
        size = config.head_dim if name == "keys" else 16
        groups = tap.reshape(30, -1, size)
        np.testing.assert_allclose(site.peak, np.abs(tap).max((0, 1)), rtol=1e-5)
        middle = (groups.max(-1, keepdims=True) + groups.min(-1, keepdims=True)) / 2
        np.testing.assert_allclose(site.rest, np.abs(groups - middle).max(0).ravel(), rtol=1e-4)
        values = np.asarray(grid.fake_quantize(jnp.asarray(groups if name == "keys" else tap)))
        lost = ((values.reshape(tap.shape) - tap) ** 2).sum(-1)
        energy = (tap**2).sum(-1)
        np.testing.assert_allclose(site.error, lost.sum() / energy.sum(), rtol=1e-3)
        at = np.arange(3), np.abs(tap).max(-1).argmax(1)
        np.testing.assert_allclose(site.error_massive, lost[at].sum() / energy[at].sum(), rtol=1e-3)


def test_a_quantized_config_measures_the_float_block(problem):
    params, config, x = problem
    quantized = dataclasses.replace(config, precision=PRECISION)
    ours, theirs = (block_sites(params, c, x, PRECISION, sliding=False) for c in (quantized, config))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
