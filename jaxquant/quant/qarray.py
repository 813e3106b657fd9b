"""`QArray`: the one quantized weight - packed words, scale, zero."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt

from jaxquant.kernels.dequant_matmul import dequant_matmul
from jaxquant.kernels.integer_matmul import integer_matmul
from jaxquant.quant.activation import QActivation, straight_through
from jaxquant.quant.grid import Grid
from jaxquant.quant.packing import block_rows, pack, unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """A packed quantized matrix `[in, out]`, or a stack of them; a pytree.

    Invariants, with `n, m = shape`, `G` groups, `B` blocks of `block = block_rows(n / G)` rows:

    - `words`: uint8 or uint32 `[..., B, packed_rows(block), m]`, planar inside a block (see `packing`);
    - `scale`: float16 or float32 `[..., G, m]`, never 0; negative only on a `"full"` symmetric grid;
    - `zero`: like `scale`, or `None` where the grid is symmetric (`grid.constant_zero`);
    - `order`: `None`, or int32 `[..., n]`: packed row k holds input `order[k]` (act-order, dynamic groups);
    - `dequantize()[order] == scale * (code - zero)`.

    Leading axes are free, so a QArray goes through `jax.vmap` and `lax.scan` as arrays do; `shape` is that of
    one matrix. Integer leaves have no gradient: differentiate with respect to `scale`, or the activations.
    Inside `jax.shard_map` leaves may be cut over outputs, and without `order` over whole groups of inputs:
    `x @ q` and `dequantize` are then those of the part, and the products of parts of the inputs add up.
    """

    words: UInt[Array, "*stack blocks words out"]
    scale: Float[Array, "*stack groups out"]
    zero: Float[Array, "*stack groups out"] | None
    order: Int[Array, "*stack in"] | None
    grid: Grid = dataclasses.field(metadata={"static": True})
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})

    # numpy arrays on the left of `@` must hand over to `__rmatmul__` instead of trying elementwise objects.
    __array_ufunc__ = None

    @classmethod
    def from_codes(
        cls,
        codes: Shaped[Array, "*stack in out"],
        scale: Float[Array, "*stack groups out"],
        zero: Float[Array, "*stack groups out"] | None,
        grid: Grid,
        *,
        order: Int[Array, "*stack in"] | None = None,
        word_dtype: jax.typing.DTypeLike = jnp.uint8,
    ) -> QArray:
        """Packs codes `0 .. 2**bits - 1`; with `order`, row k of `codes` belongs to input `order[k]`."""
        rows, out = codes.shape[-2:]
        block = block_rows(rows // grid.groups(rows))
        blocks = codes.reshape(*codes.shape[:-2], rows // block, block, out)
        words = pack(blocks, grid.bits, word_dtype=word_dtype)
        return cls(words=words, scale=scale, zero=zero, order=order, grid=grid, shape=(rows, out))

    @property
    def block(self) -> int:
        """Input rows in one packed block."""
        return block_rows(self.shape[0] // self.grid.groups(self.shape[0]))

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays hold: whole words, scales, zeros and order."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight, `8 nbytes / number of weights`."""
        stack = math.prod(self.scale.shape[:-2])
        return 8 * self.nbytes / (stack * math.prod(self.shape))

    def codes(self) -> UInt[Array, "*stack in out"]:
        """Unpacked codes as uint8, in packed row order."""
        codes = unpack(self.words, self.grid.bits, self.block)
        return codes.reshape(*codes.shape[:-3], self._rows, codes.shape[-1])

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "*stack in out"]:
        """The whole weight `[..., in, out]` in the original input order."""
        weight = self.grid.dequantize(self.codes(), self.scale, self.zero, dtype)
        if self.order is None:
            return weight
        return jnp.take_along_axis(weight, jnp.argsort(self.order, axis=-1)[..., None], axis=-2)

    def __rmatmul__(self, x: Float[Array, "*rows in"] | QActivation) -> Float[Array, "*rows out"]:
        """`x @ q` in the dtype of `x`; the weight is dequantized by tiles, if at all.

        Quantized activations are multiplied as integers, unless `order` tears their groups apart. `q` must be
        one matrix: `vmap` or `scan` over the leading axes of a stack.
        """
        if isinstance(x, QActivation):
            in_floats = x.values @ self
            if self.order is not None:
                return in_floats
            y = integer_matmul(
                x.codes, x.scale, x.lo, self.words, self.scale, self._zero(),
                x_bits=x.grid.bits, bits=self.grid.bits, block=self.block,
            )  # fmt: skip
            # Nothing but the gradient of the other product is computed, under `jit`.
            return straight_through(in_floats, y.astype(in_floats.dtype))
        x = self.inputs(x)
        return dequant_matmul(x, self.words, self.scale, self._zero(), bits=self.grid.bits, block=self.block)

    def inputs(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows in"]:
        """`x` in packed row order.

        Raises:
          ValueError: `self` is a stack, or `x` has no floats or another width.
        """
        if self.words.ndim != 3:
            raise ValueError(
                f"x @ QArray needs one matrix, not a stack of {self.words.shape[:-3]}; use jax.vmap"
            )
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x @ QArray: x is {x.dtype}; convert it to a float dtype")
        if x.shape[-1] != self._rows:
            raise ValueError(f"x @ QArray: x has {x.shape[-1]} features, the weight {self._rows} inputs")
        if self.order is not None and self._rows != self.shape[0]:
            raise ValueError("x @ QArray: inputs in order of activation cannot be cut; use static groups")
        return x if self.order is None else jnp.take(x, self.order, axis=-1)

    @property
    def _rows(self) -> int:
        """Inputs that are here, which inside `jax.shard_map` may be a part of `shape`."""
        return self.words.shape[-3] * self.block

    def _zero(self) -> Array:
        return jnp.full_like(self.scale, self.grid.constant_zero) if self.zero is None else self.zero


def quantize(w: Float[Array, "*stack in out"], grid: Grid) -> QArray:
    """`w` rounded to nearest on `grid`, packed."""
    scale, zero = grid.fit(w)
    return QArray.from_codes(grid.quantize(w, scale, zero), scale, zero, grid)
