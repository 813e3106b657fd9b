"""Numerics that the methods share."""

from jaxquant.linalg.psd import DampedFactor, damped_factor, upper_cholesky

__all__ = ["DampedFactor", "damped_factor", "upper_cholesky"]
