"""Second moments with a spectrum of one's choice."""

from __future__ import annotations

import numpy as np


def with_spectrum(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """`Q diag(values) Q^T` with a random Q."""
    n = len(values)
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    h = (q * values) @ q.T
    return (h + h.T) / 2


def power_law(n: int, exponent: float = 2.0, seed: int = 0) -> np.ndarray:
    return with_spectrum(np.arange(1, n + 1.0) ** -exponent, seed)
