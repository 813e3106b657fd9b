"""The packed cache: as small as it says, and bit for bit what the fake-quantized one keeps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import tiny_config, tiny_params, tiny_tokens

from jaxquant.models import ModelConfig, Precision
from jaxquant.models.cache import KVCache, PackedHeads, init_cache
from jaxquant.models.config import EXACT
from jaxquant.models.decoder import forward
from jaxquant.quant import ActivationGrid

HEADS = ActivationGrid(bits=4, clip=0.95, scale_dtype="float16")
SMOLLM2 = ModelConfig(
    family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
    num_kv_heads=3, head_dim=64, query_scale=0.125, max_position=8192, dtype="bfloat16",
)  # fmt: skip


def with_heads(config: ModelConfig, grid: ActivationGrid) -> ModelConfig:
    return dataclasses.replace(config, precision=Precision(keys=grid, values=grid))


def float_cache(config: ModelConfig, batch: int, length: int) -> KVCache:
    return init_cache(dataclasses.replace(config, precision=EXACT), batch, length)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_heads_are_the_fake_quantized_ones(bits, dtype):
    grid = dataclasses.replace(HEADS, bits=bits)
    rng = np.random.default_rng(bits)
    heads = jnp.asarray(rng.standard_normal((2, 5, 3, 64)) + 2, dtype)
    packed = jax.jit(PackedHeads.of, static_argnums=1)(heads, grid)
    assert packed.words.shape == (2, 5, 3, 64 * bits // 8)
    assert packed.scale.dtype == packed.lo.dtype == jnp.float16
    np.testing.assert_array_equal(packed.dequantize(dtype), jax.jit(grid.fake_quantize)(heads))


def test_symmetric_heads_keep_large_values():
    grid = ActivationGrid(bits=4, symmetric=True, scale_dtype="float16")
    heads = jnp.asarray([[[[6e4, -6e4, 1.0, 0.0]]]], jnp.float32)
    packed = PackedHeads.of(heads, grid)
    assert packed.lo is None
    np.testing.assert_array_equal(packed.dequantize("float32"), grid.fake_quantize(heads))
    assert float(packed.dequantize("float32").max()) > 5e4


def test_bytes_at_2048_tokens():
    plain, packed = (init_cache(c, 1, 2048).nbytes for c in (SMOLLM2, with_heads(SMOLLM2, HEADS)))
    assert plain == 2 * 30 * 2048 * 3 * 64 * 2
    assert packed <= 0.3 * plain
    assert packed * 8 == HEADS.effective_bits(64) * 2 * 30 * 2048 * 3 * 64


@pytest.mark.slow
def test_chunks_and_steps_fill_a_packed_cache_like_a_fake_quantized_one():
    config = with_heads(tiny_config("llama3"), HEADS)
    params, tokens = tiny_params(config), jnp.asarray(tiny_tokens("llama3"))
    run = jax.jit(forward, static_argnames=("config", "taps"))
    results = []
    for cache in (init_cache(config, len(tokens), 32), float_cache(config, len(tokens), 32)):
        parts = []
        for start, stop in ((0, 10), (10, 18), (18, 19), (19, 24)):
            out = run(params, config=config, tokens=tokens[:, start:stop], cache=cache)
            cache, parts = out.cache, [*parts, out.logits]
        results.append((jnp.concatenate(parts, axis=1), cache))
    (packed_logits, packed), (float_logits, fake) = results
    # Attention over a packed cache adds up in another order.
    np.testing.assert_allclose(packed_logits, float_logits, atol=1e-5)
    for ours, theirs in zip(packed.heads("float32"), (fake.k, fake.v), strict=True):
        np.testing.assert_array_equal(ours[:, :, :24], theirs[:, :, :24])
    assert int(packed.length) == 24
    assert packed.size == 32
    whole = run(params, config=config, tokens=tokens).logits
    np.testing.assert_allclose(packed_logits, whole, atol=1e-3)


def test_only_keys_may_be_packed():
    config = dataclasses.replace(tiny_config("llama3"), precision=Precision(keys=HEADS))
    cache = init_cache(config, 1, 8)
    assert isinstance(cache.k, PackedHeads)
    assert isinstance(cache.v, jax.Array)
