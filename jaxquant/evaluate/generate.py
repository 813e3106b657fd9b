"""Text generation with the key/value cache: one text, greedy or sampled, or many side by side."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.errors import InputError, UsageError
from jaxquant.evaluate.scoring import Progress
from jaxquant.models import decoder
from jaxquant.models.cache import KVCache, init_cache
from jaxquant.models.config import ModelConfig

# Prompts are padded to multiples of this, so that few lengths are compiled,
_BUCKET = 64
# and longer ones are read in parts of this length, so that what is in flight does not grow with them.
_CHUNK = 512
# Texts of a batch, and places of all their caches: rows enough to read the weights for, few beside them.
_MAX_ROWS = 16
_BATCH_PLACES = 8192


def generate(
    params: dict[str, Any],
    config: ModelConfig,
    prompt_tokens: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    until: Callable[[list[int]], bool] | None = None,
) -> list[int]:
    """The continuation of `prompt_tokens`: at most `max_tokens` tokens, ended before the first of `eos_ids`.

    `temperature = 0` takes the most probable token; otherwise tokens are drawn from
    `softmax(logits / temperature)` with `key`. With `until` it ends when that is true of the new tokens.

    Raises:
      InputError: an empty prompt, a token outside the vocabulary, or prompt and continuation longer than
        the model's context.
      UsageError: a negative temperature, or a positive one without a key.
    """
    prompt = _checked("the prompt", prompt_tokens, config, max_tokens)
    if not temperature >= 0 or (temperature > 0 and key is None):  # NaN is not >= 0
        raise UsageError("temperature must be 0 (greedy), or positive together with a random key")
    greedy = temperature == 0
    keys = jax.random.split(jax.random.key(0) if key is None else key, max_tokens)
    heat = jnp.float32(1.0 if greedy else temperature)

    cache = init_cache(config, 1, _places(len(prompt) + max_tokens, config))
    generated: list[int] = []
    unread, filled = prompt, 0
    for step_key in keys:
        hidden, cache = _read(params, config, unread, cache, filled)
        filled += len(unread)
        token = int(_choose(params, config, hidden, step_key, heat, greedy=greedy))
        if token in config.eos_ids:
            break
        generated.append(token)
        if until is not None and until(generated):
            break
        unread = np.asarray([token], np.int32)
    return generated


def generate_batch(
    params: dict[str, Any],
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    until: Callable[[list[int]], bool] | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """What `generate` gives greedily for each of `prompts`, which may differ in length.

    Up to 16 texts are decoded side by side, so that weights are read once for all of them. Two tokens that
    rounding alone tells apart may be chosen otherwise than one by one.

    Args:
      until: a text ends when this is true of its new tokens.
      progress: called after every batch with the numbers of prompts done and in total.

    Raises:
      InputError: as `generate`; names the prompt by its place.
    """
    rows = [_checked(f"prompt {i}", prompt, config, max_tokens) for i, prompt in enumerate(prompts)]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    results: dict[int, list[int]] = {}
    while order:
        size = _places(len(rows[order[0]]) + max_tokens, config)
        count = max(1, min(_MAX_ROWS, _BATCH_PLACES // size))
        batch, order = order[:count], order[count:]
        # As many rows in the last batch as in the others: one program less to compile.
        missing = count - len(batch) if results else 0
        filled = [rows[i] for i in batch + batch[:1] * missing]
        results |= zip(batch, _continue_all(params, config, filled, size, max_tokens, until), strict=False)
        if progress is not None:
            progress(len(results), len(rows))
    return [results[i] for i in range(len(rows))]


def _continue_all(
    params: dict[str, Any],
    config: ModelConfig,
    prompts: list[np.ndarray],
    size: int,
    max_tokens: int,
    until: Callable[[list[int]], bool] | None,
) -> list[list[int]]:
    """Continuations of all prompts, the first of which is the longest, with caches of `size` places."""
    single = init_cache(config, 1, size)
    caches = jax.tree.map(lambda leaf: jnp.zeros((len(prompts), *leaf.shape), leaf.dtype), single)
    lengths = np.asarray([len(prompt) for prompt in prompts])
    hidden = None
    for start in range(0, lengths[0], _CHUNK):
        width = min(_round_up(lengths[0] - start), _CHUNK, size - start)
        counts = np.clip(lengths - start, 0, width).astype(np.int32)
        tokens = np.zeros((len(prompts), 1, width), np.int32)
        for row, prompt, count in zip(tokens, prompts, counts, strict=True):
            row[0, :count] = prompt[start : start + count]
        read, caches = _advance_all(params, config, tokens, counts, caches)
        hidden = read if hidden is None else jnp.where(counts[:, None] > 0, read, hidden)
    generated: list[list[int]] = [[] for _ in prompts]
    active, ones = set(range(len(prompts))), np.ones(len(prompts), np.int32)
    for left in reversed(range(max_tokens)):
        chosen = np.asarray(_most_probable(params, config, hidden))
        for i in tuple(active):
            token = int(chosen[i])
            if token not in config.eos_ids:
                generated[i].append(token)
            if token in config.eos_ids or (until is not None and until(generated[i])):
                active.remove(i)
        if not active or not left:
            break
        hidden, caches = _advance_all(params, config, chosen[:, None, None], ones, caches)
    return generated


def _checked(name: str, tokens: Sequence[int], config: ModelConfig, max_tokens: int) -> np.ndarray:
    prompt = np.asarray(tokens, np.int32)
    if len(prompt) == 0:
        raise InputError(f"{name} is empty; give at least one token")
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        raise InputError(f"{name} has tokens outside the vocabulary of {config.vocab_size}")
    if len(prompt) + max_tokens > config.max_position:
        raise InputError(
            f"{name} of {len(prompt)} tokens and {max_tokens} new ones exceed the model's max_position = "
            f"{config.max_position}; shorten the prompt or ask for fewer tokens"
        )
    return prompt


def _places(length: int, config: ModelConfig) -> int:
    return min(_round_up(length), config.max_position)


def _read(
    params: dict[str, Any], config: ModelConfig, tokens: np.ndarray, cache: KVCache, filled: int
) -> tuple[jax.Array, KVCache]:
    """Appends `tokens` to a cache that holds `filled`; returns the hidden state `[d]` of the last of them."""
    hidden = None
    for start in range(0, len(tokens), _CHUNK):
        part = tokens[start : start + _CHUNK]
        width = 1 if len(part) == 1 else min(_round_up(len(part)), _CHUNK, cache.size - filled - start)
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(part)] = part
        hidden, cache = _advance(params, config, padded, np.int32(len(part)), cache)
    assert hidden is not None
    return hidden, cache


def _round_up(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _advance(
    params: dict[str, Any], config: ModelConfig, tokens: jax.Array, count: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Appends the first `count` of `tokens` `[1, T]`; returns the hidden state `[d]` of the last of them.

    The padding lands in the cache behind its length, where attention is masked, and is overwritten later.
    """
    hidden, filled = decoder.final_hidden(params, config, tokens, cache=cache)
    assert filled is not None
    return hidden[0, count - 1], dataclasses.replace(filled, length=cache.length + count)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="caches")
def _advance_all(
    params: dict[str, Any], config: ModelConfig, tokens: jax.Array, counts: jax.Array, caches: KVCache
) -> tuple[jax.Array, KVCache]:
    """`_advance` of every text, each with a cache of its own, since their lengths differ."""
    return jax.vmap(functools.partial(_advance, params, config))(tokens, counts, caches)


@functools.partial(jax.jit, static_argnames="config")
def _most_probable(params: dict[str, Any], config: ModelConfig, hidden: jax.Array) -> jax.Array:
    return decoder.logits(params, config, hidden).argmax(axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "greedy"))
def _choose(
    params: dict[str, Any],
    config: ModelConfig,
    hidden: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    *,
    greedy: bool,
) -> jax.Array:
    scores = decoder.logits(params, config, hidden[None])[0]
    return scores.argmax() if greedy else jax.random.categorical(key, scores / temperature)
