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

    # Padding comes after the text, where a causal model cannot see it.
    tokens, scored = np.zeros((40, 512), np.int32), np.zeros((40, 511), bool)
    for row, story in enumerate(stories):
        ids = [config.bos_id, *tokenizer.encode(story).ids][:512]
        tokens[row, : len(ids)], scored[row, : len(ids) - 1] = ids, True

    @jax.jit
    def losses(params, tokens):
        logits = decoder.forward(params, config, tokens).logits[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]

    assert scored.sum() == 12_571
    assert abs(np.exp(np.asarray(losses(params, tokens))[scored].mean()) - 3.473) < 0.005
