"""Models in GGUF files: metadata read as a configuration, blocks de-quantized one at a time to float32."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxquant.errors import InputError
from jaxquant.io import tokenizer as gguf_tokenizer
from jaxquant.io.gguf_file import GGUFFile
from jaxquant.io.layout import fingerprint, read_config, read_tree
from jaxquant.models.config import ModelConfig
from jaxquant.models.families import block_names, outer_names

if TYPE_CHECKING:
    import tokenizers

# `general.architecture` -> `model_type`. Mistral and SmolLM2 are converted as llama.
_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}

_BLOCK = {
    "attn_norm": "attn_norm",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_post_norm": "post_ffw_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
_OUTER = {"embed": "token_embd", "norm": "output_norm", "head": "output"}


class GGUFSource:
    """The model in the GGUF file at `path` (see `jaxquant.io.Source`); all parameters are float32.

    Llama files keep the rows of q and k in the order of adjacent rotation pairs; they are brought back to
    the half-split order of the decoder. Gemma files keep `1 + weight` for every norm, so their config has
    `norm_plus_one=False`.

    Raises:
      InputError: a damaged file, or an architecture or feature that the decoder does not have.
    """

    def __init__(self, path: Path, *, name: str):
        self.path, self.name = path, name
        self._file = GGUFFile(path)
        self.config = _config(self._file)
        self.chat_template: str | None = self._file.metadata.get("tokenizer.chat_template")

    def fingerprint(self) -> str:
        """A cheap digest of the config and of the file's size and edges."""
        return fingerprint(self.config, [self.path])

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer in the metadata; `InputError` if there is none or its kind is unknown."""
        return gguf_tokenizer.from_metadata(self._file.metadata, place=str(self.path))

    def block(self, index: int) -> dict[str, Any]:
        """Parameters of block `index`; `InputError` if a tensor is missing or misshaped."""
        names = {
            path: (f"blk.{index}.{_tensor_name(_BLOCK, path)}", transpose)
            for path, (_, transpose) in block_names(self.config).items()
        }
        return read_tree(self.config, names, self._read)

    def outer(self) -> dict[str, Any]:
        """Embedding, final norm and, unless tied, head; `InputError` as in `block`."""
        names = {
            path: (_tensor_name(_OUTER, path), transpose)
            for path, (_, transpose) in outer_names(self.config).items()
        }
        return read_tree(self.config, names, self._read)

    def _read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        value = self._file.tensor(name, shape)
        if self.config.family == "llama" and name.split(".")[-2] in ("attn_q", "attn_k"):
            # Row (head, i, half) of the file is row (head, half, i) of the decoder.
            pairs = value.reshape(-1, self.config.head_dim // 2, 2, *shape[1:])
            return pairs.swapaxes(1, 2).reshape(shape)
        return value


def _tensor_name(table: dict[str, str], path: str) -> str:
    stem, _, kind = path.rpartition(".")
    return f"{table[stem]}.bias" if kind == "bias" else f"{table[stem if kind == 'kernel' else path]}.weight"


def _config(file: GGUFFile) -> ModelConfig:
    """Metadata as the fields of a Hugging Face config, read by `from_hf`, then what only GGUF knows."""
    meta, place = file.metadata, file.path
    architecture = str(meta.get("general.architecture"))
    if architecture not in _ARCHITECTURES:
        raise InputError(
            f"{place}: architecture {architecture!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    if meta.get("split.count", 1) > 1:
        raise InputError(
            f"{place}: one of {meta['split.count']} parts of a model; merge them into one file first"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(
            f"{place}: tensor token_embd.weight is missing; the file is no complete language model"
        )

    def get(key: str, default: Any = None) -> Any:
        return meta.get(f"{architecture}.{key}", default)

    def number(key: str, default: Any = None) -> Any:
        value = get(key, default)
        if not isinstance(value, (int, float)) or value <= 0:
            raise InputError(
                f"{place}: metadata {architecture}.{key} is {value!r}, but one positive number is required; "
                "the file is damaged or describes a model with unequal layers"
            )
        return value

    heads, hidden, layers = number("attention.head_count"), number("embedding_length"), number("block_count")
    head_dim = number("attention.key_length", get("rope.dimension_count", hidden // heads))
    raw = {
        "model_type": _ARCHITECTURES[architecture],
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": number("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "num_experts": get("expert_count"),
        "attn_logit_softcapping": get("attn_logit_softcapping"),
        "final_logit_softcapping": get("final_logit_softcapping"),
        **_rope_fields(file, get),
    }
    if architecture == "gemma3":
        raw |= _gemma_fields(get, heads=heads, hidden=hidden, layers=layers, head_dim=head_dim)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise InputError(
            f"{place}: only part of each head is rotated (rope.dimension_count), which is not supported"
        )
    config = read_config(raw, place=str(place))
    # HF's `attention_bias` is all or nothing; the tensors say which linears have one.
    present = {part: f"blk.0.{tensor}.bias" in file.tensors for part, tensor in _BLOCK.items()}
    ends = ("eos_token_id", "eot_token_id", "eom_token_id")
    eos = (meta.get(f"tokenizer.ggml.{name}") for name in ends)
    return dataclasses.replace(
        config,
        qkv_bias=present["attn.q"],
        o_bias=present["attn.o"],
        mlp_bias=present["mlp.up"],
        norm_plus_one=False,
        add_bos=gguf_tokenizer.adds_bos(meta),
        eos_ids=tuple(dict.fromkeys(index for index in eos if index is not None)),
        dtype="float32",
    )


def _gemma_fields(get: Any, *, heads: int, hidden: int, layers: int, head_dim: int) -> dict[str, Any]:
    window = get("attention.sliding_window")
    pattern = get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, int):
        pattern = [bool((layer + 1) % pattern) for layer in range(layers)]
    return {
        "sliding_window": window,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern],
        "rope_local_base_freq": get("rope.freq_base_swa", 10_000.0),
        # The format has no field for it: the 27B model (62 layers) alone scales by hidden / heads.
        "query_pre_attn_scalar": hidden // heads if layers == 62 else head_dim,
    }


def _rope_fields(file: GGUFFile, get: Any) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of the Hugging Face config."""
    theta = get("rope.freq_base", 10_000.0)
    kind = get("rope.scaling.type", "none")
    factor, original = get("rope.scaling.factor", 1.0), get("rope.scaling.original_context_length")
    fields: dict[str, Any] = {"rope_theta": theta}
    if kind == "linear" or (kind == "none" and factor not in (0.0, 1.0)):
        fields["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        attention = get("rope.scaling.yarn_attn_factor") or get("rope.scaling.attn_factor") or 1.0
        scaled = None if attention == 1.0 else attention * (1.0 + 0.1 * math.log(factor))
        fields["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": get("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": get("rope.scaling.yarn_beta_slow", 1.0),
            "attention_factor": scaled,
        }
    elif kind != "none":
        raise InputError(
            f"{file.path}: rope scaling of type {kind!r} is not supported; linear, yarn and llama3 are"
        )
    if "rope_freqs.weight" in file.tensors:
        fields["rope_scaling"] = _llama3_scaling(file, theta, original)
    return fields


def _llama3_scaling(file: GGUFFile, theta: float, original: int | None) -> dict[str, Any] | None:
    """Parameters of Llama 3's scaling, recovered from the divisors of the frequencies that the file holds.

    With `r = original / wavelength`, the divisor is 1 for `r > 4`, `factor` for `r < 1`, and between them the
    inverse of the interpolation of `1 / factor` and 1. The file states the result only, so the parameters
    are those of every published model, tried over powers of two for `original`, and must reproduce it.
    """
    half = file.tensors["rope_freqs.weight"].shape[0]
    divisors = file.tensor("rope_freqs.weight", (half,)).astype(np.float64)
    if np.allclose(divisors, 1.0):
        return None
    factor = float(divisors.max())
    turns = theta ** (-np.arange(half) / half) / (2 * np.pi)
    for context in [original] if original else [2**power for power in range(3, 21)]:
        smooth = np.clip((context * turns - 1.0) / 3.0, 0.0, 1.0)
        if np.allclose(1.0 / ((1.0 - smooth) / factor + smooth), divisors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }
    raise InputError(
        f"{file.path}: rope_freqs.weight is not the Llama 3 scaling (low 1, high 4), the only one supported"
    )
