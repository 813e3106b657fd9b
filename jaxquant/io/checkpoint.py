"""Quantized models on disk: a folder of orbax checkpoints, one a block, with everything to use them.

    FOLDER/
      jaxquant.json    format version, model config, recipe, source, calibration, state and summary of the run
      tokenizer.json
      outer/           orbax: embedding, final norm, head
      blocks/000/ ...  orbax: packed weights of one block (`params`), grids and shapes (`linears`), log rows
      report.html, rows.jsonl

A block's folder appears in one rename when all of it is written, so a run killed at any moment leaves whole
blocks and nothing else that counts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.errors import InputError, UsageError
from jaxquant.io.source import adopt, aligned, fill
from jaxquant.models.config import LINEARS, ModelConfig
from jaxquant.quant import Grid, MixedQArray, Packed, QArray, QStack, is_packed, unpaired
from jaxquant.quant.mixed import layout

MANIFEST = "jaxquant.json"
FORMAT = 1
_PARTIAL = ".partial"
_ENTRIES = ("source", "recipe", "calibration", "config", "versions", "state")
_LEAVES = ("words", "scale", "zero", "order")
PATHS = tuple(path for _, paths in LINEARS for path in paths)


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a quantized model of ours, complete or not."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`.

    Raises:
      InputError: there is none, or it is damaged or of an unknown format version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder}: no {MANIFEST}; this is not a quantized model") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); quantize the model again") from None
    if not isinstance(manifest, dict):
        raise InputError(f"{path} is damaged (not a JSON object); quantize the model again")
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{path}: format {manifest.get('format')!r}, this version reads {FORMAT}; use a matching jaxquant"
        )
    missing = [entry for entry in _ENTRIES if entry not in manifest]
    if missing:
        raise InputError(f"{path} is damaged (no {', '.join(missing)}); quantize the model again")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replaces the manifest in one step."""
    write_text(folder / MANIFEST, json.dumps({"format": FORMAT, **manifest}, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all; makes its folder where there is none."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file that appears whole or not at all; makes its folder where there is none."""
    partial = path.with_name(path.name + _PARTIAL)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)


def save_outer(folder: Path, outer: Mapping[str, Any]) -> None:
    """Writes the parameters outside the blocks, once."""
    save_tree(folder / "outer", params=_numpy(dict(outer)))


def save_block(folder: Path, index: int, params: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Writes one block: packed kernels are stored by their leaves, the rest as it is.

    `record` is JSON kept with the block (log rows); grids and shapes of packed linears are added to it.
    """
    linears = {}
    stored = jax.tree.map(lambda leaf: leaf, unpaired(dict(params)), is_leaf=is_packed)
    for path in PATHS:
        part, name = path.split(".")
        kernel = stored[part][name]["kernel"]
        if is_packed(kernel):
            stored[part][name]["kernel"], linears[path] = _taken_apart(kernel)
    save_tree(_block_folder(folder, index), params=_numpy(stored), record={**record, "linears": linears})


def load_block(folder: Path, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(params, record)` of one block as `save_block` got them, leaves as numpy arrays."""
    items = load_tree(_block_folder(folder, index))
    params, record = items["params"], items["record"]
    for path, static in record["linears"].items():
        part, name = path.split(".")
        params[part][name]["kernel"] = _put_together(params[part][name]["kernel"], static)
    return params, record


def load_outer(folder: Path) -> dict[str, Any]:
    """The parameters outside the blocks as numpy arrays."""
    return load_tree(folder / "outer")["params"]


def finished_blocks(folder: Path) -> int:
    """Number of leading blocks that are whole on disk."""
    count = 0
    while _block_folder(folder, count).is_dir():
        count += 1
    return count


def finished_config(folder: Path) -> ModelConfig:
    """The config of a quantized model of which all blocks are there.

    Raises:
      InputError: the run that wrote it is unfinished.
    """
    manifest = read_manifest(folder)
    config, done = ModelConfig.from_dict(manifest["config"]), finished_blocks(folder)
    if manifest["state"] != "complete" or done != config.num_layers:
        raise InputError(
            f"{folder}: only {done} of {config.num_layers} blocks are quantized; finish the run with --resume"
        )
    return config


def remove_partial(folder: Path) -> None:
    """Deletes what an interrupted save left behind."""
    for leftover in [*folder.glob("*.orbax-checkpoint-tmp*"), *folder.glob("blocks/*.orbax-checkpoint-tmp*")]:
        shutil.rmtree(leftover)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """`(params, config)` of a finished quantized model, blocks stacked on axis 0, bit for bit as saved.

    A kernel whose grid is not the same in all blocks is a `QStack`.

    Raises:
      InputError: the run that wrote it is unfinished, or blocks are missing or damaged.
    """
    config = finished_config(folder)
    outer = jax.tree.map(jnp.asarray, load_outer(folder))
    layers = config.num_layers
    first, tree = _leaves(folder, 0)
    # Blocks are read into the result, so that there is never much more than it.
    stacks: list[Any] = [jax.tree.map(lambda a: aligned((layers, *a.shape), a.dtype), leaf) for leaf in first]
    layouts = [layout(leaf) for leaf in first]
    for index in range(layers):
        leaves, own_tree = (first, tree) if index == 0 else _leaves(folder, index)
        if own_tree != tree:
            raise InputError(f"{folder}: blocks differ in their parameters and cannot be stacked")
        for place, leaf in enumerate(leaves):
            stack = stacks[place]
            if not isinstance(stack, list) and layout(leaf) != layouts[place]:
                stack = stacks[place] = [_layer(stack, before) for before in range(index)]
            if isinstance(stack, list):
                stack.append(leaf)
            else:
                jax.tree.map(lambda whole, own: fill(whole[index, ...], own), stack, leaf)  # noqa: B023
    blocks = jax.tree.unflatten(tree, [_stacked(folder, stack) for stack in stacks])
    return {**outer, "blocks": blocks}, config


def disk_bytes(folder: Path) -> int:
    """Bytes of all parameter files below `folder`."""
    files = [*folder.glob("outer/**/*"), *folder.glob("blocks/**/*")]
    return sum(path.stat().st_size for path in files if path.is_file())


def save_tree(path: Path, *, params: Any, record: Any = None) -> None:
    """Writes a pytree of arrays, and JSON beside it, into a folder that appears whole or not at all."""
    import orbax.checkpoint as ocp

    items: dict[str, Any] = {"params": ocp.args.PyTreeSave(params)}
    if record is not None:
        items["record"] = ocp.args.JsonSave(record)
    with _writing(path), _checkpointer() as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.Composite(**items))


def load_tree(path: Path) -> Any:
    """What `save_tree` wrote, `{"params": ..., "record": ...}`, leaves as numpy arrays.

    Raises:
      InputError: it is missing or damaged.
    """
    if not path.is_dir():
        raise InputError(f"{path} is missing; finish the run with --resume, or quantize the model again")
    try:
        with _checkpointer() as checkpointer:
            items = checkpointer.restore(path.absolute())
        if "params" not in items:
            raise ValueError("no parameters in it")
        return items
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path} cannot be read ({reason}); delete it and run again with --resume, or quantize again"
        ) from error


def _block_folder(folder: Path, index: int) -> Path:
    return folder / "blocks" / f"{index:03d}"


def _taken_apart(kernel: Packed) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and static facts of a packed kernel."""
    if isinstance(kernel, MixedQArray):
        arrays, facts = zip(*map(_taken_apart, kernel.parts), strict=True)
        return {"order": kernel.order, **{str(i): own for i, own in enumerate(arrays)}}, {"parts": facts}
    leaves = {leaf: getattr(kernel, leaf) for leaf in _LEAVES}
    arrays = {name: array for name, array in leaves.items() if array is not None}
    return arrays, {"grid": kernel.grid.to_dict(), "shape": list(kernel.shape)}


def _put_together(arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> Any:
    """`_taken_apart` undone."""
    if "parts" in facts:
        parts = (_put_together(arrays[str(i)], own) for i, own in enumerate(facts["parts"]))
        return MixedQArray(parts=tuple(parts), order=arrays["order"])
    leaves: dict[str, Any] = {leaf: arrays.get(leaf) for leaf in _LEAVES}
    return QArray(**leaves, grid=Grid(**facts["grid"]), shape=(facts["shape"][0], facts["shape"][1]))


def _leaves(folder: Path, index: int) -> tuple[list[Any], Any]:
    return jax.tree.flatten(load_block(folder, index)[0], is_leaf=is_packed)


def _layer(stack: Any, index: int) -> Any:
    return jax.tree.map(lambda whole: whole[index, ...].copy(), stack)


def _stacked(folder: Path, stack: Any) -> Any:
    """Equal leaves of all blocks as they are; packed kernels that differ as a `QStack`."""
    if not isinstance(stack, list):
        return jax.tree.map(adopt, stack)
    if not any(map(is_packed, stack)):
        raise InputError(f"{folder}: parameters of the blocks differ in shape or dtype and cannot be stacked")
    return QStack.of(stack)


def _numpy(tree: Any) -> Any:
    # numpy leaves keep orbax from storing (and later asking for) the sharding of this machine.
    return jax.tree.map(np.asarray, tree)


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # Without compression the bytes on disk are those that the grids promise, whatever the weights are.
    params = ocp.PyTreeCheckpointHandler(use_compression=False)
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(params=params, record=ocp.JsonCheckpointHandler()))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into an `InputError`; orbax hides the cause in other types."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error) or "Disk quota exceeded" in str(error):
            raise InputError(
                f"{path}: the disk is full; free some space and run the same command again with --resume "
                "(whole blocks are kept)"
            ) from error
        if isinstance(error, OSError):
            raise InputError(
                f"{path}: cannot be written ({error.strerror or error}); "
                "check its permissions, or give another --out"
            ) from error
        raise


def check_new_folder(folder: Path) -> None:
    """`UsageError` unless `folder` does not exist yet, is empty, or holds a manifest's first bytes only."""
    if folder.is_dir() and all(path.name == MANIFEST + _PARTIAL for path in folder.iterdir()):
        return
    if is_checkpoint(folder):
        raise UsageError(
            f"{folder} holds a quantized model; give --resume to go on with it, or another --out"
        )
    if folder.exists():
        state = "exists and is not empty" if folder.is_dir() else "is a file"
        raise UsageError(f"{folder} {state}; give another --out")
