"""The real SmolLM2-135M file: tokens of WikiText-2 and the loss of its first window."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.io import load_params
from jaxquant.models import decoder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(shared_data):
    content = json.loads((shared_data / "reference" / "wikitext2_ppl.json").read_text())
    return content["smollm2-135m-instruct-q4_1"]


@pytest.fixture(scope="module")
def token_ids(shared_data, smollm2):
    with (shared_data / "wikitext2" / "wiki.test.raw").open(encoding="utf-8", newline="") as file:
        rows = file.read().split("\n")[:-1]
    text = "\n\n".join("" if row.strip() == "" else row + "\n" for row in rows)
    return smollm2.tokenizer().encode(text).ids


def test_tokens(token_ids, reference):
    assert len(token_ids) == reference["total_tokens"]
    assert token_ids[:20] == reference["first_ids"]


def test_first_window(smollm2, token_ids, reference):
    config, params = smollm2.config, load_params(smollm2)
    tokens = np.asarray([token_ids[: reference["seqlen"]]], np.int32)

    @jax.jit
    def loss(params, tokens):
        logits = decoder.forward(params, config, tokens).logits[0, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[0, 1:, None], axis=-1).mean()

    assert abs(float(loss(params, tokens)) - reference["window_nll"][0]) < 5e-4


def test_chat_tokens(smollm2):
    ids = smollm2.tokenizer().encode("<|im_start|>user\nHi<|im_end|>").ids
    assert (ids[0], ids[-1]) == (smollm2.config.bos_id, smollm2.config.eos_ids[0])
    assert "<|im_start|>" in smollm2.chat_template
