"""Tokenizers from GGUF metadata (`tokenizer.ggml.*`), built with the `tokenizers` package.

Two kinds exist in the supported architectures: byte-level BPE with merges (`gpt2`), split by the regular
expression that `tokenizer.ggml.pre` names, and SentencePiece BPE with scores and byte fallback (`llama`).
None of them adds special tokens on its own; `adds_bos` tells what the model expects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxquant.errors import InputError

if TYPE_CHECKING:
    import tokenizers
    from tokenizers.pre_tokenizers import PreTokenizer

# Token types of the format.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6

# How text is split before BPE. "gpt2": the regular expression built into the byte-level pre-tokenizer;
# "digits": the same after single digits have been split off; otherwise the expression of the model family,
# where {n} is how many digits may stay together.
_FAMILY = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{n}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = _FAMILY.replace("{n}", "{1,3}"), _FAMILY.replace("{n}", "")
_SPLITS = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "mpt": "gpt2",
    "olmo": "gpt2",
    "phi-2": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "command-r": "digits",
    "codeshell": "digits",
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "stablelm2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def adds_bos(metadata: dict[str, Any]) -> bool:
    """Whether a text begins with the bos token: as declared, else as the kind of tokenizer implies."""
    declared = metadata.get("tokenizer.ggml.add_bos_token")
    if declared is not None:
        return bool(declared)
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    return kind == "llama" or _SPLITS.get(str(split)) == _LLAMA3


def from_metadata(metadata: dict[str, Any], *, place: str) -> tokenizers.Tokenizer:
    """The tokenizer that GGUF `metadata` describes; `place` names the file in messages.

    Raises:
      InputError: no tokenizer in the file, or a model or pre-tokenizer that is not known here.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if kind is None or not tokens:
        raise InputError(
            f"{place}: no tokenizer in the file (tokenizer.ggml.tokens); convert it with its tokenizer"
        )
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise InputError(
            f"{place}: {len(tokens)} tokens but {len(types)} token types; convert the model again"
        )
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens, types, place)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, types, place)
    else:
        raise InputError(f"{place}: tokenizer model {kind!r} is not supported; gpt2 and llama are")
    _add_special(tokenizer, tokens, types)
    return tokenizer


def _byte_level(
    metadata: dict[str, Any], tokens: list[str], types: list[int], place: str
) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    if name not in _SPLITS:
        raise InputError(f"{place}: pre-tokenizer {name!r} is not known; known are {', '.join(_SPLITS)}")
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    split = _SPLITS[name]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        # Llama 3 takes a word that is a token as that token, even if no merges lead to it.
        model = models.BPE(vocabulary, merges, ignore_merges=split == _LLAMA3)  # pyright: ignore[reportArgumentType]
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(
            f"{place}: tokenizer.ggml.merges do not fit the vocabulary ({error}); convert it again"
        ) from error
    tokenizer = Tokenizer(model)
    if split == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = _splitter(split)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _splitter(split: str) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    if split == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "digits":
        first: PreTokenizer = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(Regex(split), behavior="isolated")
    return pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split == "digits")]
    )


def _sentencepiece(
    metadata: dict[str, Any], tokens: list[str], types: list[int], place: str
) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores") or ()
    if len(scores) != len(tokens):
        raise InputError(f"{place}: {len(tokens)} tokens but {len(scores)} scores; convert the model again")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = metadata.get(
        "tokenizer.ggml.unknown_token_id", types.index(_UNKNOWN) if _UNKNOWN in types else None
    )
    if unknown is not None and unknown >= len(tokens):
        raise InputError(f"{place}: unknown_token_id is {unknown}, but there are {len(tokens)} tokens")
    model = models.BPE(
        vocabulary,
        _merges(vocabulary, types, scores),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=_BYTE in types,
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer = Tokenizer(model)
    # No pre-tokenizer: merges may cross words, as in SentencePiece.
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    tokenizer.normalizer = normalizer  # pyright: ignore[reportAttributeAccessIssue]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _merges(vocabulary: dict[str, int], types: list[int], scores: Any) -> list[tuple[str, str]]:
    """SentencePiece joins the adjacent pair whose union has the best score; as a ranked list of merges."""
    ranked = []
    for token, index in vocabulary.items():
        if types[index] in (_UNKNOWN, _CONTROL, _UNUSED, _BYTE):
            continue
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], left, right, token, cut))
    ranked.sort()
    return [(token[:cut], token[cut:]) for _, _, _, token, cut in ranked]


def _add_special(tokenizer: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control and user-defined tokens are found in the text before it is split."""
    from tokenizers import AddedToken

    kinds = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == _CONTROL]
    )
    # Runs of spaces exist only after normalization, as runs of the space mark.
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized="▁" in token)
            for token, kind in kinds
            if kind == _USER_DEFINED and token
        ]
    )
