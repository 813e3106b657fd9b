"""Programs compiled for TPUs that are not here, by scripts of experiments/kernels: one process a chip."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments" / "kernels"


@pytest.fixture(scope="session")
def tpu_programs():
    """Rows of `compile_all` by chip and script; skipped where there is no compiler."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no TPU compiler: pip install '.[aot]'")
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import aot
    finally:
        sys.path.remove(str(EXPERIMENTS))
    return functools.cache(lambda chip, script="aot.py": aot.compile_apart(chip, str(EXPERIMENTS / script)))
