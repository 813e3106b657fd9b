"""What calibrates and trains: texts and tasks by name, mixed in shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxquant.calibrate.text import read_text, windows
from jaxquant.errors import UsageError
from jaxquant.evaluate.task_data import TASKS, Item, load_items
from jaxquant.io.source import Source
from jaxquant.models.config import ModelConfig


def calibration_windows(source: Source, text: str, *, samples: int, seqlen: int, seed: int) -> np.ndarray:
    """Calibration windows int32 `[samples, seqlen]` from what `text` names, checked against the model.

    `text` is as in `read_text`, or `TASK=FILE`: rows of a task with their answers.
    """
    check_seqlen(seqlen, source.config)
    return windows(
        _text_of(text), source.tokenizer(), source.config, samples=samples, seqlen=seqlen, seed=seed
    )


def mixed_windows(
    source: Source, texts: Mapping[str, float], *, samples: int, seqlen: int, seed: int
) -> np.ndarray:
    """Windows int32 `[samples, seqlen]` of several texts, in random order.

    Args:
      source: the model whose tokens they are.
      texts: what `read_text` takes, and the share of windows that each has, relative to the others.
      samples, seqlen, seed: see `calibrate.text.windows`.

    Raises:
      UsageError: a share is less than a window.
    """
    check_seqlen(seqlen, source.config)
    if len(texts) == 1:
        return calibration_windows(source, next(iter(texts)), samples=samples, seqlen=seqlen, seed=seed)
    shares = np.asarray(list(texts.values()))
    # Rounded so that the counts add up.
    counts = np.diff(np.round(samples * np.cumsum(shares) / shares.sum()).astype(int), prepend=0)
    if not counts.all():
        raise UsageError(
            f"{list(texts)[int(counts.argmin())]}: its share of {samples} windows is less than one; give "
            "it a larger share, or take more windows"
        )
    parts = [
        calibration_windows(source, text, samples=int(count), seqlen=seqlen, seed=seed)
        for text, count in zip(texts, counts, strict=True)
    ]
    return np.random.default_rng(seed).permutation(np.concatenate(parts))


def text_words(texts: Mapping[str, float]) -> str:
    """Texts, with their shares where these differ."""
    total = sum(texts.values())
    if len(set(texts.values())) == 1:
        return ", ".join(texts)
    return ", ".join(f"{share / total:.2g} {text}" for text, share in texts.items())


def solved(items: Sequence[Item]) -> str:
    """Rows of a task with their answers, as running text."""
    return "\n\n".join(item.solved for item in items)


def check_seqlen(seqlen: int, config: ModelConfig) -> None:
    """`UsageError` unless windows of `seqlen` tokens fit into the model's context."""
    if not 2 <= seqlen <= config.max_position:
        raise UsageError(f"--seqlen {seqlen}: this model takes 2 to {config.max_position} tokens")


def _text_of(spec: str) -> str:
    task, _, file = spec.partition("=")
    if task in TASKS and file:
        return solved(load_items(task, file))
    return read_text(spec)
