"""model x text -> trained quantized model in a folder like that of `quantize_model`, resumable as that is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibrate.fisher import output_moments
from jaxquant.errors import UsageError
from jaxquant.evaluate.scoring import check_windows
from jaxquant.folder import kept_gradients, open_run, storable, token_facts, versions
from jaxquant.io import checkpoint
from jaxquant.io.source import Source, load_params
from jaxquant.plan import plan
from jaxquant.quant import Grid, MixedQArray, QStack, is_packed
from jaxquant.recipe import Recipe, chain
from jaxquant.records import Event, kept_row, packed_row
from jaxquant.stages import RTN
from jaxquant.train.latent import latent_params, packed_params, split
from jaxquant.train.loop import RUN, Training, train

# Windows whose gradients the layer loss is weighed with.
_MOMENT_WINDOWS = 16
_MOMENTS = "output_moments.npz"
# Parts of a manifest that tell one start from another.
_START = ("source", "recipe", "calibration", "training", "summary")


def train_model(
    teacher: Source,
    start: Grid | Path,
    tokens: np.ndarray,
    options: Training,
    folder: Path,
    *,
    resume: bool = False,
    describe: dict[str, Any] | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Trains a quantized model to follow `teacher` and returns the summary that the manifest keeps.

    The result is an ordinary quantized model. `FOLDER/train` holds `metrics.jsonl`, and while the run lasts
    its state: with `resume` it goes on from the last one, to the same bits on the same machine.

    Args:
      teacher: the original model.
      start: a grid, on which the teacher is rounded to nearest; or a folder with the teacher quantized,
        whose integers, grids, rotations and precision training starts from.
      tokens: windows to train on, int32 `[n, T]`; see `train`.
      options: see `Training`.
      folder: where the quantized model goes; must not exist, or be empty, unless `resume`.
      describe: facts about the text kept in the manifest.
      on_event: called with `{"event": "step" | "gradient" | "resume" | "done", ...}`.

    Raises:
      UsageError: the folder is in use, `resume` meets another run, `start` is another model's, or a loss
        that compares inside the models meets a rotated one.
      NonFiniteError: the loss is not finite; names the step.
      InputError: unusable windows, a start that is unfinished or cannot be read, or a full disk.
    """
    started = time.monotonic()
    tokens = check_windows(tokens, teacher.config)
    recipe, begun_from = _start(teacher, start, options)
    config = recipe.runtime(teacher.config)
    original = load_params(teacher, "float32")
    if isinstance(start, Grid):
        # What is saved in 16 bits is trained so.
        student = latent_params({**original, **storable(teacher.outer())}, start)
    else:
        student = latent_params(_equal_layers(start))
    identity = {
        "source": {"name": teacher.name, "fingerprint": teacher.fingerprint()},
        "recipe": recipe.to_dict(),
        "calibration": token_facts(tokens, describe or {}),
        "training": {**dataclasses.asdict(options), "start": begun_from},
    }
    manifest = {**identity, "config": config.to_dict(), "versions": versions(), "state": "running"}
    estimate = plan(teacher.config, recipe, samples=options.batch, seqlen=tokens.shape[1])
    # A state holds three numbers for each that is trained, and is written before the last one goes.
    states = 2 * 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(split(student)[0]))
    needed = estimate.output_bytes + states
    finished = open_run(folder, manifest, recipe, teacher.tokenizer(), output_bytes=needed, resume=resume)
    previous = checkpoint.read_manifest(folder)
    if previous["state"] == "complete":
        _clean(folder)
        on_event({"event": "done", **previous["summary"]})
        return previous["summary"]

    outputs = None
    if options.smoothness == "layer":
        few = tokens[:_MOMENT_WINDOWS]
        found = kept_gradients(teacher, few, on_event, output_moments, folder / "train" / _MOMENTS)
        outputs = jax.tree.map(jnp.asarray, found)
    trained = train(
        (student, config),
        (original, teacher.config),
        tokens,
        options,
        outputs=outputs,
        folder=folder / "train",
        on_event=on_event,
    )
    packed = packed_params(trained)
    if not (folder / "outer").is_dir():
        checkpoint.save_outer(folder, {name: leaf for name, leaf in packed.items() if name != "blocks"})
    rows = []
    for index in range(config.num_layers):
        block = storable(jax.tree.map(lambda leaf, i=index: leaf[i], packed["blocks"]))
        rows.append([_row(block, index, path) for path in checkpoint.PATHS])
        if index >= finished:
            checkpoint.save_block(folder, index, block, {"rows": rows[-1], "seconds": 0.0})
    stored = sum(row["bytes"] for block in rows for row in block)
    summary = {
        "effective_bits": 8 * stored / sum(np.prod(row["shape"]) for block in rows for row in block),
        "quantized_bytes": stored,
        "disk_bytes": checkpoint.disk_bytes(folder),
        "source_bytes": estimate.source_bytes,
        "seconds": time.monotonic() - started,
    }
    checkpoint.write_manifest(folder, {**manifest, "state": "complete", "summary": summary})
    _clean(folder)
    on_event({"event": "done", **summary})
    return summary


def _clean(folder: Path) -> None:
    """Deletes what only an unfinished run needs."""
    for state in (folder / "train").glob("state-*"):
        shutil.rmtree(state)
    for name in (_MOMENTS, RUN):
        (folder / "train" / name).unlink(missing_ok=True)


def _start(teacher: Source, start: Grid | Path, options: Training) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of the model that training starts from, and what tells it from others."""
    if isinstance(start, Grid):
        return chain(RTN(), grid=start), {"name": "rounding to nearest"}
    manifest = checkpoint.read_manifest(start)
    if manifest["source"]["fingerprint"] != teacher.fingerprint():
        raise UsageError(
            f"{start} was made from {manifest['source']['name']}, which is not {teacher.name}; give the "
            "model that was quantized as the teacher"
        )
    recipe = Recipe.from_dict(manifest["recipe"])
    if recipe.keeps and all(rule.keeps for _, rule in recipe.rules):
        raise UsageError(f"{start} keeps its weights in floating point; there are no grids to train on")
    by_tokens = options.smoothness in ("none", "substitution")
    if recipe.surgery is not None and (options.hidden_weight or not by_tokens):
        raise UsageError(
            f"{start} is rotated ({recipe.surgery}): its stream and gradients are in another basis than the "
            "teacher's; use hidden_weight 0 and no smoothness loss but substitution"
        )
    if recipe.folds and options.smoothness == "layer":
        raise UsageError(
            f"{start} has scales folded into its weights ({recipe}), which the layer loss would compare with "
            "the teacher's; use another smoothness loss"
        )
    digest = hashlib.sha256(json.dumps([manifest.get(k) for k in _START]).encode())
    return recipe, {"name": str(start), "fingerprint": digest.hexdigest()}


def _equal_layers(folder: Path) -> dict[str, Any]:
    """The parameters in `folder`, if one grid serves all layers of a linear."""
    params, _ = checkpoint.load_checkpoint(folder)
    kinds = (QStack, MixedQArray)
    leaves = jax.tree.leaves(params["blocks"], is_leaf=lambda leaf: isinstance(leaf, kinds))
    if any(isinstance(leaf, kinds) for leaf in leaves):
        raise UsageError(
            f"{folder} mixes bits within a linear or between its layers, which training cannot start from; "
            "give a model with one grid for all layers of a linear, or a grid"
        )
    return params


def _row(block: dict[str, Any], index: int, path: str) -> Event:
    part, name = path.split(".")
    packed = block[part][name]["kernel"]
    return (packed_row if is_packed(packed) else kept_row)(packed, index, path)
