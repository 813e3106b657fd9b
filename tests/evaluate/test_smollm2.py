"""A real model against stored measurements of another implementation (torch, float32)."""

from __future__ import annotations

import dataclasses
import importlib
import json

import numpy as np
import pytest

from jaxquant.evaluate import perplexity
from jaxquant.io import load_params
from jaxquant.models import Precision
from jaxquant.models.cache import init_cache
from jaxquant.models.config import EXACT
from jaxquant.quant import ActivationGrid


@pytest.mark.slow
def test_wikitext2_windows(smollm2, shared_data):
    from jaxquant.calibrate.text import eval_windows, read_text

    reference = json.loads((shared_data / "reference" / "wikitext2_ppl.json").read_text())
    stored = reference["smollm2-135m-instruct-q4_1"]["window_nll"][:6]
    text = read_text(str(shared_data / "wikitext2" / "wiki.test.raw"))
    windows = eval_windows(text, smollm2.tokenizer(), smollm2.config, seqlen=2048, limit=len(stored))
    result = perplexity(load_params(smollm2, np.float32), smollm2.config, windows)
    assert result.window_nll[0] == pytest.approx(2.7178, abs=5e-4)
    assert result.perplexity == pytest.approx(np.exp(np.mean(stored)), rel=5e-4)
    np.testing.assert_allclose(result.window_nll, stored, atol=5e-4)


@pytest.mark.slow
def test_a_packed_cache_says_what_a_fake_quantized_one_says(smollm2, monkeypatch):
    """2048 tokens of context in at most 30 % of the bytes of bfloat16, and the same text."""
    heads = ActivationGrid(bits=4, clip=0.95, scale_dtype="float16")
    config = dataclasses.replace(smollm2.config, precision=Precision(keys=heads, values=heads))
    params = load_params(smollm2, np.float32)
    text = "The old lighthouse keeper climbed the stairs. " * 300
    prompt = smollm2.tokenizer().encode(text).ids[: 2048 - 30]
    assert len(prompt) == 2048 - 30
    caches, module = [], importlib.import_module("jaxquant.evaluate.generate")
    texts = []
    for own in (config, dataclasses.replace(config, precision=EXACT, dtype="float32")):

        def build(_, batch, length, own=own):
            caches.append(init_cache(own, batch, length))
            return caches[-1]

        monkeypatch.setattr(module, "init_cache", build)
        texts.append(module.generate(params, config, prompt, max_tokens=30))
    assert texts[0] == texts[1]
    assert len(texts[0]) == 30
    packed, fake = caches
    assert packed.size == fake.size == 2048
    assert packed.nbytes <= 0.3 * fake.nbytes / 2
