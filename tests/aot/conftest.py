"""Programs compiled for chips that are not here, by scripts in experiments/kernels: one process a chip."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments" / "kernels"


@pytest.fixture(scope="session")
def compiled():
    """Rows of `compile_all` of a script by `(script, chip)`; skips where the compiler is not installed."""
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        aot = importlib.import_module("aot")
    finally:
        sys.path.remove(str(EXPERIMENTS))

    @functools.cache
    def rows(script: str, chip: str) -> list[dict]:
        if reason := aot.missing(chip):
            pytest.skip(reason)
        return aot.compile_apart(chip, str(EXPERIMENTS / script))

    return rows
