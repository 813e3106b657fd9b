"""The supported families: Hugging Face configurations to and from `ModelConfig`, and their tensor names."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, TypeAlias, get_args

from jaxquant.errors import InputError
from jaxquant.models.config import Activation, ModelConfig, Rope

#: What the files of a model may be in.
Dtype: TypeAlias = Literal["float16", "bfloat16", "float32"]

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
FAMILIES = tuple(_ARCHITECTURES)

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}

# What transformers assumes where a config.json is silent; Gemma 3's multimodal files state only what differs.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32_768},
    "qwen3": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32_768, "head_dim": 128},
    "gemma3_text": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
}

# Fields of a config.json that change the computation in a way this decoder does not have.
_UNSUPPORTED = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
    "num_local_experts",
    "num_experts",
    "quantization_config",
)


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a parsed Hugging Face `config.json`, written by transformers 4 or 5.

    A multimodal `gemma3` file gives its text part. `add_bos` is a matter of the tokenizer and is left to
    the loader, except for Gemma, which is useless without it.

    Raises:
      InputError: an unknown architecture, a missing field or a feature that the decoder does not have.
    """
    if raw.get("model_type") == "gemma3" and "text_config" in raw:
        raw = {"model_type": "gemma3_text", "dtype": _dtype(raw), **raw["text_config"]}
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise InputError(_refusal("model_type", family))
    raw = {**_DEFAULTS[family], **raw}
    for name in _UNSUPPORTED:
        if raw.get(name):
            raise InputError(_refusal(name, raw[name]))
    gemma = family == "gemma3_text"
    heads, hidden = _integer(raw, "num_attention_heads"), _integer(raw, "hidden_size")
    head_dim = raw.get("head_dim") or hidden // heads
    kv_heads = raw.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise InputError(
            f"config.json: {heads} attention heads do not divide into {kv_heads} key/value heads"
        )
    act_field = "hidden_activation" if gemma else "hidden_act"
    act_name = raw.get(act_field) or "silu"
    if act_name not in _ACTIVATIONS:
        raise InputError(_refusal(act_field, act_name))
    sliding_window, sliding_layers = _sliding(raw, family)
    rope, rope_local = _ropes(raw, family)
    bias = bool(raw.get("attention_bias", False))
    eos = raw.get("eos_token_id")
    bos = raw.get("bos_token_id")
    return ModelConfig(
        family=family,
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_layers=_integer(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=float(raw["rms_norm_eps"]),
        activation=_ACTIVATIONS[act_name],
        query_scale=float(raw["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
        qkv_bias=family == "qwen2" or (family != "mistral" and bias),
        o_bias=family in ("llama", "qwen3", "gemma3_text") and bias,
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "gemma3_text"),
        norm_plus_one=gemma,
        post_norms=gemma,
        embed_scale=math.sqrt(hidden) if gemma else 1.0,
        sliding_window=sliding_window,
        sliding_layers=sliding_layers,
        rope=rope,
        rope_local=rope_local,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_position=_integer(raw, "max_position_embeddings"),
        bos_id=bos[0] if isinstance(bos, list) else bos,
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        add_bos=gemma,
        dtype=_dtype(raw),
    )


def to_hf(config: ModelConfig, dtype: Dtype) -> dict[str, Any]:
    """A Hugging Face `config.json` as transformers 5 writes it: `from_hf` of it is `config` in that dtype.

    The precision and `add_bos`, a matter of the tokenizer, are left out.

    Raises:
      InputError: no file of this family says what the config does (a rotated model may have biases that its
        family has not).
    """
    gemma = config.family == "gemma3_text"
    activation = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[config.activation]
    scale = round(config.query_scale**-2, 6)
    ropes = {"full_attention": config.rope, "sliding_attention": config.rope_local or config.rope}
    fields = {kind: _rope_fields(rope) for kind, rope in ropes.items()}
    kinds = ("full_attention", "sliding_attention")
    raw: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        "dtype": dtype,
        "hidden_activation" if gemma else "hidden_act": activation,
        "attention_bias": config.qkv_bias and config.family != "qwen2",
        "rope_parameters": fields if gemma or config.rope_local else fields["full_attention"],
        "sliding_window": config.sliding_window,
    }
    if config.family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if config.family not in ("llama", "mistral"):
        raw["layer_types"] = [kinds[config.slides(layer)] for layer in range(config.num_layers)]
        raw["use_sliding_window"] = config.sliding_window is not None
    if gemma:
        raw["query_pre_attn_scalar"] = int(scale) if scale == int(scale) else scale
    read = from_hf(raw)
    meant = dataclasses.replace(config, dtype=dtype, add_bos=read.add_bos, precision=read.precision)
    for field in dataclasses.fields(meant):
        name, value = field.name, getattr(meant, field.name)
        if value != getattr(read, name):
            raise InputError(
                f"no config.json of {config.family} says {name} = {value!r}, as this model has it"
            )
    return raw


def block_names(config: ModelConfig) -> dict[str, tuple[str, bool]]:
    """The tensors of one block: `{path: (suffix, transpose)}`.

    `path` is dotted (`"attn.q.kernel"` is `block["attn"]["q"]["kernel"]`). The tensor's name in a Hugging
    Face file is `f"model.layers.{i}.{suffix}"`; multimodal Gemma 3 files have `language_model.model.` or
    `model.language_model.` in place of the leading `model.`. With `transpose` the stored matrix is
    `[out, in]` and ours is its transpose; the other tensors are vectors and are taken as they are
    (Gemma's norm weights as stored in safetensors, without the 1 that GGUF files have already added).
    """
    names = {"attn_norm": ("input_layernorm.weight", False)}
    if config.post_norms:
        names["attn_post_norm"] = ("post_attention_layernorm.weight", False)
        names["mlp_norm"] = ("pre_feedforward_layernorm.weight", False)
        names["mlp_post_norm"] = ("post_feedforward_layernorm.weight", False)
    else:
        names["mlp_norm"] = ("post_attention_layernorm.weight", False)
    biases = {"q": config.qkv_bias, "k": config.qkv_bias, "v": config.qkv_bias, "o": config.o_bias}
    for linear, bias in biases.items():
        names[f"attn.{linear}.kernel"] = (f"self_attn.{linear}_proj.weight", True)
        if bias:
            names[f"attn.{linear}.bias"] = (f"self_attn.{linear}_proj.bias", False)
    if config.qk_norm:
        names["attn.q_norm"] = ("self_attn.q_norm.weight", False)
        names["attn.k_norm"] = ("self_attn.k_norm.weight", False)
    for linear in ("gate", "up", "down"):
        names[f"mlp.{linear}.kernel"] = (f"mlp.{linear}_proj.weight", True)
        if config.mlp_bias:
            names[f"mlp.{linear}.bias"] = (f"mlp.{linear}_proj.bias", False)
    return names


def outer_names(config: ModelConfig) -> dict[str, tuple[str, bool]]:
    """The tensors outside the blocks: `{path: (full Hugging Face name, transpose)}`; see `block_names`.

    `head` is absent when the embedding is tied, even where the file repeats it as `lm_head.weight`.
    """
    names = {"embed": ("model.embed_tokens.weight", False), "norm": ("model.norm.weight", False)}
    if not config.tie_embeddings:
        names["head"] = ("lm_head.weight", True)
    return names


def _refusal(field: str, value: Any) -> str:
    supported = ", ".join(FAMILIES)
    return f"config.json: {field} = {value!r} is not supported; supported architectures: {supported}"


def _integer(raw: dict[str, Any], name: str) -> int:
    if not isinstance(raw.get(name), int):
        raise InputError(f"config.json: {name} is missing or no integer; is the model folder complete?")
    return raw[name]


def _dtype(raw: dict[str, Any]) -> str:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if name not in get_args(Dtype):
        raise InputError(f"config.json: dtype = {name!r} is not supported; use float32, bfloat16 or float16")
    return name


def _sliding(raw: dict[str, Any], family: str) -> tuple[int | None, tuple[bool, ...]]:
    """Window and one flag a layer; `(None, ())` where every layer sees everything."""
    layers, window = raw["num_hidden_layers"], raw.get("sliding_window")
    if family in ("qwen2", "qwen3") and not raw.get("use_sliding_window", False):
        window = None
    if family == "llama" or window is None:
        return None, ()
    types = raw.get("layer_types")
    if family == "mistral":
        flags = (True,) * layers
    elif types is not None:
        for kind in types:
            if kind not in ("full_attention", "sliding_attention"):
                raise InputError(_refusal("layer_types", kind))
        flags = tuple(kind == "sliding_attention" for kind in types)
        if len(flags) != layers:
            raise InputError(f"config.json: layer_types has {len(flags)} entries for {layers} layers")
    elif family == "gemma3_text":
        pattern = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6
        flags = tuple(bool((i + 1) % pattern) for i in range(layers))
    else:
        flags = tuple(i >= raw.get("max_window_layers", 28) for i in range(layers))
    return (window, flags) if any(flags) else (None, ())


def _ropes(raw: dict[str, Any], family: str) -> tuple[Rope, Rope | None]:
    """Rotations of the full and of the sliding layers."""
    fields = raw.get("rope_parameters") or {}
    limit = raw["max_position_embeddings"]
    partial = raw.get("partial_rotary_factor")
    if partial not in (None, 1.0):
        raise InputError(_refusal("partial_rotary_factor", partial))
    if "full_attention" in fields or "sliding_attention" in fields:
        full, local = fields.get("full_attention") or {}, fields.get("sliding_attention") or {}
    else:
        full = {**(raw.get("rope_scaling") or {}), **fields}
        local = {} if family == "gemma3_text" else full
    if family == "gemma3_text":
        rope = _rope({"rope_theta": raw.get("rope_theta", 1e6), **full}, limit)
        return rope, _rope({"rope_theta": raw.get("rope_local_base_freq", 1e4), **local}, limit)
    theta = raw.get("rope_theta", 1e4)
    rope, rope_local = (
        _rope({"rope_theta": theta, **full}, limit),
        _rope({"rope_theta": theta, **local}, limit),
    )
    return rope, None if rope_local == rope else rope_local


def _rope(fields: dict[str, Any], max_position: int) -> Rope:
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise InputError(_refusal("rope_type", kind))
    if fields.get("partial_rotary_factor") not in (None, 1.0):
        raise InputError(_refusal("partial_rotary_factor", fields["partial_rotary_factor"]))
    if kind == "default":
        return Rope(theta=float(fields["rope_theta"]))
    original = fields.get("original_max_position_embeddings") or max_position
    if kind == "yarn" and fields.get("factor") is None:
        factor = max_position / original
    elif isinstance(fields.get("factor"), (int, float)):
        factor = fields["factor"]
    else:
        raise InputError(f"config.json: rope of type {kind!r} needs a factor")
    return Rope(
        theta=float(fields["rope_theta"]),
        kind=kind,
        factor=float(factor),
        low_freq_factor=float(fields.get("low_freq_factor", 1.0)),
        high_freq_factor=float(fields.get("high_freq_factor", 4.0)),
        original_max_position=int(original),
        beta_fast=float(fields.get("beta_fast") or 32.0),
        beta_slow=float(fields.get("beta_slow") or 1.0),
        attention_factor=fields.get("attention_factor"),
        mscale=fields.get("mscale"),
        mscale_all_dim=fields.get("mscale_all_dim"),
        truncate=bool(fields.get("truncate", True)),
    )


def _rope_fields(rope: Rope) -> dict[str, Any]:
    """What `_rope` reads."""
    by_kind = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": (
            "factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
        ),
    }  # fmt: skip
    values = {name: getattr(rope, name) for name in by_kind[rope.kind]}
    if rope.kind in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = rope.original_max_position
    kept = {name: value for name, value in values.items() if value is not None}
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **kept}
