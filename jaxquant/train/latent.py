"""`Latent`: a weight that training moves and rounding reads, straight through."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxquant.quant import Grid, QActivation, QArray, unpaired
from jaxquant.quant.activation import straight_through

# A place this near to the next integer beyond the range would round to it.
_MARGIN = 0.499


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latent:
    """A weight in units of its grid: `what = scale exp(stretch) (round(place) - zero)`; a pytree.

    Places and stretches are what training moves, by steps of one size whatever the weights are: a place by
    shares of a level, a stretch by shares of the scale. Places stay within half a level of the range (see
    `project`), so that none is ever out of reach of its gradient. The rounding is passed straight through
    (arXiv 1308.3432), and that of the scale to `grid.scale_dtype` too: values are those of `pack()`.

    Attributes:
      place: float32 `[..., in, out]`; row k belongs to input `order[k]`.
      stretch: float32 `[..., groups, out]`.
      scale, zero, order: as in `QArray`, in float32; not trained.
      grid: static.
    """

    place: Float[Array, "*stack in out"]
    stretch: Float[Array, "*stack groups out"]
    scale: Float[Array, "*stack groups out"]
    zero: Float[Array, "*stack groups out"] | None
    order: Int[Array, "*stack in"] | None
    grid: Grid = dataclasses.field(metadata={"static": True})

    # numpy arrays on the left of `@` must hand over to `__rmatmul__`.
    __array_ufunc__ = None

    @classmethod
    def of(cls, kernel: Float[Array, "*stack in out"] | QArray, grid: Grid | None = None) -> Latent:
        """A weight where it lies on the grid fitted to it, or a packed one on its codes.

        Args:
          kernel: floats, or what a rounding has left; training then starts from there.
          grid: of floats; a packed weight has its own.
        """
        if isinstance(kernel, QArray):
            scale, zero, order, grid = kernel.scale, kernel.zero, kernel.order, kernel.grid
            place = kernel.codes().astype(jnp.float32)
        else:
            assert grid is not None
            w, order = kernel.astype(jnp.float32), None
            scale, zero = grid.fit(w)
            shift = grid.constant_zero if zero is None else _rows(zero.astype(w.dtype), w)
            place = w / _rows(scale.astype(w.dtype), w) + shift
        scale = scale.astype(jnp.float32)
        zero = None if zero is None else zero.astype(jnp.float32)
        return cls(place, jnp.zeros_like(scale), scale, zero, order, grid).project()

    def project(self) -> Latent:
        """Places brought back into the range of the grid, `lowest - 1/2 .. 2^bits - 1/2`."""
        low, high = self.grid.lowest, 2**self.grid.bits - 1
        return dataclasses.replace(self, place=jnp.clip(self.place, low - _MARGIN, high + _MARGIN))

    def values(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*stack in out"]:
        """The weight as rounded, `[..., in, out]`, rows in the order of the inputs."""
        codes = straight_through(self.place, jnp.round(self.place))
        weight = self.grid.dequantize(codes, self._scale(), self.zero, dtype)
        if self.order is None:
            return weight
        return jnp.take_along_axis(weight, jnp.argsort(self.order, axis=-1)[..., None], axis=-2)

    def pack(self) -> QArray:
        """The packed weight; its `dequantize()` equals `values()`."""
        dtype = self.grid.scale_dtype
        codes = jnp.round(self.place).astype(jnp.uint8)
        zero = None if self.zero is None else self.zero.astype(dtype)
        return QArray.from_codes(codes, self._scale().astype(dtype), zero, self.grid, order=self.order)

    def __rmatmul__(self, x: Float[Array, "*rows in"] | QActivation) -> Float[Array, "*rows out"]:
        """`x @ values()` in the dtype of x."""
        x = x.values if isinstance(x, QActivation) else x
        return jnp.matmul(x, self.values(x.dtype))

    def _scale(self) -> Array:
        scale = self.scale * jnp.exp(self.stretch)
        return straight_through(scale, self.grid.storable(scale))


def latent_params(params: dict[str, Any], grid: Grid | None = None) -> dict[str, Any]:
    """The parameters of a model with `Latent` kernels in its blocks, other floats there in float32.

    Args:
      params: stacked, as `forward` takes them. Packed kernels start from their codes and keep their grids.
      grid: of float kernels; without one they stay as they are.
    """

    def start(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, QArray) or (grid is not None and path[-1].key == "kernel"):
            return Latent.of(leaf, grid)
        return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    blocks = jax.tree_util.tree_map_with_path(
        start, unpaired(params["blocks"]), is_leaf=lambda leaf: isinstance(leaf, QArray)
    )
    return {**params, "blocks": blocks}


def packed_params(params: dict[str, Any]) -> dict[str, Any]:
    """`latent_params` undone: every `Latent` packed."""
    return jax.tree.map(lambda leaf: leaf.pack() if is_latent(leaf) else leaf, params, is_leaf=is_latent)


def is_latent(leaf: Any) -> bool:
    """Whether a node of a tree of parameters is a `Latent`."""
    return isinstance(leaf, Latent)


def split(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is trained and what is not, each a tree of all parameters with `None` for those of the other.

    Trained are places, stretches, biases and norms of the blocks; embedding, final norm and head stay.
    """

    def trained(path: Any, leaf: Any) -> bool:
        names = [getattr(key, "key", getattr(key, "name", "")) for key in path]
        return names[0] == "blocks" and (
            names[-1] in ("place", "stretch", "bias") or names[-1].endswith("_norm")
        )

    def side(wanted: bool) -> dict[str, Any]:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if trained(path, leaf) == wanted else None, params
        )

    return side(True), side(False)


def merge(trained: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """`split` undone."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, rest, is_leaf=lambda a: a is None)


def _rows(grouped: Array, like: Array) -> Array:
    """One row for every input, `[..., in, out]`, of what there is one of for every group."""
    return jnp.repeat(grouped, like.shape[-2] // grouped.shape[-2], axis=-2)
