"""The real compiler for GPUs takes the kernels, and what they need in memory is the packed weight."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["H100", "B200"])
def programs(compiled, request):
    return compiled("aot.py", request.param)


def test_memory_is_that_of_the_packed_weight(programs):
    """A program that asks for more shared memory than there is would not have been compiled."""
    rows = [row for row in programs if row["how"] == "pallas"]
    assert {row["bits"] for row in rows} == {2, 3, 4, 8}
    for row in rows:
        assert row["calls"] == 1, row
        assert row["argument_bytes"] < 1.05 * row["packed_bytes"], row
        # Partial sums of 8 rows (Blackwell: 16), and x in as many: little, but so are weights of SmolLM2.
        small = row["linear"].startswith("SmolLM2") and row["tokens"] == 1
        of_small = {"H100": 0.15, "B200": 0.2}[row["chip"]]
        assert row["temp_bytes"] < (of_small if small else 0.05) * row["bf16_bytes"], row


def test_the_plain_product_materializes_the_weight(programs):
    """Why there is a kernel: for one token, too, XLA writes the bfloat16 weight out."""
    rows = [row for row in programs if row["how"] == "jnp"]
    assert {row["tokens"] for row in rows} == {1, 1024}
    assert all(row["temp_bytes"] >= row["bf16_bytes"] for row in rows)
