"""The format compressed-tensors, `pack-quantized`, which vLLM and transformers load."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxquant.errors import InputError, UsageError
from jaxquant.io import checkpoint
from jaxquant.models.config import EXACT, ModelConfig
from jaxquant.models.families import Dtype, block_names, outer_names, to_hf
from jaxquant.quant import Grid, MixedQArray, QArray, is_packed

_SHARD_BYTES = 4 << 30


def export_compressed_tensors(
    folder: Path,
    target: Path,
    *,
    dtype: Dtype = "float16",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes the finished quantized model in `folder` as a Hugging Face directory `target`.

    Codes and integer zeros are stored as they are, in a dense stream of bits; the engine computes
    `scale (code - zero)` in the dtype of the scales, `dtype`. Of a model whose linears differ in bits, every
    grid is a group of its own that lists its linears. `target` appears whole or not at all.

    Args:
      dtype: of scales, of what is not quantized, and of the activations in the other engine. `"float16"` has
        the scales exactly; `"bfloat16"` rounds them to 8 bits, for models whose activations exceed 65504.
      progress: called after every block with the numbers of blocks done and in total.

    Returns:
      `{"path", "bytes", "schemes": {words of a grid: number of linears}}`.

    Raises:
      InputError: the folder is unfinished or damaged, or holds what the format cannot say: quantized
        activations or caches, run-time rotations, bits by group, dynamic groups, fractional zeros; names the
        linear.
      UsageError: `target` exists, or an unknown dtype.
    """
    if dtype not in get_args(Dtype):
        raise UsageError(f"unknown dtype {dtype!r}; use {', '.join(get_args(Dtype))}")
    if target.exists():
        raise UsageError(f"{target} exists; give another --out")
    config = checkpoint.finished_config(folder)
    if config.precision != EXACT:
        raise InputError(
            f"{folder} quantizes or rotates activations or the cache at run time, which the format cannot "
            "say; export a model whose weights alone are quantized"
        )
    described = to_hf(config, dtype)
    grids: dict[Grid, list[str]] = defaultdict(list)
    dense: list[str] = []

    def tensors() -> Iterator[dict[str, np.ndarray]]:
        names = outer_names(config)
        yield _named(folder, checkpoint.load_outer(folder), names, "", dtype, grids, dense)
        for index in range(config.num_layers):
            params, _ = checkpoint.load_block(folder, index)
            yield _named(folder, params, block_names(config), f"model.layers.{index}.", dtype, grids, dense)
            if progress is not None:
                progress(index + 1, config.num_layers)

    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        nbytes = _write_shards(partial, tensors())
        if not grids:
            raise InputError(f"{folder}: no linear is quantized, so there is nothing to export")
        described["quantization_config"] = _quantization(grids, dense)
        _write_json(partial / "config.json", described)
        _write_json(partial / "generation_config.json", _ends(described))
        _write_tokenizer(folder, partial, config)
        partial.rename(target)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{target}: cannot be written ({reason}); free some space or give another --out"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"path": str(target), "bytes": nbytes, "schemes": {str(g): len(own) for g, own in grids.items()}}


def _named(
    folder: Path,
    params: dict[str, Any],
    names: dict[str, tuple[str, bool]],
    prefix: str,
    dtype: str,
    grids: dict[Grid, list[str]],
    dense: list[str],
) -> dict[str, np.ndarray]:
    """Tensors by their names in the file; notes which linear has which grid, and which has none."""
    leaves = {
        ".".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)[0]
    }
    if unknown := sorted(leaves.keys() - names.keys()):
        raise InputError(
            f"{folder}: {prefix}{unknown[0]} has no place in a Hugging Face file of this family; export a "
            "model that is not rotated"
        )
    found = {}
    for path, (suffix, transpose) in names.items():
        name, leaf = prefix + suffix, leaves[path]
        linear = name.removesuffix(".weight")
        if is_packed(leaf):
            found |= {f"{linear}.{key}": value for key, value in _packed(linear, leaf, dtype).items()}
            grids[leaf.grid].append(linear)
            continue
        value = np.asarray(leaf).T if transpose else np.asarray(leaf)
        found[name] = np.ascontiguousarray(value.astype(jnp.dtype(dtype)))
        if transpose:
            dense.append(linear)
    return found


def _packed(linear: str, q: QArray | MixedQArray, dtype: DTypeLike) -> dict[str, np.ndarray]:
    """The tensors of a linear whose integers are packed; `[out, in]` there."""
    if isinstance(q, MixedQArray):
        raise InputError(
            f"{linear} has bits by group, which the format cannot say; quantize without GroupBits"
        )
    if q.order is not None:
        raise InputError(
            f"{linear} has dynamic groups, which the format has given up; quantize with static groups"
        )
    bits = q.grid.bits
    if bits == 1 and q.grid.symmetric:
        raise InputError(
            f"{linear}: the zero of a symmetric grid of 1 bit is 1/2, which the format cannot say"
        )
    tensors = {
        "weight_packed": pack_dense(np.asarray(q.codes()).T, bits),
        "weight_scale": np.ascontiguousarray(np.asarray(q.scale).T.astype(jnp.dtype(dtype))),
        "weight_shape": np.array(q.shape[::-1], np.int64),
    }
    if q.zero is not None:
        zero = np.asarray(q.zero).astype(np.float32)
        if np.any(zero != np.rint(zero)):
            raise InputError(
                f"{linear} has fractional zeros, which the format cannot say; refit with integer_zero"
            )
        tensors["weight_zero_point"] = np.ascontiguousarray(pack_dense(zero.astype(np.uint8), bits).T)
    return tensors


def pack_dense(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `0 .. 2^bits - 1` of every row as one stream of bits, lowest first: int32 `[rows, words]`.

    `words = ceil(n bits / 32)`, the last one filled with zeros.
    """
    rows, n = codes.shape
    stream = np.unpackbits(np.ascontiguousarray(codes)[..., None], axis=-1, count=bits, bitorder="little")
    stream = np.pad(stream.reshape(rows, n * bits), ((0, 0), (0, -n * bits % 32)))
    return np.packbits(stream, axis=-1, bitorder="little").view("<i4")


def _quantization(grids: dict[Grid, list[str]], dense: list[str]) -> dict[str, Any]:
    """What config.json says of the weights: a group a scheme, which lists its linears if one of many."""
    groups: dict[str, Any] = {}
    for grid, linears in grids.items():
        strategy = "channel" if grid.group_size is None else "group"
        weights = {
            "num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "strategy": strategy,
            "group_size": grid.group_size, "dynamic": False,
        }  # fmt: skip
        key = json.dumps(weights)
        groups.setdefault(key, {"weights": weights, "targets": []})["targets"] += linears
    if len(groups) == 1:
        (only,) = groups.values()
        only["targets"] = ["Linear"]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
        "ignore": ["lm_head", *(linear for linear in dense if linear != "lm_head")],
    }


def _write_shards(folder: Path, parts: Iterator[dict[str, np.ndarray]]) -> int:
    """Writes the tensors and their index; no more than a shard and a part are held. Returns the bytes."""
    from safetensors.numpy import save_file

    where: dict[str, str] = {}
    held: dict[str, np.ndarray] = {}
    total = shards = 0

    def flush() -> None:
        nonlocal shards
        shards += 1
        shard = f"model-{shards:05d}.safetensors"
        save_file(held, folder / shard, metadata={"format": "pt"})
        where.update(dict.fromkeys(held, shard))
        held.clear()

    for part in parts:
        size = sum(tensor.nbytes for tensor in part.values())
        if held and size + sum(tensor.nbytes for tensor in held.values()) > _SHARD_BYTES:
            flush()
        held |= part
        total += size
    flush()
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where}
    )
    return total


def _ends(described: dict[str, Any]) -> dict[str, Any]:
    return {name: described[name] for name in ("bos_token_id", "eos_token_id") if described[name] is not None}


def _write_tokenizer(folder: Path, target: Path, config: ModelConfig) -> None:
    """Our tokenizer, which adds BOS there by itself where this model wants one."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings["model_max_length"] = config.max_position
    for name, number in (("bos_token", config.bos_id), ("eos_token", next(iter(config.eos_ids), None))):
        if number is not None:
            settings[name] = tokenizer.id_to_token(number)
    if config.add_bos and config.bos_id is not None:
        bos = settings["bos_token"]
        tokenizer.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, config.bos_id)]
        )
    tokenizer.save(str(target / "tokenizer.json"))
    _write_json(target / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
