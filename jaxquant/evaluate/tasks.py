"""What a model can do: multiple choice, the last word of a passage, grade-school mathematics.

Prompts and scoring are those of lm-evaluation-harness (`task_data` has the prompts), except that `acc_norm`
divides by bytes, where the harness counts characters. TASA (arXiv 2607.00908) allocates bits by such tasks.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxquant.errors import UsageError
from jaxquant.evaluate.continuations import Continuation, encode_pair, prompt_tokens, score_continuations
from jaxquant.evaluate.generate import generate_batch
from jaxquant.evaluate.scoring import Progress, mean_and_stderr
from jaxquant.evaluate.task_data import TASKS, Item, with_shots
from jaxquant.models.config import ModelConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How long a solution may be, and where a model begins to ask itself the next question.
_SOLUTION_TOKENS = 256
_NEXT_QUESTION = "Question:"
_NUMBER = re.compile(r"#### (-?[0-9.,]+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A model on a task.

    Attributes:
      name: of the task.
      n: items answered.
      shots: solved examples before each.
      truncated: items whose prompt lost its beginning, since it exceeds the model's context.
      metrics: by name, each mean with its standard error over items `.._stderr`, NaN for a single item;
        shares are 0 to 1, negative log-likelihoods in nats. Multiple choice: `acc`, the likeliest choice is
        right; `acc_norm`, the same of likelihoods per byte of the choice. LAMBADA: `acc`, every token of the
        word is the most probable one; `nll` of a word, `perplexity = exp(nll)`. GSM8K: `nll` per token of the
        right solution, all tokens of all items alike; `exact_match`, the number found is right.
      answers: one per item, plain JSON: `place`, `gold`, `prediction` and what they rest on.
    """

    name: str
    n: int
    shots: int
    truncated: int
    metrics: dict[str, float]
    answers: list[dict[str, Any]]


def evaluate_task(
    params: dict[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    task: str,
    items: Sequence[Item],
    *,
    shots: int = 0,
    shots_from: Sequence[Item] | None = None,
    seed: int = 0,
    limit: int | None = None,
    exact_match: bool = True,
    progress: Progress | None = None,
) -> TaskResult:
    """Scores `items` of a task; the model may be dense, packed or fake-quantized.

    Args:
      task: one of `task_data.TASKS`.
      items: see `load_items`.
      shots: how many solved examples come first; drawn with `seed`, see `with_shots`.
      shots_from: where they are taken from; by default from `items`, which are then not asked.
      limit: only the first items, after those that serve as examples were taken out.
      exact_match: whether GSM8K also generates solutions, which takes longer; a small model scores about 0.
      progress: called with the numbers of requests done and in total; a request is one choice, one target or
        one solution to generate.

    Raises:
      InputError: too few examples, or a text that the model cannot read.
      NonFiniteError: the model gives NaN or infinity.
      UsageError: an unknown task, a negative number of shots, or a limit below 1.
    """
    if task not in TASKS:
        raise UsageError(f"{task}: no such task; use {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit}: must be at least 1")
    kind = TASKS[task].kind
    items = with_shots(items, items if shots_from is None else shots_from, shots, seed=seed)[:limit]
    requests = [
        encode_pair(tokenizer, config, *pair)
        for item in items
        for pair in zip(item.contexts, item.continuations, strict=True)
    ]
    generations = len(items) if kind == "solution" and exact_match else 0

    def scored(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total + generations)

    flat = iter(score_continuations(params, config, requests, progress=scored))
    continuations = [[next(flat) for _ in item.contexts] for item in items]
    measure = {"choice": _choices, "word": _words, "solution": _solutions}[kind]
    metrics, answers = measure(items, continuations)
    if generations:

        def generated(done: int, total: int) -> None:
            if progress is not None:
                progress(len(requests) + done, len(requests) + total)

        texts = generate_until(
            params, config, tokenizer, [item.contexts[0] for item in items], [_NEXT_QUESTION],
            max_tokens=_SOLUTION_TOKENS, progress=generated,
        )  # fmt: skip
        for item, answer, text in zip(items, answers, texts, strict=True):
            answer |= {"generated": text, "prediction": _number(text), "gold": _number(item.continuations[0])}
        metrics |= _mean("exact_match", [answer["prediction"] == answer["gold"] for answer in answers])
    return TaskResult(
        name=task,
        n=len(items),
        shots=shots,
        truncated=sum(any(one.truncated for one in own) for own in continuations),
        metrics=metrics,
        answers=[{"place": item.place, **answer} for item, answer in zip(items, answers, strict=True)],
    )


def generate_until(
    params: dict[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    contexts: Sequence[str],
    stops: Sequence[str],
    *,
    max_tokens: int,
    progress: Progress | None = None,
) -> list[str]:
    """Greedy continuations of contexts, each cut before the first of the texts `stops`, none of them empty.

    Contexts are continued in batches, see `generate_batch`. One that leaves no room for `max_tokens` loses
    its beginning, as in lm-evaluation-harness.

    Raises:
      UsageError: the model's context is not longer than `max_tokens`.
    """
    room = config.max_position - max_tokens
    if room < 1:
        raise UsageError(
            f"{max_tokens} new tokens leave no room for a prompt in the model's max_position = "
            f"{config.max_position}; take a model with a longer context, or leave out what generates"
        )

    def stopped(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens)
        return any(stop in text for stop in stops)

    prompts = [prompt_tokens(tokenizer, config, context)[-room:] for context in contexts]
    found = generate_batch(params, config, prompts, max_tokens=max_tokens, until=stopped, progress=progress)
    texts = map(tokenizer.decode, found)
    return [text[: min((text.find(stop) for stop in stops if stop in text), default=None)] for text in texts]


def _choices(items: Sequence[Item], continuations: Sequence[Sequence[Continuation]]) -> Any:
    answers = []
    for item, own in zip(items, continuations, strict=True):
        scores = np.asarray([one.log_likelihood for one in own])
        # The delimiter is no part of the choice.
        lengths = np.asarray([len(text.removeprefix(" ").encode()) for text in item.continuations])
        answers.append(
            {
                "gold": item.gold,
                "prediction": int(scores.argmax()),
                "prediction_norm": int((scores / lengths).argmax()),
                "log_likelihoods": scores.tolist(),
            }
        )
    acc = _mean("acc", [answer["prediction"] == answer["gold"] for answer in answers])
    return acc | _mean(
        "acc_norm", [answer["prediction_norm"] == answer["gold"] for answer in answers]
    ), answers


def _words(items: Sequence[Item], continuations: Sequence[Sequence[Continuation]]) -> Any:
    answers = [
        {"gold": item.continuations[0].strip(), "greedy": own.greedy, "log_likelihood": own.log_likelihood}
        for item, (own,) in zip(items, continuations, strict=True)
    ]
    nll = _mean("nll", [-answer["log_likelihood"] for answer in answers])
    perplexity = {"perplexity": math.exp(nll["nll"]) if nll["nll"] < 700 else math.inf}
    return _mean("acc", [answer["greedy"] for answer in answers]) | nll | perplexity, answers


def _solutions(items: Sequence[Item], continuations: Sequence[Sequence[Continuation]]) -> Any:
    del items
    answers = [{"log_likelihood": own.log_likelihood, "tokens": own.tokens} for (own,) in continuations]
    losses = np.asarray([-answer["log_likelihood"] for answer in answers])
    tokens = np.asarray([answer["tokens"] for answer in answers])
    nll = losses.sum() / tokens.sum()
    # A ratio of two means; its error is that of the residuals.
    stderr = _mean("nll", (losses - nll * tokens) / tokens.mean())["nll_stderr"]
    return {"nll": float(nll), "nll_stderr": stderr}, answers


def _mean(name: str, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    mean, stderr = mean_and_stderr(np.asarray(values, np.float64)[:, None], name)
    return {name: mean, f"{name}_stderr": stderr}


def _number(solution: str) -> str | None:
    """The first number behind `####`, without separators of thousands and a final point."""
    found = _NUMBER.search(solution)
    return found and found[1].replace(",", "").removesuffix(".")
