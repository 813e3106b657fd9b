"""One folder per op: `reference.py` is the meaning, `api.py` chooses an implementation."""

import jaxquant.quant  # noqa: F401  `QArray` imports the ops and they import its packing: quant has to come first
from jaxquant.kernels.platform import Backend, check_backend, use_backend

__all__ = ["Backend", "check_backend", "use_backend"]
