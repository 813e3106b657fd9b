"""Tokenizers from GGUF metadata against the tokenizers they describe."""

from __future__ import annotations

import heapq
import itertools
import json
import random

import pytest
from stories import read_tok512
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxquant.errors import InputError
from jaxquant.io import tokenizer as gguf_tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

TEXTS = [
    "Hello, world! It's 12345 o'clock; we'll see.",
    "  two spaces,\ttab\n\nand newlines \r\n  end  ",
    "Ünïcödé — 日本語 🙂 е\u0301",
    "<|im_start|>user\nHi<|im_end|>",
    "",
]


def build(**metadata):
    return gguf_tokenizer.from_metadata(
        {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, place="model.gguf"
    )


@pytest.fixture(scope="module")
def trained():
    """A byte-level tokenizer in SmolLM's manner, trained on a little text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = (
        "it was the best of times, it was the worst of times, we'll see the user's 12345 o'clock world " * 3
    )
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def metadata_of(tokenizer, *, pre):
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    types = [CONTROL if t.startswith("<|") else USER if t == "<tool>" else NORMAL for t in tokens]
    merges = [" ".join(pair) for pair in model["merges"]]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}


def test_byte_level_round_trip(trained):
    ours = build(**metadata_of(trained, pre="smollm"))
    for text in [*TEXTS, "a<tool>b", " the<tool> the"]:
        encoded = ours.encode(text)
        assert encoded.ids == trained.encode(text, add_special_tokens=False).ids
        assert ours.decode(encoded.ids, skip_special_tokens=False) == text


def test_special_tokens_are_one_token_and_can_be_skipped(trained):
    ours = build(**metadata_of(trained, pre="smollm"))
    ids = ours.encode("<|im_start|>the<|im_end|>").ids
    assert ids[0] == 1
    assert ids[-1] == 2
    assert ours.decode(ids) == "the"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'ll", "Ġpay", "Ġ12345", ",", "Ċ", "Ċ", "OK", "?!", "Ċ", "I", "'", "LL"]),
        ("smollm", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "5", ",", "Ċ", "Ċ", "OK", "?!", "Ċ", "I",
                    "'", "LL"]),
        ("llama-bpe", ["I", "'ll", "Ġpay", "Ġ", "123", "45", ",ĊĊ", "OK", "?!Ċ", "I", "'LL"]),
        ("qwen2", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "5", ",ĊĊ", "OK", "?!Ċ", "I", "'LL"]),
    ],
)  # fmt: skip
def test_splits(trained, pre, pieces):
    ours = build(**metadata_of(trained, pre=pre))
    found = [piece for piece, _ in ours.pre_tokenizer.pre_tokenize_str("I'll pay 12345,\n\nOK?!\nI'LL")]
    assert found == pieces


def test_llama3_takes_whole_words_without_merges(trained):
    metadata = metadata_of(trained, pre="llama-bpe")
    metadata["tokens"] = [*metadata["tokens"], "zyxw"]
    metadata["token_type"] = [*metadata["token_type"], NORMAL]
    assert build(**metadata).encode("zyxw").ids == [len(metadata["tokens"]) - 1]
    assert len(build(**{**metadata, "pre": "qwen2"}).encode("zyxw").ids) == 4


def test_qwen2_composes_unicode(trained):
    ours = build(**metadata_of(trained, pre="qwen2"))
    assert ours.encode("e\u0301").ids == ours.encode("\u00e9").ids


def greedy(text, scores):
    """SentencePiece BPE: join the adjacent pair whose union has the best score, leftmost first."""
    pieces = list(text)
    while True:
        joined = [
            (scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in scores
        ]
        if not joined:
            return pieces
        best = max(joined, key=lambda pair: (pair[0], -pair[1]))[1]
        pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]


def sentencepiece_metadata(words, *, seed=0):
    """A vocabulary of all prefixes-by-halves of `words`, with byte tokens, ranked at random."""
    pieces = {"▁"} | {c for w in words for c in w}
    for word in words:
        heap = [word]
        while heap:
            piece = heapq.heappop(heap)
            if len(piece) > 1 and piece not in pieces:
                pieces.add(piece)
                heap += [piece[: len(piece) // 2], piece[len(piece) // 2 :]]
    ranked = sorted(pieces, key=lambda piece: (len(piece), piece))
    random.Random(seed).shuffle(ranked)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *ranked]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(ranked)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(ranked))]
    return {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores, "unknown_token_id": 0}


WORDS = [
    "▁once",
    "▁upon",
    "▁time",
    "▁there",
    "▁was",
    "▁a",
    "▁girl",
    "ere",
    "ing",
    "▁the",
    "▁▁▁",
    "on",
    "ce▁u",
]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_sentencepiece_joins_by_score(prefix, seed):
    metadata = sentencepiece_metadata(WORDS, seed=seed)
    ours = build(**metadata, add_space_prefix=prefix)
    scores = dict(zip(metadata["tokens"], metadata["scores"], strict=True))
    for text in ["once upon a time there was a girl", "there  the   onceing", "a", "girl "]:
        encoded = ours.encode(text)
        assert encoded.tokens == greedy(("▁" if prefix else "") + text.replace(" ", "▁"), scores)
        assert ours.decode(encoded.ids) == text


def test_sentencepiece_falls_back_to_bytes():
    ours = build(**sentencepiece_metadata(WORDS), add_space_prefix=False)
    assert ours.encode("a日").tokens == ["a", "<0xE6>", "<0x97>", "<0xA5>"]
    assert ours.decode(ours.encode("a日\n").ids) == "a日\n"


def test_user_defined_runs_of_spaces():
    metadata = sentencepiece_metadata(["a", "b"])
    metadata["tokens"] += ["▁▁▁", "<b>"]
    metadata["token_type"] += [USER, USER]
    metadata["scores"] += [-1000.0, -1000.0]
    ours = build(**metadata, add_space_prefix=False)
    assert ours.encode("a   b<b>").tokens == ["a", "▁▁▁", "b", "<b>"]


def test_real_sentencepiece_vocabulary(shared_data):
    metadata = read_tok512(shared_data / "stories260K" / "tok512.bin")
    scores = dict(zip(metadata["tokens"], metadata["scores"], strict=True))
    ours = build(**metadata)
    text = (shared_data / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line and set(line.replace(" ", "▁")) <= set(scores)][:200]
    assert len(lines) == 200
    for line in lines:
        assert ours.encode(line).tokens == greedy("▁" + line.replace(" ", "▁"), scores)


@pytest.mark.parametrize(
    ("metadata", "pattern"),
    [
        ({}, "no tokenizer in the file"),
        ({"model": "t5", "tokens": ["a"]}, "tokenizer model 't5' is not supported; gpt2 and llama are"),
        (
            {"model": "gpt2", "pre": "klingon", "tokens": ["a"]},
            "pre-tokenizer 'klingon' is not known; known are .*smollm",
        ),
        ({"model": "gpt2", "tokens": ["a", "b"], "token_type": [1]}, "2 tokens but 1 token types"),
        ({"model": "gpt2", "tokens": ["a", "b"], "merges": ["a c"]}, "merges do not fit the vocabulary"),
        ({"model": "gpt2", "tokens": ["a", "b"], "merges": ["ac"]}, "merges do not fit the vocabulary"),
        ({"model": "llama", "tokens": ["a", "b"], "scores": [0.0]}, "2 tokens but 1 scores"),
        (
            {"model": "llama", "tokens": ["a"], "scores": [0.0], "unknown_token_id": 7},
            "unknown_token_id is 7",
        ),
    ],
)
def test_errors(metadata, pattern):
    with pytest.raises(InputError, match=rf"model\.gguf: .*{pattern}"):
        build(**metadata)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"model": "llama"}, True),
        ({"model": "llama", "add_bos_token": False}, False),
        ({"model": "gpt2", "pre": "smollm"}, False),
        ({"model": "gpt2", "pre": "llama-bpe"}, True),
        ({"model": "gpt2", "add_bos_token": True}, True),
        ({}, False),
    ],
)
def test_bos(metadata, expected):
    assert gguf_tokenizer.adds_bos({f"tokenizer.ggml.{k}": v for k, v in metadata.items()}) is expected
