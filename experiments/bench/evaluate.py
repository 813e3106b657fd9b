"""Perplexity of SmolLM2-135M on WikiText-2: jaxquant against transformers on torch, both on this CPU.

    python experiments/bench/evaluate.py --text wiki.test.raw [--windows 5] [--seqlen 2048]

Both score the same windows with the same float32 weights and all cores. They take turns window by window, so
that a busy machine slows both; the result is the median over windows of the ratio of their times. Peak memory
comes from one fresh process each that scores one window. Writes results/evaluate.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from jaxquant.calibrate.text import eval_windows, read_text
from jaxquant.io import Source, load_params, open_model
from jaxquant.models.config import ModelConfig
from jaxquant.models.families import block_names, outer_names

Scorer = Callable[[np.ndarray], float]


def our_scorer(source: Source, seqlen: int) -> tuple[Scorer, float]:
    """Mean NLL of a window, and the seconds of compilation."""
    import jax

    from jaxquant.evaluate.perplexity import token_nll

    params = jax.tree.map(jax.numpy.asarray, load_params(source, np.float32))
    start = time.perf_counter()
    compiled = token_nll.lower(params, source.config, jax.ShapeDtypeStruct((seqlen,), np.int32)).compile()
    return lambda window: float(np.asarray(compiled(params, window)).mean()), time.perf_counter() - start


def torch_scorer(source: Source) -> Scorer:
    """The usual evaluation: `LlamaForCausalLM` with SDPA attention, loss of `labels=input_ids`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config: ModelConfig = source.config
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_position,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="sdpa",
        )
    )
    outer = source.outer()
    state = {name: outer[path] for path, (name, _) in outer_names(config).items()}
    for layer in range(config.num_layers):
        block = source.block(layer)
        for path, (suffix, transpose) in block_names(config).items():
            leaf = block
            for key in path.split("."):
                leaf = leaf[key]
            state[f"model.layers.{layer}.{suffix}"] = leaf.T if transpose else leaf
    tensors = {name: torch.tensor(np.asarray(array, np.float32)) for name, array in state.items()}
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    model.float().eval()

    def score(window: np.ndarray) -> float:
        tokens = torch.from_numpy(window).long()[None]
        with torch.inference_mode():
            return float(model(tokens, labels=tokens, use_cache=False).loss)

    return score


def peak_megabytes() -> float:
    # Not ru_maxrss: a child inherits its parent's. VmHWM starts anew with the program (Linux).
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measured(score: Scorer, window: np.ndarray) -> tuple[float, float, float]:
    """NLL, wall seconds, seconds of processor time."""
    wall, busy = time.perf_counter(), time.process_time()
    nll = score(window)
    return nll, time.perf_counter() - wall, time.process_time() - busy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--only", choices=("jaxquant", "torch"), help="score one window, print peak memory")
    args = parser.parse_args()

    source = open_model("smollm2-135m")
    text = read_text(args.text)
    windows = eval_windows(text, source.tokenizer(), source.config, seqlen=args.seqlen, limit=args.windows)
    if args.only:
        score = our_scorer(source, args.seqlen)[0] if args.only == "jaxquant" else torch_scorer(source)
        loaded = peak_megabytes()
        score(windows[0])
        print(json.dumps({"loaded": round(loaded), "peak": round(peak_megabytes())}))
        return

    ours, compile_seconds = our_scorer(source, args.seqlen)
    theirs = torch_scorer(source)
    ours(windows[0])
    theirs(windows[0])
    rows = []
    for i, window in enumerate(windows):
        sides = [("jaxquant", ours), ("torch", theirs)]
        results = {name: measured(score, window) for name, score in (sides if i % 2 else sides[::-1])}
        rows.append({name: dict(zip(("nll", "wall", "cpu"), r, strict=True)) for name, r in results.items()})
        print(rows[-1], flush=True)

    def ratio(clock: str) -> float:
        return statistics.median(row["torch"][clock] / row["jaxquant"][clock] for row in rows)

    memory = {}
    for side in ("jaxquant", "torch"):
        command = [sys.executable, __file__, "--text", args.text, "--windows", "1", "--only", side,
                   "--seqlen", str(args.seqlen)]  # fmt: skip
        memory[side] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    result = {
        "model": source.name,
        "fingerprint": source.fingerprint(),
        "text": Path(args.text).name,
        "seqlen": args.seqlen,
        "median_seconds": {
            side: statistics.median(row[side]["wall"] for row in rows) for side in ("jaxquant", "torch")
        },
        "torch_over_jaxquant_wall": ratio("wall"),
        "torch_over_jaxquant_cpu": ratio("cpu"),
        "largest_nll_difference": max(abs(row["torch"]["nll"] - row["jaxquant"]["nll"]) for row in rows),
        "compile_seconds": compile_seconds,
        "megabytes": memory,
        "windows": rows,
        "load_average": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "cpu": Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t: "),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "torch", "transformers", "numpy")},
    }
    path = Path(__file__).parent / "results" / "evaluate.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "windows"}, indent=1))


if __name__ == "__main__":
    main()
