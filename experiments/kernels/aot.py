"""What compilers for TPUs and GPUs make of products with packed weights, chip by chip, without a chip.

    python experiments/kernels/aot.py [--chip v6e]

Compiles `jaxquant.kernels.dequant_matmul` ahead of time for linears of SmolLM2-135M, Llama-3-8B and
Llama-3-70B, one token and 1024 tokens, on TPUs with scales and zeros in pairs, too, and `integer_matmul` for
some of them, in one process a chip, since a compiler may abort; with `--chip`, for that one in this process,
and prints the rows. On v6e and GPUs the scan and the plain product with a `jnp.uint4` or `jnp.uint2` weight
are compiled beside it. Needs `libtpu` of the version that jax pins (extra `aot`), and `jax-cuda12-plugin` and
`jax-cuda12-pjrt` of the version of jax, installed with `--no-deps`: no driver and no CUDA. Writes
results/aot.json and results/aot.md. Nothing is run: `vmem_bytes` is what a compiler for TPUs says that the
kernel takes, and `floor_us`, a prediction, what the bytes of arguments take at the bandwidth of the chip or
the multiplications at its peak, whichever is longer.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

# Topology that both supported versions of libtpu know, bytes a second of HBM of one of its devices, and its
# operations a second in bfloat16 (Google Cloud's tables; a chip of tpu7x is two devices; NVIDIA's data sheets
# of the H100 SXM and the B200, without sparsity).
CHIPS = {
    "v4": ("v4:2x2x1", 1228e9, 275e12),
    "v5e": ("v5e:2x2", 819e9, 197e12),
    "v5p": ("v5p:2x2x1", 2765e9, 459e12),
    "v6e": ("v6e:2x2", 1640e9, 918e12),
    "tpu7x": ("tpu7x:2x2x1", 3690e9, 1153e12),
    "H100": ("h100", 3350e9, 989e12),
    "B200": ("b200", 8000e9, 2250e12),
}
# XLA wants a GPU described: capability, multiprocessors, name. The extension makes it sm_90a, which has
# `wgmma`, or sm_100a, which has `tcgen05.mma`.
GPUS = {"H100": (9, 132, "NVIDIA H100 80GB HBM3"), "B200": (10, 148, "NVIDIA B200")}
GPU = """
gpu_device_info {{
  cuda_compute_capability {{ major: {} minor: 0 feature_extension: ACCELERATED_FEATURES }}
  core_count: {} threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  fpus_per_core: 128 clock_rate_ghz: 1.98 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: {} minor: {} }}
device_description_str: "{}"
"""
# Versions of CUDA that the plugins are built for.
CUDA = {"xla_cuda12": (12, 9), "xla_cuda13": (13, 0)}
CALL = re.compile('custom_call_target="(tpu_custom_call|mosaic_gpu)')
VMEM = re.compile(r'"used_scoped_memory_configs":\[{"memory_space":"1","offset":"\d+","size":"(\d+)"')
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

Compile: TypeAlias = Callable[[str], list[dict]]
Table: TypeAlias = Callable[[list[dict]], str]


def missing(chip: str) -> str:
    """What has to be installed to compile for the chip; "" if nothing."""
    if chip not in GPUS:
        return "" if importlib.util.find_spec("libtpu") else "no TPU compiler: pip install '.[aot]'"
    if _plugin():
        return ""
    return "no CUDA compiler: pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt of the version of jax"


def _plugin() -> str | None:
    found = importlib.util.find_spec("jax_plugins")
    return next((n for n in CUDA if found and importlib.util.find_spec(f"jax_plugins.{n}")), None)


def device(chip: str):
    """A device that is not here, to compile for."""
    from jax.experimental import topologies

    if chip not in GPUS:
        return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0]).devices[0]
    capability, cores, name = GPUS[chip]
    target = GPU.format(capability, cores, *CUDA[_plugin()], name)
    return topologies.get_topology_desc(
        platform="cuda", topology_name=CHIPS[chip][0], topology="1x1x1", target_config=target
    ).devices[0]


def floor_us(chip: str, nbytes: float, operations: float = 0) -> float:
    """What bytes or operations in bfloat16 take at least, in microseconds."""
    _, bandwidth, peak = CHIPS[chip]
    return 1e6 * max(nbytes / bandwidth, operations / peak)


def kernels(program) -> dict:
    """Calls of kernels in a compiled program, and the most VMEM that one of them takes (`None` on GPUs)."""
    lines = [line for line in program.as_text().splitlines() if CALL.search(line)]
    sizes = [int(size) for line in lines for size in VMEM.findall(line)]
    return {"calls": len(lines), "vmem_bytes": max(sizes, default=None)}


def compile_all(chip: str) -> list[dict]:
    """A row a program; the environment has to be `environment()` before jax is imported."""
    import jax
    import jax.numpy as jnp

    from jaxquant.kernels.dequant_matmul import dequant_matmul, paired_matmul
    from jaxquant.kernels.integer_matmul import integer_matmul
    from jaxquant.quant.packing import block_rows, packed_rows

    sharding = jax.sharding.SingleDeviceSharding(device(chip))
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)

    def weight(name: str, bits: int) -> tuple:
        rows, out, size = LINEARS[name]
        block = block_rows(size)
        per_group = array((rows // size, out), jnp.float16)
        return array((rows // block, packed_rows(block, bits), out), jnp.uint8), per_group, per_group

    def packed(name: str, bits: int, tokens: int, backend: str | None) -> dict:
        rows, out, size = LINEARS[name]
        product = functools.partial(dequant_matmul, bits=bits, block=block_rows(size), backend=backend)
        how = {None: "pallas", "portable": "scan"}[backend]
        x = (array((tokens, rows), jnp.bfloat16),)
        return row(product, name, bits, tokens, how, bits / 8 * rows * out, x, *weight(name, bits))

    def pairs(name: str, bits: int, tokens: int) -> dict:
        rows, out, size = LINEARS[name]
        product = functools.partial(paired_matmul, bits=bits, block=block_rows(size))
        words, *_ = weight(name, bits)
        x = (array((tokens, rows), jnp.bfloat16),)
        metadata = array((rows // size, 1, out), jnp.uint32)
        return row(product, name, bits, tokens, "paired", bits / 8 * rows * out, x, words, metadata)

    def integers(name: str, bits: int, tokens: int, x_groups: int) -> dict:
        rows, out, size = LINEARS[name]
        product = functools.partial(integer_matmul, x_bits=8, bits=bits, block=block_rows(size))
        per_row = array((tokens, x_groups), jnp.float32)
        x = (array((tokens, rows), jnp.uint8), per_row, per_row)
        how = "integers" if x_groups == 1 else "integers, x in groups"
        return row(product, name, bits, tokens, how, bits / 8 * rows * out, x, *weight(name, bits))

    def plain(x, w, scale, zero):
        grouped = w.reshape(scale.shape[0], -1, w.shape[1]).astype(x.dtype)
        scale, zero = (a.astype(x.dtype)[:, None] for a in (scale, zero))
        return x @ ((grouped - zero) * scale).reshape(w.shape)

    def unpacked(name: str, bits: int, tokens: int) -> dict:
        rows, out, size = LINEARS[name]
        per_group = array((rows // size, out), jnp.float16)
        codes = array((rows, out), {2: jnp.uint2, 4: jnp.uint4}[bits])
        x = (array((tokens, rows), jnp.bfloat16),)
        return row(plain, name, bits, tokens, "jnp", bits / 8 * rows * out, x, codes, per_group, per_group)

    def row(product, name, bits, tokens, how, code_bytes, x, *weight) -> dict:
        rows, out, size = LINEARS[name]
        started = time.perf_counter()
        program = jax.jit(product).lower(*x, *weight).compile()
        memory, cost = program.memory_analysis(), program.cost_analysis() or {}
        metadata = 2 * 2 * rows // size * out
        return {
            "chip": chip, "linear": name, "in": rows, "out": out, "group": size, "bits": bits,
            "tokens": tokens, "how": how,
            "argument_bytes": memory.argument_size_in_bytes,
            "packed_bytes": int(code_bytes) + metadata + sum(a.size * a.dtype.itemsize for a in x),
            "temp_bytes": memory.temp_size_in_bytes,
            "bf16_bytes": 2 * rows * out,
            "accessed_bytes": cost.get("bytes accessed"),
            **kernels(program),
            "floor_us": floor_us(chip, memory.argument_size_in_bytes, 2 * tokens * rows * out),
            "compile_seconds": time.perf_counter() - started,
        }  # fmt: skip

    rows = [packed(name, bits, 1, None) for name in LINEARS for bits in WIDTHS]
    rows += [packed(name, 4, PREFILL, None) for name in LINEARS]
    if chip not in GPUS:
        rows += [pairs(name, bits, 1) for name in LINEARS for bits in WIDTHS]
        rows += [pairs(name, 4, PREFILL) for name in LINEARS]
    if chip != "B200":
        rows += [integers("8B up", bits, 1, 1) for bits in (3, 4, 8)]
        rows += [integers(name, 4, PREFILL, 1) for name in ("SmolLM2 up", "8B up", "70B down")]
        rows += [integers("8B up", 4, PREFILL, LINEARS["8B up"][0] // LINEARS["8B up"][2])]
    if chip in ("v6e", *GPUS):
        for tokens in (1, PREFILL):
            rows += [packed("8B up", bits, tokens, "portable") for bits in (2, 3, 4)]
            rows += [unpacked("8B up", bits, tokens) for bits in (2, 4)]
    return rows


def environment() -> dict[str, str]:
    """For a process that compiles: without these libtpu asks a metadata server for its machine."""
    facts = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what it keeps can be loaded on such a device only
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
            accessed = r["accessed_bytes"] and f"{r['accessed_bytes'] / r['argument_bytes']:.1f}"
            lines.append(
                f"| {r['chip']} | {r['how']} | {r['bits']} | {r['tokens']} | "
                f"{r['argument_bytes'] / 1e6:.1f} | {over:.1%} | {temp:.1%} | "
                f"{accessed or '?'} | {r['floor_us']:.1f} |"
            )
    return "\n".join(lines) + "\n"


def run(script: str, about: str | None, chips: Iterable[str], compile_all: Compile, table: Table) -> None:
    """The command line of a script, and its results under the name that it has."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=chips)
    chip = parser.parse_args().chip
    for name in [chip] if chip else chips:
        if reason := missing(name):
            parser.exit(1, f"{name}: {reason}\n")
    if chip:
        print(json.dumps(compile_all(chip)))
        return
    rows = [row for name in chips for row in compile_apart(name, script)]
    from importlib.metadata import version

    from jaxquant.folder import versions

    compilers = ["libtpu"]
    if not GPUS.keys().isdisjoint(chips):
        compilers.append(f"jax-{_plugin().removeprefix('xla_')}-plugin")
    facts = {"versions": versions() | {name: version(name) for name in compilers}, "rows": rows}
    results = RESULTS / Path(script).name
    results.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    results.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    run(__file__, __doc__, CHIPS, compile_all, table)
