"""Text generation with the key/value cache: greedy, or sampled at a temperature."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.errors import InputError, UsageError
from jaxquant.models import decoder
from jaxquant.models.cache import KVCache, init_cache
from jaxquant.models.config import ModelConfig

# Prompts are padded to multiples of this, so that few lengths are compiled,
_BUCKET = 64
# and longer ones are read in parts of this length, so that what is in flight does not grow with them.
_CHUNK = 512


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
    prompt = np.asarray(prompt_tokens, np.int32)
    length = len(prompt)
    if length == 0:
        raise InputError("the prompt is empty; give at least one token")
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        raise InputError(f"the prompt has tokens outside the vocabulary of {config.vocab_size}")
    if length + max_tokens > config.max_position:
        raise InputError(
            f"a prompt of {length} tokens and {max_tokens} new ones exceed the model's max_position = "
            f"{config.max_position}; shorten the prompt or ask for fewer tokens"
        )
    if not temperature >= 0 or (temperature > 0 and key is None):  # NaN is not >= 0
        raise UsageError("temperature must be 0 (greedy), or positive together with a random key")
    greedy = temperature == 0
    keys = jax.random.split(jax.random.key(0) if key is None else key, max_tokens)
    heat = jnp.float32(1.0 if greedy else temperature)

    cache = init_cache(config, 1, min(_round_up(length + max_tokens), config.max_position))
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
