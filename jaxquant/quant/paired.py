"""`PairedArray`: a `QArray` as TPUs hold it without padding, scale and zero of a group in one word."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from jaxquant.kernels.dequant_matmul import paired_matmul
from jaxquant.quant.activation import QActivation
from jaxquant.quant.grid import Grid
from jaxquant.quant.mixed import MixedQArray, QStack
from jaxquant.quant.packing import pair, unpair
from jaxquant.quant.qarray import QArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairedArray:
    """A packed matrix `[in, out]` to multiply with, or a stack of them; a pytree.

    As `QArray`, of as many bytes, but for `pairs`: uint32 `[..., G, 1, m]`, see `packing.pair`. Nothing in it
    has a gradient: differentiate with respect to the activations, or to the scales of the `QArray`.
    """

    words: UInt[Array, "*stack blocks words out"]
    pairs: UInt[Array, "*stack groups 1 out"]
    order: Int[Array, "*stack in"] | None
    grid: Grid = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    # numpy arrays on the left of `@` must hand over to `__rmatmul__`.
    __array_ufunc__ = None

    def to_qarray(self) -> QArray:
        """The same matrix with its scales and zeros apart."""
        scale, zero = unpair(self.pairs)
        return QArray(self.words, scale, zero, self.order, self.grid, self.shape)

    def __rmatmul__(self, x: Float[Array, "*rows in"] | QActivation) -> Float[Array, "*rows out"]:
        """`x @ self.to_qarray()`, and on TPUs no scale is taken out of its pair before the kernel."""
        q = self.to_qarray()
        if isinstance(x, QActivation):
            return x @ q
        x = q.inputs(x)
        return paired_matmul(x, self.words, self.pairs, bits=self.grid.bits, block=q.block)


def paired(params: Any) -> Any:
    """The tree with every asymmetric `QArray` of float16 scales as a `PairedArray`, to be run on TPUs.

    TPUs hold 16 bits in tiles of 8 x 128: 9 groups take 16 rows, and as pairs 9. `MixedQArray`, `QStack` and
    what has no such scales stay as they are. `unpaired` is the inverse.
    """

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, QArray) or leaf.zero is None:
            return leaf
        if not leaf.scale.dtype == leaf.zero.dtype == jnp.float16:
            return leaf
        return PairedArray(leaf.words, pair(leaf.scale, leaf.zero), leaf.order, leaf.grid, leaf.shape)

    return jax.tree.map(convert, params, is_leaf=lambda leaf: isinstance(leaf, (QArray, MixedQArray, QStack)))


def unpaired(params: Any) -> Any:
    """The tree with every `PairedArray` as the `QArray` it was."""

    def is_paired(leaf: Any) -> bool:
        return isinstance(leaf, PairedArray)

    return jax.tree.map(lambda leaf: leaf.to_qarray() if is_paired(leaf) else leaf, params, is_leaf=is_paired)


def paired_on_tpus(params: Any) -> Any:
    """`paired(params)` where the arrays lie on TPUs, else `params`."""
    devices = {device for leaf in jax.tree.leaves(params) for device in leaf.devices()}
    return paired(params) if {device.platform for device in devices} == {"tpu"} else params
