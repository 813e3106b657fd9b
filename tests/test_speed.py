"""Speed of a model: what is counted, and that the choice of a backend reaches the matmuls."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from jaxquant.errors import InputError, UsageError
from jaxquant.io import load_model
from jaxquant.kernels import use_backend
from jaxquant.quant import Grid, quantize
from jaxquant.speed import measure_speed


def test_bytes_are_those_of_weights_and_cache():
    model = load_model("tiny")
    config = dataclasses.replace(model.config, dtype="float32")
    speed = measure_speed(model.params, config, prompt=16, tokens=4, repeats=1)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    cache = 2 * config.num_layers * 20 * config.num_kv_heads * config.head_dim * 4
    assert config.tie_embeddings
    assert (speed["weight_bytes"], speed["cache_bytes"]) == (weights, cache)
    assert speed["bytes_per_token"] == weights + cache
    moved = speed["bytes_per_token"] * speed["decode_tokens_per_second"]
    assert speed["roofline"] == pytest.approx(moved / speed["bandwidth"])
    assert min(speed["prefill_tokens_per_second"], *speed["compile_seconds"].values()) > 0
    with pytest.raises(InputError, match="max_position"):
        measure_speed(model.params, config, prompt=config.max_position, tokens=1)


def test_a_backend_is_chosen_for_all_matmuls_inside():
    q = quantize(jax.random.normal(jax.random.key(0), (64, 128)), Grid(bits=4, group_size=32))
    multiply = jax.jit(lambda x, q: x @ q)
    x = jax.numpy.ones((2, 64))

    def calls() -> int:
        return multiply.trace(x, q).lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call")

    assert calls() == 1
    with use_backend("portable"):
        assert calls() == 0
    with use_backend("kernel"):  # where there is one
        text = multiply.trace(x, q).lower(lowering_platforms=("rocm",)).as_text()
    assert "custom_call" not in text
    assert "while" in text
    with (
        use_backend("fast"),
        pytest.raises(UsageError, match="unknown backend"),
    ):
        x @ q
