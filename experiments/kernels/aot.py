"""What the TPU compiler makes of the dequantizing matmul, chip by chip, without a chip.

    python experiments/kernels/aot.py [--chip v6e]

Compiles `jaxquant.kernels.dequant_matmul` ahead of time for linears of SmolLM2-135M, Llama-3-8B and
Llama-3-70B, one token and 1024 tokens, in one process a chip, since a compiler may abort; with `--chip`, for
that one in this process, and prints the rows. On v6e the scan and the plain product with a `jnp.int4` or
`jnp.int2` weight are compiled beside it. Needs `libtpu` of the version that jax pins (extra `aot`).
Writes results/aot.json and results/aot.md. Nothing is run on a TPU: `floor_us` is bytes over bandwidth.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# Topology that both supported versions of libtpu know, and bytes a second of HBM of one of its devices
# (Google Cloud's tables; a chip of tpu7x is two devices).
CHIPS = {
    "v4": ("v4:2x2x1", 1228e9),
    "v5e": ("v5e:2x2", 819e9),
    "v5p": ("v5p:2x2x1", 2765e9),
    "v6e": ("v6e:2x2", 1640e9),
    "tpu7x": ("tpu7x:2x2x1", 3690e9),
}
# Inputs, outputs and group size.
LINEARS = {
    "SmolLM2 up": (576, 1536, 64),
    "SmolLM2 down": (1536, 576, 64),
    "8B up": (4096, 14336, 128),
    "8B down": (14336, 4096, 128),
    "70B up": (8192, 28672, 128),
    "70B down": (28672, 8192, 128),
}
WIDTHS = (2, 3, 4, 8)
PREFILL = 1024
RESULTS = Path(__file__).parent / "results"


def compile_all(chip: str) -> list[dict]:
    """A row a program; the environment has to be `environment()` before jax is imported."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from jaxquant.kernels.dequant_matmul import dequant_matmul
    from jaxquant.quant.packing import block_rows, packed_rows

    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0]).devices[0]
    array = functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))

    def packed(name: str, bits: int, tokens: int, backend: str | None) -> dict:
        rows, out, size = LINEARS[name]
        block = block_rows(size)
        per_group = array((rows // size, out), jnp.float16)
        words = array((rows // block, packed_rows(block, bits), out), jnp.uint8)
        product = functools.partial(dequant_matmul, bits=bits, block=block, backend=backend)
        return row(
            product,
            name,
            bits,
            tokens,
            {None: "pallas", "portable": "scan"}[backend],
            bits / 8 * rows * out,
            words,
            per_group,
            per_group,
        )

    def plain(x, w, scale, zero):
        grouped = w.reshape(scale.shape[0], -1, w.shape[1]).astype(x.dtype)
        scale, zero = (a.astype(x.dtype)[:, None] for a in (scale, zero))
        return x @ ((grouped - zero) * scale).reshape(w.shape)

    def unpacked(name: str, bits: int, tokens: int) -> dict:
        rows, out, size = LINEARS[name]
        per_group = array((rows // size, out), jnp.float16)
        codes = array((rows, out), {2: jnp.uint2, 4: jnp.uint4}[bits])
        return row(plain, name, bits, tokens, "jnp", bits / 8 * rows * out, codes, per_group, per_group)

    def row(product, name, bits, tokens, how, code_bytes, *weight) -> dict:
        rows, out, size = LINEARS[name]
        started = time.perf_counter()
        program = jax.jit(product).lower(array((tokens, rows), jnp.bfloat16), *weight).compile()
        memory, cost = program.memory_analysis(), program.cost_analysis()
        metadata = 2 * 2 * rows // size * out
        return {
            "chip": chip, "linear": name, "in": rows, "out": out, "group": size, "bits": bits,
            "tokens": tokens, "how": how,
            "argument_bytes": memory.argument_size_in_bytes,
            "packed_bytes": int(code_bytes) + metadata + 2 * tokens * rows,
            "temp_bytes": memory.temp_size_in_bytes,
            "bf16_bytes": 2 * rows * out,
            "accessed_bytes": cost["bytes accessed"],
            "calls": program.as_text().count('custom_call_target="tpu_custom_call"'),
            "floor_us": 1e6 * memory.argument_size_in_bytes / CHIPS[chip][1],
            "compile_seconds": time.perf_counter() - started,
        }  # fmt: skip

    rows = [packed(name, bits, 1, None) for name in LINEARS for bits in WIDTHS]
    rows += [packed(name, 4, PREFILL, None) for name in LINEARS]
    if chip == "v6e":
        for tokens in (1, PREFILL):
            rows += [packed("8B up", bits, tokens, "portable") for bits in (2, 3, 4)]
            rows += [unpacked("8B up", bits, tokens) for bits in (2, 4)]
    return rows


def environment() -> dict[str, str]:
    """For a process that compiles for TPUs: without these libtpu asks a metadata server for its machine."""
    facts = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what it keeps can be loaded on a TPU only
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compilers share a host, devices would not
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    return os.environ | facts


def compile_apart(chip: str, script: str = __file__) -> list[dict]:
    """`compile_all` of a script in a process of its own; RuntimeError with the end of its log on failure."""
    command = [sys.executable, script, "--chip", chip]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise RuntimeError(f"{chip}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def table(rows: list[dict]) -> str:
    """Markdown: one token through the 8B up projection."""
    lines = [
        "| chip | how | bits | tokens | arguments, MB | over packed | temp / bf16 weight | "
        "accessed / arguments | floor, us |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        if r["linear"] == "8B up":
            over, temp = r["argument_bytes"] / r["packed_bytes"] - 1, r["temp_bytes"] / r["bf16_bytes"]
            lines.append(
                f"| {r['chip']} | {r['how']} | {r['bits']} | {r['tokens']} | "
                f"{r['argument_bytes'] / 1e6:.1f} | {over:.1%} | {temp:.1%} | "
                f"{r['accessed_bytes'] / r['argument_bytes']:.1f} | {r['floor_us']:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", choices=CHIPS)
    chip = parser.parse_args().chip
    if importlib.util.find_spec("libtpu") is None:
        parser.exit(1, "libtpu is missing: pip install '.[aot]'\n")
    if chip:
        print(json.dumps(compile_all(chip)))
        return
    rows = [row for name in CHIPS for row in compile_apart(name)]
    from importlib.metadata import version

    from jaxquant.folder import versions

    facts = {"versions": versions() | {"libtpu": version("libtpu")}, "rows": rows}
    (RESULTS / "aot.json").write_text(json.dumps(facts, indent=1) + "\n")
    (RESULTS / "aot.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
