"""stories260K, a real float32 Llama in the format of llama2.c: perplexity as measured elsewhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from stories import read_stories260K, read_tok512

from jaxquant.io import tokenizer as gguf_tokenizer
from jaxquant.models import decoder


def test_perplexity(shared_data):
    folder = shared_data / "stories260K"
    config, params = read_stories260K(folder / "stories260K.bin")
    metadata = {f"tokenizer.ggml.{key}": value for key, value in read_tok512(folder / "tok512.bin").items()}
    tokenizer = gguf_tokenizer.from_metadata(metadata, place="tok512.bin")
    text = (shared_data / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [story for story in map(str.strip, text.split("<|endoftext|>")) if len(story) > 200][:40]

    @jax.jit
    def losses(params, tokens):
        logits = decoder.forward(params, config, tokens).logits[0, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[0, 1:, None], axis=-1)[:, 0]

    total, count = 0.0, 0
    for story in stories:
        ids = [config.bos_id, *tokenizer.encode(story).ids][:512]
        # Padding comes after the text, where a causal model cannot see it.
        padded = np.zeros((1, 512), np.int32)
        padded[0, : len(ids)] = ids
        total += float(losses(params, padded)[: len(ids) - 1].sum())
        count += len(ids) - 1
    assert count == 12_571
    assert abs(np.exp(total / count) - 3.473) < 0.005
