from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.errors import InputError, UsageError
from jaxquant.evaluate import generate, generate_batch
from jaxquant.models import ModelConfig, Precision
from jaxquant.models.decoder import forward
from jaxquant.models.init import init_params
from jaxquant.quant import ActivationGrid

CONFIG = ModelConfig(
    family="mistral",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    query_scale=8**-0.5,
    max_position=150,
    sliding_window=6,
    sliding_layers=(True, True),
)
PROMPT = [3, 14, 15, 9, 26]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), CONFIG))
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape) * 0.4, jnp.float32), shapes)


HEADS = ActivationGrid(bits=4, clip=0.95, scale_dtype="float16")
PACKED = dataclasses.replace(CONFIG, precision=Precision(keys=HEADS, values=HEADS))


# Prompts that fill part of a bucket, more than one, and more than a chunk.
@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 5, 65, 600])
@pytest.mark.parametrize(
    "config", [pytest.param(CONFIG, marks=pytest.mark.slow), PACKED], ids=["float", "packed"]
)
def test_greedy_is_the_argmax_of_the_whole_forward(params, config, length):
    """Of a forward pass without cache, where keys and values are fake-quantized if the cache is packed."""
    config = dataclasses.replace(config, max_position=700)
    prompt = (PROMPT * 120)[:length]
    generated = generate(params, config, prompt, max_tokens=12)
    assert len(generated) == 12
    tokens = jnp.asarray([prompt + generated[:-1]], jnp.int32)
    logits = jax.jit(forward, static_argnums=1)(params, config, tokens).logits[0]
    np.testing.assert_array_equal(generated, logits[len(prompt) - 1 :].argmax(axis=-1))


def test_generation_ends_before_the_end_token(params):
    generated = generate(params, CONFIG, PROMPT, max_tokens=12)
    stop = generated[4]
    config = dataclasses.replace(CONFIG, eos_ids=(stop,))
    assert generate(params, config, PROMPT, max_tokens=12) == generated[: generated.index(stop)]


def test_generation_ends_as_asked(params):
    generated = generate(params, CONFIG, PROMPT, max_tokens=12)
    assert generate(params, CONFIG, PROMPT, max_tokens=12, until=lambda new: len(new) == 3) == generated[:3]


def test_sampling_follows_key_and_temperature(params):
    def sample(seed, temperature):
        return generate(
            params, CONFIG, PROMPT, max_tokens=20, temperature=temperature, key=jax.random.key(seed)
        )

    assert sample(0, 1.0) == sample(0, 1.0)
    assert sample(0, 1.0) != sample(1, 1.0)
    assert sample(0, 1e-4) == generate(params, CONFIG, PROMPT, max_tokens=20)


def test_nothing_asked_nothing_given(params):
    assert generate(params, CONFIG, PROMPT, max_tokens=0) == []
    assert generate_batch(params, CONFIG, [PROMPT, PROMPT], max_tokens=0) == [[], []]
    assert generate_batch(params, CONFIG, [], max_tokens=3) == []


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        pytest.param(CONFIG, 40, id="short"),
        pytest.param(CONFIG, 600, id="chunks", marks=pytest.mark.slow),
        pytest.param(PACKED, 600, id="packed", marks=pytest.mark.slow),
    ],
)
def test_a_batch_is_its_texts_one_by_one(params, config, longest):
    """Over parts of a bucket, chunks and batches; texts end by themselves, at an end token or as asked."""
    config = dataclasses.replace(config, max_position=700, eos_ids=(7,))
    prompts = [(PROMPT * 120)[i : i + length] for i, length in enumerate([5, longest, 1, 2, 3])]
    prompts += [[token, 3] for token in range(13)]
    options = {"max_tokens": 12, "until": lambda new: sum(new) % 5 == 0}
    calls = []
    found = generate_batch(params, config, prompts, **options, progress=lambda *call: calls.append(call))
    assert found == [generate(params, config, prompt, **options) for prompt in prompts]
    assert len({len(own) for own in found}) > 2
    assert [total for _, total in calls] == [18] * len(calls)
    assert calls[-1][0] == 18
    assert len(calls) > 1


def test_errors(params):
    with pytest.raises(InputError, match="prompt of 5 tokens and 146 new ones"):
        generate(params, CONFIG, PROMPT, max_tokens=146)
    with pytest.raises(InputError, match="empty"):
        generate(params, CONFIG, [], max_tokens=1)
    with pytest.raises(InputError, match="vocabulary of 40"):
        generate(params, CONFIG, [40], max_tokens=1)
    with pytest.raises(UsageError, match="random key"):
        generate(params, CONFIG, PROMPT, max_tokens=1, temperature=0.5)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        generate_batch(params, CONFIG, [PROMPT, []], max_tokens=1)
