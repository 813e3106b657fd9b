"""Numerics that the methods share."""

from jaxquant.linalg.cg import conjugate_gradients
from jaxquant.linalg.dense import product, rows_from
from jaxquant.linalg.hadamard import (
    base_order,
    hadamard,
    hadamard_factors,
    hadamard_transform,
    random_hadamard,
    random_orthogonal,
)
from jaxquant.linalg.nullspace import (
    HardNullSpace,
    Stability,
    anti_shift,
    deflated_mean,
    hard_null_space,
    intersect,
    soft_from_factor,
    soft_null_space,
    subspace_stability,
    tail_null_space,
)
from jaxquant.linalg.psd import DampedFactor, damped_factor, upper_cholesky

__all__ = [
    "DampedFactor",
    "HardNullSpace",
    "Stability",
    "anti_shift",
    "base_order",
    "conjugate_gradients",
    "damped_factor",
    "deflated_mean",
    "hadamard",
    "hadamard_factors",
    "hadamard_transform",
    "hard_null_space",
    "intersect",
    "product",
    "random_hadamard",
    "random_orthogonal",
    "rows_from",
    "soft_from_factor",
    "soft_null_space",
    "subspace_stability",
    "tail_null_space",
    "upper_cholesky",
]
