from __future__ import annotations

import dataclasses

import jax
import numpy as np

from jaxquant.models import ModelConfig
from jaxquant.models.decoder import forward
from jaxquant.models.init import init_params
from jaxquant.quant import Grid, QArray, quantize

CONFIG = ModelConfig(
    family="qwen2",
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    query_scale=8**-0.5,
    qkv_bias=True,
)


def test_the_state_of_the_module_is_the_params():
    from flax import nnx

    from jaxquant.models.modules import Decoder

    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), CONFIG)
    query = params["blocks"]["attn"]["q"]
    query["kernel"] = jax.jit(quantize, static_argnums=1)(query["kernel"], Grid(bits=4, group_size=16))
    model = Decoder(params, CONFIG)
    _, state = nnx.split(model)
    pure = nnx.to_pure_dict(state)
    assert jax.tree.structure(pure) == jax.tree.structure(params)
    assert isinstance(pure["blocks"]["attn"]["q"]["kernel"], QArray)
    jax.tree.map(np.testing.assert_array_equal, pure, params)
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 40)
    np.testing.assert_allclose(
        nnx.jit(lambda m, t: m(t).logits)(model, tokens),
        jax.jit(forward, static_argnums=1)(params, CONFIG, tokens).logits,
        atol=2e-5,
    )


def test_untied_and_tied_modules_have_their_own_leaves():
    from flax import nnx

    from jaxquant.models.modules import Decoder

    for tied in (False, True):
        config = dataclasses.replace(CONFIG, tie_embeddings=tied)
        model = Decoder(jax.eval_shape(lambda c=config: init_params(jax.random.key(0), c)), config)
        assert ("head" in nnx.to_pure_dict(nnx.state(model))) is not tied
