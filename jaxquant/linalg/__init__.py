"""Numerics that the methods share."""

from jaxquant.linalg.psd import InverseFactor, damped_inverse_factor, upper_inverse_factor

__all__ = ["InverseFactor", "damped_inverse_factor", "upper_inverse_factor"]
