"""A real model against stored measurements of another implementation (torch, float32)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxquant.evaluate import perplexity


@pytest.mark.slow
def test_wikitext2_windows(smollm2, shared_data):
    from jaxquant.calibrate.text import eval_windows, read_text
    from jaxquant.io import load_params

    reference = json.loads((shared_data / "reference" / "wikitext2_ppl.json").read_text())
    stored = reference["smollm2-135m-instruct-q4_1"]["window_nll"]
    text = read_text(str(shared_data / "wikitext2" / "wiki.test.raw"))
    windows = eval_windows(text, smollm2.tokenizer(), smollm2.config, seqlen=2048, limit=31)
    result = perplexity(load_params(smollm2, np.float32), smollm2.config, windows)
    assert result.window_nll[0] == pytest.approx(2.7178, abs=5e-4)
    assert result.perplexity == pytest.approx(21.99, abs=0.02)
    np.testing.assert_allclose(result.window_nll, stored, atol=5e-4)
