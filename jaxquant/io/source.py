"""A model wherever it lies: the `Source` protocol, `open_model` and `load_params`."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from jaxquant.errors import InputError, UsageError
from jaxquant.models.config import ModelConfig

if TYPE_CHECKING:
    import tokenizers


class Source(Protocol):
    """A model that is read block by block; opening it reads headers only.

    `block(i)` is one block's parameters and `outer()` the rest (`embed`, `norm` and, unless tied, `head`):
    nested dictionaries of numpy arrays, kernels `[in, out]` (often transposed views), in the file's dtype.
    The tokenizer adds no special token on its own: `config.add_bos` says whether a text begins with
    `config.bos_id`. `chat_template` is the Jinja template of the model's chat format, if it has one.
    """

    name: str
    config: ModelConfig
    chat_template: str | None

    def fingerprint(self) -> str:
        """A cheap digest of the content: equal for equal models, wherever they lie."""
        ...

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The model's tokenizer."""
        ...

    def block(self, index: int) -> dict[str, Any]:
        """Parameters of block `index`."""
        ...

    def outer(self) -> dict[str, Any]:
        """Parameters outside the blocks."""
        ...


def open_model(spec: str) -> Source:
    """The model that `spec` names, opened for reading.

    Args:
      spec: a known name (see `jaxquant.io.names`), a Hugging Face directory, a `.gguf` file, or a hub id
        `owner/name` (needs the extra `hub` and, the first time, a connection).

    Raises:
      InputError: the model cannot be fetched, or its files are incomplete, damaged or of an unknown kind.
      UsageError: `spec` is none of these.
    """
    from jaxquant.io import names
    from jaxquant.io.gguf import GGUFSource
    from jaxquant.io.huggingface import HuggingFaceSource, fetch_from_hub

    path = names.fetch(spec) if spec in names.KNOWN else Path(spec).expanduser()
    if path.is_dir():
        return HuggingFaceSource(path, name=spec if spec in names.KNOWN else path.resolve().name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"{path}: a model file must be a .gguf file; for safetensors give the directory")
        return GGUFSource(path, name=spec if spec in names.KNOWN else path.stem)
    if path.suffix == ".gguf" or spec.startswith((".", "/", "~")):
        raise InputError(f"{spec}: no such file or directory")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        return HuggingFaceSource(fetch_from_hub(spec), name=spec)
    raise UsageError(
        f"{spec!r} is no model: give a known name ({', '.join(names.KNOWN)}), a directory with config.json "
        "and safetensors, a .gguf file, or a hub id such as owner/name"
    )


def load_params(source: Source, dtype: str | None = None) -> dict[str, Any]:
    """All parameters of `source`, blocks stacked on axis 0, as JAX arrays.

    Blocks are read one at a time into arrays allocated for the result, so the peak is the result and one
    block.

    Args:
      source: the model.
      dtype: float dtype of the result; `None` keeps that of the file.
    """
    # The outer tree first: its large embedding exists twice for a moment, when little else does.
    outer = source.outer()
    params = {name: adopt(_copy(outer.pop(name), dtype)) for name in list(outer)}
    layers = source.config.num_layers
    block = source.block(0)
    stacked = jax.tree.map(lambda leaf: aligned((layers, *leaf.shape), dtype or leaf.dtype), block)
    for index in range(layers):
        block = block if index == 0 else source.block(index)
        # With the ellipsis a scalar of each block is a view, too.
        jax.tree.map(lambda whole, leaf: fill(whole[index, ...], leaf), stacked, block)  # noqa: B023
    return {**params, "blocks": jax.tree.map(adopt, stacked)}


def _copy(leaf: np.ndarray, dtype: str | None) -> np.ndarray:
    out = aligned(leaf.shape, dtype or leaf.dtype)
    fill(out, leaf)
    return out


def fill(out: np.ndarray, leaf: np.ndarray) -> None:
    """Copies, with any cast."""
    np.copyto(out, leaf, casting="unsafe")


def adopt(leaf: np.ndarray) -> jax.Array:
    """`leaf` as a JAX array without a copy on CPU; nobody else may hold it."""
    return jax.device_put(leaf, may_alias=True)


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array whose address is a multiple of 64, as XLA on CPU needs it to share memory."""
    dtype = np.dtype(jax.numpy.dtype(dtype))
    size = prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
