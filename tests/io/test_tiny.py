"""The model that ships inside the package."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxquant.calibrate.text import eval_windows, read_text
from jaxquant.io import load_params, names, open_model
from jaxquant.models import decoder


@pytest.fixture(scope="module")
def source():
    return open_model("tiny")


@pytest.fixture(scope="module")
def params(source):
    return load_params(source, "float32")


def test_tiny_is_small_and_complete(source):
    config = source.config
    folder = names.fetch("tiny")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_200_000
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (3, 128, 512)
    assert config.num_heads == 2 * config.num_kv_heads
    assert config.tie_embeddings
    assert not config.add_bos
    assert source.tokenizer().get_vocab_size() == config.vocab_size


@pytest.mark.parametrize("text", ["Maren found 42 keys.\n", "d\u00e9j\u00e0 vu \u2192 \U0001f44b"])
def test_tiny_tokenizer_round_trips(source, text):
    tokenizer = source.tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_tiny_has_learned_english(source, params):
    tokens = eval_windows(read_text("corpus:evaluation"), source.tokenizer(), source.config, seqlen=256)

    @jax.jit
    def nll(params, tokens):
        logits = decoder.forward(params, source.config, tokens[:, :-1]).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    counts = np.bincount(tokens.ravel(), minlength=512)
    shares = counts[counts > 0] / counts.sum()
    unigram = -np.sum(shares * np.log(shares))
    assert nll(params, jnp.asarray(tokens)) < unigram - 1.2


@pytest.mark.slow
def test_tiny_equals_transformers(source, params):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = read_text("corpus:evaluation")[:600]
    folder = names.fetch("tiny")
    tokens = np.asarray([source.tokenizer().encode(text, add_special_tokens=False).ids[:200]], np.int32)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:200]
    np.testing.assert_array_equal(tokens[0], ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    got = decoder.forward(params, source.config, jnp.asarray(tokens)).logits
    np.testing.assert_allclose(got, expected, atol=2e-4)
