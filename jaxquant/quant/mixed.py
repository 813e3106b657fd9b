"""Packed weights of several widths: group by group (`MixedQArray`), and layer by layer (`QStack`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from jaxquant.errors import UsageError
from jaxquant.quant.activation import QActivation
from jaxquant.quant.grid import Grid
from jaxquant.quant.qarray import QArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedQArray:
    """A packed matrix `[in, out]` whose groups of inputs have different bits; a pytree.

    Invariants:

    - `parts`: one `QArray` a width, by ascending bits, of grids that differ in their bits alone;
    - `order`: int32 `[..., G]`, the groups in the order in which the parts hold them.

    How many groups have which width is static, which groups they are is not: so stacked layers with equal
    counts `vmap` and `scan`. Stored are the parts and 4 bytes a group.
    """

    parts: tuple[QArray, ...]
    order: Int[Array, "*stack groups"]

    # numpy arrays on the left of `@` must hand over to `__rmatmul__`.
    __array_ufunc__ = None

    @classmethod
    def from_codes(
        cls,
        codes: UInt[Array, "in out"],
        scale: Float[Array, "groups out"],
        zero: Float[Array, "groups out"] | None,
        grid: Grid,
        group_bits: Int[Array, " groups"],
    ) -> MixedQArray:
        """Packs the codes `0 .. 2**group_bits - 1` of one matrix; not under `jit`: bits make shapes."""
        bits = np.asarray(group_bits)
        order = np.argsort(bits, kind="stable").astype(np.int32)
        grouped = codes.reshape(len(bits), -1, codes.shape[-1])
        parts = []
        for width in np.unique(bits):
            own = order[bits[order] == width]
            part = grouped[own].reshape(-1, codes.shape[-1])
            own_zero = None if zero is None else zero[own]
            parts.append(QArray.from_codes(part, scale[own], own_zero, grid_at(grid, int(width))))
        return cls(parts=tuple(parts), order=jnp.asarray(order))

    @property
    def shape(self) -> tuple[int, int]:
        """`(in, out)` of one matrix."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def widths(self) -> dict[int, int]:
        """How many groups have which bits."""
        return {part.grid.bits: part.scale.shape[-2] for part in self.parts}

    @property
    def bits(self) -> float:
        """Mean bits of a code."""
        return sum(bits * count for bits, count in self.widths.items()) / self.order.shape[-1]

    @property
    def group_size(self) -> int | None:
        """Inputs per group."""
        return self.parts[0].grid.group_size

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays hold."""
        return sum(part.nbytes for part in self.parts) + self.order.size * self.order.dtype.itemsize

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*stack in out"]:
        """The whole weight `[..., in, out]` in the original input order."""
        weight = jnp.concatenate([part.dequantize(dtype) for part in self.parts], axis=-2)
        groups = weight.reshape(*self.order.shape, -1, weight.shape[-1])
        back = jnp.argsort(self.order, axis=-1)[..., None, None]
        return jnp.take_along_axis(groups, back, axis=-3).reshape(weight.shape)

    def __rmatmul__(self, x: Float[Array, "*rows in"] | QActivation) -> Float[Array, "*rows out"]:
        """`x @ q` in the dtype of `x`, a product a width; quantized activations enter as values."""
        x = x.values if isinstance(x, QActivation) else jnp.asarray(x)
        if self.order.ndim != 1:
            raise ValueError(
                f"x @ MixedQArray needs one matrix, not a stack of {self.order.shape[:-1]}; use jax.vmap"
            )
        if x.shape[-1] != self.shape[0]:
            raise ValueError(
                f"x @ MixedQArray: x has {x.shape[-1]} features, the weight {self.shape[0]} inputs"
            )
        groups = x.reshape(*x.shape[:-1], len(self.order), -1)
        sorted_x = jnp.take(groups, self.order, axis=-2).reshape(x.shape)
        cuts = np.cumsum([part.shape[0] for part in self.parts])[:-1]
        inputs = jnp.split(sorted_x, cuts, axis=-1)
        return functools.reduce(jnp.add, (own @ part for own, part in zip(inputs, self.parts, strict=True)))


#: The packed weights.
Packed: TypeAlias = QArray | MixedQArray


def is_packed(leaf: Any) -> bool:
    """Whether a node of a tree of parameters is a packed weight, of one matrix or of equal layers."""
    return isinstance(leaf, (QArray, MixedQArray))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QStack:
    """Matrices of one shape, one a layer, whose layouts differ; a pytree.

    Layers of equal layout (grid, counts of widths, or floats) are stacked; `places[l] = (k, i)` says that
    layer l is number i of `parts[k]`. A scan over layers scans the places and holds the parts, and the
    product with a layer is a `lax.switch` over layouts: what is compiled grows with their number, not with
    the depth.
    """

    parts: tuple[Packed | Array, ...]
    places: Int[Array, "layers 2"]

    @classmethod
    def of(cls, layers: Sequence[Packed | Array]) -> QStack:
        """The stack of single matrices."""
        layouts: dict[Any, list[int]] = {}
        for number, layer in enumerate(layers):
            layouts.setdefault(layout(layer), []).append(number)
        places = np.zeros((len(layers), 2), np.int32)
        parts = []
        for kind, members in enumerate(layouts.values()):
            places[members] = [(kind, i) for i in range(len(members))]
            parts.append(jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[i] for i in members)))
        return cls(parts=tuple(parts), places=jnp.asarray(places))

    def at(self, place: Int[Array, " pair"]) -> _Layer:
        """The layer at one of `places`, which may be traced: something that defines `x @ layer`."""
        return _Layer(self.parts, place)


@dataclasses.dataclass(frozen=True)
class _Layer:
    # numpy arrays on the left of `@` must hand over to `__rmatmul__`.
    __array_ufunc__ = None

    parts: tuple[Any, ...]
    place: Int[Array, " pair"]

    def __rmatmul__(self, x: Float[Array, "*rows in"] | QActivation) -> Float[Array, "*rows out"]:
        def product(part: Any) -> Callable[[Any, Array], Array]:
            def multiply(x: Any, index: Array) -> Array:
                kernel = jax.tree.map(lambda leaf: leaf[index], part)
                if not isinstance(kernel, jax.Array):
                    return x @ kernel
                x = x.values if isinstance(x, QActivation) else x
                return jnp.matmul(x, kernel.astype(x.dtype))

            return multiply

        return jax.lax.switch(self.place[0], [product(part) for part in self.parts], x, self.place[1])


def layout(kernel: Any) -> Any:
    """What two matrices must share to be stacked; hashable."""
    leaves, tree = jax.tree.flatten(kernel)
    return tree, tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves)


def grid_at(grid: Grid, bits: int) -> Grid:
    """`grid` with other bits."""
    return dataclasses.replace(grid, bits=bits)


def neighbors(grid: Grid) -> tuple[int, ...]:
    """Bits that the groups of a mixed matrix may have: one less than `grid.bits`, as many, one more.

    Raises:
      UsageError: the grid is symmetric: its zero would depend on the bits.
    """
    if grid.symmetric:
        raise UsageError(f"bits by group need an asymmetric grid, not {grid}")
    return tuple(bits for bits in (grid.bits - 1, grid.bits, grid.bits + 1) if 1 <= bits <= 8)


def fit(
    grid: Grid, w: Float[Array, "in out"], group_bits: Int[Array, " groups"] | None
) -> tuple[Float[Array, "groups out"], Float[Array, "groups out"] | None]:
    """`grid.fit(w)`, each group with its own bits; `None`: all with `grid.bits`.

    NaN where a group has other bits than `neighbors(grid)` names.
    """
    if group_bits is None:
        return grid.fit(w)
    fits = [(bits, *grid_at(grid, bits).fit(w)) for bits in neighbors(grid)]
    scale = zero = jnp.full_like(fits[0][1], jnp.nan)
    for bits, own_scale, own_zero in fits:
        chosen = (group_bits == bits)[:, None]
        scale = jnp.where(chosen, own_scale, scale)
        zero = jnp.where(chosen, own_zero, zero)  # pyright: ignore[reportArgumentType]
    return scale, zero


def quantize(
    grid: Grid,
    w: Float[Array, "in out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"] | None,
    group_bits: Int[Array, " groups"] | None,
) -> UInt[Array, "in out"]:
    """`grid.quantize(w, scale, zero)`, codes of each group within its own bits."""
    if group_bits is None:
        return grid.quantize(w, scale, zero)
    codes = grid_at(grid, neighbors(grid)[-1]).quantize(w, scale, zero)
    highest = ((1 << group_bits) - 1).astype(codes.dtype)
    return jnp.minimum(codes, jnp.repeat(highest, w.shape[0] // len(group_bits))[:, None])
