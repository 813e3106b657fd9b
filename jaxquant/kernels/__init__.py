"""One folder per op: `reference.py` is the meaning, `api.py` chooses an implementation."""

import jaxquant.quant  # noqa: F401  `QArray` imports the ops and they import its packing: quant has to come first
