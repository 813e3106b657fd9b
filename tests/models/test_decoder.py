from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.errors import InputError
from jaxquant.models import ModelConfig, Rope
from jaxquant.models.cache import init_cache
from jaxquant.models.decoder import TAPS, block, embed, final_hidden, forward, logits, reduce_taps, rms_norm
from jaxquant.models.init import init_params
from jaxquant.quant import Grid, QArray, quantize

LLAMA = ModelConfig(
    family="llama",
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    query_scale=8**-0.5,
    max_position=64,
)
GEMMA = dataclasses.replace(
    LLAMA,
    family="gemma3_text",
    activation="gelu_tanh",
    qk_norm=True,
    norm_plus_one=True,
    post_norms=True,
    embed_scale=32**0.5,
    sliding_window=4,
    sliding_layers=(True, False, True),
    rope=Rope(theta=1e6),
    rope_local=Rope(theta=1e4),
    tie_embeddings=True,
)
MISTRAL = dataclasses.replace(LLAMA, family="mistral", sliding_window=5, sliding_layers=(True,) * 3)
QWEN = dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, o_bias=True, mlp_bias=True)
CONFIGS = pytest.mark.parametrize("config", [LLAMA, GEMMA, MISTRAL, QWEN], ids=lambda c: c.family)

run = jax.jit(forward, static_argnums=1, static_argnames="taps")


def params_of(config, dtype="float32", seed=0):
    """Random parameters drawn by numpy: compiling `init_params` would take longer than the tests."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))

    def draw(leaf):
        scale = leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 1.0
        return jnp.asarray(rng.standard_normal(leaf.shape) * scale, dtype)

    return jax.tree.map(draw, shapes)


def tokens_of(config, length=12, batch=2):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)


@CONFIGS
def test_scan_equals_a_loop_over_blocks(config):
    params, tokens = params_of(config), tokens_of(config)

    @jax.jit
    def looped(params):
        x = embed(params, config, tokens)
        for layer in range(config.num_layers):
            one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
            sliding = bool(config.sliding_layers) and config.sliding_layers[layer]
            x, _, _ = block(one, config, x, sliding=sliding)
        return logits(params, config, rms_norm(x, params["norm"], config))

    np.testing.assert_allclose(run(params, config, tokens).logits, looped(params), atol=2e-5)


@CONFIGS
def test_cache_gives_the_same_logits(config):
    params, tokens = params_of(config), tokens_of(config)
    whole = run(params, config, tokens).logits
    cache, parts = init_cache(config, 2, 16), []
    for start, stop in [(0, 7), (7, 8), (8, 9), (9, 12)]:
        output = run(params, config, tokens[:, start:stop], cache=cache)
        cache = output.cache
        parts.append(output.logits)
    assert int(cache.length) == 12
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)


def test_queries_longer_than_a_chunk():
    config = dataclasses.replace(
        MISTRAL, max_position=1024, sliding_window=300, num_layers=1, sliding_layers=(True,)
    )
    mixed = dataclasses.replace(config, num_layers=2, sliding_layers=(True, False))
    params, tokens = params_of(mixed), tokens_of(config, length=700, batch=1)
    first = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    x = embed(params, config, tokens)
    skipped, _, _ = jax.jit(block, static_argnums=1, static_argnames="sliding")(
        first, config, x, sliding=True
    )
    masked, _, _ = jax.jit(block, static_argnums=1)(first, config, x, sliding=jnp.asarray(True))
    np.testing.assert_allclose(skipped, masked, atol=1e-5)
    cached = run(params, mixed, tokens, cache=init_cache(mixed, 1, 701)).logits
    np.testing.assert_allclose(run(params, mixed, tokens).logits, cached, atol=2e-5)


@pytest.mark.parametrize("sliding", [True, False])
def test_a_window_hides_what_is_further_back(sliding):
    config = dataclasses.replace(MISTRAL, num_layers=1, sliding_layers=(sliding,))
    params, tokens = params_of(config), tokens_of(config)
    changed = tokens.at[:, 3].set((tokens[:, 3] + 1) % config.vocab_size)
    difference = np.abs(run(params, config, tokens).logits - run(params, config, changed).logits).max(
        axis=(0, 2)
    )
    affected = np.flatnonzero(difference > 1e-6)
    np.testing.assert_array_equal(affected, np.arange(3, 3 + 5) if sliding else np.arange(3, 12))


@CONFIGS
def test_taps_are_what_the_linears_read(config):
    params, tokens = params_of(config), tokens_of(config)
    taps = run(params, config, tokens, taps=TAPS).taps
    sizes = {"attn_in": 32, "attn_out": 32, "mlp_in": 32, "mlp_hidden": 48}
    assert {name: tap.shape for name, tap in taps.items()} == {
        n: (3, 2, 12, size) for n, size in sizes.items()
    }
    first = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    expected = rms_norm(embed(params, config, tokens), first["attn_norm"], config)
    np.testing.assert_allclose(taps["attn_in"][0], expected, atol=1e-6)
    assert set(run(params, config, tokens, taps=("mlp_in",)).taps) == {"mlp_in"}


def test_what_reduces_taps_is_read_at_every_call():
    params, tokens, factor = params_of(LLAMA), tokens_of(LLAMA), [1.0]

    def reduce(x):
        return factor[0] * jnp.sum(x)

    once = reduce_taps(params, LLAMA, tokens, reduce, taps=("mlp_in",))["mlp_in"]
    factor[0] = 2.0
    twice = reduce_taps(params, LLAMA, tokens, reduce, taps=("mlp_in",))["mlp_in"]
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)
    with pytest.raises(InputError, match="unknown tap"):
        reduce_taps(params, LLAMA, tokens, reduce, taps=("mlp",))


def test_vmap_over_models():
    params = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(params_of(LLAMA, seed=seed) for seed in range(3))
    )
    tokens = tokens_of(LLAMA)
    together = jax.jit(jax.vmap(lambda p: forward(p, LLAMA, tokens).logits))(params)
    for i in range(3):
        alone = run(jax.tree.map(lambda leaf, i=i: leaf[i], params), LLAMA, tokens).logits
        np.testing.assert_allclose(together[i], alone, atol=2e-5)


@CONFIGS
def test_gradient_matches_finite_differences(config):
    params, tokens = params_of(config), tokens_of(config, length=6, batch=1)

    @jax.jit
    def loss(params):
        return jnp.mean(jnp.tanh(forward(params, config, tokens).logits))

    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), params)
    slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, jax.jit(jax.grad(loss))(params), direction)))
    step = 1e-3
    ahead, behind = (
        jax.tree.map(lambda a, d, s=s: np.asarray(a) + np.float32(s) * d, params, direction)
        for s in (step, -step)
    )
    difference = (loss(ahead) - loss(behind)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=2e-2, atol=2e-4)


def test_packed_kernels_equal_their_dequantized_selves():
    params, tokens = params_of(LLAMA), tokens_of(LLAMA)
    grid = Grid(bits=4, group_size=16)

    @jax.jit
    def pack(blocks):
        def one(path, leaf):
            return quantize(leaf, grid) if path[-1].key == "kernel" else leaf

        return jax.tree_util.tree_map_with_path(one, blocks)

    @jax.jit
    def unpack(blocks):
        def is_packed(leaf):
            return isinstance(leaf, QArray)

        return jax.tree.map(lambda a: a.dequantize() if is_packed(a) else a, blocks, is_leaf=is_packed)

    packed = {**params, "blocks": pack(params["blocks"])}
    plain = {**params, "blocks": unpack(packed["blocks"])}
    np.testing.assert_allclose(run(packed, LLAMA, tokens).logits, run(plain, LLAMA, tokens).logits, atol=5e-5)


def test_bfloat16_activations_with_float32_logits():
    config = dataclasses.replace(LLAMA, dtype="bfloat16")
    params, tokens = params_of(config, "bfloat16"), tokens_of(config)
    hidden, _ = jax.eval_shape(lambda: final_hidden(params, config, tokens))
    assert hidden.dtype == jnp.bfloat16
    output = run(params, config, tokens).logits
    assert output.dtype == jnp.float32
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    exact = run(wide, LLAMA, tokens).logits
    assert jnp.abs(output - exact).max() < 0.15


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_narrow_head_is_not_widened_as_a_whole(tied, dtype):
    config = dataclasses.replace(LLAMA, vocab_size=32003, hidden_size=256, tie_embeddings=tied)
    head = jax.ShapeDtypeStruct((32003, 256) if tied else (256, 32003), dtype)
    params, hidden = {"embed" if tied else "head": head}, jax.ShapeDtypeStruct((1, 1, 256), jnp.float32)
    program = jax.jit(lambda params, hidden: logits(params, config, hidden)).lower(params, hidden).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.2 * 4 * head.size


def test_a_packed_head_equals_its_dequantized_self():
    params, tokens = params_of(LLAMA), tokens_of(LLAMA)
    head = quantize(params["head"], Grid(bits=4, group_size=16))
    packed, plain = ({**params, "head": a} for a in (head, head.dequantize()))
    np.testing.assert_allclose(run(packed, LLAMA, tokens).logits, run(plain, LLAMA, tokens).logits, atol=5e-5)


def test_compiled_size_does_not_grow_with_depth():
    def size(layers):
        config = dataclasses.replace(LLAMA, num_layers=layers)
        params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
        shape = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        return len(run.lower(params, config, shape).as_text())

    assert size(30) < 1.02 * size(3)


def test_initial_activations_have_unit_variance():
    config = dataclasses.replace(LLAMA, hidden_size=256, num_layers=1)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    assert params["blocks"]["mlp"]["down"]["kernel"].shape == (1, 48, 256)
    taps = run(params, config, tokens_of(config), taps=("mlp_in", "mlp_hidden")).taps
    assert 0.9 < taps["mlp_in"].std() < 1.1
    assert run(params, config, tokens_of(config)).logits.std() < 1.5


def test_errors_name_the_limit():
    params = params_of(LLAMA)
    with pytest.raises(InputError, match="max_position = 64"):
        init_cache(LLAMA, 1, 65)
    with pytest.raises(InputError, match="cache of 8"):
        forward(params, LLAMA, tokens_of(LLAMA), cache=init_cache(LLAMA, 2, 8))
    with pytest.raises(InputError, match="mlp_out"):
        forward(params, LLAMA, tokens_of(LLAMA), taps=("mlp_out",))
