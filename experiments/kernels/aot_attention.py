"""What compilers for TPUs and the H100 make of attention over a packed cache, chip by chip, without a chip.

    python experiments/kernels/aot_attention.py [--chip v6e]

Compiles `jaxquant.kernels.cache_attention` ahead of time for one token and 4096 places in the shapes of
SmolLM2-135M, Llama-3-8B and Llama-3-70B; on v6e and H100 also the scan, and the cache dequantized as a whole.
The rest is as in `aot.py`. Writes results/aot_attention.json and results/aot_attention.md.
"""

from __future__ import annotations

import functools
import time

import aot

# Heads, heads of the cache, and their size.
SHAPES = {"SmolLM2": (9, 3, 64), "8B": (32, 8, 128), "70B": (64, 8, 128)}
WIDTHS = (2, 3, 4, 8)
PLACES = 4096
# Grids that the kernel for GPUs does not take.
NOT_ON_H100 = {("SmolLM2", 3, None), ("8B", 4, 32), ("70B", 4, 32)}


def compile_all(chip: str) -> list[dict]:
    """A row a program; the environment has to be `aot.environment()` before jax is imported."""
    import jax
    import jax.numpy as jnp

    from jaxquant.kernels.cache_attention import cache_attention
    from jaxquant.models.attention import attention
    from jaxquant.quant import ActivationGrid, PackedHeads

    sharding = jax.sharding.SingleDeviceSharding(aot.device(chip))
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)

    def dequantized(q, k, v, start):
        k, v = k.dequantize(q.dtype), v.dequantize(q.dtype)
        return attention(q, k, v, window=None, sliding=False, start=start)

    def by(backend):
        return lambda q, k, v, start: cache_attention(q, k, v, start=start, backend=backend)

    ways = {"pallas": by(None), "scan": by("portable"), "dequantized": dequantized}

    def row(name: str, how: str, grid: ActivationGrid) -> dict:
        heads, kv_heads, n = SHAPES[name]
        floats = jax.ShapeDtypeStruct((1, PLACES, kv_heads, n), jnp.bfloat16)
        spec = jax.eval_shape(lambda heads: PackedHeads.of(heads, grid), floats)
        cache = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), spec)
        q, start = array((1, 1, heads, n), jnp.bfloat16), array((), jnp.int32)
        started = time.perf_counter()
        program = jax.jit(ways[how]).lower(q, cache, cache, start).compile()
        memory, cost = program.memory_analysis(), program.cost_analysis() or {}
        return {
            "chip": chip, "model": name, "how": how, "bits": grid.bits, "group": grid.group_size or n,
            "places": PLACES, "argument_bytes": memory.argument_size_in_bytes,
            "packed_bytes": int(2 * PLACES * kv_heads * n * grid.effective_bits(n) / 8),
            "temp_bytes": memory.temp_size_in_bytes,
            "bf16_bytes": 2 * 2 * PLACES * kv_heads * n,
            "accessed_bytes": cost.get("bytes accessed"),
            **aot.kernels(program),
            "floor_us": aot.floor_us(chip, memory.argument_size_in_bytes),
            "compile_seconds": time.perf_counter() - started,
        }  # fmt: skip

    grids = [ActivationGrid(bits=bits, scale_dtype="float16") for bits in WIDTHS]
    grids.append(ActivationGrid(bits=4, group_size=32, scale_dtype="float16"))
    rows = [
        row(name, "pallas", grid)
        for name in SHAPES
        for grid in grids
        if chip != "H100" or (name, grid.bits, grid.group_size) not in NOT_ON_H100
    ]
    if chip in ("v6e", "H100"):
        rows += [row("8B", how, grids[WIDTHS.index(4)]) for how in ("scan", "dequantized")]
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: a block of Llama-3-8B, one scale a head."""
    lines = [
        "| chip | how | bits | arguments, MB | of a bf16 cache | temp / bf16 cache | "
        "accessed / arguments | floor, us |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        if r["model"] == "8B" and r["group"] == SHAPES["8B"][2] and r["bits"] in (2, 4):
            accessed = r["accessed_bytes"]  # the compiler for GPUs tells none
            lines.append(
                f"| {r['chip']} | {r['how']} | {r['bits']} | {r['argument_bytes'] / 1e6:.2f} | "
                f"{r['argument_bytes'] / r['bf16_bytes']:.1%} | {r['temp_bytes'] / r['bf16_bytes']:.1%} | "
                f"{'' if accessed is None else format(accessed / r['argument_bytes'], '.1f')} | "
                f"{r['floor_us']:.1f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    aot.run(__file__, __doc__, [chip for chip in aot.CHIPS if chip != "B200"], compile_all, table)
