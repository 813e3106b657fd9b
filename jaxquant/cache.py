"""Where files are kept that can be had again: models that were fetched, kernels that were built."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`JAXQUANT_CACHE`, else `jaxquant` in the user's cache folder (`XDG_CACHE_HOME`, `~/.cache`)."""
    chosen = os.environ.get("JAXQUANT_CACHE")
    return (
        Path(chosen)
        if chosen
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxquant"
    )
