"""OffQ: the outlier direction becomes an offset that a whole group of channels shares (arXiv 2606.07116).

In a basis whose channels are spread over their group by a Hadamard matrix with a constant first row, the
first channel of a group is the mean of the group, and an asymmetric grid takes the mean for nothing:

    x' = z H / sqrt(g),   mean_j x'_j = z_1 / sqrt(g),   sum_j (x'_j - mean)^2 = sum_{k>1} z_k^2
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from jaxquant.calibrate.offsets import Offsets
from jaxquant.errors import UsageError
from jaxquant.linalg import base_order, hadamard
from jaxquant.methods.rotate import Rotations

#: How the basis of the residual stream is found; see `stream_basis`.
Basis = Literal["mixed", "top", "all", "householder", "identity"]

# The share of all tokens in the mixed basis; results are flat from 1e-4 to 1e-1.
_ALL = 1e-3


def offq(stats: Offsets, group_size: int, *, basis: Basis = "mixed", sort: bool = True) -> Rotations:
    """The rotations of OffQ: the residual stream, values, keys, and the order of the hidden units.

    `R1 = U P (I (x) H_g)`: the basis U of `stream_basis`, the order P of `spread_leaders`, the Hadamard
    matrix of each group. Values and keys have a head for a group and the eigenvectors of their second moments
    for U; keys lose their mean. Hidden units keep their basis, since the activation function is between:
    their order puts the largest first in their groups, and the Hadamard matrix of a group is applied at run
    time.

    Args:
      stats: of the model with its norms folded.
      group_size: g, channels that share an offset; of the residual stream and of the hidden units.
      basis, sort: parts of the method that can be left out to see what they are worth; `sort=False` keeps the
        channels of U in order, `g` consecutive ones a group.

    Raises:
      UsageError: g does not divide the channels, no Hadamard matrix of an order is known, or an unknown
        basis.
    """
    check_groups(
        group_size,
        hidden_size=len(stats.all),
        intermediate_size=stats.hidden_peak.shape[1],
        head_dim=stats.keys.shape[-1],
    )
    u = stream_basis(stats, basis)
    if sort:
        # What one token of a sequence has is little in the mean of all tokens, and an outlier all the same.
        energies = [np.sum(u * (second @ u), axis=0) for second in (stats.all, stats.top)]
        u = u[:, spread_leaders(np.sqrt(np.maximum(*energies)), group_size)]
    turn = hadamard(group_size) / group_size**0.5
    residual = (u.reshape(len(u), -1, group_size) @ turn).reshape(u.shape)
    head_turn = hadamard(stats.keys.shape[-1]) / stats.keys.shape[-1] ** 0.5
    return Rotations(
        residual=residual,
        values=_principal(stats.values) @ head_turn,
        keys=_principal(stats.keys) @ head_turn,
        key_shift=stats.key_mean,
        hidden=np.array([spread_leaders(peak, group_size) for peak in stats.hidden_peak]),
        hidden_block=group_size,
    )


def check_groups(group_size: int, *, hidden_size: int, intermediate_size: int, head_dim: int) -> None:
    """That groups of a model's channels can be rotated.

    Raises:
      UsageError: the group size does not divide the channels, or a Hadamard matrix is missing.
    """
    for name, channels in (("residual stream", hidden_size), ("hidden units", intermediate_size)):
        if channels % group_size:
            raise UsageError(
                f"OffQ: {channels} channels of the {name} are not divisible by group_size={group_size}; give "
                "another one"
            )
    for name, order in (("group_size", group_size), ("head_dim", head_dim)):
        try:
            base_order(order)
        except UsageError:
            raise UsageError(
                f"OffQ: no Hadamard matrix of order {name}={order} is known; 2, 4, 8, .. and most multiples "
                "of 4 have one"
            ) from None


def stream_basis(stats: Offsets, basis: Basis = "mixed") -> np.ndarray:
    """Orthonormal columns `[d, d]`, the direction of the largest tokens first.

    `"mixed"`: eigenvectors of `top + .001 all`, both uncentred and of trace 1; `"top"`: of the largest tokens
    alone, as the paper reads, which leaves the order of most channels to chance; `"all"`: of all tokens;
    `"householder"`: the first direction of `"top"` and otherwise the channels as they are; `"identity"`.

    Raises:
      UsageError: another word.
    """
    if basis not in get_args(Basis):
        raise UsageError(f"unknown basis {basis!r}; use {', '.join(get_args(Basis))}")
    if basis == "identity":
        return np.eye(len(stats.all))
    second = {"all": stats.all, "mixed": stats.top + _ALL * stats.all}.get(basis, stats.top)
    vectors = _principal(second)
    if basis != "householder":
        return vectors
    first = vectors[:, 0]
    mirror = first + np.where(first[0] > 0, 1, -1) * np.eye(len(first))[0]
    return np.eye(len(first)) - 2 * np.outer(mirror, mirror) / (mirror @ mirror)


def spread_leaders(peaks: np.ndarray, group_size: int) -> np.ndarray:
    """An order of channels `[n]`: the `n / g` largest lead a group each, the rest is dealt out to and fro.

    Args:
      peaks: magnitude of each channel `[n]`.
      group_size: g; channel `order[i]` comes to place i, groups are g consecutive places.
    """
    groups = len(peaks) // group_size
    dealt = np.argsort(-peaks, kind="stable").reshape(group_size, groups)
    dealt[1::2] = dealt[1::2, ::-1]
    return dealt.T.ravel()


def _principal(second: np.ndarray) -> np.ndarray:
    """Eigenvectors by descending eigenvalue, the largest entry of each positive."""
    vectors = np.linalg.eigh(second)[1][..., ::-1]
    at = np.argmax(np.abs(vectors), axis=-2)[..., None, :]
    return vectors * np.sign(np.take_along_axis(vectors, at, axis=-2))
