"""How fast a model reads a prompt and writes tokens here, and how near that is to what memory allows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.models import decoder
from jaxquant.models.cache import KVCache, init_cache
from jaxquant.models.config import ModelConfig

# Floats of the matrix that tells the bandwidth: 256 MiB, more than caches hold.
_ROWS, _COLUMNS = 16384, 4096


def measure_speed(
    params: dict[str, Any], config: ModelConfig, *, prompt: int = 512, tokens: int = 64, repeats: int = 5
) -> dict[str, Any]:
    """Tokens per second of prefill and decode for one text, compilation left out, medians over `repeats`.

    A prompt is read in one call; then `tokens` greedy steps follow, one call each. What a step has to move is
    every weight once (one row of an embedding that is not the head, too) and the cache, counted as full as it
    is in the end; the roofline is that at the bandwidth of a float32 product of a matrix of 256 MiB with a
    vector, measured beside it.

    Args:
      params: dense or packed.
      prompt, tokens: together at most the model's context.

    Returns:
      `prefill_tokens_per_second`, `decode_tokens_per_second`, `bytes_per_token`, `weight_bytes` (all that is
      resident), `cache_bytes`, `bandwidth` in bytes a second, `roofline`, the share of it that decode
      reaches, `compile_seconds` of both programs, and `device`.

    Raises:
      InputError: a prompt and tokens longer than the model's context.
    """

    def advance(params: Any, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        hidden, cache_after = decoder.final_hidden(params, config, tokens, cache=cache)
        assert cache_after is not None
        chosen = decoder.logits(params, config, hidden[:, -1]).argmax(axis=-1)
        return chosen.astype(jnp.int32)[:, None], cache_after

    empty = init_cache(config, 1, prompt + tokens)
    text = (jnp.arange(prompt, dtype=jnp.int32) % config.vocab_size)[None]
    step = jax.jit(advance, donate_argnums=2)
    read, read_seconds = _compiled(jax.jit(advance), params, text, empty)
    write, write_seconds = _compiled(step, params, text[:, :1], empty)
    prefill, decode = [], []
    for _ in range(repeats):
        begun = time.perf_counter()
        token, cache = jax.block_until_ready(read(params, text, empty))
        prefill.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        for _ in range(tokens):
            token, cache = write(params, token, cache)
        jax.block_until_ready(token)
        decode.append(time.perf_counter() - begun)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    looked_up = 0 if config.tie_embeddings else params["embed"].nbytes * (1 - 1 / config.vocab_size)
    moved = round(weights - looked_up + empty.nbytes)
    per_second = tokens / statistics.median(decode)
    bandwidth = _bandwidth()
    return {
        "prefill_tokens_per_second": prompt / statistics.median(prefill),
        "decode_tokens_per_second": per_second,
        "bytes_per_token": moved,
        "weight_bytes": weights,
        "cache_bytes": empty.nbytes,
        "bandwidth": bandwidth,
        "roofline": moved * per_second / bandwidth,
        "compile_seconds": {"prefill": read_seconds, "decode": write_seconds},
        "prompt": prompt,
        "tokens": tokens,
        "device": jax.devices()[0].device_kind,
    }


def _compiled(f: Any, *arguments: Any) -> tuple[Callable[..., Any], float]:
    begun = time.perf_counter()
    program = f.lower(*arguments).compile()
    return program, time.perf_counter() - begun


def _bandwidth() -> float:
    matrix, vector = jnp.ones((_ROWS, _COLUMNS)), jnp.ones(_COLUMNS)
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(matrix, vector))
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        jax.block_until_ready(multiply(matrix, vector))
        seconds.append(time.perf_counter() - begun)
    return matrix.nbytes / statistics.median(seconds)
