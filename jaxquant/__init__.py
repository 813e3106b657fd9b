"""jaxquant: low-bit quantization of language models in JAX.

The names below are imported on first use, so that `import jaxquant` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxquant.calibrate.moments import Moments, merge, observe
    from jaxquant.io import load_model, load_params, open_model
    from jaxquant.methods import Rounded, gptq, rtn
    from jaxquant.pipeline import quantize_model
    from jaxquant.quant import Grid, QArray, quantize
    from jaxquant.recipe import Recipe

__version__ = "0.1.0"

_HOME = {
    "Grid": "jaxquant.quant",
    "Moments": "jaxquant.calibrate.moments",
    "QArray": "jaxquant.quant",
    "Recipe": "jaxquant.recipe",
    "Rounded": "jaxquant.methods",
    "gptq": "jaxquant.methods",
    "load_model": "jaxquant.io",
    "load_params": "jaxquant.io",
    "merge": "jaxquant.calibrate.moments",
    "observe": "jaxquant.calibrate.moments",
    "open_model": "jaxquant.io",
    "quantize": "jaxquant.quant",
    "quantize_model": "jaxquant.pipeline",
    "rtn": "jaxquant.methods",
}

__all__ = [
    "Grid",
    "Moments",
    "QArray",
    "Recipe",
    "Rounded",
    "gptq",
    "load_model",
    "load_params",
    "merge",
    "observe",
    "open_model",
    "quantize",
    "quantize_model",
    "rtn",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxquant' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
