"""Rows of task files and hub data sets, turned into the prompts of lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxquant.calibrate.text import json_rows, load_hub
from jaxquant.errors import InputError, UsageError

# Between the examples of a prompt, and between a question and its answer.
_BETWEEN, _BEFORE_ANSWER = "\n\n", " "


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question: which continuation follows its context best.

    Attributes:
      contexts: one per continuation; all the same unless the options stand in the context (WinoGrande).
      continuations: each choice with what separates it from the context; one alone is what must follow.
      gold: index of the right one.
      subject: header of the prompt, before all examples (MMLU); items of another one are no examples for it.
      place: where it comes from, `file:line`; items that differ in nothing else are equal.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    subject: str = ""
    place: str = dataclasses.field(default="", compare=False)

    @property
    def solved(self) -> str:
        """The item with its answer, as an example shows it."""
        return self.contexts[self.gold] + self.continuations[self.gold]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """How a task is read and scored.

    Attributes:
      kind: `choice` compares continuations, `word` and `solution` score one.
      expects: the fields of a row, for messages.
      item: turns a row into an item; raises `ValueError` or `KeyError` where it cannot.
    """

    kind: Literal["choice", "word", "solution"]
    expects: str
    item: Callable[[Mapping[str, Any]], Item]


def load_items(task: str, source: str) -> list[Item]:
    """The items of a task.

    Args:
      task: one of `TASKS`.
      source: a `.jsonl` file (`.jsonl.gz` too), or `hub:NAME[:CONFIG][:SPLIT]`; the split is `test` if it is
        not given.

    Raises:
      InputError: nothing there, nothing in it, or a row that is no item: names file and line.
      UsageError: an unknown task, or `hub:` with parts that do not exist.
    """
    if task not in TASKS:
        raise UsageError(f"{task}: no such task; use {', '.join(TASKS)}")
    items = [_item(task, row, place) for place, row in _rows(source)]
    if not items:
        raise InputError(f"{source}: no rows; a row of {task} has {TASKS[task].expects}")
    return items


def with_shots(items: Sequence[Item], shots: Sequence[Item], count: int, *, seed: int = 0) -> list[Item]:
    """`items` as whole prompts: header of the subject, `count` solved examples out of `shots`, the item.

    The examples are the same for all items of a subject, so that their keys and values are computed once.
    They are drawn with `seed`; where items have subjects, they are the first ones of the subject, as is the
    convention of MMLU. Items that serve as examples are left out, wherever they come from.

    Raises:
      InputError: too few examples, or no item is left.
      UsageError: a negative count.
    """
    if count < 0:
        raise UsageError(f"shots={count}: must not be negative")
    chosen: dict[str, list[Item]] = {}
    for subject in dict.fromkeys(item.subject for item in items):
        pool = [shot for shot in shots if shot.subject == subject]
        if len(pool) < count:
            of = f" of {subject.strip()!r}" if subject else ""
            raise InputError(f"{len(pool)} examples{of}, {count} needed; ask for fewer shots")
        order = range(count) if subject else np.random.default_rng(seed).permutation(len(pool))[:count]
        chosen[subject] = [pool[i] for i in order]
    used = {shot for examples in chosen.values() for shot in examples}
    left = [item for item in items if item not in used]
    if not left:
        raise InputError(
            "every item serves as an example; ask for fewer shots, or take them from another file"
        )
    headers = {
        subject: subject + "".join(shot.solved + _BETWEEN for shot in examples)
        for subject, examples in chosen.items()
    }
    return [
        dataclasses.replace(item, contexts=tuple(headers[item.subject] + text for text in item.contexts))
        for item in left
    ]


def _rows(source: str) -> Sequence[tuple[str, Mapping[str, Any]]]:
    if source.startswith("hub:"):
        parts = source.split(":")[1:]
        if len(parts) > 3 or not parts[0]:
            raise UsageError(f"{source}: write hub:NAME[:CONFIG][:SPLIT], such as hub:piqa::validation")
        name, config, split = parts + [""] * (3 - len(parts))
        rows = load_hub(source, name, config, split or "test")
        return [(f"{source} row {n}", row) for n, row in enumerate(rows)]
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"{source}: no such file; give rows as JSON lines, or hub:NAME")
    return json_rows(path)


def _item(task: str, row: Mapping[str, Any], place: str) -> Item:
    try:
        item = TASKS[task].item(row)
        if not 0 <= item.gold < len(item.continuations):
            raise ValueError(f"no choice {item.gold} among {len(item.continuations)}")
    except (KeyError, ValueError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{place}: {reason}; a row of {task} has {TASKS[task].expects}") from None
    return dataclasses.replace(item, place=place)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {value!r}, no text")
    return value


def _texts(values: Any, name: str) -> list[str]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) < 2:
        raise ValueError(f"{name} is {values!r}, no list of at least two texts")
    return [_text({name: value}, name) for value in values]


def _index(row: Mapping[str, Any], name: str) -> int:
    """HellaSwag has its labels as texts, and BoolQ as truth values."""
    try:
        return int(row[name])
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {row[name]!r}, no index") from None


def _choice(context: str, choices: Sequence[str], gold: int, subject: str = "") -> Item:
    return Item(
        contexts=(context,) * len(choices),
        continuations=tuple(_BEFORE_ANSWER + choice for choice in choices),
        gold=gold,
        subject=subject,
    )


def _lettered(row: Mapping[str, Any]) -> tuple[list[str], int]:
    """Choices of the data sets of AI2, `choices.text` with `choices.label`, of which one is `answerKey`."""
    choices, key = row["choices"], _text(row, "answerKey").strip()
    if not isinstance(choices, Mapping):
        raise ValueError(f"choices is {choices!r}, no table of text and label")
    return _texts(choices["text"], "choices.text"), list(choices["label"]).index(key)


def _arc(row: Mapping[str, Any]) -> Item:
    if "query" in row:
        query, choices, gold = _text(row, "query"), _texts(row["choices"], "choices"), _index(row, "gold")
    else:
        query, (choices, gold) = "Question: " + _text(row, "question"), _lettered(row)
    return _choice(query + "\nAnswer:", choices, gold)


def _openbookqa(row: Mapping[str, Any]) -> Item:
    if "query" in row:
        return _choice(_text(row, "query"), _texts(row["choices"], "choices"), _index(row, "gold"))
    return _choice(_text(row, "question_stem"), *_lettered(row))


def _piqa(row: Mapping[str, Any]) -> Item:
    if "query" in row:
        query = _text(row, "query").removesuffix("\n")
        choices, gold = _texts(row["choices"], "choices"), _index(row, "gold")
    else:
        query, gold = "Question: " + _text(row, "goal"), _index(row, "label")
        choices = [_text(row, "sol1"), _text(row, "sol2")]
    return _choice(query + "\nAnswer:", choices, gold)


def _boolq(row: Mapping[str, Any]) -> Item:
    if "query" in row:
        query, gold = _text(row, "query").removeprefix("Passage: "), _index(row, "gold")
    else:
        query = f"{_text(row, 'passage')}\nQuestion: {_text(row, 'question')}?"
        gold = _index(row, "label" if "label" in row else "answer")
    return _choice(query + "\nAnswer:", ("no", "yes"), gold)


def _copa(row: Mapping[str, Any]) -> Item:
    if "query" in row:
        premise, _, connector = _text(row, "query").rpartition(" ")
        context, gold = f"{premise.removesuffix(',')} {connector}", _index(row, "gold")
        choices = _texts(row["choices"], "choices")
    else:
        connectors = {"cause": "because", "effect": "therefore"}
        kind = _text(row, "question")
        if kind not in connectors:
            raise ValueError(f"question is {kind!r}, neither cause nor effect")
        context, gold = f"{_text(row, 'premise').strip()[:-1]} {connectors[kind]}", _index(row, "label")
        choices = [_text(row, name) for name in ("choice1", "choice2")]
    # Two spaces before the choice: lm-evaluation-harness puts a delimiter before choices that begin with one.
    return _choice(context, [" " + choice[0].lower() + choice[1:] for choice in choices], gold)


def _hellaswag(row: Mapping[str, Any]) -> Item:
    # The second half may be empty.
    context = f"{_text(row, 'activity_label')}: {_text(row, 'ctx_a')} {str(row['ctx_b']).capitalize()}"
    endings = [_cleaned(ending) for ending in _texts(row["endings"], "endings")]
    return _choice(_cleaned(context), endings, _index(row, "label"))


def _cleaned(text: str) -> str:
    """Without the marks of the WikiHow part: `[title]` ends a sentence, others vanish."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _winogrande(row: Mapping[str, Any]) -> Item:
    if "context_options" in row:
        contexts = _texts(row["context_options"], "context_options")
        ending, gold = _text(row, "continuation"), _index(row, "gold")
    else:
        before, gap, after = _text(row, "sentence").partition("_")
        if not gap:
            raise ValueError("sentence has no _ for the options")
        contexts = [before + _text(row, name) for name in ("option1", "option2")]
        ending, gold = after, _index(row, "answer") - 1
    ending = _BEFORE_ANSWER + ending.strip()
    return Item(contexts=tuple(contexts), continuations=(ending,) * len(contexts), gold=gold)


def _mmlu(row: Mapping[str, Any]) -> Item:
    choices = _texts(row["choices"], "choices")
    letters = "ABCDEFGHIJ"[: len(choices)]
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    context = "\n".join([_text(row, "question").strip(), *lines, "Answer:"])
    name = _text(row, "subject").replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about {name}.\n\n"
    return _choice(context, letters, _index(row, "gold" if "gold" in row else "answer"), header)


def _lambada(row: Mapping[str, Any]) -> Item:
    context, space, word = _text(row, "text").rpartition(" ")
    if not context or not word:
        raise ValueError("text does not end with a space and a word")
    return Item(contexts=(context,), continuations=(space + word,), gold=0)


def _gsm8k(row: Mapping[str, Any]) -> Item:
    answer = _text(row, "answer")
    if "####" not in answer:
        raise ValueError("answer has no number behind ####")
    return _choice(f"Question: {_text(row, 'question')}\nAnswer:", [answer], 0)


_LOCAL = "query, choices, gold"
_ARC = Task(kind="choice", expects=f"{_LOCAL}, or question, choices (text, label), answerKey", item=_arc)

#: Tasks by name.
TASKS: Mapping[str, Task] = {
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "hellaswag": Task(
        kind="choice", expects="activity_label, ctx_a, ctx_b, endings, label", item=_hellaswag
    ),
    "piqa": Task(kind="choice", expects=f"{_LOCAL}, or goal, sol1, sol2, label", item=_piqa),
    "winogrande": Task(
        kind="choice",
        expects="context_options, continuation, gold, or sentence (with _), option1, option2, answer",
        item=_winogrande,
    ),
    "boolq": Task(kind="choice", expects=f"{_LOCAL}, or passage, question, label", item=_boolq),
    "openbookqa": Task(
        kind="choice",
        expects=f"{_LOCAL}, or question_stem, choices (text, label), answerKey",
        item=_openbookqa,
    ),
    "copa": Task(
        kind="choice", expects=f"{_LOCAL}, or premise, question, choice1, choice2, label", item=_copa
    ),
    "mmlu": Task(kind="choice", expects="subject, question, choices, gold (or answer)", item=_mmlu),
    "lambada": Task(kind="word", expects="text", item=_lambada),
    "gsm8k": Task(kind="solution", expects="question, answer (with ####)", item=_gsm8k),
}  # fmt: skip
