from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxquant.errors import UsageError
from jaxquant.evaluate import evaluate_task, tasks
from jaxquant.evaluate.continuations import Continuation
from jaxquant.evaluate.task_data import Item
from jaxquant.evaluate.tasks import generate_until
from jaxquant.models import ModelConfig
from jaxquant.models.init import init_params

CONFIG = ModelConfig(
    family="llama", vocab_size=256, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8, query_scale=8**-0.5, max_position=320, bos_id=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return built


def choices(n, *texts, gold=0):
    own = tuple(f" {text}" for text in texts)
    return Item(contexts=(f"Q{n}:",) * len(own), continuations=own, gold=gold, place=f"rows.jsonl:{n}")


@pytest.fixture
def score(monkeypatch, tokenizer):
    """Evaluates with given log-likelihoods, all greedy where they are above -1."""

    def run(task, items, log_likelihoods, **options):
        def scored(params, config, requests, *, progress):
            progress(len(requests), len(requests))
            return [
                Continuation(log_likelihood=ll, greedy=ll > -1, tokens=len(tail), truncated=ll < -50)
                for ll, (_, tail) in zip(log_likelihoods, requests, strict=True)
            ]

        monkeypatch.setattr(tasks, "score_continuations", scored)
        return evaluate_task({}, CONFIG, tokenizer, task, items, **options)

    return run


def test_multiple_choice(score):
    items = [choices(0, "aa", "bbbbbbbb"), choices(1, "aa", "éé", gold=1), choices(2, "a", "b", "c", gold=2)]
    result = score("arc_easy", items, [-3.0, -4.0, -1.0, -1.5, -2.0, -3.0, -1.0])
    # Per byte: -1.5 and -.5; -.5 and -.375; the third as it is.
    assert [a["prediction"] for a in result.answers] == [0, 0, 2]
    assert [a["prediction_norm"] for a in result.answers] == [1, 1, 2]
    assert result.metrics == {
        "acc": pytest.approx(2 / 3),
        "acc_stderr": pytest.approx(np.std([1, 0, 1], ddof=1) / 3**0.5),
        "acc_norm": pytest.approx(2 / 3),
        "acc_norm_stderr": pytest.approx(np.std([0, 1, 1], ddof=1) / 3**0.5),
    }
    assert (result.name, result.n, result.truncated) == ("arc_easy", 3, 0)
    assert json.loads(json.dumps(result.answers))[1] == {
        "place": "rows.jsonl:1", "gold": 1, "prediction": 0, "prediction_norm": 1,
        "log_likelihoods": [-1.0, -1.5],
    }  # fmt: skip


def test_last_word(score):
    items = [choices(n, "sea") for n in range(3)]
    result = score("lambada", items, [-0.5, -2.0, -60.0])
    assert result.metrics["acc"] == pytest.approx(1 / 3)
    assert result.metrics["nll"] == pytest.approx(62.5 / 3)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(62.5 / 3))
    assert result.answers[0] == {
        "place": "rows.jsonl:0", "gold": "sea", "greedy": True, "log_likelihood": -0.5,
    }  # fmt: skip
    assert result.truncated == 1
    (one,) = [score("lambada", items, [-0.5], limit=1)]
    assert math.isnan(one.metrics["nll_stderr"])


SOLUTIONS = ["2 + 2 = 4\n#### 4", "So\n#### 1,200", "No"]


@pytest.mark.parametrize("exact_match", [True, False])
def test_solutions(score, monkeypatch, exact_match):
    items = [choices(n, text) for n, text in enumerate(SOLUTIONS[:2])] + [choices(2, "Well\n#### -3")]
    found = ["It is 5\n#### 4.", " #### 1200 #### 7", "none"]

    def generate_until(*arguments, progress, **options):
        progress(3, 3)
        return found

    monkeypatch.setattr(tasks, "generate_until", generate_until)
    calls = []
    losses, options = (
        [-9.0, -4.0, -20.0],
        {"exact_match": exact_match, "progress": lambda *c: calls.append(c)},
    )
    result = score("gsm8k", items, losses, **options)
    counts = np.asarray([len(item.continuations[0]) for item in items])
    nll = 33 / counts.sum()
    spread = np.std(-np.asarray(losses) - nll * counts, ddof=1) / counts.mean() / 3**0.5
    assert result.metrics["nll"] == pytest.approx(nll)
    assert result.metrics["nll_stderr"] == pytest.approx(spread)
    assert calls[-1] == ((6, 6) if exact_match else (3, 3))
    if exact_match:
        assert result.metrics["exact_match"] == pytest.approx(2 / 3)
        assert [(a["prediction"], a["gold"]) for a in result.answers] == [
            ("4", "4"),
            ("1200", "1200"),
            (None, "-3"),
        ]
    else:
        assert "exact_match" not in result.metrics


def test_examples_and_limit(score):
    items = [choices(n, "a", "b") for n in range(8)]
    result = score("piqa", items, [-1.0, -2.0] * 3, shots=2, limit=3, seed=1)
    assert (result.n, result.shots) == (3, 2)
    with pytest.raises(UsageError, match="limit=0"):
        evaluate_task({}, CONFIG, None, "piqa", items, limit=0)
    with pytest.raises(UsageError, match="no such task"):
        evaluate_task({}, CONFIG, None, "race", items)


def test_generation_stops_at_a_text(tokenizer):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), CONFIG))
    params = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape) * 0.4, jnp.float32), shapes)
    contexts = ["2 + 2 =", "2"]
    whole, other = generate_until(params, CONFIG, tokenizer, contexts, [], max_tokens=8)
    stop = whole[3:5]
    cut = generate_until(params, CONFIG, tokenizer, contexts, [stop, "nowhere"], max_tokens=8)
    assert cut == [text.partition(stop)[0] for text in (whole, other)]
    with pytest.raises(UsageError, match="320 new tokens leave no room"):
        generate_until(params, CONFIG, tokenizer, ["2"], [], max_tokens=320)
