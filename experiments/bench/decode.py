"""Times decode with packed W4 weights by each backend against dense float32 and torch: in turn, in one run.

    python experiments/bench/decode.py [--repeats 15] [--threads 2] [--gguf FILE]

Single linears with 1, 16 and 512 rows of activations; the product of a row with a float16 embedding, which
the portable backend widens as a whole (dense: a float32 one); of a model of SmolLM2-135M's shape the token
behind 128 others, logits included, and 512 tokens at once with the logits of the last. Weights are random,
packed ones 4.5 bits with a float16 embedding. With llama-cpp-python and a GGUF file of that model, llama.cpp
stands beside them (Q4_1: 5 bits). Ratios are medians of paired times, dense float32 in JAX over the side
named. Writes results/decode.json.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Else LAPACK's threads spin beside those of JAX and torch.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.folder import versions
from jaxquant.kernels import use_backend
from jaxquant.kernels.dequant_matmul import dequant_matmul
from jaxquant.kernels.head_matmul import head_matmul
from jaxquant.models import decoder
from jaxquant.models.cache import init_cache
from jaxquant.models.config import ModelConfig
from jaxquant.models.init import init_params
from jaxquant.quant import Grid, quantize

GRID = Grid(bits=4, group_size=64)
LINEARS = [(4096, 4096), (576, 1536), (1536, 576)]
ROWS = (1, 16, 512)
FILLED, PROMPT, SIZE = 128, 512, 1024
SMOLLM2 = ModelConfig(
    family="llama", query_scale=64**-0.5,
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
    head_dim=64, max_position=2048, tie_embeddings=True,
)  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "decode.json"


def interleaved(
    sides: dict[str, Callable[[], Any]], repeats: int, *, base: str = "dense_float32"
) -> dict[str, Any]:
    """Median milliseconds of each side, and what `base` takes in multiples of it."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    slow = seconds[base]
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(own),
            "fastest": 1e3 * min(own),
            "ratio": statistics.median(d / o for d, o in zip(slow, own, strict=True)),
            "ratio_of_fastest": min(slow) / min(own),
        }
        for name, own in seconds.items()
    }


def write_report(
    out: Path,
    setting: dict[str, Any],
    cases: dict[str, Any],
    before: tuple[float, ...],
    *,
    peers: Iterable[str] = (),
) -> None:
    """Cases, what they ran with, and the load `before` them and now: above 1 a CPU, others worked too."""
    load = {"before": before, "after": os.getloadavg()}
    report = {
        "setting": setting,
        "versions": versions() | {name: importlib.metadata.version(name) for name in peers},
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "load": load},
        "cases": cases,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


def run_jax(f: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    compiled = jax.jit(f).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def linear_sides(inputs: int, outputs: int, rows: int) -> dict[str, Callable[[], Any]]:
    w = jax.random.normal(jax.random.key(0), (inputs, outputs)) / inputs**0.5
    x = jax.random.normal(jax.random.key(1), (rows, inputs))
    q = quantize(w, GRID)
    sides = {"dense_float32": run_jax(jnp.matmul, x, w)}
    for backend in ("kernel", "portable"):
        multiply = functools.partial(dequant_matmul, bits=GRID.bits, block=q.block, backend=backend)
        sides[f"packed_{backend}"] = run_jax(multiply, x, q.words, q.scale, q.zero)
    if importlib.util.find_spec("torch") is None:
        return sides
    import torch

    def product(dtype: Any) -> Callable[[], Any]:
        x_t, w_t = (torch.from_numpy(np.array(a)).to(dtype) for a in (x, w.T))
        return torch.inference_mode()(lambda: torch.nn.functional.linear(x_t, w_t))

    return sides | {"torch_float32": product(torch.float32), "torch_bfloat16": product(torch.bfloat16)}


def head_sides() -> dict[str, Callable[[], Any]]:
    x = jax.random.normal(jax.random.key(0), (1, SMOLLM2.hidden_size))
    w = jax.random.normal(jax.random.key(1), (SMOLLM2.vocab_size, SMOLLM2.hidden_size))
    half = w.astype(jnp.float16)
    return {
        "dense_float32": run_jax(head_matmul, x, w),
        "float16_kernel": run_jax(functools.partial(head_matmul, backend="kernel"), x, half),
        "float16_portable": run_jax(functools.partial(head_matmul, backend="portable"), x, half),
    }


def model_sides(length: int, gguf: str | None, threads: int) -> dict[str, Callable[[], Any]]:
    """One token behind `FILLED` others, or `length` tokens into an empty cache."""
    filled = FILLED if length == 1 else 0
    params = init_params(jax.random.key(0), SMOLLM2)
    tokens = jnp.zeros((1, length), jnp.int32)
    cache = init_cache(SMOLLM2, 1, filled + length)
    if filled:
        cache = decoder.forward(params, SMOLLM2, jnp.zeros((1, filled), jnp.int32), cache=cache).cache
    blocks = {
        part: {
            name: {"kernel": jax.vmap(lambda w: quantize(w, GRID))(linear["kernel"])}
            for name, linear in params["blocks"][part].items()
        }
        for part in ("attn", "mlp")
    }
    packed = params | {"blocks": params["blocks"] | blocks, "embed": params["embed"].astype(jnp.float16)}

    def step(params: Any, tokens: jax.Array, cache: Any) -> jax.Array:
        hidden, _ = decoder.final_hidden(params, SMOLLM2, tokens, cache=cache)
        return decoder.logits(params, SMOLLM2, hidden[:, -1])

    sides = {
        "dense_float32": run_jax(step, params, tokens, cache),
        "packed_kernel": run_jax(step, packed, tokens, cache),
    }
    with use_backend("portable"):
        sides["packed_portable"] = run_jax(step, packed, tokens, cache)
    return sides | torch_sides(length, filled) | llama_sides(length, filled, gguf, threads)


def torch_sides(length: int, filled: int) -> dict[str, Callable[[], Any]]:
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        return {}
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    def model(dtype: Any) -> Callable[[], Any]:
        config = LlamaConfig(
            vocab_size=SMOLLM2.vocab_size, hidden_size=SMOLLM2.hidden_size, tie_word_embeddings=True,
            intermediate_size=SMOLLM2.intermediate_size, num_hidden_layers=SMOLLM2.num_layers,
            num_attention_heads=SMOLLM2.num_heads, num_key_value_heads=SMOLLM2.num_kv_heads,
        )  # fmt: skip
        llama = LlamaForCausalLM(config).to(dtype).eval()
        past = DynamicCache(config=config)
        with torch.inference_mode():
            if filled:
                llama(torch.zeros((1, filled), dtype=torch.long), past_key_values=past, use_cache=True)

        @torch.inference_mode()
        def step() -> Any:
            tokens = torch.zeros((1, length), dtype=torch.long)
            logits = llama(tokens, past_key_values=past, use_cache=True, logits_to_keep=1).logits
            past.crop(-length)
            return logits

        return step

    return {"torch_float32": model(torch.float32), "torch_bfloat16": model(torch.bfloat16)}


def llama_sides(length: int, filled: int, gguf: str | None, threads: int) -> dict[str, Callable[[], Any]]:
    if gguf is None:
        return {}
    from llama_cpp import Llama

    llama = Llama(gguf, n_ctx=SIZE, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads, verbose=False)
    if filled:
        llama.eval([1] * filled)

    def step() -> None:
        llama.n_tokens = filled  # it forgets what is behind that
        llama.eval([1] * length)

    return {"llama_cpp": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="of torch and llama.cpp")
    parser.add_argument("--gguf", help="the model for llama.cpp, which is left out without it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    peers = ["torch", "transformers", "llama_cpp_python"]
    peers = [name for name in peers if importlib.util.find_spec(name.removesuffix("_python")) is not None]
    if "torch" in peers:
        import torch

        torch.set_num_threads(args.threads)
    cases: dict[str, Callable[[], dict[str, Callable[[], Any]]]] = {
        f"{inputs}x{outputs}, {rows} rows": functools.partial(linear_sides, inputs, outputs, rows)
        for inputs, outputs in LINEARS
        for rows in ROWS
    }
    cases["the head of a SmolLM2-135M"] = head_sides
    for name, length in (("a token", 1), (f"{PROMPT} tokens", PROMPT)):
        cases[f"{name} of a SmolLM2-135M"] = functools.partial(model_sides, length, args.gguf, args.threads)
    before, results = os.getloadavg(), {}
    for name, sides in cases.items():
        results[name] = interleaved(sides(), args.repeats)
        times = (
            f"{side} {r['milliseconds']:.3f} ms ({r['ratio']:.2f}x)" for side, r in results[name].items()
        )
        print(f"{name}: {', '.join(times)}", flush=True)
    setting = {"grid": str(GRID), "repeats": args.repeats, "threads_of_peers": args.threads}
    write_report(args.out, setting, results, before, peers=peers)


if __name__ == "__main__":
    main()
