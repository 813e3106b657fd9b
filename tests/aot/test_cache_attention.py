"""The real compilers take the kernels, and what they need in memory is the packed cache."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

CHIPS = ["v4", "v5e", "v5p", "v6e", "tpu7x"]
SCRIPT = "aot_attention.py"


@pytest.mark.parametrize("chip", CHIPS)
def test_memory_is_that_of_the_packed_cache(chip, compiled):
    rows = [row for row in compiled(SCRIPT, chip) if row["how"] == "pallas"]
    assert {row["bits"] for row in rows} == {2, 3, 4, 8}
    for row in rows:
        small = row["model"] == "SmolLM2"
        assert row["calls"] == 1, row
        assert row["vmem_bytes"] <= 16 * 2**20, row
        # Registers are 8 x 128: of SmolLM2 three heads of scales take four.
        assert row["argument_bytes"] < (1.1 if small else 1.01) * row["packed_bytes"], row
        if row["bits"] == 4:
            assert row["argument_bytes"] < 0.3 * row["bf16_bytes"] or row["group"] == 32, row
        # A head of 128 words lies with its words in the lanes, so a copy puts places there.
        if row["bits"] < 8:
            assert row["temp_bytes"] < (0.1 if small else 0.02) * row["bf16_bytes"], row


def test_the_scan_copies_the_cache(compiled):
    """Why there is a kernel: XLA moves the cache several times over."""
    rows = {row["how"]: row for row in compiled(SCRIPT, "v6e") if row["model"] == "8B" and row["bits"] == 4}
    for how in ("scan", "dequantized"):
        assert rows[how]["accessed_bytes"] > 5 * rows[how]["argument_bytes"]


def test_the_gpu_holds_copies_of_scales_and_partial_sums(compiled):
    """Partial sums are eight rows to a head of the cache and share of the places, in float32."""
    rows = [row for row in compiled(SCRIPT, "H100") if row["how"] == "pallas"]
    assert {row["bits"] for row in rows} == {2, 3, 4, 8}
    for row in rows:
        assert row["calls"] == 1, row
        assert row["argument_bytes"] < 1.01 * row["packed_bytes"], row
        assert row["temp_bytes"] < (0.12 if row["model"] == "SmolLM2" else 0.06) * row["bf16_bytes"], row


def test_without_the_kernel_the_gpu_writes_much_of_the_cache(compiled):
    rows = {row["how"]: row for row in compiled(SCRIPT, "H100") if row["model"] == "8B" and row["bits"] == 4}
    for how in ("scan", "dequantized"):
        assert rows[how]["temp_bytes"] > 0.3 * rows[how]["bf16_bytes"]
