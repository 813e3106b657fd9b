"""Parity with transformers: live where torch is installed, against stored outputs everywhere."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import RAW, tiny_config, tiny_params, tiny_tokens

from jaxquant.models import decoder

GOLDEN = Path(__file__).parent / "golden"


def our_outputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and hidden states before each block, the blocks called one by one."""
    config = tiny_config(name)
    params, tokens = jax.tree.map(jnp.asarray, tiny_params(config)), jnp.asarray(tiny_tokens(name))
    run_block = jax.jit(decoder.block, static_argnums=1, static_argnames="sliding")
    x, hidden = decoder.embed(params, config, tokens), []
    for layer in range(config.num_layers):
        hidden.append(x)
        one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        sliding = bool(config.sliding_layers) and config.sliding_layers[layer]
        x, _, _ = run_block(one, config, x, sliding=sliding)
    logits = jax.jit(decoder.forward, static_argnums=1)(params, config, tokens).logits
    return np.asarray(logits), np.asarray(jnp.stack(hidden))


def assert_parity(name: str, logits: np.ndarray, hidden: np.ndarray) -> None:
    our_logits, our_hidden = our_outputs(name)
    for layer, (ours, theirs) in enumerate(zip(our_hidden, hidden, strict=True)):
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error <= 1e-5, f"{name}: relative error {error:.1e} before block {layer}"
    assert np.abs(our_logits - logits).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", RAW)
def test_transformers(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from huggingface_reference import huggingface_outputs

    config = tiny_config(name)
    assert_parity(name, *huggingface_outputs(RAW[name], config, tiny_params(config), tiny_tokens(name)))


@pytest.mark.parametrize("name", RAW)
def test_golden(name):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        np.testing.assert_array_equal(golden["tokens"], tiny_tokens(name))
        assert_parity(name, golden["logits"], golden["hidden"])
