from __future__ import annotations

import gzip
import io
import json
import re
import sys
import types

import numpy as np
import pytest

from jaxquant.calibrate import text as text_module
from jaxquant.calibrate.text import eval_windows, read_text, windows
from jaxquant.errors import InputError, UsageError
from jaxquant.models.config import ModelConfig


def make_config(**fields) -> ModelConfig:
    return ModelConfig(
        **{
            "family": "llama", "vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1,
            "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "query_scale": 1.0, **fields,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """Words become numbers; the text of a test is `0 1 2 ...`, so a token says where it came from."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({str(n): n for n in range(300)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def count_to(n: int) -> str:
    return " ".join(map(str, range(n)))


# --- the embedded corpus


def eight_word_sequences(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


def test_corpus_splits_share_no_eight_words():
    calibration, evaluation = read_text("corpus"), read_text("corpus:evaluation")
    assert not eight_word_sequences(calibration) & eight_word_sequences(evaluation)


def test_corpus_has_the_promised_size_and_takes_turns_between_registers():
    calibration, evaluation = read_text("corpus"), read_text("corpus:evaluation")
    assert 55_000 < len(calibration) + len(evaluation) < 65_000
    assert 3 < len(calibration) / len(evaluation) < 5
    documents = calibration.split("\n\n")
    assert documents[3].startswith("How to")
    assert documents[4].startswith("Question:")
    assert documents[9].startswith("Question:")
    assert all(document.strip() for document in documents)


def test_corpus_default_is_the_calibration_split():
    assert read_text("corpus") == read_text("corpus:calibration")


def test_corpus_worked_answers_end_with_the_answer():
    questions = [d for d in read_text("corpus").split("\n\n") if d.startswith("Question:")]
    assert len(questions) > 25
    for question in questions:
        worked, _, answer = question.partition("The answer is ")
        numbers = re.findall(r"\d[\d,.]*\d|\d", answer)
        assert numbers
        assert all(number in worked for number in numbers), question


def test_corpus_unknown_split_is_a_usage_error():
    with pytest.raises(UsageError, match="corpus:evaluation"):
        read_text("corpus:test")


# --- files


def test_plain_file_keeps_its_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\u2028three\n".encode())
    assert read_text(str(path)) == "one\r\ntwo\u2028three\n"


def test_raw_file_is_joined_as_wikitext(tmp_path):
    raw = " \n = Title = \n \n One row .\n Another .\n \n"
    path = tmp_path / "wiki.test.raw"
    path.write_text(raw, newline="")
    rows = ["" if line.strip() == "" else line + "\n" for line in raw.split("\n")[:-1]]
    assert read_text(str(path)) == "\n\n".join(rows)
    (tmp_path / "wiki.txt").write_text(raw, newline="")
    assert read_text(str(tmp_path / "wiki.txt")) == raw


def test_wikitext2_has_the_canonical_length(shared_data):
    assert len(read_text(str(shared_data / "wikitext2" / "wiki.test.raw"))) == 1_294_336


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_jsonl_takes_text_or_prefix_and_completion(tmp_path, suffix):
    rows = [{"text": "a\nb"}, {"prefix": "once ", "gold_completion": "upon", "other": 1}]
    data = "\n".join(map(json.dumps, rows)).encode() + b"\n\n"
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    assert read_text(str(path)) == "a\nb\n\nonce upon"


def test_jsonl_takes_questions_with_their_right_answers(tmp_path):
    rows = [
        {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
        {"query": "Question: Is it so?\n", "choices": ["no", "yes"], "gold": 1},
        {"query": "Therefore", "choices": ["it is.", "it was."], "gold": 0},
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_text(str(path)) == (
        "Question: 1 + 1?\nAnswer: 1 + 1 = <<1+1=2>>2\n#### 2\n\n"
        "Question: Is it so?\nAnswer: yes\n\n"
        "Therefore\nAnswer: it is."
    )


@pytest.mark.parametrize(
    ("file", "rows"), [("gsm8k/gsm8k_train_1000.jsonl", 1000), ("arc/arc_challenge_test_even.jsonl", 586)]
)
def test_task_files_are_read_as_questions(shared_data, file, rows):
    text = read_text(str(shared_data / file))
    assert text.startswith("Question: ")
    assert len(re.findall(r"^Answer: ", text, re.MULTILINE)) == rows


def test_gz_of_raw_and_of_text(tmp_path):
    (tmp_path / "a.raw.gz").write_bytes(gzip.compress(b"x\n \n"))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x\n \n"))
    assert read_text(str(tmp_path / "a.raw.gz")) == "x\n\n\n"
    assert read_text(str(tmp_path / "a.txt.gz")) == "x\n \n"


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO("déjà\r\n".encode())))
    assert read_text("-") == "déjà\r\n"
    with pytest.raises(InputError, match="standard input: the text is empty"):
        read_text("-")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\n", "empty"),
        ("binary.txt", b"ab\0\1\2", "zero byte at offset 2"),
        ("latin.txt", "caf\u00e9 au lait".encode("latin-1"), "0xe9 at offset 3 is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\nnot json\n', "bad.jsonl:2: not JSON"),
        ("list.jsonl", b"[1]\n", "list.jsonl:1: a JSON object is needed, found list"),
        ("other.jsonl", b'{"body": "a", "id": 3}\n', "no string field text.*found body, id"),
        ("number.jsonl", b'{"text": 3}\n', "no string field text"),
        (
            "gold.jsonl",
            b'{"query": "q", "choices": ["a"], "gold": 1}\n',
            "gold.jsonl:1: no string field text",
        ),
        ("choices.jsonl", b'{"query": "q", "choices": [1], "gold": 0}\n', "query with choices and gold"),
        ("answer.jsonl", b'{"question": "q", "choices": ["a"]}\n', "question and answer"),
        ("notgz.txt.gz", b"plain", "cannot be read"),
        ("cut.txt.gz", gzip.compress(b"a" * 1000, mtime=0)[:-9], "cannot be read"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        read_text(str(tmp_path / name))
    assert name in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.txt: no such file"):
        read_text(str(tmp_path / "nothing.txt"))
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        read_text(str(tmp_path))


# --- hub data sets


class Rows:
    column_names = ("body", "id")

    def __getitem__(self, field):
        return {"body": ["one\n", "", "two"], "id": [1, 2, 3]}[field]


def test_hub_passes_the_parts_and_joins_the_rows(monkeypatch):
    calls = []
    fake = types.ModuleType("datasets")
    vars(fake)["load_dataset"] = lambda *args, **kwargs: calls.append((args, kwargs)) or Rows()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read_text("hub:owner/name::validation:body") == "one\n\n\n\n\ntwo"
    assert calls == [(("owner/name", None), {"split": "validation"})]
    with pytest.raises(InputError, match="the fields are body, id"):
        read_text("hub:owner/name")
    with pytest.raises(InputError, match="no text in field id"):
        read_text("hub:owner/name:::id")


def test_hub_without_the_package_or_the_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"jaxquant\[hub\]"):
        read_text("hub:wikitext")
    fake = types.ModuleType("datasets")

    def fail(*args, **kwargs):
        raise ConnectionError("no route")

    vars(fake)["load_dataset"] = fail
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(InputError, match="no route; check the name"):
        read_text("hub:wikitext")


@pytest.mark.parametrize("spec", ["hub:", "hub:a:b:c:d:e"])
def test_hub_with_wrong_parts(spec):
    with pytest.raises(UsageError, match="hub:NAME"):
        read_text(spec)


# --- windows


def test_windows_do_not_overlap_when_the_text_is_long_enough(tokenizer):
    for seed in range(20):
        got = windows(count_to(100), tokenizer, make_config(), samples=6, seqlen=16, seed=seed)
        assert got.shape == (6, 16)
        assert got.dtype == np.int32
        assert (np.diff(got, axis=1) == 1).all()
        assert len(np.unique(got)) == got.size
    exact = windows(count_to(96), tokenizer, make_config(), samples=6, seqlen=16, seed=0)
    assert sorted(exact[:, 0]) == [0, 16, 32, 48, 64, 80]


def test_windows_reach_every_part_of_the_text(tokenizer):
    seen = [windows(count_to(40), tokenizer, make_config(), samples=2, seqlen=8, seed=s) for s in range(200)]
    assert set(np.unique(seen)) == set(range(40))


def test_windows_same_seed_same_windows(tokenizer):
    def draw(seed):
        return windows(count_to(200), tokenizer, make_config(), samples=5, seqlen=8, seed=seed)

    np.testing.assert_array_equal(draw(3), draw(3))
    assert (draw(3) != draw(4)).any()


def test_windows_of_a_short_text_overlap_with_distinct_starts(tokenizer):
    got = windows(count_to(20), tokenizer, make_config(), samples=8, seqlen=12, seed=0)
    assert len(set(got[:, 0])) == 8
    more = windows(count_to(13), tokenizer, make_config(), samples=8, seqlen=12, seed=0)
    assert set(more[:, 0]) == {0, 1}


def test_eval_windows_are_consecutive_and_drop_the_tail(tokenizer):
    got = eval_windows(count_to(29), tokenizer, make_config(), seqlen=9)
    np.testing.assert_array_equal(got, np.arange(27, dtype=np.int32).reshape(3, 9))
    assert got.dtype == np.int32
    limited = eval_windows(count_to(29), tokenizer, make_config(), seqlen=9, limit=2)
    np.testing.assert_array_equal(limited, got[:2])
    assert len(eval_windows(count_to(29), tokenizer, make_config(), seqlen=9, limit=50)) == 3


def test_every_window_starts_with_bos_where_the_model_wants_it(tokenizer):
    config = make_config(add_bos=True, bos_id=299)
    got = eval_windows(count_to(29), tokenizer, config, seqlen=9)
    np.testing.assert_array_equal(got[1], [299, *range(9, 17)])
    drawn = windows(count_to(100), tokenizer, config, samples=4, seqlen=10, seed=1)
    assert drawn.shape == (4, 10)
    assert (drawn[:, 0] == 299).all()
    assert (np.diff(drawn[:, 1:], axis=1) == 1).all()
    with pytest.raises(InputError, match="no bos_id"):
        eval_windows(count_to(29), tokenizer, make_config(add_bos=True), seqlen=9)


def test_too_short_texts_say_what_was_found_and_needed(tokenizer):
    with pytest.raises(InputError, match=r"16 tokens found, 17 needed.*--seqlen 15"):
        windows(count_to(16), tokenizer, make_config(), samples=1, seqlen=16, seed=0)
    with pytest.raises(InputError, match=r"16 tokens found, 20 needed.*--seqlen 16"):
        eval_windows(count_to(16), tokenizer, make_config(), seqlen=20)
    with pytest.raises(InputError, match=r"use a longer text$"):
        eval_windows("1", tokenizer, make_config(), seqlen=20)


@pytest.mark.parametrize("limits", [{"seqlen": 0}, {"seqlen": 8, "limit": 0}])
def test_eval_windows_needs_positive_numbers(tokenizer, limits):
    with pytest.raises(UsageError, match="must be at least 1"):
        eval_windows(count_to(29), tokenizer, make_config(), **limits)


def test_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(InputError, match="token id 28 but the model has 20 embeddings"):
        eval_windows(count_to(29), tokenizer, make_config(vocab_size=20), seqlen=4)


def test_truncation_and_special_tokens_of_the_tokenizer_are_ignored(tokenizer):
    from tokenizers import Tokenizer, processors

    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(max_length=4)
    other.post_processor = processors.TemplateProcessing(single="7 $A", special_tokens=[("7", 7)])
    got = eval_windows(count_to(29), other, make_config(), seqlen=29)
    np.testing.assert_array_equal(got[0], np.arange(29))
    assert other.truncation["max_length"] == 4


def test_registers_all_ship():
    assert {f"{r}.{s}.txt" for r in text_module.REGISTERS for s in text_module.SPLITS} == {
        file.name for file in (text_module.resources.files("jaxquant.calibrate") / "corpus").iterdir()
    }
