"""The real TPU compilers take the kernel for integers; the chip that cannot multiply int8 gets the scan."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_memory_is_that_of_the_packed_weight(chip, compiled):
    rows = [row for row in compiled("aot.py", chip) if row["how"].startswith("int8")]
    assert {row["bits"] for row in rows} == {3, 4, 8}
    assert all(row["calls"] == (chip != "v4") for row in rows)
    for row in rows:
        small = row["linear"].startswith("SmolLM2")
        # Registers are 8 x 128: of SmolLM2 9 groups take 16.
        assert row["argument_bytes"] < (1.2 if small else 1.05) * row["packed_bytes"], row
        # A prefill may hold its codes once more, by pieces; v5p copies scales.
        if not small:
            assert row["temp_bytes"] < (0.05 if row["tokens"] == 1 else 0.15) * row["bf16_bytes"], row
