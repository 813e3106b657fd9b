"""The real compilers take the transform that quantizes, and nothing transformed is in memory."""

from __future__ import annotations

import math

import pytest

pytestmark = pytest.mark.slow

SCRIPT = "aot_hadamard.py"


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_memory_is_that_of_x_and_codes(chip, compiled):
    rows = [row for row in compiled(SCRIPT, chip) if row["how"] == "pallas"]
    assert {row["block"] for row in rows} == {64, 1536, 14336, 28672}
    for row in rows:
        assert row["calls"] == 1, row
        assert row["vmem_bytes"] <= 16 * 2**20, row
        # v5p copies scales and offsets, whose rows are whole registers.
        width = 128 * math.ceil(row["channels"] / row["group"] / 128)
        assert row["temp_bytes"] < 1.1 * 2 * 4 * row["tokens"] * width, row


def test_the_gpu_holds_scales_of_tiles(compiled):
    rows = [row for row in compiled(SCRIPT, "H100") if row["how"] == "pallas"]
    assert {row["block"] for row in rows} == {64, 1536, 14336, 28672}
    for row in rows:
        assert row["calls"] == 1, row
        # A program writes scales and offsets of whole tiles of 64 slices: four rows of 12 fill one. A row of
        # 12 slices alone is copied, as 16.
        slices = row["channels"] // 128
        at_once = 4 if slices == 12 else 1
        tiles = math.ceil(row["tokens"] / at_once) * math.ceil(at_once * slices / 64)
        assert row["temp_bytes"] <= 2 * 4 * 64 * tiles * max(1, 128 // row["group"]) + 8192, row


@pytest.mark.parametrize("chip", ["v6e", "H100"])
def test_the_portable_implementation_writes_the_transformed(compiled, chip):
    """Why there is a kernel."""
    rows = [row for row in compiled(SCRIPT, chip) if row["how"] == "portable"]
    assert rows
    assert all(row["temp_bytes"] >= row["float32_bytes"] for row in rows)
