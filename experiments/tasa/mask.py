"""What it costs SmolLM2-135M to hide the first token of a window from GPTQ, one block quantized at a time.

    python experiments/tasa/mask.py --data DIR [--bits 3]

DIR holds wikitext2/wiki.train.part.raw and wiki.test.raw. Each block alone is rounded to `--bits` (groups of
64, clip search, act-order) on moments of 16 x 512 training tokens, of all tokens and without the first of
each window; losses are divergences from the original on 8 windows of 256 test tokens. Attention rests on the
massive activations that the first token gets in one block, and these hang on few weights.
Writes results/mask.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp

from jaxquant.calibrate.collect import model_moments
from jaxquant.calibrate.text import windows
from jaxquant.folder import versions
from jaxquant.io import load_params, open_model
from jaxquant.methods import Problem
from jaxquant.models import decoder
from jaxquant.models.config import LINEARS
from jaxquant.named import named
from jaxquant.quant import Grid

RESULTS = Path(__file__).resolve().parent / "results" / "mask.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=3)
    arguments = parser.parse_args()
    source = open_model("smollm2-135m")
    config, tokenizer = dataclasses.replace(source.config, dtype="float32"), source.tokenizer()
    params: Any = load_params(source, "float32")
    text = {
        part: (arguments.data / "wikitext2" / f"wiki.{part}.raw").read_text()
        for part in ("train.part", "test")
    }
    calibration = windows(text["train.part"], tokenizer, config, samples=16, seqlen=512, seed=0)
    tokens = jnp.asarray(windows(text["test"], tokenizer, config, samples=8, seqlen=256, seed=1))
    recipe = named("gptq", Grid(bits=arguments.bits, group_size=64, clip="mse"))
    log_p = jax.jit(lambda params: jax.nn.log_softmax(decoder.forward(params, config, tokens).logits))
    reference = log_p(params)

    def divergence(layer: int, moments: Any) -> float:
        blocks = {part: dict(params["blocks"][part]) for part in ("attn", "mlp")}
        for tap, paths in LINEARS:
            seen = jax.tree.map(lambda a: a[layer], moments[tap])
            for part, name in (path.split(".") for path in paths):
                stack = params["blocks"][part][name]["kernel"]
                values = recipe(Problem.of(stack[layer], seen, recipe.grid)).values(stack.dtype)
                blocks[part][name] = {"kernel": stack.at[layer].set(values)}
        changed = log_p(params | {"blocks": params["blocks"] | blocks})
        return float(jnp.mean(jnp.sum(jnp.exp(reference) * (reference - changed), axis=-1)))

    collect = functools.partial(model_moments, params, config, calibration)
    masks = {"none": collect(mask="none"), "first": collect(mask="first")}
    kl: dict[str, list[float]] = {name: [] for name in masks}
    for layer in range(config.num_layers):
        for name, moments in masks.items():
            kl[name].append(divergence(layer, moments))
        print(f"block {layer}: " + ", ".join(f"{name} {own[-1]:.4f}" for name, own in kl.items()), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    report = {"model": source.name, "recipe": str(recipe), "versions": versions(), "kl": kl}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
