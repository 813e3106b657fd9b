"""The folder of a run: begun, checked and resumed alike, whether a model is quantized or trained into it."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.errors import InputError, UsageError
from jaxquant.io import checkpoint
from jaxquant.io.source import Source
from jaxquant.quant import is_packed
from jaxquant.recipe import Recipe, to_toml
from jaxquant.records import Event

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Small and read by every query: not rounded on the way to the disk.
_KEY_OPERATIONS = ("key_rotation", "key_shift")

# Parts of a manifest that must be those of the run that is resumed: what to do where they are not.
_IDENTITY = {
    "source": "give the model it was started with",
    "recipe": "give the same recipe, bits, group size and flags",
    "calibration": "give the same text, samples, seqlen and seed",
    "training": "give the same options of training",
}


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    import platform
    from importlib.metadata import version

    packages = ("jaxquant", "jax", "jaxlib", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def token_facts(tokens: np.ndarray, describe: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest keeps of windows int32 `[samples, seqlen]`: their digest, their shape, `describe`."""
    return {
        "tokens_sha256": hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes()).hexdigest(),
        "samples": int(tokens.shape[0]),
        "seqlen": int(tokens.shape[1]),
        **describe,
    }


def open_run(
    folder: Path,
    manifest: Mapping[str, Any],
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    output_bytes: int,
    resume: bool,
) -> int:
    """Makes the folder of a run, or with `resume` checks that it is that of this one.

    Args:
      folder: must not exist, or be empty, unless `resume`.
      manifest: what is kept of the run; of its parts those in `_IDENTITY` tell one run from another.
      recipe, tokenizer: written beside it.
      output_bytes: what the disk must have room for.
      resume: whether a run in the folder goes on.

    Returns:
      The number of blocks that are already done.

    Raises:
      UsageError: the folder is in use, or `resume` meets another run.
      InputError: the disk is too full.
    """
    if resume and checkpoint.is_checkpoint(folder):
        previous = checkpoint.read_manifest(folder)
        for key, remedy in _IDENTITY.items():
            if difference := _difference(previous.get(key, {}), manifest.get(key, {})):
                raise UsageError(
                    f"{folder} was started with another {key}: {difference}; {remedy}, or another --out"
                )
        checkpoint.remove_partial(folder)
    else:
        checkpoint.check_new_folder(folder)
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < 1.1 * output_bytes:
            raise InputError(
                f"{folder}: the quantized model needs {output_bytes / 1e6:.0f} MB, "
                f"the disk has {free / 1e6:.0f} MB free; free some space or give another --out"
            )
        # First of all: with a manifest the folder can be resumed, whatever else is missing.
        checkpoint.write_manifest(folder, manifest)
    (folder / "blocks").mkdir(exist_ok=True)
    if not (folder / "recipe.toml").is_file():
        checkpoint.write_text(folder / "recipe.toml", to_toml(recipe))
    if not (folder / "tokenizer.json").is_file():
        checkpoint.write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    return checkpoint.finished_blocks(folder)


def kept_gradients(
    source: Source,
    tokens: np.ndarray,
    on_event: Callable[[Event], None],
    measure: Callable[..., list[dict[str, np.ndarray]]],
    path: Path,
) -> dict[str, np.ndarray]:
    """What `measure` finds, blocks stacked on axis 0, kept at `path` so that a resumed run finds the same.

    Args:
      source, tokens: what `measure` is given; see `calibrate.fisher`.
      on_event: called with `{"event": "gradient", "done", "total"}`.
      measure: `fisher_weights` or `output_moments`.
      path: an .npz file, read where there is one.
    """
    if not path.is_file():

        def on_block(done: int, total: int) -> None:
            on_event({"event": "gradient", "done": done, "total": total})

        found = measure(source, tokens, on_block=on_block)
        stacked = {name: np.stack([block[name] for block in found]) for name in found[0]}
        buffer = io.BytesIO()
        np.savez(buffer, **stacked)  # pyright: ignore[reportArgumentType]
        checkpoint.write_bytes(path, buffer.getvalue())
    with np.load(path) as stored:
        return dict(stored)


def storable(tree: Any) -> Any:
    """Parameters, unquantized matrices in 16 bits: bfloat16 if they come so, else float16 where values fit.

    What is done to keys at run time, a matrix a head, stays as it is.
    """
    largest = float(jnp.finfo(jnp.float16).max)

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        if is_packed(leaf) or path[-1].key in _KEY_OPERATIONS:
            return leaf
        if leaf.ndim < 2 or leaf.dtype == jnp.bfloat16:
            return leaf
        return leaf.astype(jnp.float16) if abs(leaf).max() <= largest else leaf

    return jax.tree_util.tree_map_with_path(cast, tree, is_leaf=is_packed)


# What something is called may change between runs; digests tell whether it is the same.
_LABELS = ("name", "text")
_DIGESTS = ("fingerprint", "tokens_sha256")


def _difference(old: Event, new: Event) -> str:
    """In words, what differs between two parts of manifests; empty where nothing that matters does."""
    before, after = _flat(old), _flat(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if all(key.rpartition(".")[2] in _LABELS for key in keys):
        return ""
    told = [key for key in keys if key.rpartition(".")[2] not in _DIGESTS]
    return ", ".join(f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in told or keys)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, (dict, list)):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for key, x in items for k, v in _flat(x, f"{prefix}.{key}" if prefix else str(key)).items()}
