"""Rotations folded into a model: the function stays, the bases are those that were asked for."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import run
from tiny_families import RAW, tiny_config, tiny_params, tiny_tokens

from jaxquant.errors import UsageError
from jaxquant.linalg import hadamard, random_hadamard, random_orthogonal
from jaxquant.methods import Rotations, fold_norms, quarot, rotate
from jaxquant.models import Precision
from jaxquant.models.decoder import forward

TAPS = ("attn_in", "attn_out", "mlp_in", "mlp_hidden", "keys")
# The two with the most parts; the others with the slow tests.
FAMILIES = [
    name if name in ("llama_linear_biases", "gemma3") else pytest.param(name, marks=pytest.mark.slow)
    for name in RAW
]


def model(name: str):
    config = tiny_config(name)
    return tiny_params(config), config, jnp.asarray(tiny_tokens(name))


def draw(config, seed: int = 1) -> Rotations:
    """QuaRot's rotations, an order of the hidden units and a shift of the keys."""
    rng = np.random.default_rng(seed)
    order = [rng.permutation(config.intermediate_size) for _ in range(config.num_layers)]
    shift = rng.standard_normal((config.num_layers, config.num_kv_heads, config.head_dim))
    return dataclasses.replace(quarot(config, seed), hidden=np.array(order), key_shift=shift)


def change(after, before) -> float:
    return float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before)))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_is_preserved(name):
    params, config, tokens = model(name)
    before = run(params, config, tokens).logits
    folded, untied = fold_norms(params, config)
    assert not untied.tie_embeddings
    assert change(run(folded, untied, tokens).logits, before) <= 1e-4
    rotated, turned = rotate(folded, untied, draw(config))
    assert turned.precision == Precision(hidden_hadamard=48)
    assert np.abs(np.asarray(rotated["embed"]) - params["embed"]).max() > 0.1
    assert change(run(rotated, turned, tokens).logits, before) <= 1e-4


@pytest.mark.parametrize("name", ["llama_linear_biases", "gemma3"])
def test_the_function_is_preserved_in_float64(name):
    with jax.enable_x64(True):
        params, config, tokens = model(name)
        config = dataclasses.replace(config, dtype="float64")
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        before = run(params, config, tokens)
        after = run(*rotate(*fold_norms(params, config), draw(config)), tokens)
    # The model keeps its statistics and logits in float32.
    assert change(after.logits, before.logits) <= 2e-6


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_what_the_linears_read_is_in_the_new_basis(name):
    params, config, tokens = model(name)
    folded, config = fold_norms(params, config)
    rotations = draw(config)
    rotated, turned = rotate(folded, config, rotations)
    before, after = (run(p, c, tokens, taps=TAPS).taps for p, c in ((folded, config), (rotated, turned)))
    assert rotations.values is not None
    assert rotations.hidden is not None
    group = config.num_heads // config.num_kv_heads
    for layer in range(config.num_layers):
        b, a = ({tap: np.asarray(taps[tap][layer], np.float64) for tap in TAPS} for taps in (before, after))
        for tap in ("attn_in", "mlp_in"):
            np.testing.assert_allclose(a[tap], b[tap] @ rotations.residual, atol=2e-4)
        hidden = b["mlp_hidden"][..., rotations.hidden[layer]] @ hadamard(48) / 48**0.5
        np.testing.assert_allclose(a["mlp_hidden"], hidden, atol=1e-3)
        heads = b["attn_out"].reshape(*b["attn_out"].shape[:2], config.num_heads, -1)
        turned = [heads[:, :, h] @ rotations.values[layer, h // group] for h in range(config.num_heads)]
        np.testing.assert_allclose(a["attn_out"], np.concatenate(turned, axis=-1), atol=2e-4)
        keys = b["keys"].reshape(*b["keys"].shape[:2], config.num_kv_heads, -1) - rotations.key_shift[layer]
        turned = [keys[:, :, h] @ rotations.keys[layer, h] for h in range(config.num_kv_heads)]
        np.testing.assert_allclose(a["keys"], np.concatenate(turned, axis=-1), atol=2e-4)


def test_parts_of_a_model_are_treated_like_the_whole():
    params, config, _ = model("gemma3")
    rotations = draw(config)
    whole, _ = rotate(*fold_norms(params, config), rotations)
    outer = {name: leaf for name, leaf in params.items() if name != "blocks"}
    block = {"blocks": jax.tree.map(lambda leaf: leaf[1:2], params["blocks"])}
    own = dataclasses.replace(
        rotations,
        **{name: getattr(rotations, name)[1:2] for name in ("values", "keys", "key_shift", "hidden")},
    )
    parts, _ = rotate(*fold_norms(outer, config), rotations)
    one, _ = rotate(*fold_norms(block, config), own)
    expected = {**whole, "blocks": jax.tree.map(lambda leaf: leaf[1:2], whole["blocks"])}
    for a, b in zip(jax.tree.leaves({**parts, **one}), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["llama2", "gemma3"])
def test_a_second_rotation_adds_to_the_first(name):
    params, config, tokens = model(name)
    before = run(params, config, tokens).logits
    once = rotate(*fold_norms(params, config), draw(config, 1))
    again = dataclasses.replace(draw(config, 2), keys=None, key_shift=None, hidden=None, hidden_block=0)
    twice, config = rotate(*once, again)
    assert change(run(twice, config, tokens).logits, before) <= 1e-4


def test_half_precision_weights_keep_their_dtype():
    params, config, _ = model("llama2")
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    rotated, _ = rotate(*fold_norms(half, config), draw(config))
    assert rotated["blocks"]["mlp"].pop("hidden_hadamard").shape == (3, 48)
    for name in ("key_rotation", "key_shift"):
        assert rotated["blocks"]["attn"].pop(name).dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(rotated)} == {jnp.dtype(jnp.bfloat16)}


def test_orders_without_a_hadamard_matrix_get_a_random_rotation():
    config = dataclasses.replace(tiny_config("llama2"), hidden_size=36, head_dim=9)
    rotations = quarot(config, 0)
    np.testing.assert_allclose(np.abs(rotations.residual), 36**-0.5)
    assert rotations.values is not None
    assert rotations.values.shape == (3, 4, 9, 9)
    assert np.ptp(np.abs(rotations.values[0, 0])) > 0.1
    assert np.abs(rotations.values[0, 0] - rotations.values[0, 1]).max() > 0.1


def test_rotated_parameters_refuse_the_config_of_before():
    params, config, tokens = model("llama3")
    rotated, turned = rotate(*fold_norms(params, config), draw(config))
    assert turned.precision.hidden_hadamard == 48
    untied = dataclasses.replace(config, tie_embeddings=False)
    for order, shown in ((0, "none"), (16, "16")):
        other = dataclasses.replace(untied, precision=Precision(hidden_hadamard=order))
        message = (
            f"of order 48 at the inputs of down, this config has {shown}; take both from load_checkpoint"
        )
        with pytest.raises(UsageError, match=message):
            forward(rotated, other, tokens)


def test_impossible_rotations():
    params, config, _ = model("llama3")
    folded, untied = fold_norms(params, config)
    good = draw(config)
    with pytest.raises(UsageError, match="attn_norm still scales; call fold_norms first"):
        rotate(params, config, good)
    assert good.values is not None
    assert good.hidden is not None
    tied = {name: leaf for name, leaf in folded.items() if name != "head"}
    with pytest.raises(UsageError, match="the embedding is tied; call fold_norms first"):
        rotate(tied, untied, good)
    cases = [
        ({"residual": random_orthogonal(16, 0)}, r"residual is \[16, 16\]; this model takes \[32, 32\]"),
        ({"values": good.values[:2]}, r"values is \[2, 2, 8, 8\]; this model takes \[3, 2, 8, 8\]"),
        ({"residual": random_hadamard(32, 0).astype(np.float32)}, "residual is not orthogonal"),
        ({"residual": np.full((32, 32), np.nan)}, "residual is not orthogonal"),
        ({"hidden": np.zeros_like(good.hidden)}, "hidden is no order"),
        ({"key_shift": good.hidden}, r"key_shift is \[3, 48\]; this model takes \[3, 2, 8\]"),
        ({"keys": None}, "key_shift needs keys"),
        ({"hidden_block": 32}, "48 inputs of down do not divide into blocks of 32"),
    ]
    for fields, message in cases:
        with pytest.raises(UsageError, match=message):
            rotate(folded, untied, dataclasses.replace(good, **fields))
    once = rotate(folded, untied, good)
    with pytest.raises(UsageError, match="inputs of down are rotated already; start from the original"):
        rotate(*once, good)
    with pytest.raises(UsageError, match="keys of this model are rotated already; start from the original"):
        rotate(*once, dataclasses.replace(good, hidden=None, hidden_block=0))
