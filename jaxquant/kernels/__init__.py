"""One folder per op: `reference.py` is the meaning, `api.py` chooses an implementation."""
