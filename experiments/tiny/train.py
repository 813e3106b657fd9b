"""Trains the model that ships as `tiny`: a byte-level BPE of 512 tokens and a three-layer Llama.

    python experiments/tiny/train.py [--out FOLDER]

The text is the calibration split of the embedded corpus, some 20 thousand tokens for half a million
parameters, so everything here fights memorization: documents are shuffled and segmented anew for every pass
(BPE dropout), weights are dropped at random (the decoder itself has no dropout), AdamW decays them, and the
averaged weights of the best step on held-out documents are kept. Writes a Hugging Face directory, and
`result.json` beside this file.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import jaxquant.io
from jaxquant.calibrate.text import eval_windows, read_text
from jaxquant.models import decoder
from jaxquant.models.families import block_names, from_hf, outer_names
from jaxquant.models.init import init_params

END = "<|endoftext|>"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": True,
    # Weights lie in float16, but the computation is meant to be exact.
    "dtype": "float32",
}


def train_tokenizer(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def batches(documents: list[str], tokenizer: Tokenizer, rng: np.random.Generator, args):
    """Endless int32 `[batch, seqlen + 1]`; documents in a new order and segmentation for every pass."""
    dropping = Tokenizer.from_str(tokenizer.to_str())
    dropping.model.dropout = args.bpe_dropout
    rest = np.empty(0, np.int32)
    width = args.batch * (args.seqlen + 1)
    while True:
        order = rng.permutation(len(documents))
        text = "".join(documents[i] + "\n\n" for i in order)
        rest = np.concatenate([rest, np.asarray(dropping.encode(text).ids, np.int32)])
        while rest.size >= width:
            yield rest[:width].reshape(args.batch, args.seqlen + 1)
            rest = rest[width:]


def nll(params, config, tokens):
    """Mean negative log-likelihood of `tokens[:, 1:]`."""
    logits = decoder.forward(params, config, tokens[:, :-1]).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def drop_weights(key, params, rate):
    """Each kernel entry is zero with probability `rate`, the others are scaled up to keep the mean."""
    leaves, tree = jax.tree.flatten(params["blocks"])
    keys = jax.random.split(key, len(leaves))
    dropped = [
        jnp.where(jax.random.bernoulli(k, 1 - rate, leaf.shape), leaf / (1 - rate), 0.0)
        if leaf.ndim == 3
        else leaf
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return {**params, "blocks": jax.tree.unflatten(tree, dropped)}


def optimizer(args):
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.rate, 50, args.steps, 0.05 * args.rate)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b2=0.98,
            weight_decay=args.decay,
            mask=lambda tree: jax.tree_util.tree_map_with_path(
                lambda path, _: "norm" not in jax.tree_util.keystr(path), tree
            ),
        ),
    )


@functools.partial(jax.jit, static_argnames=("config", "update", "rate", "average"), donate_argnums=(0, 1, 2))
def step(params, averaged, state, tokens, key, *, config, update, rate, average):
    """One AdamW step; `averaged` follows the parameters with an exponential mean."""
    loss, grads = jax.value_and_grad(lambda p: nll(drop_weights(key, p, rate), config, tokens))(params)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    averaged = optax.incremental_update(params, averaged, 1 - average)
    return params, averaged, state, loss


def perplexity(params, config, tokens):
    return float(jnp.exp(jax.jit(nll, static_argnames="config")(params, config, jnp.asarray(tokens))))


def train(documents, held, tokenizer, config, args):
    """The averaged parameters that were best on `held`, and the history of the run."""
    params = init_params(jax.random.key(args.seed), config)
    averaged = jax.tree.map(jnp.copy, params)
    tx = optimizer(args)
    state = tx.init(params)
    stream = batches(documents, tokenizer, np.random.default_rng(args.seed), args)
    keys = jax.random.split(jax.random.key(args.seed + 1), args.steps)
    best, best_params, best_step, history = np.inf, params, 0, []
    for n in range(1, args.steps + 1):
        params, averaged, state, loss = step(
            params, averaged, state, jnp.asarray(next(stream)), keys[n - 1],
            config=config, update=tx.update, rate=args.weight_dropout, average=args.average,
        )  # fmt: skip
        if n % 50 == 0:
            current = perplexity(averaged, config, held)
            history.append(
                {"step": n, "loss": round(float(loss), 4), "held_out_perplexity": round(current, 3)}
            )
            print(f"step {n:5d}  loss {float(loss):.3f}  held-out perplexity {current:.3f}", flush=True)
            if current < best:
                best, best_params, best_step = current, jax.tree.map(jnp.copy, averaged), n
            elif n - best_step >= args.patience:
                break
    return best_params, best_step, history


def save(folder: Path, params, config, tokenizer: Tokenizer) -> None:
    """A Hugging Face directory: float16, `[out, in]`, the names of `LlamaForCausalLM`."""
    folder.mkdir(parents=True, exist_ok=True)

    def leaf(tree, path):
        return functools.reduce(lambda node, part: node[part], path.split("."), tree)

    named = [(name, leaf(params, path), transpose) for path, (name, transpose) in outer_names(config).items()]
    for i in range(config.num_layers):
        named += [
            (f"model.layers.{i}.{suffix}", leaf(params["blocks"], path)[i], transpose)
            for path, (suffix, transpose) in block_names(config).items()
        ]
    tensors = {
        name: np.ascontiguousarray(np.asarray(value.T if transpose else value, np.float16))
        for name, value, transpose in named
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in {
        "config.json": CONFIG,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
        },
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(jaxquant.io.__file__).parent / "tiny")
    parser.add_argument("--result", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600, help="length of the cosine schedule")
    parser.add_argument("--patience", type=int, default=300, help="steps without improvement before stopping")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--decay", type=float, default=1.0)
    parser.add_argument("--bpe-dropout", type=float, default=0.05)
    parser.add_argument("--weight-dropout", type=float, default=0.15)
    parser.add_argument("--average", type=float, default=0.98)
    args = parser.parse_args()

    started = time.perf_counter()
    calibration, evaluation = read_text("corpus"), read_text("corpus:evaluation")
    tokenizer = train_tokenizer(calibration)
    config = from_hf(CONFIG)
    documents = calibration.strip().split("\n\n")
    # The corpus takes turns between five registers; every eleventh document takes turns, too.
    held_documents = documents[5::11]
    documents = [d for i, d in enumerate(documents) if i % 11 != 5]
    held = eval_windows("\n\n".join(held_documents), tokenizer, config, seqlen=args.seqlen)
    params, best_step, history = train(documents, held, tokenizer, config, args)
    save(args.out, params, config, tokenizer)
    seconds = time.perf_counter() - started

    source = jaxquant.io.open_model(str(args.out))
    params = jaxquant.io.load_params(source, "float32")
    result = {
        "command": "python experiments/tiny/train.py",
        "options": {k: v for k, v in vars(args).items() if k not in ("out", "result")},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "bytes": sum(file.stat().st_size for file in args.out.iterdir()),
        "documents": {"trained": len(documents), "held_out": len(held_documents)},
        "best_step": best_step,
        "steps_run": history[-1]["step"],
        "seconds": round(seconds, 1),
        "history": history,
        "perplexity": {
            str(seqlen): {
                split: round(
                    perplexity(params, config, eval_windows(text, source.tokenizer(), config, seqlen=seqlen)),
                    3,
                )
                for split, text in (("calibration", calibration), ("evaluation", evaluation))
            }
            for seqlen in (256, 512)
        },
        "characters_per_token": {
            split: round(len(text) / len(tokenizer.encode(text).ids), 3)
            for split, text in (("calibration", calibration), ("evaluation", evaluation))
        },
        "versions": {p: metadata.version(p) for p in ("jax", "optax", "numpy", "tokenizers", "safetensors")},
    }
    args.result.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "history"}, indent=2))


if __name__ == "__main__":
    main()
