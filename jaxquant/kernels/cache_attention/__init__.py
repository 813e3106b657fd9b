"""Attention over keys and values that a cache keeps packed."""

from jaxquant.kernels.cache_attention.api import cache_attention

__all__ = ["cache_attention"]
