"""What a run will take, known before it starts."""

from __future__ import annotations

import dataclasses
import math
import time

import jax.numpy as jnp

from jaxquant.calibrate.collect import BATCH_TOKENS
from jaxquant.io.checkpoint import PATHS
from jaxquant.linalg import hadamard_factors
from jaxquant.models.config import LINEARS, ModelConfig
from jaxquant.recipe import Recipe
from jaxquant.stages import RTN, Keep, Tune


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run will take, known before it starts.

    Attributes:
      peak_bytes: estimated peak of resident memory.
      output_bytes: size of the packed model.
      source_bytes: size of the same parameters in 16 bits.
      seconds: estimated duration on this machine.
      linears: number of matrices to quantize.
      effective_bits: stored bits per quantized weight.
    """

    peak_bytes: int
    output_bytes: int
    source_bytes: int
    seconds: float
    linears: int
    effective_bits: float


def plan(config: ModelConfig, recipe: Recipe, *, samples: int, seqlen: int) -> Plan:
    """Checks that the grid fits every linear and estimates memory, size and time.

    Raises:
      UsageError: a group size does not divide the inputs of a linear (named).
    """
    config = recipe.runtime(config)
    shapes = {path: config.linear_shape(path) for path in PATHS}
    packed = 0.0
    for index in range(config.num_layers):
        for path, (n, m) in shapes.items():
            module = f"blocks.{index}.{path}"
            packed += recipe.at(module).stored_bytes(n, m, where=module)
    tokens, layers = samples * seqlen, config.num_layers
    runtime_bytes = 0
    if recipe.surgery is not None:
        # What stays for run time: rotations of heads in float32, and behind inner norms matrices in 16 bits.
        heads = 4 * config.num_kv_heads * config.head_dim * (config.head_dim + 1)
        runtime_bytes = layers * (heads + 2 * 2 * config.hidden_size**2 * config.post_norms)
    weights = sum(n * m for n, m in shapes.values())
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    taps = [shapes[paths[0]][0] for _, paths in LINEARS]
    hessians = 4 * sum(n * n for n in taps)
    batch = min(tokens, BATCH_TOKENS)
    widest = max(taps)
    tries = max(1, len(recipe.options))  # roundings of a linear, side by side
    solve = 4 * (4 * widest * widest + 6 * tries * max(n * m for n, m in shapes.values()))
    activations = 4 * (2 * tokens * config.hidden_size + batch * (6 * config.hidden_size + 3 * widest))
    # 450 MB: the interpreter, JAX and its compiler.
    peak = 450e6 + 4 * embeddings + 3 * 4 * weights + hessians + solve + activations

    solving = sum(not isinstance(stage, (RTN, Keep, Tune)) for stage in recipe.stages)
    solving = tries - 1 + tries * (solving - (tries > 1))
    solves = solving * sum(n * n * m * 4 + n**3 for n, m in shapes.values())
    passes = (1 + len(LINEARS)) if recipe.true_sequential else 2
    products = passes * 2 * tokens * weights + 2 * tokens * sum(n * n for n in taps)
    walks = (recipe.hessian == "fisher") + recipe.needs_gradients
    if walks:
        # Forward, forward again inside the backward pass, and that; the inputs of all blocks of a batch.
        products += walks * 4 * 2 * tokens * weights
        peak += 4 * layers * batch * config.hidden_size
    if recipe.needs_gradients:
        # Moments of the gradients at all outputs, and a copy on their way to the disk.
        outputs = sum(m * m for _, m in shapes.values())
        products += 2 * tokens * outputs
        peak += 2 * 4 * layers * outputs
    if recipe.needs_originals:
        # The original model runs along, and drift is as large as the second moments.
        products += passes * 2 * tokens * weights + 2 * tokens * sum(n * n for n in taps)
        peak += 4 * tokens * config.hidden_size + hessians
    for stage in recipe.finishes:
        if not isinstance(stage, Tune):  # of a user, who knows
            continue
        # Samples run forward: steps forward and back, at most 4 judges 9 times, all once for a target; with a
        # price for gradients each of these is three.
        runs = (3 * stage.steps * stage.batch + 36 + samples) * (3 if stage.weight else 1)
        products += 2 * runs * seqlen * weights
        peak += 4 * 4 * tokens * config.hidden_size
    # The solve is a chain of small steps and runs at about a tenth of the speed of large products.
    seconds = layers * (products + 10 * solves) / _flops_per_second() + 20 + 0.3 * layers
    return Plan(
        peak_bytes=int(peak),
        output_bytes=int(packed + runtime_bytes + 2 * embeddings),
        source_bytes=int(2 * (layers * weights + embeddings)),
        seconds=seconds,
        linears=layers * len(shapes),
        effective_bits=8 * packed / (layers * weights),
    )


def token_cost(config: ModelConfig, *, rotated: bool) -> dict[str, float]:
    """What one token takes at run time, over all blocks.

    Args:
      config: of the quantized model.
      rotated: whether a surgery has left operations in the blocks.

    Returns:
      Multiply-adds of the portable program: `linears`; and of what a surgery leaves, `key_rotation` (of
      queries and keys), `hidden_hadamard` (inputs of `down`) and `post_rotation` (behind inner norms). Bytes:
      `cache_bytes`, and `cache_bytes_16` of a cache in 16 bits.
    """
    layers, d, size = config.num_layers, config.hidden_size, config.head_dim
    block = config.precision.hidden_hadamard
    channels = config.num_kv_heads * size
    grids = (config.precision.keys, config.precision.values)
    bits = sum(16.0 if grid is None else grid.effective_bits(size) for grid in grids)
    per_layer = {
        "linears": sum(math.prod(config.linear_shape(path)) for path in PATHS),
        "key_rotation": rotated * (config.num_heads + config.num_kv_heads) * size**2,
        "hidden_hadamard": config.intermediate_size * sum(hadamard_factors(block)) if block else 0,
        "post_rotation": rotated * config.post_norms * 2 * d**2,
        "cache_bytes": channels * bits / 8,
        "cache_bytes_16": 4 * channels,
    }
    return {name: layers * value for name, value in per_layer.items()}


def _flops_per_second() -> float:
    """Speed of a large float32 product, measured once."""
    a = jnp.ones((1024, 1024), jnp.float32)
    (a @ a).block_until_ready()
    begun = time.perf_counter()
    for _ in range(4):
        (a @ a).block_until_ready()
    return 4 * 2 * 1024**3 / (time.perf_counter() - begun)
