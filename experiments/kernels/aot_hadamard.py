"""What compilers make of the Hadamard transform that quantizes, chip by chip, without a chip.

    python experiments/kernels/aot_hadamard.py [--chip v6e]

Compiles `jaxquant.kernels.hadamard` ahead of time for the inputs of `down` of SmolLM2-135M, Llama-3-8B and
Llama-3-70B, one token and 1024 tokens, one block and one range a token and blocks and groups of 64; on v6e
and the H100 also the portable implementation; the B200 has no other. The rest is as in `aot.py`. Writes
results/aot_hadamard.json and results/aot_hadamard.md.
"""

from __future__ import annotations

import functools
import time

import aot

WIDTHS = {"SmolLM2": 1536, "8B": 14336, "70B": 28672}
TOKENS = (1, 1024)
CHIPS = [chip for chip in aot.CHIPS if chip != "B200"]


def compile_all(chip: str) -> list[dict]:
    """A row a program; the environment has to be `aot.environment()` before jax is imported."""
    import jax
    import jax.numpy as jnp

    from jaxquant.kernels.hadamard import hadamard_quantize
    from jaxquant.quant import ActivationGrid

    sharding = jax.sharding.SingleDeviceSharding(aot.device(chip))

    def row(name: str, size: int | None, tokens: int, backend: str | None) -> dict:
        n = WIDTHS[name]
        x = jax.ShapeDtypeStruct((tokens, n), jnp.bfloat16, sharding=sharding)
        grid, block = ActivationGrid(bits=4, group_size=size), size or n
        f = functools.partial(hadamard_quantize, grid=grid, block=block, backend=backend)
        started = time.perf_counter()
        program = jax.jit(f).lower(x).compile()
        memory, cost = program.memory_analysis(), program.cost_analysis() or {}
        moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return {
            "chip": chip, "model": name, "how": "portable" if backend else "pallas", "channels": n,
            "block": block, "group": size or n, "tokens": tokens,
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
            "float32_bytes": 4 * tokens * n,
            "accessed_bytes": cost.get("bytes accessed"),
            **aot.kernels(program),
            "floor_us": aot.floor_us(chip, moved),
            "compile_seconds": time.perf_counter() - started,
        }  # fmt: skip

    cases = [(name, size, tokens) for name in WIDTHS for size in (None, 64) for tokens in TOKENS]
    rows = [row(*case, None) for case in cases]
    if chip in ("v6e", "H100"):
        rows += [row("8B", size, 1024, "portable") for size in (None, 64)]
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: 1024 tokens of Llama-3-8B."""
    lines = [
        "| chip | how | block | group | x and codes, MB | temp / x in float32 | "
        "accessed / x and codes | floor, us |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        if r["model"] == "8B" and r["tokens"] > 1:
            moved = r["argument_bytes"] + r["output_bytes"]
            # The compiler for GPUs tells none.
            accessed = "" if r["accessed_bytes"] is None else f"{r['accessed_bytes'] / moved:.1f}"
            lines.append(
                f"| {r['chip']} | {r['how']} | {r['block']} | {r['group']} | {moved / 1e6:.1f} | "
                f"{r['temp_bytes'] / r['float32_bytes']:.1%} | {accessed} | "
                f"{r['floor_us']:.1f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    aot.run(__file__, __doc__, CHIPS, compile_all, table)
