"""What the compilers make of one packed decoder block, chip by chip, without a chip.

    python experiments/kernels/block.py [--chip v6e]

Compiles `jaxquant.models.decoder.block` ahead of time for the shapes of SmolLM2-135M, Llama-3-8B and
Llama-3-70B, all linears W4 in groups (for TPUs `paired`): W4A16, activations and cache in bfloat16, and
W4A4KV4, activations (one range a token, the inputs of down transformed) and cache in 4 bits; one token behind
a cache of 4096, and a prompt of 512 into a cache of its length. Parameters are shapes, no array is made. As
in aot.py, which has what they need installed, there is a process a chip, nothing is run, and `floor_us` is
the time of bytes or operations (as if in bfloat16), those of linears and of attention. Of whole models it is
that of their blocks and of a bfloat16 head for one token. Writes results/block.json and results/block.md.
"""

from __future__ import annotations

import dataclasses
import time

import aot

# Hidden and intermediate size, heads, heads of keys, size of a head, group size.
MODELS = {
    "SmolLM2": (576, 1536, 9, 3, 64, 64),
    "8B": (4096, 14336, 32, 8, 128, 128),
    "70B": (8192, 28672, 64, 8, 128, 128),
}
# Blocks, and tokens of the vocabulary.
WHOLE = {"SmolLM2": (30, 49152), "8B": (32, 128256), "70B": (80, 128256)}
CHIPS = ("v4", "v5e", "v5p", "v6e", "tpu7x", "H100")
# Tokens that enter at once, and places of the cache.
STEPS = {"decode": (1, 4096), "prefill": (512, 512)}
BITS = 4
PRECISIONS = ("W4A16", "W4A4KV4")


def operations(name: str, step: str) -> int:
    """Of the linears of a block, and of the scores and sums of attention, each token at its own place."""
    hidden, intermediate, heads, kv_heads, head_dim, _ = MODELS[name]
    tokens, places = STEPS[step]
    weights = hidden * (2 * (heads + kv_heads) * head_dim + 3 * intermediate)
    seen = sum(range(places - tokens + 1, places + 1))
    return 2 * tokens * weights + 4 * seen * heads * head_dim


def compile_all(chip: str) -> list[dict]:
    """A row a program; the environment has to be `aot.environment()` before jax is imported."""
    import jax
    import jax.numpy as jnp

    from jaxquant.models.cache import init_cache
    from jaxquant.models.config import LINEARS, ModelConfig, Precision
    from jaxquant.models.decoder import block
    from jaxquant.models.init import init_params
    from jaxquant.quant import ActivationGrid, Grid, paired, quantize

    sharding = jax.sharding.SingleDeviceSharding(aot.device(chip))

    def build(name: str, places: int, precision: str):
        hidden, intermediate, heads, kv_heads, head_dim, size = MODELS[name]
        integers = Precision.uniform(
            ActivationGrid(bits=BITS), ActivationGrid(bits=BITS, scale_dtype="float16")
        )
        integers = dataclasses.replace(integers, hidden_hadamard=intermediate)
        config = ModelConfig(
            family="llama", vocab_size=8, hidden_size=hidden, intermediate_size=intermediate, num_layers=1,
            num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, query_scale=head_dim**-0.5,
            max_position=places, dtype="bfloat16",
            precision=integers if precision == "W4A4KV4" else Precision(),
        )  # fmt: skip

        def arrays():
            params = init_params(jax.random.key(0), config, dtype=jnp.bfloat16)["blocks"]
            for path in (path for _, paths in LINEARS for path in paths):
                part, linear = path.split(".")
                kernel = params[part][linear]["kernel"].astype(jnp.float32)
                params[part][linear]["kernel"] = quantize(kernel, Grid(bits=BITS, group_size=size))
            cache = init_cache(config, 1, places)
            if chip not in aot.GPUS:
                params = paired(params)
            params, k, v = jax.tree.map(lambda a: a[0], (params, cache.k, cache.v))
            return params, dataclasses.replace(cache, k=k, v=v)

        return config, *jax.eval_shape(arrays)

    def row(name: str, step: str, precision: str) -> dict:
        tokens, places = STEPS[step]
        config, params, cache = build(name, places, precision)
        x = jax.ShapeDtypeStruct((1, tokens, config.hidden_size), jnp.bfloat16)
        arguments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), (params, x, cache)
        )

        def run(params, x, cache):
            return block(params, config, x, sliding=False, cache=cache)[:2]

        started = time.perf_counter()
        program = jax.jit(run, donate_argnums=2).lower(*arguments).compile()
        memory = program.memory_analysis()
        return {
            "chip": chip, "model": name, "step": step, "tokens": tokens, "places": places,
            "precision": precision,
            "argument_bytes": memory.argument_size_in_bytes,
            "packed_bytes": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arguments)),
            "temp_bytes": memory.temp_size_in_bytes,
            "bf16_bytes": 2 * config.hidden_size * config.intermediate_size,
            **aot.kernels(program),
            "floor_us": aot.floor_us(chip, memory.argument_size_in_bytes, operations(name, step)),
            "compile_seconds": time.perf_counter() - started,
        }  # fmt: skip

    return [row(name, step, precision) for precision in PRECISIONS for name in MODELS for step in STEPS]


def table(rows: list[dict]) -> str:
    """Markdown: a row a program."""
    lines = [
        "| chip | precision | model | step | arguments, MB | over packed | temp, MB | "
        "largest linear in bf16, MB | kernels | VMEM, MB | floor, us |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        vmem = "" if r["vmem_bytes"] is None else f"{r['vmem_bytes'] / 1e6:.1f}"
        lines.append(
            f"| {r['chip']} | {r['precision']} | {r['model']} | {r['step']} | "
            f"{r['argument_bytes'] / 1e6:.1f} | {r['argument_bytes'] / r['packed_bytes'] - 1:.1%} | "
            f"{r['temp_bytes'] / 1e6:.1f} | {r['bf16_bytes'] / 1e6:.1f} | {r['calls']} | {vmem} | "
            f"{r['floor_us']:.1f} |"
        )
    lines += [
        "",
        "Predicted floors of whole models, ms: a token behind 4096, and a prompt of 512.",
        "",
        "| chip | precision | " + " | ".join(f"{name}, {step}" for name in MODELS for step in STEPS) + " |",
        "| --- | --- |" + " ---: |" * len(MODELS) * len(STEPS),
    ]
    for chip, precision in dict.fromkeys((r["chip"], r["precision"]) for r in rows):
        of_chip = [r for r in rows if (r["chip"], r["precision"]) == (chip, precision)]
        cells = [f"{whole_ms(chip, r['model'], r['floor_us']):.3g}" for r in of_chip]
        lines.append(f"| {chip} | {precision} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def whole_ms(chip: str, name: str, block_us: float) -> float:
    """Blocks one after another, and the head for the last token."""
    blocks, vocabulary = WHOLE[name]
    head = aot.floor_us(chip, 2 * vocabulary * MODELS[name][0])
    return (blocks * block_us + head) / 1e3


if __name__ == "__main__":
    aot.run(__file__, __doc__, CHIPS, compile_all, table)
