"""From named tensors of a file to the parameter tree, and what the kinds of sources have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxquant.errors import InputError
from jaxquant.models.config import ModelConfig
from jaxquant.models.families import from_hf

_EDGE = 1 << 20


def read_config(raw: dict[str, Any], *, place: str) -> ModelConfig:
    """`from_hf(raw)`, whose complaints name the file at `place`."""
    try:
        return from_hf(raw)
    except InputError as error:
        raise InputError(f"{place}: {str(error).removeprefix('config.json: ')}") from None


def leaf_shape(config: ModelConfig, path: str) -> tuple[int, ...]:
    """Shape of what lies at the dotted `path` of a block or of the outer tree, kernels as `[in, out]`."""
    if path == "embed":
        return config.vocab_size, config.hidden_size
    if path == "head":
        return config.hidden_size, config.vocab_size
    if path.endswith(".kernel"):
        return config.linear_shape(path.removesuffix(".kernel"))
    if path.endswith(".bias"):
        return config.linear_shape(path.removesuffix(".bias"))[1:]
    return (config.head_dim,) if path in ("attn.q_norm", "attn.k_norm") else (config.hidden_size,)


def read_tree(
    config: ModelConfig,
    names: dict[str, tuple[str, bool]],
    read: Callable[[str, tuple[int, ...]], np.ndarray],
) -> dict[str, Any]:
    """The nested tree of `names` (`{path: (tensor name, transpose)}`).

    `read(name, shape)` gives a tensor as it lies in the file. This is the one place where `[out, in]` of
    files becomes `[in, out]`; transposed leaves are views.
    """
    tree: dict[str, Any] = {}
    for path, (name, transpose) in names.items():
        shape = leaf_shape(config, path)
        value = read(name, shape[::-1]).T if transpose else read(name, shape)
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def fingerprint(config: ModelConfig, files: Iterable[Path]) -> str:
    """sha256 over the config and, per file, its name, size, first and last MiB.

    It tells models apart without reading them: a change of the weights moves the header, the size or, as
    trained models differ everywhere, the edges.
    """
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(size - _EDGE, 0))
            digest.update(file.read(_EDGE))
    return digest.hexdigest()
