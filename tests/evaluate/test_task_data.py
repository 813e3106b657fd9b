from __future__ import annotations

import json
import sys
import types

import pytest

from jaxquant.errors import InputError, UsageError
from jaxquant.evaluate.task_data import TASKS, Item, load_items, with_shots

AI2 = {"choices": {"text": ["wet", "dry"], "label": ["A", "B"]}, "answerKey": "B"}
# Rows of the local format and of the hub that are one item, and its context, continuations and gold.
EQUAL = {
    "arc_easy": (
        {"query": "Question: Sand is", "choices": ["wet", "dry"], "gold": 1},
        {"question": "Sand is", **AI2},
        "Question: Sand is\nAnswer:", [" wet", " dry"], 1,
    ),
    "openbookqa": (
        {"query": "Sand is", "choices": ["wet", "dry"], "gold": 1},
        {"question_stem": "Sand is", **AI2},
        "Sand is", [" wet", " dry"], 1,
    ),
    "piqa": (
        {"query": "Question: Dry it\n", "choices": ["sun", "rain"], "gold": 0},
        {"goal": "Dry it", "sol1": "sun", "sol2": "rain", "label": 0},
        "Question: Dry it\nAnswer:", [" sun", " rain"], 0,
    ),
    "boolq": (
        {"query": "Passage: Salt -- is it.\nQuestion: is salt white?", "choices": ["no", "yes"], "gold": 1},
        {"passage": "Salt -- is it.", "question": "is salt white", "answer": True},
        "Salt -- is it.\nQuestion: is salt white?\nAnswer:", [" no", " yes"], 1,
    ),
    "copa": (
        {"query": "It rained, because", "choices": ["clouds came.", "I slept."], "gold": 0},
        {"premise": "It rained.", "choice1": "Clouds came.", "choice2": "I slept.", "question": "cause",
         "label": 0},
        "It rained because", ["  clouds came.", "  i slept."], 0,
    ),
    "mmlu": (
        {"subject": "high_school_physics", "question": " Light? ", "choices": ["wave", "ray"], "gold": 0},
        {"subject": "high_school_physics", "question": " Light? ", "choices": ["wave", "ray"], "answer": 0},
        "Light?\nA. wave\nB. ray\nAnswer:", [" A", " B"], 0,
    ),
}  # fmt: skip


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("task", EQUAL)
def test_local_and_hub_rows_are_one_item(task, tmp_path):
    local, hub, context, continuations, gold = EQUAL[task]
    first, second = load_items(task, written(tmp_path / "rows.jsonl", [local, hub]))
    assert first == second
    assert set(first.contexts) == {context}
    assert (list(first.continuations), first.gold) == (continuations, gold)
    assert first.place == f"{tmp_path}/rows.jsonl:1"


def test_winogrande_has_its_options_in_the_context(tmp_path):
    rows = [
        {"context_options": ["Ann so Ann", "Ann so Eve"], "continuation": "won.", "gold": 1},
        {"sentence": "Ann so _ won.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ]
    first, second = load_items("winogrande", written(tmp_path / "rows.jsonl", rows))
    assert first == second
    assert first == Item(contexts=("Ann so Ann", "Ann so Eve"), continuations=(" won.", " won."), gold=1)
    assert first.solved == "Ann so Eve won."


def test_hellaswag_is_cleaned(tmp_path):
    row = {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Mix [step] Take  flour.",
        "ctx_b": "the COOK",
        "endings": ["[substeps] stirs.", "sings [title] loudly"],
        "label": "1",
    }
    (item,) = load_items("hellaswag", written(tmp_path / "rows.jsonl", [row]))
    assert item.contexts[0] == "Baking: How to bake. Mix Take flour. The cook"
    assert item.continuations == ("  stirs.", " sings. loudly")
    assert item.gold == 1


def test_one_continuation(tmp_path):
    (item,) = load_items("lambada", written(tmp_path / "l.jsonl", [{"text": "He saw\nthe  sea"}]))
    assert (item.contexts, item.continuations) == (("He saw\nthe ",), (" sea",))
    row = {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}
    (item,) = load_items("gsm8k", written(tmp_path / "g.jsonl", [row]))
    assert item.solved == "Question: 1 + 1?\nAnswer: 1 + 1 = 2\n#### 2"


GOOD = {"query": "Question: Sand is", "choices": ["wet", "dry"], "gold": 1}


@pytest.mark.parametrize(("task", "row", "message"), [
    ("arc_easy", {**GOOD, "gold": 2}, "no choice 2 among 2"),
    ("arc_easy", {**GOOD, "gold": "b"}, "gold is 'b', no index"),
    ("arc_easy", {**GOOD, "choices": "wet"}, "choices is 'wet', no list"),
    ("arc_easy", {**GOOD, "choices": ["wet", 3]}, "choices is 3, no text"),
    ("arc_easy", {"text": "Sand"}, "no field 'question'; a row of arc_easy has query, choices, gold"),
    ("arc_easy", {"question": "q", **AI2, "answerKey": "C"}, "'C' is not in list"),
    ("arc_easy", {"question": "q", "answerKey": "C", "choices": ["a", "b"]}, "no table of text and label"),
    ("copa", {"premise": "a.", "question": "why", "choice1": "a", "choice2": "b"}, "'why', neither"),
    ("winogrande", {"sentence": "none", "option1": "a", "option2": "b", "answer": "1"}, "sentence has no _"),
    ("lambada", {"text": "word"}, "space and a word"),
    ("gsm8k", {"question": "q", "answer": "2"}, "no number behind ####"),
    ("piqa", {**GOOD, "query": " "}, "query is ' ', no text"),
])  # fmt: skip
def test_malformed_rows_name_file_and_line(task, row, message, tmp_path):
    good = EQUAL[task][0] if task in EQUAL else None
    path = written(tmp_path / "rows.jsonl", [good, row] if good else [row])
    with pytest.raises(InputError) as error:
        load_items(task, path)
    assert f"rows.jsonl:{2 if good else 1}: " in str(error.value)
    assert message in str(error.value)


def test_unusable_sources(tmp_path):
    with pytest.raises(InputError, match=r"no rows; a row of boolq has query"):
        load_items("boolq", written(tmp_path / "none.jsonl", []))
    with pytest.raises(InputError, match="no such file; give rows"):
        load_items("boolq", str(tmp_path / "missing.jsonl"))
    (tmp_path / "bad.jsonl").write_text('\n{"text": "a b"}\nText\n')
    with pytest.raises(InputError, match=r"bad.jsonl:3: not JSON"):
        load_items("lambada", str(tmp_path / "bad.jsonl"))
    with pytest.raises(UsageError, match="race: no such task; use arc_easy"):
        load_items("race", "rows.jsonl")
    with pytest.raises(UsageError, match="hub:NAME"):
        load_items("piqa", "hub::a")


def test_hub_data_sets(monkeypatch):
    asked, fake = [], types.ModuleType("datasets")
    fake.load_dataset = lambda *args, **kwargs: (
        asked.append((args, kwargs)) or [{"question": "Sand is", **AI2}]
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    (item,) = load_items("arc_easy", "hub:allenai/ai2_arc:ARC-Easy")
    assert item.place == "hub:allenai/ai2_arc:ARC-Easy row 0"
    load_items("arc_easy", "hub:allenai/ai2_arc:ARC-Easy:validation")
    assert asked == [(("allenai/ai2_arc", "ARC-Easy"), {"split": s}) for s in ("test", "validation")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"jaxquant\[hub\]"):
        load_items("arc_easy", "hub:allenai/ai2_arc")


def question(n, subject=""):
    return Item(contexts=(f"Q{n}:",) * 2, continuations=(" no", " yes"), gold=n % 2, subject=subject)


def test_examples_are_drawn_by_seed_and_not_asked():
    items = [question(n) for n in range(12)]
    draws = {seed: with_shots(items, items, 3, seed=seed) for seed in range(3)}
    assert draws[0] == with_shots(items, items, 3, seed=0)
    assert len({draw[0].contexts[0].rpartition("\n\n")[0] for draw in draws.values()}) > 1
    for draw in draws.values():
        assert len(draw) == 9
        header = draw[0].contexts[0].rpartition("\n\n")[0]
        assert header.count(":") == 3
        assert not {item.contexts[0].rpartition("\n\n")[2] for item in draw} & {
            f"{q.split(':')[0]}:" for q in header.split("\n\n")
        }
    # The same row in another file is the same item.
    left = with_shots(items, [question(5), question(20)], 2)
    assert len(left) == 11
    assert sorted(left[0].contexts[0].split("\n\n")) == ["Q0:", "Q20: no", "Q5: yes"]
    assert with_shots(items, [], 0) == items


def test_subjects_have_their_own_first_examples():
    pool = [question(n, subject) for n in range(20, 25) for subject in ("About a.\n\n", "About b.\n\n")]
    first, second = with_shots([question(0, "About a.\n\n"), question(1, "About b.\n\n")], pool, 2)
    assert first.contexts[0] == "About a.\n\nQ20: no\n\nQ21: yes\n\nQ0:"
    assert second.contexts[0].startswith("About b.\n\n")
    with pytest.raises(InputError, match=r"5 examples of 'About a.', 6 needed"):
        with_shots([question(0, "About a.\n\n")], pool, 6)
    (bare,) = with_shots([question(0, "About a.\n\n")], pool, 0)
    assert bare.contexts[0] == "About a.\n\nQ0:"


def test_too_few_items():
    with pytest.raises(InputError, match="1 examples, 2 needed"):
        with_shots([question(0)], [question(1)], 2)
    with pytest.raises(InputError, match="every item serves as an example"):
        with_shots([question(0)], [question(0)], 1)
    with pytest.raises(UsageError, match="must not be negative"):
        with_shots([question(0)], [question(1)], -1)


def test_every_shared_file_is_read(shared_data):
    files = {
        "arc_easy": "arc/arc_easy_test", "arc_challenge": "arc/arc_challenge_test_even",
        "hellaswag": "hellaswag/hellaswag_val_1000", "piqa": "piqa/piqa_valid",
        "winogrande": "winogrande/winogrande_dev_even", "boolq": "boolq/boolq_valid_even",
        "openbookqa": "openbookqa/openbookqa_test", "copa": "copa/copa", "mmlu": "mmlu/mmlu_test_sub",
        "lambada": "lambada/lambada_openai_test_even", "gsm8k": "gsm8k/gsm8k_test_even",
    }  # fmt: skip
    assert set(files) == set(TASKS)
    counts = {task: len(load_items(task, str(shared_data / f"{file}.jsonl"))) for task, file in files.items()}
    assert (counts["arc_easy"], counts["mmlu"], counts["lambada"]) == (2376, 1003, 2576)
