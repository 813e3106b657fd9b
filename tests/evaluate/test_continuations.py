from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxquant.errors import InputError, NonFiniteError
from jaxquant.evaluate import continuations as module
from jaxquant.evaluate.continuations import encode_pair, score_continuations
from jaxquant.models import ModelConfig, Precision
from jaxquant.models.decoder import forward
from jaxquant.models.init import init_params
from jaxquant.quant import ActivationGrid, Grid, quantize

CONFIG = ModelConfig(
    family="llama", vocab_size=40, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8, query_scale=8**-0.5, max_position=160,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), CONFIG))
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape) * 0.4, jnp.float32), shapes)


def tokens(seed, length):
    return np.random.default_rng(seed).integers(0, 40, length).tolist()


def requests():
    """Lone requests, families with and without a usable prefix, and families behind a header."""
    lengths = enumerate((1, 7, 30, 90))
    found = [(tokens(seed, length), tokens(seed + 50, 1 + seed % 5)) for seed, length in lengths]
    for seed, length in ((10, 7), (11, 40)):
        found += [(tokens(seed, length), tokens(seed + extra, 1 + extra)) for extra in range(4)]
    for item in range(9):
        context = tokens(20, 70) + tokens(30 + item, 24)
        found += [(context, [choice]) for choice in range(2)]
    return found


def by_definition(params, config, asked):
    """Sums of float64 log-probabilities, and whether each is the largest, from passes over the whole."""
    whole = np.zeros((len(asked), 161), np.int32)
    for row, (context, continuation) in zip(whole, asked, strict=True):
        row[: len(context) + len(continuation)] = [*context, *continuation]
    logits = np.asarray(jax.jit(forward, static_argnums=1)(params, config, whole).logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for row, (context, continuation) in zip(log_p, asked, strict=True):
        row = row[len(context) - 1 :][: len(continuation)]
        yield row[np.arange(len(row)), continuation].sum(), bool((row.argmax(axis=-1) == continuation).all())


HEADS = ActivationGrid(bits=8, clip=0.95, scale_dtype="float32")
SLIDING = dataclasses.replace(CONFIG, sliding_window=6, sliding_layers=(True, False))


@pytest.mark.parametrize(
    "config",
    [CONFIG, SLIDING, dataclasses.replace(CONFIG, precision=Precision(keys=HEADS, values=HEADS))],
    ids=["full", "sliding", "packed cache"],
)
def test_against_the_definition(params, config):
    asked, progress = requests(), []
    found = score_continuations(params, config, asked, progress=lambda *done: progress.append(done))
    expected = by_definition(params, config, asked)
    for own, (_, continuation), (total, greedy) in zip(found, asked, expected, strict=True):
        assert own.log_likelihood == pytest.approx(total, abs=1e-4)
        assert (own.greedy, own.tokens, own.truncated) == (greedy, len(continuation), False)
    assert progress[-1] == (len(asked), len(asked))
    assert progress == sorted(progress)


def test_batching_changes_nothing(params, monkeypatch):
    asked = requests()[2:]
    together = score_continuations(params, CONFIG, asked)
    monkeypatch.setattr(module, "_BATCH_TOKENS", 1)  # one family at a time
    monkeypatch.setattr(module, "_HEADER_FAMILIES", 10**6)  # no header
    single = score_continuations(params, CONFIG, asked)
    alike = [own.log_likelihood for own in together]
    np.testing.assert_allclose([own.log_likelihood for own in single], alike, atol=1e-4)
    assert [own.greedy for own in single] == [own.greedy for own in together]


def test_what_is_shared_is_read_once(params, monkeypatch):
    read, original = [], module._token_scores
    monkeypatch.setattr(
        module, "_token_scores",
        lambda *a, **k: read.append((a[2].size, a[3].size, a[6])) or original(*a, **k),
    )  # fmt: skip
    context = tokens(1, 120)
    score_continuations(params, CONFIG, [(context, [choice, 5]) for choice in range(4)])
    ((prefix, rest, header),) = read
    assert header is None
    # Of 120 tokens in common, 112 are read once; the rest is padded to 16 in every row.
    assert (prefix, rest) == (112, 4 * 16)


def test_packed_and_fake_quantized_weights_agree(params):
    mlp = params["blocks"]["mlp"]
    packed = quantize(mlp["down"]["kernel"], Grid(bits=4, group_size=8))
    asked, found = requests()[8:12], []
    for kernel in (packed, packed.dequantize()):
        own = params | {"blocks": params["blocks"] | {"mlp": mlp | {"down": {"kernel": kernel}}}}
        found.append([one.log_likelihood for one in score_continuations(own, CONFIG, asked)])
    np.testing.assert_allclose(*found, atol=1e-4)


def test_a_long_context_loses_its_beginning(params):
    context, continuation = tokens(0, 200), tokens(1, 4)
    (found,) = score_continuations(params, CONFIG, [(context, continuation)])
    kept = [*context, *continuation][-161:]
    assert found.truncated
    assert found.log_likelihood == pytest.approx(
        next(by_definition(params, CONFIG, [(kept[:-4], continuation)]))[0], abs=1e-4
    )
    (longest,) = score_continuations(params, CONFIG, [([1], tokens(2, 160))])
    assert not longest.truncated


def test_errors(params):
    for bad, message in (
        (([], [1]), "request 0: context and continuation need"),
        (([1], []), "request 0: context and continuation need"),
        (([1], [40]), "vocabulary of 40"),
        (([-1], [4]), "vocabulary of 40"),
        (([1], [4] * 161), "continuation of 161 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            score_continuations(params, CONFIG, [bad])
    broken = params | {"norm": params["norm"] * jnp.nan}
    with pytest.raises(NonFiniteError, match="request 0 is not finite"):
        score_continuations(broken, CONFIG, [([1], [2])])
    assert score_continuations(params, CONFIG, []) == []


@pytest.fixture(scope="module")
def tokenizer():
    """Letters; a space joins the letter behind it, and `ab` is one token."""
    vocabulary = {letter: i for i, letter in enumerate(["Ġ", *"abcdefgh", "Ġa", "Ġb", "ab", "?"])}
    merges = [("Ġ", "a"), ("Ġ", "b"), ("a", "b")]
    built = Tokenizer(models.BPE(vocabulary, merges, unk_token="?"))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return built


def test_pairs_are_cut_where_the_context_ends(tokenizer):
    assert encode_pair(tokenizer, CONFIG, "cd", " ab") == ([3, 4], [9, 2])
    # A space at the end of the context moves,
    assert encode_pair(tokenizer, CONFIG, "cd ", "ab") == ([3, 4], [9, 2])
    # and a merge over the border is cut by length: `ab` is one token of the whole, `b` is none of its own.
    assert encode_pair(tokenizer, CONFIG, "ca", "bd") == ([3, 1], [4])
    with_bos = dataclasses.replace(CONFIG, add_bos=True, bos_id=39)
    assert encode_pair(tokenizer, with_bos, "cd", " a") == ([39, 3, 4], [9])
    for config in (with_bos, dataclasses.replace(CONFIG, eos_ids=(39, 38))):
        assert encode_pair(tokenizer, config, "", "ab") == ([39], [11])
    with pytest.raises(InputError, match="neither bos_id nor eos_ids"):
        encode_pair(tokenizer, CONFIG, "", "a")
    with pytest.raises(InputError, match="adds no token"):
        encode_pair(tokenizer, CONFIG, "cd", "")
