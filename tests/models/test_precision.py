"""Quantized activations and caches in the forward pass: what is read is on its grid, all else as before."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import run
from tiny_families import tiny_config, tiny_params, tiny_tokens

from jaxquant.kernels import use_backend
from jaxquant.kernels.hadamard import cpu
from jaxquant.linalg import hadamard
from jaxquant.models import ModelConfig, Precision
from jaxquant.models.cache import init_cache
from jaxquant.models.decoder import block, forward
from jaxquant.quant import ActivationGrid, Grid, quantize

GRID = ActivationGrid(bits=4, group_size=16)
HEADS = ActivationGrid(bits=4)
ALL = Precision(
    attn_in=GRID, attn_out=GRID, mlp_in=GRID, mlp_hidden=GRID, keys=HEADS, values=HEADS, hidden_hadamard=16
)
TAPS = ("attn_in", "attn_out", "mlp_in", "mlp_hidden", "keys", "values")


@pytest.fixture(scope="module")
def llama():
    config = tiny_config("llama3")
    return tiny_params(config), config, jnp.asarray(tiny_tokens("llama3"))


def with_precision(config: ModelConfig, **fields) -> ModelConfig:
    return dataclasses.replace(config, precision=Precision(**fields))


@pytest.mark.parametrize("tap", TAPS)
def test_what_is_read_is_on_its_grid_and_the_rest_is_not(llama, tap):
    params, config, tokens = llama
    grid = dataclasses.replace(HEADS if tap in ("keys", "values") else GRID, bits=2)
    quantized = with_precision(config, **{tap: grid})
    taps = run(params, quantized, tokens, taps=TAPS).taps
    for name, x in taps.items():
        size = config.head_dim if name in ("keys", "values") else 16
        levels = [len(np.unique(group)) for group in np.asarray(x).reshape(-1, size)]
        assert (max(levels) <= 4) == (name == tap)
    # Only the first block reads what the float model reads.
    plain = run(params, config, tokens, taps=(tap,)).taps[tap][0]
    width = config.head_dim if tap in ("keys", "values") else plain.shape[-1]
    expected = grid.fake_quantize(plain.reshape(-1, width)).reshape(plain.shape)
    np.testing.assert_allclose(taps[tap][0], expected, atol=1e-5)
    assert np.abs(np.asarray(taps[tap][0] - plain)).max() > 1e-2


def test_hidden_units_are_rotated_block_by_block(llama):
    params, config, tokens = llama
    plain, turned = (
        run(params, c, tokens, taps=("mlp_hidden",)).taps["mlp_hidden"][0]
        for c in (config, with_precision(config, hidden_hadamard=16))
    )
    expected = plain.reshape(*plain.shape[:-1], 3, 16) @ (hadamard(16) / 4).astype(np.float32)
    np.testing.assert_allclose(turned, expected.reshape(plain.shape), atol=1e-5)


def test_decoding_with_a_cache_equals_the_whole_text(llama):
    params, config, tokens = llama
    config = dataclasses.replace(config, precision=ALL)
    whole = run(params, config, tokens).logits
    cache, parts = init_cache(config, tokens.shape[0], 32), []
    for start, stop in ((0, 10), (10, 11), (11, 24)):
        out = run(params, config, tokens[:, start:stop], cache=cache)
        cache, parts = out.cache, [*parts, out.logits]
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-3)


def test_packed_readers_get_integers_of_the_transformed(llama):
    """In one call where there is a kernel; all backends and the values that dense readers get agree."""
    params, config, tokens = llama
    grid = ActivationGrid(bits=8, group_size=16)
    config = with_precision(config, mlp_hidden=grid, hidden_hadamard=16)
    mlp = dict(params["blocks"]["mlp"])
    down = jax.vmap(lambda w: quantize(w, Grid(bits=8, group_size=16)))(jnp.asarray(mlp["down"]["kernel"]))

    def logits(kernel):
        blocks = params["blocks"] | {"mlp": mlp | {"down": mlp["down"] | {"kernel": kernel}}}
        return forward(params | {"blocks": blocks}, config, tokens).logits

    by_integers = jax.jit(logits)
    shape = jax.ShapeDtypeStruct((1, 48), jnp.float32)
    target = "jaxquant_hadamard_quantize"
    assert (target in by_integers.lower(down).as_text()) == (
        not cpu.KERNEL.refuses(shape, grid=grid, block=16)
    )
    with use_backend("portable"):
        assert target not in by_integers.lower(down).as_text()
        portable = by_integers(down)
    expected = logits(jax.vmap(lambda q: q.dequantize())(down))
    for ours in (by_integers(down), portable):
        np.testing.assert_allclose(ours, expected, atol=0.01 * float(jnp.abs(expected).max()))


@pytest.mark.slow
def test_a_block_alone_is_that_of_the_model(llama):
    params, config, tokens = llama
    config = dataclasses.replace(config, precision=ALL)
    x = jnp.take(jnp.asarray(params["embed"]), tokens, axis=0)
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), params["blocks"])
    _, _, taps = block(first, config, x, sliding=False, taps=TAPS)
    both = run(params, config, tokens, taps=tuple(taps)).taps
    for tap, values in taps.items():
        np.testing.assert_allclose(values, both[tap][0], atol=1e-5)


def test_json_round_trip():
    config = tiny_config("llama3")
    assert "precision" not in config.to_dict()
    assert ModelConfig.from_dict(config.to_dict()) == config
    for precision in (ALL, Precision(keys=HEADS)):
        quantized = dataclasses.replace(config, precision=precision)
        assert ModelConfig.from_dict(quantized.to_dict()) == quantized
    assert hash(quantized) != hash(config)
