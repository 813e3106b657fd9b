"""Finished quantized models on disk, written without a run."""

from __future__ import annotations

import dataclasses

import numpy as np
from small_model import CONFIG, MemorySource
from tiny_families import tiny_params

from jaxquant.io import checkpoint
from jaxquant.models.config import EXACT
from jaxquant.quant import Grid, QArray

RNG = np.random.default_rng(0)
GRID = Grid(bits=2, group_size=16)


def packed(grid, shape):
    """Random codes, scales and integer zeros."""
    rows, columns = shape
    groups = grid.groups(rows)
    codes = RNG.integers(0, 2**grid.bits, shape).astype(np.uint8)
    scale = RNG.uniform(0.01, 0.1, (groups, columns)).astype(np.float16)
    zero = None if grid.symmetric else RNG.integers(0, 2**grid.bits, (groups, columns)).astype(np.float16)
    return QArray.from_codes(codes, scale, zero, grid)


def folder_of(folder, kernel, config=CONFIG, precision=EXACT):
    """A finished quantized model whose linears are `kernel(path, shape)`."""
    config = dataclasses.replace(config, precision=precision)
    source = MemorySource(tiny_params(config), config)
    checkpoint.save_outer(folder, source.outer())
    for layer in range(config.num_layers):
        block = source.block(layer)
        for path in checkpoint.PATHS:
            part, name = path.split(".")
            block[part][name]["kernel"] = kernel(f"blocks.{layer}.{path}", config.linear_shape(path))
        checkpoint.save_block(folder, layer, block, {})
    checkpoint.write_manifest(
        folder,
        {"source": {}, "recipe": {}, "calibration": {}, "config": config.to_dict(), "versions": {}}
        | {"state": "complete"},
    )
    source.tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def mixed_kernel(path, shape):
    """Blocks and linears of several grids, and one in floats."""
    if path == "blocks.1.mlp.up":
        return RNG.standard_normal(shape).astype(np.float32)
    if path.startswith("blocks.0."):
        return packed(Grid(bits=3, group_size=16), shape)
    if ".attn." in path:
        return packed(Grid(bits=4, group_size=8, symmetric=True), shape)
    return packed(Grid(bits=8) if path.endswith("down") else GRID, shape)
