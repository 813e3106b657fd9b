"""Text and token windows: where calibration and evaluation data come from."""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import sys
import zlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxquant.errors import InputError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from jaxquant.models.config import ModelConfig

REGISTERS = ("encyclopedic", "story", "dialogue", "howto", "arithmetic")
SPLITS = ("calibration", "evaluation")


def read_text(spec: str) -> str:
    r"""The text that `spec` names, line ends untouched.

    Args:
      spec: one of
        `corpus`, `corpus:evaluation`: the embedded English text, documents of its five registers in turn
          (a file of that name is `./corpus`);
        `-`: standard input;
        `hub:NAME[:CONFIG][:SPLIT][:FIELD]`: rows of a Hugging Face data set, joined with two newlines; an
          empty part keeps its default (no config, `train`, `text`);
        anything else: a UTF-8 file. `.raw` is read as WikiText: rows joined with two newlines, a blank row
          being the empty string. `.jsonl` gives one document a line, joined with two newlines: the field
          `text`; `prefix` + `gold_completion`; `question` and `answer` (GSM8K) as
          "Question: ...\nAnswer: ..."; or `query`, which asks by itself, and the one of its `choices` that
          `gold` counts from 0 (ARC, PIQA) as "...\nAnswer: ...". All may end in `.gz`.

    Raises:
      InputError: nothing there, nothing in it, not text, or a row without a text field.
      UsageError: `corpus:` or `hub:` with parts that do not exist.
    """
    if spec == "corpus" or spec.startswith("corpus:"):
        return _corpus(spec.partition(":")[2] or "calibration")
    if spec.startswith("hub:"):
        text = _hub(spec)
    elif spec == "-":
        text = _decode(sys.stdin.buffer.read(), "standard input")
    else:
        text = _file(Path(spec))
    if not text.strip():
        place = "standard input" if spec == "-" else spec
        raise InputError(f"{place}: the text is empty; give some prose, or corpus for the built-in text")
    return text


def windows(
    text: str, tokenizer: Tokenizer, config: ModelConfig, *, samples: int, seqlen: int, seed: int
) -> np.ndarray:
    """Random calibration windows, the same for the same seed.

    Windows do not overlap if the text holds `samples * seqlen` tokens: every such placement is then equally
    likely. A shorter text gives distinct, overlapping starts (repeated ones only where there are fewer
    starts than samples). With `config.add_bos` a window is BOS and its first `seqlen - 1` tokens.

    Returns:
      int32 `[samples, seqlen]`.

    Raises:
      InputError: fewer than `seqlen + 1` tokens, or token ids that the model does not have.
    """
    _positive(samples=samples, seqlen=seqlen)
    ids = token_ids(text, tokenizer, config)
    if ids.size < seqlen + 1:
        raise InputError(
            f"calibration text: {ids.size} tokens found, {seqlen + 1} needed for windows of {seqlen}; "
            f"{_shorter(ids.size - 1)}"
        )
    rng = np.random.default_rng(seed)
    slack = ids.size - samples * seqlen
    if slack >= 0:
        # Each placement of disjoint windows is one choice of `samples` out of `slack + samples` cells.
        cells = np.sort(rng.choice(slack + samples, samples, replace=False))
        starts = rng.permutation(cells + np.arange(samples) * (seqlen - 1))
    else:
        count = ids.size - seqlen + 1
        starts = rng.choice(count, samples, replace=count < samples)
    return _with_bos(ids[starts[:, None] + np.arange(seqlen)[None, :]], config)


def eval_windows(
    text: str, tokenizer: Tokenizer, config: ModelConfig, *, seqlen: int, limit: int | None = None
) -> np.ndarray:
    """Consecutive windows without overlap; the short tail is dropped.

    With `config.add_bos` a window is BOS and its first `seqlen - 1` tokens (its last token is not used).

    Args:
      limit: at most this many windows; `None` for all.

    Returns:
      int32 `[n, seqlen]`.

    Raises:
      InputError: fewer than `seqlen` tokens, or token ids that the model does not have.
    """
    _positive(seqlen=seqlen, limit=1 if limit is None else limit)
    ids = token_ids(text, tokenizer, config)
    count = ids.size // seqlen
    if count == 0:
        raise InputError(
            f"evaluation text: {ids.size} tokens found, {seqlen} needed for one window; {_shorter(ids.size)}"
        )
    count = count if limit is None else min(count, limit)
    return _with_bos(ids[: count * seqlen].reshape(count, seqlen), config)


def token_ids(text: str, tokenizer: Tokenizer, config: ModelConfig) -> np.ndarray:
    """The tokens of `text`, int32, no special ones added and none cut off.

    Raises:
      InputError: token ids that the model does not have.
    """
    if tokenizer.truncation or tokenizer.padding:
        # Both are settings of the object; the caller's keeps its own.
        tokenizer = type(tokenizer).from_str(tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    if ids.size and ids.max() >= config.vocab_size:
        raise InputError(
            f"tokenizer: token id {ids.max()} but the model has {config.vocab_size} embeddings; "
            "use the tokenizer that belongs to the model"
        )
    return ids


def json_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, which may end in `.gz`, each with its place `file:line`.

    Raises:
      InputError: the file is missing, is no text, or a line that is not blank is no JSON object.
    """
    lines = enumerate(_content(path).split("\n"), 1)
    return [(f"{path}:{n}", _object(line, f"{path}:{n}")) for n, line in lines if line.strip()]


def load_hub(spec: str, name: str, config: str, split: str) -> Any:
    """Rows of a Hugging Face data set, with `column_names`; `spec` stands for it in messages.

    Raises:
      InputError: the package datasets is missing, or it cannot load that.
    """
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f'{spec}: needs the package datasets; pip install "jaxquant[hub]", or give a file'
        ) from None
    try:
        return load_dataset(name, config or None, split=split)
    except Exception as error:  # the package raises its own types, those of its storage, and plain ones
        raise InputError(f"{spec}: {error}; check the name and the connection, or give a file") from error


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"{name}={value}: must be at least 1")


def _shorter(available: int) -> str:
    if available < 2:
        return "use a longer text"
    return f"use a longer text or --seqlen {available} or less"


def _with_bos(ids: np.ndarray, config: ModelConfig) -> np.ndarray:
    if not config.add_bos:
        return ids
    if config.bos_id is None:
        raise InputError(
            "model config: add_bos is set but there is no bos_id; add bos_token_id to config.json"
        )
    bos = np.full((len(ids), 1), config.bos_id, np.int32)
    return np.concatenate([bos, ids[:, :-1]], axis=1)


def _corpus(split: str) -> str:
    if split not in SPLITS:
        raise UsageError(f"corpus:{split}: no such split; use corpus:calibration or corpus:evaluation")
    folder = resources.files("jaxquant.calibrate") / "corpus"
    registers = [
        (folder / f"{register}.{split}.txt").read_bytes().decode().strip().split("\n\n")
        for register in REGISTERS
    ]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*registers))
    return "\n\n".join(document for document in in_turn if document is not None) + "\n"


def _file(path: Path) -> str:
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    if suffix == ".jsonl":
        return "\n\n".join(_document(row, place) for place, row in json_rows(path))
    text = _content(path)
    return _join_wikitext(text) if suffix == ".raw" else text


def _content(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a text file, - for standard input, or corpus") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); give a readable text file") from error
    return _decode(data, str(path))


def _decode(data: bytes, place: str) -> str:
    data = data.removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        raise InputError(f"{place}: a zero byte at offset {data.index(0)}: not a text file; give UTF-8 text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8; convert it"
        ) from None


def _join_wikitext(raw: str) -> str:
    """The usual WikiText perplexity text: blank rows are empty, two newlines between rows."""
    rows = raw.removesuffix("\n").split("\n")
    return "\n\n".join("" if not row.strip() else row + "\n" for row in rows)


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON ({error.msg}); write one JSON object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: a JSON object is needed, found {type(row).__name__}")
    return row


def _document(row: dict[str, Any], place: str) -> str:
    match row:
        case {"text": str(text)}:
            return text
        case {"prefix": str(prefix), "gold_completion": str(completion)}:
            return prefix + completion
        case {"question": str(question), "answer": str(answer)}:
            return f"Question: {question}\nAnswer: {answer}"
        case {"query": str(query), "choices": [*choices], "gold": int(gold)} if gold in range(len(choices)):
            if isinstance(choices[gold], str):
                return f"{query.rstrip()}\nAnswer: {choices[gold]}"
    raise InputError(
        f"{place}: no string field text (nor prefix and gold_completion, question and answer, or query with "
        f"choices and gold, the number of one); found {', '.join(row) or 'nothing'}"
    )


def _hub(spec: str) -> str:
    parts = spec.split(":")[1:]
    if len(parts) > 4 or not parts[0]:
        raise UsageError(
            f"{spec}: write hub:NAME[:CONFIG][:SPLIT][:FIELD], such as hub:wikitext:wikitext-2-raw-v1:test"
        )
    name, config, split, field = parts + [""] * (4 - len(parts))
    rows = load_hub(spec, name, config, split or "train")
    texts = rows[field or "text"] if (field or "text") in rows.column_names else []
    if not all(isinstance(text, str) for text in texts) or not len(texts):
        raise InputError(
            f"{spec}: no text in field {field or 'text'}; the fields are {', '.join(rows.column_names)}"
        )
    return "\n\n".join(texts)
