"""model x recipe x tokens -> quantized model on disk, block by block, resumable at any moment."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import records
from jaxquant.calibrate.collect import batches, block_moments, embed_all
from jaxquant.calibrate.fisher import TokenWeights, fisher_weights, output_moments
from jaxquant.calibrate.moments import Moments
from jaxquant.errors import NonFiniteError
from jaxquant.folder import kept_gradients, open_run, storable, token_facts, versions
from jaxquant.io import checkpoint
from jaxquant.io.source import Source
from jaxquant.methods import Problem, layer_error, rtn
from jaxquant.models.config import EXACT, LINEARS, ModelConfig
from jaxquant.models.decoder import block as block_forward
from jaxquant.plan import plan
from jaxquant.quant import Packed, is_packed
from jaxquant.recipe import Recipe
from jaxquant.records import Event
from jaxquant.surgery import operate

# Samples that folds may run through the block, and that its activations are pictured on.
_FEW_SAMPLES = 2


def quantize_model(
    source: Source,
    recipe: Recipe,
    tokens: np.ndarray,
    folder: Path,
    *,
    resume: bool = False,
    describe: dict[str, Any] | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Quantizes `source` into `folder` and returns the summary that the manifest keeps.

    Blocks are read, calibrated, quantized, saved and forgotten one after another; the inputs of a block come
    from the quantized blocks before it. Every finished block is final: with `resume` the run continues after
    the last one, and the result is bit-identical to that of an undisturbed run on the same machine.

    Args:
      source: the model.
      recipe: what to do with each linear.
      tokens: calibration windows, int32 `[samples, seqlen]`.
      folder: where the quantized model goes; must not exist, or be empty, unless `resume`.
      describe: facts about the calibration kept in the manifest (text, seed).
      on_event: called with `{"event": "surgery" | "gradient" | "row" | "block" | "resume" | "done", ...}`.

    Returns:
      The summary; with `resume` on a finished run that of the run, at once.

    Raises:
      UsageError: the folder is in use, or `resume` meets a run of another model, recipe or calibration.
      NonFiniteError: NaN or infinity in a weight or in the activations; names the linear.
      InputError: the disk is full.
    """
    started = time.monotonic()
    config = recipe.runtime(source.config)
    estimate = plan(source.config, recipe, samples=tokens.shape[0], seqlen=tokens.shape[1])
    identity = {
        "source": {"name": source.name, "fingerprint": source.fingerprint()},
        "recipe": recipe.to_dict(),
        "calibration": token_facts(tokens, describe or {}),
    }
    manifest = {**identity, "config": config.to_dict(), "versions": versions(), "state": "running"}
    finished = open_run(
        folder, manifest, recipe, source.tokenizer(), output_bytes=estimate.output_bytes, resume=resume
    )
    previous = checkpoint.read_manifest(folder)
    if previous["state"] == "complete":
        on_event({"event": "done", **previous["summary"]})
        return previous["summary"]

    if recipe.surgery is not None:
        on_event({"event": "surgery", "stage": str(recipe.surgery)})
        source = operate(source, recipe.surgery, config, tokens, keep=folder / "rotations.npz")
    outer = source.outer()
    hidden = embed_all(storable({"embed": outer["embed"]}), config, tokens)
    if not (folder / "outer").is_dir():
        checkpoint.save_outer(folder, storable(outer))
    del outer
    if finished:
        on_event({"event": "resume", "block": finished, "blocks": config.num_layers})

    gradient = functools.partial(kept_gradients, source, tokens, on_event)
    fisher = recipe.hessian == "fisher"
    weights = gradient(fisher_weights, folder / "token_weights.npz") if fisher else None
    outputs = gradient(output_moments, folder / "output_moments.npz") if recipe.needs_gradients else None
    # What enters the block in the original model.
    known = hidden.copy() if recipe.needs_originals else None
    rows: list[Event] = []
    for index in range(config.num_layers):
        if index < finished:
            params, record = checkpoint.load_block(folder, index)
            params = jax.tree.map(jnp.asarray, params)
        else:
            begun = time.monotonic()
            params, record = _quantize_block(
                source,
                index,
                config,
                recipe,
                hidden,
                known,
                _of_block(weights, index),
                _of_block(outputs, index),
                on_event,
            )
            record["seconds"] = time.monotonic() - begun
            params = storable(params)
            checkpoint.save_block(folder, index, params, record)
        rows.extend(record["rows"])
        if index + 1 < config.num_layers:
            for part in batches(hidden):
                hidden[part] = _propagate(params, config, hidden[part], sliding=config.slides(index))
            if known is not None:
                original = jax.tree.map(jnp.asarray, source.block(index))
                floats = config.in_floats()
                for part in batches(known):
                    known[part] = _propagate(original, floats, known[part], sliding=config.slides(index))
        on_event({"event": "block", "block": index, "blocks": config.num_layers})

    packed = sum(row["bytes"] for row in rows)
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    summary = {
        "effective_bits": 8 * packed / weights,
        "quantized_bytes": packed,
        "disk_bytes": checkpoint.disk_bytes(folder),
        "source_bytes": estimate.source_bytes,
        "mean_error": float(np.mean([row["error"] for row in rows])),
        "mean_error_rtn": float(np.mean([row["error_rtn"] for row in rows])),
        "seconds": time.monotonic() - started,
        "seconds_of_blocks": sum(row["seconds"] for row in rows),
    }
    checkpoint.write_manifest(folder, {**manifest, "state": "complete", "summary": summary})
    on_event({"event": "done", **summary})
    return summary


@functools.partial(jax.jit, static_argnames=("config", "sliding"))
def _propagate(params: Any, config: ModelConfig, x: jax.Array, *, sliding: bool) -> jax.Array:
    # Many tokens, one block: unpacking it whole is faster than unpacking it group by group.
    params = jax.tree.map(
        lambda leaf: leaf.dequantize(config.dtype) if is_packed(leaf) else leaf, params, is_leaf=is_packed
    )
    y, _, _ = block_forward(params, config, x.astype(config.dtype), sliding=sliding)
    return y.astype(jnp.float32)


def _of_block(found: dict[str, np.ndarray] | None, index: int) -> dict[str, np.ndarray] | None:
    return None if found is None else {name: array[index] for name, array in found.items()}


def _quantize_block(
    source: Source,
    index: int,
    config: ModelConfig,
    recipe: Recipe,
    hidden: np.ndarray,
    known: np.ndarray | None,
    weights: TokenWeights | None,
    outputs: dict[str, np.ndarray] | None,
    on_event: Callable[[Event], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One block's parameters with packed kernels, and the record (rows, pictures) that goes with them."""
    sliding = config.slides(index)
    original = params = jax.tree.map(jnp.asarray, source.block(index))
    record: dict[str, Any] = {"rows": [], "histograms": []}
    pictured = index in (0, config.num_layers // 2, config.num_layers - 1)
    if pictured and config.precision != EXACT:
        record["sites"] = records.sites(source, index, original, config, hidden[:_FEW_SAMPLES])
    judged_by: dict[str, tuple[jax.Array, Moments]] = {}
    # One pass serves all taps; true-sequential order needs a pass after each quantized group of linears.
    for stage in [[group] for group in LINEARS] if recipe.true_sequential else [list(LINEARS)]:
        kept = {path for _, paths in stage for path in paths if recipe.at(f"blocks.{index}.{path}").keeps}
        taps = tuple(tap for tap, paths in stage if not kept.issuperset(paths))

        moments = {}
        if taps:
            moments = block_moments(
                params,
                config,
                hidden,
                sliding=sliding,
                taps=taps,
                mask=recipe.mask,
                weights=weights,
                original=None if known is None else (original, known),
            )
        plain = moments
        for fold in recipe.folds:
            equal_heads = config.num_heads == config.num_kv_heads
            facts = {
                "norm_plus_one": config.norm_plus_one,
                "equal_heads": equal_heads,
                "apply": _block_function(config, sliding),
                "inputs": jnp.asarray(hidden[:_FEW_SAMPLES]),
            }
            params, moments = fold(params, moments, recipe.grid, **facts)
        for tap, path in [(tap, path) for tap, paths in stage for path in paths]:
            part, name = path.split(".")
            kernel = params[part][name]["kernel"]
            own = recipe.at(f"blocks.{index}.{path}")
            if path in kept:
                record["rows"].append(records.kept_row(kernel, index, path))
                if not recipe.finishes:
                    on_event({"event": "row", **record["rows"][-1]})
                continue
            problem = Problem.of(
                kernel,
                moments[tap],
                own.grid,
                outputs=None if outputs is None else jnp.asarray(outputs[path]),
            )
            packed, row = _quantize_linear(problem, own, index, path)
            nearest = rtn(original[part][name]["kernel"], plain[tap], own.grid)
            row["error_rtn"] = float(nearest.stats.error)
            if pictured and path in ("attn.q", "mlp.down"):
                record["histograms"].append(records.histogram(kernel, packed, row["module"]))
            params = {**params, part: {**params[part], name: {**params[part][name], "kernel": packed}}}
            record["rows"].append(row)
            if recipe.finishes:
                judged_by[path] = problem.target, moments[tap]
            else:
                on_event({"event": "row", **row})
    for finish in recipe.finishes:
        params = finish(
            params,
            original,
            jnp.asarray(hidden),
            apply=_block_function(config, sliding),
            reference=_block_function(config.in_floats(), sliding),
        )
    for row in record["rows"] if recipe.finishes else ():
        part, name = row["linear"].split(".")
        if row["linear"] in judged_by:
            target, seen_by = judged_by[row["linear"]]
            values = params[part][name]["kernel"].dequantize()
            row["error"] = float(layer_error(values, target, seen_by.second))
        on_event({"event": "row", **row})
    return params, record


@functools.lru_cache(maxsize=4)
def _block_function(config: ModelConfig, sliding: bool) -> Callable[[Any, jax.Array], jax.Array]:
    """One function object per kind of block, so that what takes it as a static argument compiles once."""
    return lambda params, x: block_forward(params, config, x.astype(config.dtype), sliding=sliding)[0]


def _quantize_linear(problem: Problem, recipe: Recipe, index: int, path: str) -> tuple[Packed, Event]:
    begun = time.monotonic()
    module = f"blocks.{index}.{path}"
    rounded = recipe(problem)
    stats = jax.tree.map(np.asarray, rounded.stats)
    if not stats.finite:
        fault = not bool(jnp.all(jnp.isfinite(problem.target)))
        which = "its weight" if fault else "the activations that enter it"
        raise NonFiniteError(
            f"{module}: NaN or infinity in {which}; check the model file, or run the model in float32"
        )
    packed = rounded.pack()
    row = {
        **records.packed_row(packed, index, path),
        "error": float(stats.error),
        "damping": float(stats.damping),
        "attempts": int(stats.attempts),
        "fallback": bool(stats.fallback),
        "dead": int(stats.dead),
        "seconds": time.monotonic() - begun,
    }
    if stats.choices is not None:
        row["choices"] = dict(zip(recipe.options, stats.choices.tolist(), strict=True))
    return packed, row
