"""Log-likelihoods of continuations: batched by length, what requests have in common computed once.

Requests with the same context (the choices of one item) are a family, whose keys and values up to the last
tokens of the context come from one pass; families that begin alike (the same few-shot examples) share a
header. A prefix that is reused is cut at a bucket's edge, and the rest of it is read again with every
continuation: so the prefixes of a batch are equally long, nothing is padded on the left, and padding on the
right comes after everything that causal attention can see.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibrate.text import token_ids
from jaxquant.errors import InputError, NonFiniteError
from jaxquant.evaluate.scoring import Progress, at_targets, head_only, over_tokens
from jaxquant.models import decoder
from jaxquant.models.cache import KVCache, init_cache
from jaxquant.models.config import ModelConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Tokens of a batch, with those in its cache: enough for the matrix units, little beside the parameters.
_BATCH_TOKENS = 4096
_MAX_ROWS = 32
# A header is read in parts of this many tokens; a shorter one is not worth a pass of its own.
_HEADER_PART = 64
# Fewer families would not fill the batches that a header of their own sets them apart in.
_HEADER_FAMILIES = 8
# Lengths are padded to a quarter of the power of two below them, and at least to this.
_STEP = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """What a model thinks of one continuation.

    Attributes:
      log_likelihood: `sum_t log p(token t | context, tokens < t)`, in nats.
      greedy: whether every token is the most probable one at its place.
      tokens: how many there are.
      truncated: whether the context lost its beginning, since both exceed the model's context.
    """

    log_likelihood: float
    greedy: bool
    tokens: int
    truncated: bool


def encode_pair(
    tokenizer: Tokenizer, config: ModelConfig, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Tokens of `context`, and of what follows it in `context + continuation`, as in lm-evaluation-harness.

    Both texts are encoded as one and cut where the context alone ends; white space at the end of the context
    belongs to the continuation. BOS comes first where `config.add_bos` says so, and stands for an empty
    context in any case (the first end token where a model has no BOS).

    Raises:
      InputError: no token is left to score, token ids that the model does not have, or an empty context for
        a model that has neither BOS nor an end token.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    head = prompt_tokens(tokenizer, config, kept)
    first = head[: config.add_bos or not kept]
    tail = [*first, *token_ids(kept + continuation, tokenizer, config).tolist()][len(head) :]
    if not tail:
        raise InputError(
            f"the continuation {continuation!r} adds no token to its context; give one that is not empty"
        )
    return head, tail


def prompt_tokens(tokenizer: Tokenizer, config: ModelConfig, context: str) -> list[int]:
    """Tokens of a prompt, never none: BOS first as in `encode_pair`.

    Raises:
      InputError: as `encode_pair`.
    """
    tokens = token_ids(context, tokenizer, config).tolist()
    return [start_token(config), *tokens] if config.add_bos or not tokens else tokens


def start_token(config: ModelConfig) -> int:
    """BOS, or the first end token of a model without.

    Raises:
      InputError: the model has neither.
    """
    start = config.bos_id if config.bos_id is not None else next(iter(config.eos_ids), None)
    if start is None:
        raise InputError(
            "model config: neither bos_id nor eos_ids, one of which begins a text; add bos_token_id to "
            "config.json"
        )
    return start


def score_continuations(
    params: dict[str, Any],
    config: ModelConfig,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    progress: Progress | None = None,
) -> list[Continuation]:
    """Log-likelihoods of continuations given their contexts, in the order of `requests`.

    The head is evaluated at continuation tokens only, in float32. In float32 activations results depend on
    what else is in the call by less than 1e-4; rounded activations amplify such differences.

    Args:
      params: of any model, dense, packed or fake-quantized.
      requests: tokens of `(context, continuation)`, none empty. A pair of more than `max_position + 1` tokens
        loses the first ones, as in lm-evaluation-harness.
      progress: called after every batch with the numbers of requests done and in total.

    Raises:
      InputError: an empty context or continuation, a continuation longer than the model's context, or a
        token outside the vocabulary.
      NonFiniteError: the model gives NaN or infinity.
    """
    rows = [_Row.of(index, *request, config) for index, request in enumerate(requests)]
    results: dict[int, Continuation] = {}
    for shared, families in _by_header(_families(rows)):
        header = _read_header(params, config, families[0].first[:shared])
        for batch in _batches(families, shared):
            results |= _score_batch(params, config, batch, header, shared)
            if progress is not None:
                progress(len(results), len(rows))
    return [results[index] for index in range(len(rows))]


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    """One request: what the model reads, and the targets of the last places."""

    index: int
    context: tuple[int, ...]
    inputs: np.ndarray
    targets: np.ndarray
    truncated: bool

    @classmethod
    def of(cls, index: int, context: Sequence[int], continuation: Sequence[int], config: ModelConfig) -> _Row:
        if not len(context) or not len(continuation):
            raise InputError(f"request {index}: context and continuation need at least one token each")
        if len(continuation) > config.max_position:
            raise InputError(
                f"request {index}: a continuation of {len(continuation)} tokens exceeds the model's "
                f"max_position = {config.max_position}; shorten it"
            )
        tokens = np.asarray([*context, *continuation], np.int32)
        if tokens.min() < 0 or tokens.max() >= config.vocab_size:
            raise InputError(f"request {index} has tokens outside the vocabulary of {config.vocab_size}")
        inputs = tokens[:-1][-config.max_position :]
        return cls(index, tuple(context), inputs, tokens[-len(continuation) :], len(inputs) < len(tokens) - 1)

    @property
    def unscored(self) -> int:
        """How many inputs come before the first one whose output is scored."""
        return len(self.inputs) - len(self.targets)


@dataclasses.dataclass(frozen=True, slots=True)
class _Family:
    """Requests of one context; `shared` inputs are the same in all of them, and not scored."""

    rows: list[_Row]
    shared: int

    @classmethod
    def of(cls, rows: list[_Row]) -> _Family:
        first, others = rows[0], rows[1:]
        agreed = [min(row.unscored, _agreement(row.inputs, first.inputs)) for row in others]
        return cls(rows, min([first.unscored, *agreed]))

    @property
    def first(self) -> np.ndarray:
        return self.rows[0].inputs

    @property
    def longest(self) -> int:
        return max(len(row.inputs) for row in self.rows)


def _agreement(a: np.ndarray, b: np.ndarray) -> int:
    """The length of the common prefix."""
    length = min(len(a), len(b))
    return int(np.append(a[:length] == b[:length], False).argmin())


def _families(rows: Sequence[_Row]) -> list[_Family]:
    members: dict[tuple[int, ...], list[_Row]] = {}
    for row in rows:
        members.setdefault(row.context, []).append(row)
    return [
        _Family.of(same[start : start + _MAX_ROWS])
        for same in members.values()
        for start in range(0, len(same), _MAX_ROWS)
    ]


def _by_header(families: list[_Family]) -> Iterator[tuple[int, list[_Family]]]:
    """Families that begin alike, with the length of what they share; first those without a header."""
    # Sorted, families of one header are neighbours, and the neighbours' agreement is that of all.
    families = sorted(families, key=lambda family: family.first.tolist())
    runs: list[tuple[int, list[_Family]]] = []
    for family in families:
        if runs:
            header, run = runs[-1]
            shared = min(header, run[-1].shared, family.shared, _agreement(run[-1].first, family.first))
            if shared >= _HEADER_PART:
                runs[-1] = (shared, [*run, family])
                continue
        runs.append((family.shared, [family]))
    own = [(header, run) for header, run in runs if len(run) >= _HEADER_FAMILIES]
    others = [family for _, run in runs if len(run) < _HEADER_FAMILIES for family in run]
    if others:
        yield 0, others
    for header, run in own:
        yield header // _HEADER_PART * _HEADER_PART, run


def _batches(families: list[_Family], header: int) -> Iterator[list[_Family]]:
    """Families with equally many rows, the longest first; batches are filled up, so that few sizes occur."""
    for count in sorted({len(family.rows) for family in families}):
        equal = [family for family in families if len(family.rows) == count]
        reused = [_down(family.shared - header) if count > 1 else 0 for family in equal]
        order = sorted(range(len(equal)), key=lambda i: (-reused[i], -equal[i].longest))
        equal = [equal[i] for i in order]
        while equal:
            rows = min(_MAX_ROWS, _BATCH_TOKENS // _up(equal[0].longest) or 1)
            size = max(1, (1 << rows.bit_length() - 1) // count)
            size = min(size, 1 << (len(equal) - 1).bit_length())
            batch, equal = equal[:size], equal[size:]
            yield batch + batch[:1] * (size - len(batch))


def _step(length: int) -> int:
    return max(_STEP, 1 << max(length.bit_length() - 3, 0))


def _up(length: int) -> int:
    return -(-length // _step(length)) * _step(length)


def _down(length: int) -> int:
    return length // _step(length) * _step(length)


def _read_header(params: dict[str, Any], config: ModelConfig, tokens: np.ndarray) -> KVCache | None:
    if not len(tokens):
        return None
    cache = init_cache(config, 1, min(_up(len(tokens)), config.max_position))
    for part in tokens.reshape(-1, _HEADER_PART):
        cache = _advance(params, config, part[None], cache)
    return cache


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _advance(params: dict[str, Any], config: ModelConfig, tokens: jax.Array, cache: KVCache) -> KVCache:
    filled = decoder.final_hidden(params, config, tokens, cache=cache)[1]
    assert filled is not None
    return filled


def _score_batch(
    params: dict[str, Any], config: ModelConfig, batch: list[_Family], header: KVCache | None, start: int
) -> dict[int, Continuation]:
    """Results by index of request; `start` tokens are in the header."""
    rows = [row for family in batch for row in family.rows]
    alone = len(rows) == len(batch)
    begin = start + (0 if alone else _down(min(family.shared for family in batch) - start))
    longest = max(family.longest for family in batch)
    width = min(_up(longest - begin), config.max_position - begin)
    tokens = np.zeros((len(rows), width), np.int32)
    for row, padded in zip(rows, tokens, strict=True):
        padded[: len(row.inputs) - begin] = row.inputs[begin:]
    prefix = np.stack([family.first[start:begin] for family in batch])

    counts = [len(row.targets) for row in rows]
    # A power of two: one more length that programs are compiled for.
    scored = max(_HEADER_PART, 1 << (sum(counts) - 1).bit_length())
    places, targets = np.zeros((2, scored), np.int32)
    places[: sum(counts)] = np.concatenate(
        [i * width + np.arange(row.unscored, len(row.inputs)) - begin for i, row in enumerate(rows)]
    )
    targets[: sum(counts)] = np.concatenate([row.targets for row in rows])
    size = min(_up(begin + width), config.max_position)
    nll, greedy = _token_scores(params, config, prefix, tokens, places, targets, header, size=size)
    ends = np.cumsum(counts)[:-1]
    parts = zip(
        rows, np.split(np.asarray(nll)[: sum(counts)], ends),
        np.split(np.asarray(greedy)[: sum(counts)], ends), strict=True,
    )  # fmt: skip
    results = {}
    for row, row_nll, row_greedy in parts:
        if not np.isfinite(row_nll).all():
            raise NonFiniteError(
                f"the log-likelihood of request {row.index} is not finite; the model's weights or "
                "activations overflow"
            )
        results[row.index] = Continuation(
            log_likelihood=-float(row_nll.sum(dtype=np.float64)),
            greedy=bool(row_greedy.all()),
            tokens=len(row.targets),
            truncated=row.truncated,
        )
    return results


@functools.partial(jax.jit, static_argnames=("config", "size"))
def _token_scores(
    params: dict[str, Any],
    config: ModelConfig,
    prefix: jax.Array,
    tokens: jax.Array,
    places: jax.Array,
    targets: jax.Array,
    header: KVCache | None,
    *,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihoods `[N]` and whether the argmax is the target, at `places` of the flat tokens.

    Args:
      prefix: `[G, P]`, what follows the header in each family; P may be 0.
      tokens: `[G C, S]`, what follows the prefix, C rows of each family in turn.
      places, targets: `[N]`.
      header: keys and values of one text, before every prefix.
      size: places of the cache.
    """
    families, shared = prefix.shape
    cache = None
    if header is not None:
        cache = _resized(header, families, size)
    elif shared:
        cache = init_cache(config, families, size)
    if cache is not None:
        if shared:
            cache = _advance(params, config, prefix, cache)
        cache = _resized(cache, tokens.shape[0] // families, size)
    hidden, _ = decoder.final_hidden(params, config, tokens, cache=cache)
    hidden = hidden.reshape(-1, hidden.shape[-1])[places]
    head = head_only(params, config)

    def score(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = decoder.logits(head, config, hidden)
        nll = jax.nn.logsumexp(scores, axis=-1) - at_targets(scores, targets)
        return nll, scores.argmax(axis=-1) == targets

    return over_tokens(score, config.vocab_size, hidden, targets)


def _resized(cache: KVCache, copies: int, size: int) -> KVCache:
    """Every text of the cache `copies` times in turn, with places for `size` tokens."""

    def resize(leaf: jax.Array) -> jax.Array:
        missing = [(0, 0)] * leaf.ndim
        missing[2] = (0, size - leaf.shape[2])
        return jnp.pad(jnp.repeat(leaf, copies, axis=1), missing)

    k, v = jax.tree.map(resize, (cache.k, cache.v))
    return KVCache(k=k, v=v, length=cache.length)
