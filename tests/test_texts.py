"""Texts and tasks by name, mixed in shares."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxquant.calibrate.text import windows
from jaxquant.errors import UsageError
from jaxquant.io import open_model
from jaxquant.texts import calibration_windows, mixed_windows, text_words


@pytest.fixture(scope="module")
def source():
    return open_model("tiny")


def test_shares_are_windows_of_each_text_in_random_order(source, tmp_path):
    other = tmp_path / "counted.txt"
    other.write_text("one two three four five six seven eight nine ten " * 40)
    texts = {"corpus": 3.0, str(other): 1.0}
    mixed = mixed_windows(source, texts, samples=8, seqlen=16, seed=0)
    parts = [calibration_windows(source, "corpus", samples=6, seqlen=16, seed=0),
             calibration_windows(source, str(other), samples=2, seqlen=16, seed=0)]  # fmt: skip
    assert sorted(map(tuple, mixed)) == sorted(map(tuple, np.concatenate(parts)))
    assert not np.array_equal(mixed, np.concatenate(parts))
    alone = mixed_windows(source, {"corpus": 0.2}, samples=6, seqlen=16, seed=0)
    np.testing.assert_array_equal(alone, parts[0])
    with pytest.raises(UsageError, match=r"counted\.txt: its share of 3 windows is less than one"):
        mixed_windows(source, {"corpus": 9.0, str(other): 1.0}, samples=3, seqlen=16, seed=0)
    with pytest.raises(UsageError, match="--seqlen 1: this model takes 2 to"):
        mixed_windows(source, texts, samples=8, seqlen=1, seed=0)


def test_rows_of_a_task_are_text_with_their_answers(source, tmp_path):
    rows = [
        {"goal": f"Count to {i}", "sol1": "Say the numbers.", "sol2": "Sleep.", "label": 0} for i in range(30)
    ]
    file = tmp_path / "piqa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = calibration_windows(source, f"piqa={file}", samples=2, seqlen=16, seed=0)
    text = "\n\n".join(f"Question: Count to {i}\nAnswer: Say the numbers." for i in range(30))
    expected = windows(text, source.tokenizer(), source.config, samples=2, seqlen=16, seed=0)
    np.testing.assert_array_equal(found, expected)


def test_words():
    assert text_words({"a": 2.0, "b": 2.0}) == "a, b"
    assert text_words({"a": 1.0, "b": 3.0}) == "0.25 a, 0.75 b"
