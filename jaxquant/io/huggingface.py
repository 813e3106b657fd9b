"""Hugging Face model directories: config.json, safetensors (sharded or not) and tokenizer.json."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxquant.errors import InputError
from jaxquant.io.layout import fingerprint, read_config, read_tree
from jaxquant.models.config import ModelConfig
from jaxquant.models.families import block_names, outer_names

if TYPE_CHECKING:
    import tokenizers

# Where the language model lies in a file: alone, or inside a multimodal one as older and newer files have it.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_REFETCH = "it is damaged or its download was cut off: fetch it again"


class HuggingFaceSource:
    """The model in the Hugging Face directory `path` (see `jaxquant.io.Source`), in the dtype of its files.

    Weights come from `model.safetensors` or the shards of `model.safetensors.index.json`. A shard is mapped
    while one block is read from it, so a block is all that is in memory.

    Raises:
      InputError: a file is missing, damaged or inconsistent, or the architecture is not supported.
    """

    def __init__(self, path: Path, *, name: str):
        self.path, self.name = path, name
        if not (path / "config.json").is_file():
            raise InputError(
                f"{path}: no config.json; a model directory holds config.json, safetensors and tokenizer.json"
            )
        self._files = _locate(path)
        config = read_config(_read_json(path / "config.json"), place=str(path / "config.json"))
        self._prefix = next((p for p in _PREFIXES if f"{p}embed_tokens.weight" in self._files), _PREFIXES[0])
        self.config = _complete(config, path, self._files)
        self.chat_template = _chat_template(path)

    def fingerprint(self) -> str:
        """A cheap digest of the config, and of each file's name, size and edges."""
        extra = [path for path in [self.path / "tokenizer.json"] if path.is_file()]
        return fingerprint(self.config, [*set(self._files.values()), *extra])

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer of tokenizer.json, adding no special tokens; `InputError` if missing or damaged."""
        from tokenizers import Tokenizer

        path = self.path / "tokenizer.json"
        if not path.is_file():
            raise InputError(
                f"{path}: missing; write it with transformers: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise InputError(f"{path}: cannot be read ({error}); {_REFETCH}") from error
        # The caller decides about bos, windows and padding.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        return tokenizer

    def block(self, index: int) -> dict[str, Any]:
        """Parameters of block `index`; `InputError` if a tensor is missing, misshaped or damaged."""
        return self._read(
            {
                path: (f"{self._prefix}layers.{index}.{suffix}", transpose)
                for path, (suffix, transpose) in block_names(self.config).items()
            }
        )

    def outer(self) -> dict[str, Any]:
        """Embedding, final norm and, unless tied, head; `InputError` as in `block`."""
        names = outer_names(self.config)
        return self._read(
            {path: (_renamed(name, self._prefix), transpose) for path, (name, transpose) in names.items()}
        )

    def _read(self, names: dict[str, tuple[str, bool]]) -> dict[str, Any]:
        wanted = defaultdict(list)
        for name, _ in names.values():
            if name not in self._files:
                raise InputError(
                    f"{self.path}: tensor {name} is missing; the weights do not belong to this config.json"
                )
            wanted[self._files[name]].append(name)
        loaded: dict[str, np.ndarray] = {}
        for path, group in wanted.items():
            loaded |= _tensors(path, group)

        def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
            value = loaded.pop(name)
            if value.shape != shape:
                raise InputError(
                    f"{self._files[name]}: tensor {name} has shape {value.shape}, but config.json implies "
                    f"{shape}; the two do not belong together"
                )
            return value

        return read_tree(self.config, names, read)


def fetch_from_hub(repository: str) -> Path:
    """The local snapshot of the hub model `repository` (`owner/name`), fetched if it is not cached.

    Raises:
      InputError: the extra `hub` is not installed, there is no connection, or no such model.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{repository}: reading from the hub needs an extra: pip install 'jaxquant[hub]'; "
            "or give a local directory"
        ) from None
    patterns = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # many kinds: connection, authorization, no such repository
        raise InputError(
            f"{repository}: cannot be fetched from the hub ({error}); check the name, the connection and "
            "your access rights, or give a local directory"
        ) from error


def _renamed(name: str, prefix: str) -> str:
    """Full tensor name in a file whose language model lies under `prefix`."""
    if name.startswith("model."):
        return prefix + name.removeprefix("model.")
    return f"language_model.{name}" if prefix == "language_model.model." else name


def _locate(path: Path) -> dict[str, Path]:
    """Tensor name -> file; every file's header is checked against its size here."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(_header_names(single), single)
    if not index.is_file():
        raise InputError(
            f"{path}: neither model.safetensors nor model.safetensors.index.json; "
            "convert the weights to safetensors"
        )
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise InputError(f"{index}: no weight_map; {_REFETCH}")
    held: dict[str, set[str]] = {}
    for shard in sorted(set(where.values())):
        if not (path / shard).is_file():
            raise InputError(
                f"{path / shard}: missing, though {index.name} points to it; fetch the remaining shards"
            )
        held[shard] = set(_header_names(path / shard))
    for name, shard in where.items():
        if name not in held[shard]:
            raise InputError(
                f"{path / shard}: tensor {name} is missing, though {index.name} points to it; {_REFETCH}"
            )
    return {name: path / shard for name, shard in where.items()}


def _header_names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error}); {_REFETCH}") from error


def _tensors(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """The tensors `names` of one file, which is mapped only meanwhile: so its pages do not pile up."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            for name in names:
                kind = file.get_slice(name).get_dtype()
                if kind not in ("F32", "F16", "BF16"):
                    raise InputError(
                        f"{path}: tensor {name} is {kind}; weights must be F32, F16 or BF16 "
                        "(an already quantized model cannot be read)"
                    )
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        message = f"{path}: cannot read {names[0]} and its neighbours ({error}); {_REFETCH}"
        raise InputError(message) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); {_REFETCH}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; {_REFETCH}")
    return content


def _optional_json(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _complete(config: ModelConfig, path: Path, files: dict[str, Path]) -> ModelConfig:
    """What config.json leaves to other files: eos ids, bos, and a head that is tied by absence."""
    eos = _optional_json(path / "generation_config.json").get("eos_token_id")
    extra = eos if isinstance(eos, list) else [] if eos is None else [eos]
    has_head = any(name.endswith("lm_head.weight") for name in files)
    return dataclasses.replace(
        config,
        eos_ids=tuple(dict.fromkeys([*config.eos_ids, *extra])),
        add_bos=_adds_bos(config, path),
        tie_embeddings=config.tie_embeddings or not has_head,
    )


def _adds_bos(config: ModelConfig, path: Path) -> bool:
    """As tokenizer_config.json declares, else whether tokenizer.json's post-processor puts bos first."""
    declared = _optional_json(path / "tokenizer_config.json").get("add_bos_token")
    if declared is not None:
        return bool(declared) and config.bos_id is not None
    steps = _optional_json(path / "tokenizer.json").get("post_processor") or {}
    for step in steps.get("processors", [steps]):
        if step.get("type") == "TemplateProcessing":
            first = (step.get("single") or [{}])[0].get("SpecialToken", {}).get("id")
            ids = step.get("special_tokens", {}).get(first, {}).get("ids", [])
            return config.bos_id is not None and config.bos_id in ids
    return config.add_bos


def _chat_template(path: Path) -> str | None:
    alone = path / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8")
    template = _optional_json(path / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        # Several named templates: the one for plain chat.
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template
