"""Writes models as Hugging Face directories and GGUF files, independently of the readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxquant.models.config import ModelConfig
from jaxquant.models.families import block_names, from_hf, outer_names

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

GGUF_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Gemma has two norms more, and the name of one of them means another place than in the other families.
GEMMA_NAMES = GGUF_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def state_dict(config: ModelConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Tensors by Hugging Face name, kernels as [out, in]."""
    state = {}
    for path, (name, transpose) in outer_names(config).items():
        state[name] = params[path].T if transpose else params[path]
    for path, (suffix, transpose) in block_names(config).items():
        stacked = params["blocks"]
        for key in path.split("."):
            stacked = stacked[key]
        for layer, leaf in enumerate(stacked):
            state[f"model.layers.{layer}.{suffix}"] = leaf.T if transpose else leaf
    return {name: np.ascontiguousarray(value) for name, value in state.items()}


def write_huggingface(
    folder: Path, raw: dict[str, Any], params: dict[str, Any], *, dtype: str = "float32", shards: int = 1
) -> dict[str, np.ndarray]:
    """A model directory without tokenizer; returns the tensors as written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**raw, "dtype": dtype}))
    state = {name: value.astype(DTYPES[dtype]) for name, value in state_dict(from_hf(raw), params).items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return state
    where = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(state.items())[shard::shards])
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return state


def adjacent_pairs(value: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k in the order of adjacent rotation pairs: within a head 0, h/2, 1, h/2 + 1, ..."""
    order = [
        head * head_dim + half * (head_dim // 2) + pair
        for head in range(len(value) // head_dim)
        for pair in range(head_dim // 2)
        for half in (0, 1)
    ]
    return value[order]


def write_gguf(
    path: Path,
    raw: dict[str, Any],
    params: dict[str, Any],
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    rope_divisors: np.ndarray | None = None,
    extra: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """A GGUF model file as the usual converter lays it out; returns the float32 tensors that it means.

    `extra` holds further metadata (its keys are added as they are), `drop` leaves tensors out.
    """
    config = from_hf(raw)
    architecture = GGUF_ARCHITECTURES[config.family]
    gemma = architecture == "gemma3"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    add_metadata(writer, extra or {})
    written = {}
    state = state_dict(config, params)
    if rope_divisors is not None:
        state["rope_freqs.weight"] = rope_divisors.astype(np.float32)
    for name, value in state.items():
        target = gguf_name(name, GEMMA_NAMES if gemma else GGUF_NAMES)
        if gemma and name.endswith("norm.weight"):
            value = value + np.float32(1)
        stored = value
        if architecture == "llama" and target.split(".")[-2] in ("attn_q", "attn_k"):
            stored = adjacent_pairs(value, config.head_dim)
        matrix = value.ndim == 2
        this_kind = kind if matrix else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(stored, this_kind)
        written[name] = value
        if this_kind != gguf.GGMLQuantizationType.F32:
            seen = gguf.dequantize(packed, this_kind)
            if stored is not value:
                seen = seen[np.argsort(adjacent_pairs(np.arange(len(value)), config.head_dim))]
            written[name] = seen
        if target not in drop:
            writer.add_tensor(target, packed, raw_dtype=this_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def gguf_name(name: str, table: dict[str, str]) -> str:
    """GGUF name of a Hugging Face tensor."""
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if not name.startswith("model.layers."):
        return outer.get(name, name)
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    stem, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{table[stem]}.{kind}"


def add_metadata(writer: gguf.GGUFWriter, fields: dict[str, Any]) -> None:
    """Metadata by Python type: int as uint32, float as float32."""
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def assert_params_equal(config: ModelConfig, params: dict[str, Any], state: dict[str, np.ndarray]) -> None:
    """The loaded, stacked `params` hold exactly the tensors of `state` (lm_head aside if tied)."""
    numpy_params = {
        "blocks": _to_numpy(params["blocks"]),
        **{name: np.asarray(leaf) for name, leaf in params.items() if name != "blocks"},
    }
    loaded = state_dict(config, numpy_params)
    expected = {name for name in state if name != "rope_freqs.weight"}
    assert set(loaded) == expected - ({"lm_head.weight"} if config.tie_embeddings else set())
    for name, value in loaded.items():
        assert value.dtype == state[name].dtype, name
        np.testing.assert_array_equal(value.astype(np.float32), state[name].astype(np.float32), err_msg=name)


def _to_numpy(tree: Any) -> Any:
    return {k: _to_numpy(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree)
