"""A whole packed decoder block compiles for chips that are not here, and never holds a dequantized weight."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x", "H100"])
def test_a_kernel_per_linear_and_no_dequantized_weight(chip, compiled):
    rows = compiled("block.py", chip)
    assert {(row["model"], row["step"]) for row in rows} == {
        (model, step) for model in ("SmolLM2", "8B", "70B") for step in ("decode", "prefill")
    }
    for row in rows:
        small = row["model"] == "SmolLM2"
        assert row["calls"] == 7, row
        assert row["argument_bytes"] < 1.05 * row["packed_bytes"], row
        # Of SmolLM2 512 tokens take more room than any weight.
        if not small or row["step"] == "decode":
            assert row["temp_bytes"] < row["bf16_bytes"], row
