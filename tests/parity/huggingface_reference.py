"""Runs a tiny model in transformers on torch CPU with our weights; needs torch and transformers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from jaxquant.models.config import ModelConfig
from jaxquant.models.families import block_names, outer_names


def huggingface_outputs(
    raw: dict[str, Any], config: ModelConfig, params: dict[str, Any], tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[B, T, V]` and hidden states before each block `[L, B, T, d]`, float32, eager attention."""
    import torch

    model = huggingface_model(raw, config, params)
    with torch.no_grad():
        output = model(torch.from_numpy(tokens).long(), output_hidden_states=True, use_cache=False)
    # The last hidden state of transformers is after the final norm: the blocks before it are enough.
    return output.logits.numpy(), np.stack([h.numpy() for h in output.hidden_states[:-1]])


def huggingface_model(raw: dict[str, Any], config: ModelConfig, params: dict[str, Any]) -> Any:
    """The model of a Hugging Face `config.json` with our weights, in float32, with eager attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = copy.deepcopy(raw)
    hf_config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager").float().eval()
    state = {
        name: _tensor(params[path], transpose) for path, (name, transpose) in outer_names(config).items()
    }
    for path, (suffix, transpose) in block_names(config).items():
        stacked = params["blocks"]
        for key in path.split("."):
            stacked = stacked[key]
        for layer in range(config.num_layers):
            state[f"model.layers.{layer}.{suffix}"] = _tensor(stacked[layer], transpose)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name == "lm_head.weight" and config.tie_embeddings for name in missing), missing
    model.tie_weights()
    return model


def _tensor(array: np.ndarray, transpose: bool) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array.T if transpose else array))
