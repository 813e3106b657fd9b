"""How kernels for GPUs run where there is none: memory is emulated."""

from __future__ import annotations

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="the interpreter of JAX 0.10 multiplies no transposed operand; JAX 0.12 has one that does",
)


def strict():
    """Unsynchronized accesses raise, fresh memory reads as NaN."""
    return plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
