"""What a token takes at run time; estimates of whole runs are tested where runs are."""

from __future__ import annotations

import dataclasses

from tiny_families import tiny_config

from jaxquant.models import ModelConfig
from jaxquant.named import named
from jaxquant.plan import plan, token_cost
from jaxquant.quant import Grid

SMOLLM2 = ModelConfig(
    family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
    num_kv_heads=3, head_dim=64, query_scale=0.125,
)  # fmt: skip
GRID = Grid(bits=4, group_size=64)


def test_an_original_model_does_nothing_besides():
    assert token_cost(SMOLLM2, rotated=False) == {
        "linears": 30 * (576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536),
        "key_rotation": 0,
        "hidden_hadamard": 0,
        "post_rotation": 0,
        "cache_bytes": 30 * 2 * 192 * 2,
        "cache_bytes_16": 30 * 2 * 192 * 2,
    }


def test_rotated_models():
    offq = token_cost(named("offq-w4a4kv4", GRID).runtime(SMOLLM2), rotated=True)
    assert offq["key_rotation"] == 30 * 12 * 64 * 64
    assert offq["hidden_hadamard"] == 30 * 1536 * 64  # blocks of 64: one product
    assert offq["cache_bytes"] == 30 * 2 * 192 * 4.5 / 8
    # 1536 = 12 * 2^7: two products.
    quarot = token_cost(named("quarot-w4a4kv16", GRID).runtime(SMOLLM2), rotated=True)
    assert quarot["hidden_hadamard"] == 30 * 1536 * (48 + 32)
    assert quarot["cache_bytes"] == quarot["cache_bytes_16"]


def test_inner_norms_cost_two_matrices():
    gemma = tiny_config("gemma3")
    config = named("quarot-w4a4kv4", dataclasses.replace(GRID, group_size=None)).runtime(gemma)
    cost = token_cost(config, rotated=True)
    assert cost["post_rotation"] == gemma.num_layers * 2 * gemma.hidden_size**2


def test_further_candidates_and_the_original_alongside_take_memory():
    plain, osaq, qep = (
        plan(SMOLLM2, named(name, GRID), samples=8, seqlen=512) for name in ("gptq", "osaq-gptq", "qep-gptq")
    )
    assert osaq.peak_bytes - plain.peak_bytes == 4 * 6 * 576 * 1536  # a second rounding of the largest
    second_moments = 4 * (3 * 576**2 + 1536**2)
    assert qep.peak_bytes - plain.peak_bytes == second_moments + 4 * 8 * 512 * 576
