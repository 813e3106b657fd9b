from __future__ import annotations

import dataclasses

import pytest
from tiny_families import RAW

from jaxquant.errors import InputError
from jaxquant.models import ModelConfig, Rope
from jaxquant.models.families import block_names, from_hf, outer_names, to_hf

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
GEMMA = {**LLAMA, "model_type": "gemma3_text", "head_dim": 32, "num_hidden_layers": 7}


def test_defaults_of_a_sparse_file():
    config = from_hf(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.rope, config.norm_eps) == (4, 16, Rope(), 1e-6)
    assert config.query_scale == 0.25
    assert not config.tie_embeddings
    assert config.eos_ids == ()


def test_round_trip_through_json_types():
    for raw in (LLAMA, GEMMA):
        config = from_hf(raw)
        assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", RAW)
def test_a_config_is_written_as_it_is_read(name):
    config = from_hf(RAW[name])
    assert from_hf(to_hf(config, "float16")) == dataclasses.replace(config, dtype="float16")


def test_what_no_file_says_is_refused():
    """A rotation gives linears biases, and heads their own matrix, that the family has not."""
    config = dataclasses.replace(from_hf(LLAMA), o_bias=True)
    with pytest.raises(InputError, match="llama says o_bias = True"):
        to_hf(config, "float32")
    config = dataclasses.replace(from_hf(LLAMA), query_scale=0.3)
    with pytest.raises(InputError, match="llama says query_scale"):
        to_hf(config, "float32")


def test_old_and_new_style_mean_the_same():
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling, "torch_dtype": "bfloat16"}
    new = {**LLAMA, "rope_parameters": {"rope_theta": 5e5, **scaling}, "dtype": "bfloat16"}
    assert from_hf(old) == from_hf(new)
    old = {**GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
           "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
    new = {
        **GEMMA,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    assert from_hf(old) == from_hf(new)


def test_multimodal_gemma_gives_its_text_part():
    text = {k: v for k, v in GEMMA.items() if k != "vocab_size"}
    config = from_hf({"model_type": "gemma3", "torch_dtype": "bfloat16", "text_config": text})
    assert (config.family, config.vocab_size, config.dtype) == ("gemma3_text", 262_208, "bfloat16")
    assert config.sliding_layers == (True,) * 5 + (False, True)
    assert config.add_bos


def test_windows():
    assert from_hf({**LLAMA, "model_type": "mistral"}).sliding_window == 4096
    assert from_hf({**LLAMA, "model_type": "mistral", "sliding_window": None}).sliding_layers == ()
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 32, "max_window_layers": 3}
    assert from_hf(qwen).sliding_layers == ()
    assert from_hf({**qwen, "use_sliding_window": True}).sliding_layers == (False, False, False, True)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model_type": "mixtral"}, "model_type = 'mixtral'.*llama, mistral, qwen2, qwen3, gemma3_text"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "needs a factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_key_value_heads": 3}, "4 attention heads do not divide into 3"),
        ({"dtype": "float64"}, "dtype = 'float64'"),
    ],
)
def test_what_is_not_supported_is_named(fields, match):
    with pytest.raises(InputError, match=match):
        from_hf({**LLAMA, **fields})


def test_names_cover_the_parameters():
    import jax

    from jaxquant.models.init import init_params

    for raw in (
        LLAMA,
        GEMMA,
        {**LLAMA, "model_type": "qwen2"},
        {**LLAMA, "attention_bias": True, "mlp_bias": True},
    ):
        config = from_hf(raw)
        params = jax.eval_shape(lambda config=config: init_params(jax.random.key(0), config))
        paths = {
            jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in jax.tree.leaves_with_path(params)
        }
        named = {f"blocks.{path}" for path in block_names(config)} | set(outer_names(config))
        assert named == paths
