"""OffQ: the basis, the order, the function that stays, and 4-bit tokens that lose less."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from small_model import MemorySource, run
from tiny_families import RAW, tiny_config, tiny_params, tiny_tokens

from jaxquant.calibrate.offsets import Offsets, offsets
from jaxquant.errors import UsageError
from jaxquant.methods import fold_norms, offq, quarot, rotate
from jaxquant.methods.offq import spread_leaders, stream_basis
from jaxquant.quant import ActivationGrid

GROUP = 8
# The two with the most parts; the others with the slow tests.
FAMILIES = [
    name if name in ("llama_linear_biases", "gemma3") else pytest.param(name, marks=pytest.mark.slow)
    for name in RAW
]


def folded(name: str):
    config = tiny_config(name)
    return *fold_norms(tiny_params(config), config), tiny_tokens(name)


@pytest.fixture(scope="module")
def llama():
    params, config, tokens = folded("llama3")
    return params, config, tokens, offsets(MemorySource(params, config), tokens)


def test_offsets_against_numpy(llama):
    params, config, tokens, stats = llama
    taps = run(
        params, config, jnp.asarray(tokens), taps=("attn_in", "mlp_in", "mlp_hidden", "keys", "values")
    ).taps
    top, everything = [], []
    for tap in ("attn_in", "mlp_in"):
        for layer in np.asarray(taps[tap], np.float64):
            largest = [sample[np.abs(sample).max(-1).argmax()] for sample in layer]
            for kept, rows in ((top, np.array(largest)), (everything, layer.reshape(-1, layer.shape[-1]))):
                second = rows.T @ rows
                kept.append(second / np.trace(second))
    np.testing.assert_allclose(stats.top, np.mean(top, axis=0), atol=1e-6)
    np.testing.assert_allclose(stats.all, np.mean(everything, axis=0), atol=1e-6)
    heads = {
        tap: np.asarray(taps[tap], np.float64).reshape(
            config.num_layers, -1, config.num_kv_heads, config.head_dim
        )
        for tap in ("keys", "values")
    }
    np.testing.assert_allclose(stats.key_mean, heads["keys"].mean(1), atol=1e-5)
    centred = heads["keys"] - heads["keys"].mean(1, keepdims=True)
    for second, rows in ((stats.keys, centred), (stats.values, heads["values"])):
        np.testing.assert_allclose(
            second, np.einsum("lthi,lthj->lhij", rows, rows) / rows.shape[1], atol=1e-4
        )
    np.testing.assert_allclose(stats.hidden_peak, np.abs(taps["mlp_hidden"]).max((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_is_preserved(name):
    params, config, tokens = folded(name)
    before = run(params, config, jnp.asarray(tokens)).logits
    rotations = offq(offsets(MemorySource(params, config), tokens), GROUP)
    for matrix in (rotations.residual, rotations.values, rotations.keys):
        assert matrix is not None
        error = np.swapaxes(matrix, -1, -2) @ matrix - np.eye(matrix.shape[-1])
        assert np.abs(error).max() <= 1e-12
    rotated, config = rotate(params, config, rotations)
    assert config.precision.hidden_hadamard == GROUP
    after = run(rotated, config, jnp.asarray(tokens)).logits
    assert float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before))) <= 1e-4


def test_the_mean_of_a_group_is_its_leader(llama):
    params, config, tokens, stats = llama
    rotations = offq(stats, GROUP)
    rotated, turned = rotate(params, config, rotations)
    before, after = (
        np.asarray(run(p, c, jnp.asarray(tokens), taps=("mlp_in",)).taps["mlp_in"], np.float64)
        for p, c in ((params, config), (rotated, turned))
    )
    u = stream_basis(stats)
    energies = [np.diagonal(u.T @ second @ u) for second in (stats.all, stats.top)]
    order = spread_leaders(np.sqrt(np.maximum(*energies)), GROUP)
    leaders = (before @ u[:, order])[..., ::GROUP]
    means = after.reshape(*after.shape[:-1], -1, GROUP).mean(-1)
    np.testing.assert_allclose(means, leaders / GROUP**0.5, atol=1e-5)


def test_the_first_direction_is_that_of_the_largest_tokens(llama):
    stats = llama[-1]
    first = np.linalg.eigh(stats.top)[1][:, -1]
    for basis in ("top", "mixed", "householder"):
        u = stream_basis(stats, basis)
        assert np.abs(u.T @ u - np.eye(len(u))).max() < 1e-12
        assert abs(u[:, 0] @ first) > 0.99
    np.testing.assert_array_equal(stream_basis(stats, "identity"), np.eye(32))
    assert abs(stream_basis(stats, "all")[:, 0] @ np.linalg.eigh(stats.all)[1][:, -1]) > 1 - 1e-9


def test_leaders_are_spread_and_the_rest_is_dealt_evenly():
    peaks = np.random.default_rng(0).lognormal(0, 2, 64)
    groups = peaks[spread_leaders(peaks, 16)].reshape(4, 16)
    np.testing.assert_array_equal(np.sort(groups.ravel()), np.sort(peaks))
    np.testing.assert_array_equal(groups[:, 0], np.sort(peaks)[::-1][:4])
    assert np.all(groups[:, 0] == groups.max(axis=1))
    rest = np.square(groups[:, 1:]).sum(axis=1)
    assert rest.max() < 1.6 * rest.min()


def test_outlier_tokens_survive_4_bits_better_than_in_random_rotations(llama):
    """The error of what attention reads, all tokens sharing a direction 30 times as strong as the rest."""
    params, config, tokens, _ = llama
    direction = np.random.default_rng(1).standard_normal(config.hidden_size)
    direction /= np.linalg.norm(direction)
    params = {**params, "embed": params["embed"] + 30 * direction.astype(np.float32)}
    grid = ActivationGrid(bits=4, group_size=GROUP)
    errors = {}
    for name, rotations in (
        ("offq", offq(offsets(MemorySource(params, config), tokens), GROUP)),
        (
            "unsorted",
            offq(offsets(MemorySource(params, config), tokens), GROUP, basis="identity", sort=False),
        ),
        ("quarot", quarot(config, 0)),
    ):
        x = run(*rotate(params, config, rotations), jnp.asarray(tokens), taps=("attn_in",)).taps["attn_in"]
        errors[name] = float(jnp.linalg.norm(grid.fake_quantize(x) - x) / jnp.linalg.norm(x))
    assert errors["offq"] < 0.5 * errors["quarot"]
    assert errors["offq"] < 0.5 * errors["unsorted"]


def test_impossible_options(llama):
    stats = llama[-1]
    with pytest.raises(
        UsageError, match="32 channels of the residual stream are not divisible by group_size=12; give"
    ):
        offq(stats, 12)
    with pytest.raises(UsageError, match="unknown basis 'pca'; use mixed, top, all, householder, identity"):
        offq(stats, 8, basis="pca")
    with pytest.raises(UsageError, match="no Hadamard matrix of order group_size=6 is known"):
        offq(dataclasses.replace(stats, top=np.eye(36), all=np.eye(36)), 6)


def test_a_direction_of_one_token_a_sequence_leads_a_group():
    rng = np.random.default_rng(0)
    d, direction = 64, np.zeros(64)
    direction[:] = rng.standard_normal(d) / 8
    direction /= np.linalg.norm(direction)
    every = np.eye(d) / d * (1 - 1 / 512) + np.outer(direction, direction) / 512
    stats = Offsets(
        top=np.outer(direction, direction),
        all=every,
        values=np.eye(8)[None, None],
        keys=np.eye(8)[None, None],
        key_mean=np.zeros((1, 1, 8)),
        hidden_peak=np.ones((1, 64)),
    )
    residual = offq(stats, 16).residual
    spread = (direction @ residual).reshape(4, 16)
    loudest = np.argmax(np.abs(spread).sum(axis=1))
    np.testing.assert_allclose(spread[loudest], spread[loudest].mean(), atol=1e-9)
    assert abs(spread[loudest].mean()) > 0.2
