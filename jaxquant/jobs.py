"""What the commands do, from names and files to plain dictionaries; `cli` only parses and prints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxquant.calibrate.text import eval_windows, read_text
from jaxquant.errors import InputError, UsageError
from jaxquant.evaluate import divergence, evaluate_task, perplexity
from jaxquant.evaluate import generate as continue_tokens
from jaxquant.evaluate.task_data import load_items
from jaxquant.io import LoadedModel, checkpoint, load_model
from jaxquant.io.source import Source
from jaxquant.kernels import check_backend, use_backend
from jaxquant.models.config import ModelConfig
from jaxquant.pipeline import quantize_model
from jaxquant.plan import token_cost
from jaxquant.quant import Grid
from jaxquant.recipe import Recipe
from jaxquant.records import Event, read_rows
from jaxquant.report import write_report
from jaxquant.smoothness import Tree, smoothness_comparison
from jaxquant.speed import measure_speed
from jaxquant.texts import check_seqlen
from jaxquant.train import Training, train_model
from jaxquant.train.loop import METRICS

Progress = Callable[[int, int], None]

# What is kept of measurements in the folder of the model.
_EVALUATION, _SMOOTHNESS = "evaluation.json", "smoothness.json"
# Nodes of a tree that are pictured.
_DRAWN = 24
# Tokens before the trees.
_PROMPT = 64


def quantize(
    source: Source,
    recipe: Recipe,
    tokens: np.ndarray,
    folder: Path,
    *,
    describe: dict[str, Any],
    resume: bool,
    on_event: Callable[[Event], None],
) -> dict[str, Any]:
    """`quantize_model`, then `rows.jsonl` and `report.html`; returns the summary."""
    summary = quantize_model(
        source, recipe, tokens, folder, resume=resume, describe=describe, on_event=on_event
    )
    rows, _ = read_rows(folder)
    checkpoint.write_text(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    report(folder)
    return summary


def train(
    source: Source,
    start: Grid | Path,
    tokens: np.ndarray,
    options: Training,
    folder: Path,
    *,
    describe: dict[str, Any],
    resume: bool,
    on_event: Callable[[Event], None],
) -> dict[str, Any]:
    """`train_model`, then `report.html`; returns the summary."""
    summary = train_model(
        source, start, tokens, options, folder, resume=resume, describe=describe, on_event=on_event
    )
    report(folder)
    return summary


def training_words(training: Mapping[str, Any]) -> str:
    """The `training` of a manifest for people."""
    options = {name: value for name, value in training.items() if name != "start"}
    words = ", ".join(f"{name} {value}" for name, value in options.items())
    return f"trained from {training['start']['name']}: {words}"


def report(folder: Path, *, evaluation: dict[str, Any] | None = None) -> Path:
    """Writes `report.html` of a finished run.

    With `evaluation`, the result of `evaluate(..., against=...)`, which is kept in the folder for later
    reports, and with what `smoothness` left there.
    """
    manifest = checkpoint.read_manifest(folder)
    summary, calibration = manifest["summary"], manifest["calibration"]
    recipe = Recipe.from_dict(manifest["recipe"])
    training, name = manifest.get("training"), " + ".join(s.name or type(s).__name__ for s in recipe.stages)
    run = {
        "verb": "train" if training else "quantize",
        "model": manifest["source"]["name"],
        "recipe_name": f"{name}, trained" if training else name,
        "recipe": f"{recipe}; {training_words(training)}" if training else str(recipe),
        "grid": " and ".join(dict.fromkeys(map(_grid_words, (recipe, *(rule for _, rule in recipe.rules))))),
        "effective_bits": summary["effective_bits"],
        "bytes_before": summary["source_bytes"],
        "bytes_after": summary["disk_bytes"],
        "calibration": calibration.get("text", "unnamed text"),
        "samples": calibration["samples"],
        "seqlen": calibration["seqlen"],
        "tokens": calibration["samples"] * calibration["seqlen"],
        "seed": calibration.get("seed", "unknown"),
        "seconds": summary["seconds"],
        "versions": manifest["versions"],
    }
    if evaluation is not None:
        _keep(folder / _EVALUATION, evaluation)
    evaluation = _kept(folder / _EVALUATION)
    if evaluation is not None:
        run["evaluation"] = {
            "perplexity_before": evaluation["reference_perplexity"],
            "perplexity_after": evaluation["perplexity"],
            **{key: evaluation[key] for key in ("kl", "kl_stderr", "top1", "text", "tokens")},
        }
    rows, pictures = read_rows(folder)
    lines = folder / "train" / METRICS
    return write_report(
        folder,
        run,
        rows,
        smoothness=_kept(folder / _SMOOTHNESS),
        metrics=[json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else (),
        **pictures,
    )


def evaluate(
    spec: str,
    *,
    text: str,
    seqlen: int | None,
    limit: int | None,
    against: str | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of the model that `spec` names, and with `against` its divergence from that one."""
    content = read_text(text)
    model = load_model(spec).to_run()
    seqlen = min(2048, model.config.max_position) if seqlen is None else seqlen
    check_seqlen(seqlen, model.config)
    batch = eval_windows(content, model.tokenizer, model.config, seqlen=seqlen, limit=limit)
    facts = {"model": model.name, "text": text, "seqlen": seqlen, "windows": len(batch)}
    if against is None:
        return facts | _scores(perplexity(model.params, model.config, batch, progress=progress))
    reference = load_model(against).to_run()
    pair = divergence(
        model.params, reference.params, model.config, reference.config, batch, progress=progress
    )
    return {
        **facts,
        **_scores(pair.model),
        "against": reference.name,
        "reference_perplexity": pair.reference.perplexity,
        "kl": pair.kl,
        "kl_stderr": pair.kl_stderr,
        "top1": pair.top1,
        "top1_stderr": pair.top1_stderr,
    }


def evaluate_tasks(
    spec: str,
    sources: Mapping[str, str],
    *,
    shots: int,
    shots_from: str | None,
    limit: int | None,
    exact_match: bool,
    answers: Path | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`evaluate_task` of the model that `spec` names, on each task and what `load_items` takes for it.

    Args:
      shots_from: where examples of the one task come from; `None`: from its own items.
      answers: a JSON file for every answer by task.

    Raises:
      UsageError: `shots_from` with several tasks.
    """
    if shots_from is not None and len(sources) > 1:
        raise UsageError("--shots-from has the examples of one task; evaluate the tasks one by one")
    items = {task: load_items(task, source) for task, source in sources.items()}
    examples = {task: load_items(task, shots_from) for task in items if shots_from is not None}
    model = load_model(spec).to_run()
    tasks, kept = [], {}
    for task, own in items.items():
        result = evaluate_task(
            model.params,
            model.config,
            model.tokenizer,
            task,
            own,
            shots=shots,
            shots_from=examples.get(task),
            limit=limit,
            exact_match=exact_match,
            progress=progress,
        )
        metrics = {name: value if math.isfinite(value) else None for name, value in result.metrics.items()}
        facts = {"task": task, "source": sources[task], "n": result.n, "shots": shots}
        tasks.append({**facts, "truncated": result.truncated, **metrics})
        kept[task] = result.answers
    if answers is not None:
        checkpoint.write_text(answers, json.dumps({"model": model.name, "answers": kept}, indent=1) + "\n")
    return {"model": model.name, "tasks": tasks}


def smoothness(
    spec: str,
    *,
    against: str,
    text: str,
    limit: int,
    seqlen: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`smoothness_comparison` of the model that `spec` names with its original.

    Of a folder that `quantize` wrote the result is kept there, and shown in its `report.html`.
    """
    content = read_text(text)
    model, reference = load_model(spec).to_run(), load_model(against).to_run()
    check_seqlen(seqlen, model.config)
    batch = eval_windows(content, model.tokenizer, model.config, seqlen=seqlen, limit=limit)
    found = smoothness_comparison(
        (model.params, model.config),
        (reference.params, reference.config),
        batch,
        jax.random.key(0),
        prompt=_PROMPT,
        progress=progress,
    )
    result: dict[str, Any] = {
        "model": model.name,
        "against": reference.name,
        "text": text,
        "windows": len(batch),
        "seqlen": seqlen,
        "prompt_tokens": found.prompt,
    }
    for name, estimate in found.estimates.items():
        result[name] = estimate.mean
        result[f"{name}_stderr"] = estimate.stderr if math.isfinite(estimate.stderr) else None
    result["by_window"] = {name: list(estimate.by_window) for name, estimate in found.estimates.items()}
    original, own = found.trees[0]
    decode = model.tokenizer.decode
    result["trees"] = {
        "prompt": decode(batch[0, : found.prompt].tolist()),
        "reference": _drawn(original, own, decode),
        "model": _drawn(own, original, decode),
    }
    folder = Path(spec).expanduser()
    if checkpoint.is_checkpoint(folder):
        _keep(folder / _SMOOTHNESS, result)
        report(folder)
    return result


def generate(
    model: LoadedModel, prompt: str, *, max_tokens: int, temperature: float, seed: int
) -> dict[str, Any]:
    """Continues `prompt`; the text and tokens of the continuation.

    Raises:
      InputError: the prompt is empty or not Unicode, or with `max_tokens` longer than the model's context.
    """
    model, config = model.to_run(), model.config
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # how Python keeps foreign bytes
        raise InputError("the prompt is not UTF-8; check the encoding of the terminal")
    tokens = model.tokenizer.encode(prompt).ids
    if config.add_bos and config.bos_id is not None:
        tokens = [config.bos_id, *tokens]
    if not tokens:
        raise InputError("the prompt is empty; give at least one word with --prompt")
    new = continue_tokens(
        model.params, config, tokens, max_tokens=max_tokens, temperature=temperature, key=jax.random.key(seed)
    )
    return {"prompt": prompt, "text": model.tokenizer.decode(new), "tokens": len(new)}


def bench(name: str, *, prompt: int, tokens: int, repeats: int, backend: str | None = None) -> dict[str, Any]:
    """`measure_speed` of a model or quantized folder, and its name.

    Raises:
      UsageError: an unknown backend.
      InputError: a prompt and tokens longer than the model's context.
    """
    check_backend(backend)
    model = load_model(name).to_run()
    with use_backend(backend):
        speed = measure_speed(model.params, model.config, prompt=prompt, tokens=tokens, repeats=repeats)
    return {"model": name, "backend": backend, **speed}


def inspect(folder: Path) -> dict[str, Any]:
    """What `folder` holds: recipe, state, sizes, the cost of a token, and one row per quantized linear."""
    manifest = checkpoint.read_manifest(folder)
    recipe, config = Recipe.from_dict(manifest["recipe"]), ModelConfig.from_dict(manifest["config"])
    rows, _ = read_rows(folder)
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    packed = sum(row["bytes"] for row in rows)
    return {
        "model": manifest["source"]["name"],
        "recipe": str(recipe),
        "state": manifest["state"],
        "blocks": checkpoint.finished_blocks(folder),
        "blocks_total": manifest["config"]["num_layers"],
        "effective_bits": 8 * packed / weights if weights else None,
        "bytes": packed,
        "disk_bytes": checkpoint.disk_bytes(folder),
        "calibration": manifest["calibration"],
        "training": training_words(manifest["training"]) if "training" in manifest else None,
        "versions": manifest["versions"],
        "token": token_cost(config, rotated=recipe.surgery is not None),
        "modules": rows,
    }


def _drawn(tree: Tree, other: Tree, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    """The most probable nodes of `tree`: parents come before their children, and are there."""
    likely = sorted(tree.nodes, key=lambda path: (-tree.nodes[path], len(path)))[:_DRAWN]
    return [
        {
            "path": list(path),
            "token": decode([path[-1]]),
            "probability": math.exp(tree.nodes[path]),
            "shared": path in other.nodes,
        }
        for path in likely
    ]


def _grid_words(recipe: Recipe) -> str:
    return "weights in 16 bits" if recipe.keeps else str(recipe.grid)


def _keep(path: Path, result: dict[str, Any]) -> None:
    checkpoint.write_text(path, json.dumps(result, indent=1) + "\n")


def _kept(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _scores(result: Any) -> dict[str, Any]:
    return {
        "nll": result.nll,
        "nll_stderr": result.stderr if math.isfinite(result.stderr) else None,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
    }
