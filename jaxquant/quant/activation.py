"""`ActivationGrid`: integers for what flows between linears, its range fitted anew to every token."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, UInt8

from jaxquant.errors import UsageError
from jaxquant.kernels.hadamard import hadamard_quantize
from jaxquant.linalg import hadamard_transform
from jaxquant.quant.grid import working_dtype

#: How an asymmetric range is found; see `ActivationGrid`.
Range = Literal["midpoint", "zero"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationGrid:
    """Uniform integers for the channels of a token, or for groups of them, without calibration.

        midpoint:  mid = (max + min) / 2,  half = clip (max - min) / 2,  lo = mid - half
        zero:      lo = clip min(x, 0),  2 half = clip max(x, 0) - lo
        symmetric: lo = -scale 2^(bits-1),  scale = clip max|x| / (2^(bits-1) - 1)
        scale = 2 half / (2^bits - 1),  q = clamp(round((x - lo) / scale), 0, 2^bits - 1),  x' = lo + scale q

    `lo` is a number of its own and not a multiple of the scale, so an offset that a whole group shares costs
    nothing: `x + c` is quantized like x (arXiv 2606.07116 lives on that). `"zero"` is the rule of earlier
    code (QuaRot, arXiv 2404.00456): 0 is kept in the range and raw ends are clipped, which an offset ruins.

    Attributes:
      bits: 2 to 8.
      group_size: channels that share a range; `None`: all of a token (of a head, in a cache).
      symmetric: around 0.
      clip: share of the range that is kept, in (0, 1]; .9 to 1 is usual.
      range: of asymmetric grids.
      scale_dtype: what scale and lo are rounded to before anything is quantized with them: `"float32"`, or
        `"float16"`, half as large in a cache, for groups of values below 65504 whose range is above 1 % of
        their offset and above 1e-4.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    clip: float = 1.0
    range: Range = "midpoint"
    scale_dtype: Literal["float16", "float32"] = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise UsageError(
                f"activation bits={self.bits!r} is out of range; use 2 to 8, or leave the grid out"
            )
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(f"activation group_size={self.group_size}: use None for one group a token")
        if not 0 < self.clip <= 1:
            raise UsageError(f"activation clip={self.clip} is out of range; use a share of the range up to 1")
        if self.range not in get_args(Range):
            raise UsageError(f"unknown activation range {self.range!r}; use {' or '.join(get_args(Range))}")
        if self.scale_dtype not in ("float16", "float32"):
            raise UsageError(f"unknown scale_dtype {self.scale_dtype!r}; use float16 or float32")

    def groups(self, channels: int, *, where: str = "") -> int:
        """Groups of a token; `where` names the place in an error.

        Raises:
          UsageError: the group size does not divide `channels`.
        """
        size = self.group_size or channels
        if channels % size:
            divisors = [d for d in range(16, channels) if channels % d == 0][:6]
            place = f"{where}: " if where else ""
            raise UsageError(
                f"{place}{channels} channels are not divisible by the activation group_size={size}; "
                f"use {', '.join([*map(str, divisors), 'None'])}"
            )
        return channels // size

    def effective_bits(self, channels: int) -> float:
        """Bits a channel with what goes along in `scale_dtype`: a scale a group, `lo` where asymmetric."""
        metadata = jnp.finfo(self.scale_dtype).bits * (1 if self.symmetric else 2)
        return self.bits + metadata * self.groups(channels) / channels

    def fit(
        self, x: Float[Array, "*tokens n"]
    ) -> tuple[Float[Array, "*tokens groups"], Float[Array, "*tokens groups"]]:
        """`(scale, lo)` in float32 (float64 for such an x), rounded to a float16 `scale_dtype`.

        In a constant group the scale is 0 and `lo` the constant. NaN and infinity stay.
        """
        grouped = self._grouped(x)
        return self.of_range(jnp.min(grouped, axis=-1), jnp.max(grouped, axis=-1))

    def of_range(
        self, low: Float[Array, "*groups"], high: Float[Array, "*groups"]
    ) -> tuple[Float[Array, "*groups"], Float[Array, "*groups"]]:
        """`(scale, lo)` of groups with these least and largest values."""
        top = 2**self.bits - 1
        if self.symmetric:
            scale = self._storable(self.clip * jnp.maximum(-low, high) / (2 ** (self.bits - 1) - 1))
            return scale, self.symmetric_lo(scale)
        if self.range == "zero":
            low, high = self.clip * jnp.minimum(low, 0), self.clip * jnp.maximum(high, 0)
        else:
            middle, half = (low + high) / 2, self.clip * (high - low) / 2
            low, high = middle - half, middle + half
        return self._storable((high - low) / top), self._storable(low)

    def symmetric_lo(self, scale: Float[Array, "*tokens groups"]) -> Float[Array, "*tokens groups"]:
        """`lo` of a symmetric grid."""
        return -scale * 2 ** (self.bits - 1)

    def quantize(
        self,
        x: Float[Array, "*tokens n"],
        scale: Float[Array, "*tokens groups"],
        lo: Float[Array, "*tokens groups"],
    ) -> UInt8[Array, "*tokens n"]:
        """The integers, 0 to `2^bits - 1`."""
        codes = jnp.round(self._places(x, scale, lo))
        return jnp.clip(codes, 0, 2**self.bits - 1).astype(jnp.uint8).reshape(x.shape)

    def dequantize(
        self,
        codes: UInt8[Array, "*tokens n"],
        scale: Float[Array, "*tokens groups"],
        lo: Float[Array, "*tokens groups"],
        dtype: Any = jnp.float32,
    ) -> Float[Array, "*tokens n"]:
        """`lo + scale q`, computed in the dtype of the scale."""
        groups, channels = scale.shape[-1], codes.shape[-1]
        grouped = codes.reshape(*codes.shape[:-1], groups, channels // groups).astype(scale.dtype)
        return (lo[..., None] + scale[..., None] * grouped).reshape(codes.shape).astype(dtype)

    def fake_quantize(self, x: Float[Array, "*tokens n"]) -> Float[Array, "*tokens n"]:
        """x as it is after quantization, in its own dtype.

        Only the rounding is passed straight through. A value inside the range has the gradient of `x' = x +
        scale e` with the error `e = q - (x - lo) / scale` held constant, so that a range that is too wide is
        felt; a clipped one that of the end of the range.
        """
        return QActivation.of(x, self).values

    def __str__(self) -> str:
        size = "per token" if self.group_size is None else f"g{self.group_size}"
        kind = "symmetric" if self.symmetric else "asymmetric" + (" with 0" if self.range == "zero" else "")
        clip = "" if self.clip == 1 else f", clip {self.clip:g}"
        return f"{self.bits} bits {size} {kind}{clip}"

    def _relaxed(self, x: Array, codes: Array, scale: Array, lo: Array) -> Array:
        """The values again, with the errors of rounding as constants; without a quotient to differentiate."""
        top = 2**self.bits - 1
        place = lax.stop_gradient(self._places(x, scale, lo))
        error = codes.reshape(place.shape).astype(place.dtype) - jnp.clip(place, 0, top)
        low, step = lo[..., None], scale[..., None]
        inside = jnp.where(place > top, low + step * top, self._grouped(x) + step * error)
        return jnp.where(place < 0, low, inside).reshape(x.shape).astype(x.dtype)

    def _places(self, x: Array, scale: Array, lo: Array) -> Array:
        return (self._grouped(x) - lo[..., None]) / jnp.where(scale == 0, 1, scale)[..., None]

    def _storable(self, a: Array) -> Array:
        if self.scale_dtype == "float32":
            return a
        largest = jnp.finfo(jnp.float16).max.astype(a.dtype)
        finite = jnp.where(jnp.isfinite(a), jnp.clip(a, -largest, largest), a)
        # A cast would round the gradient, too.
        return straight_through(a, finite.astype(jnp.float16).astype(a.dtype))

    def _grouped(self, x: Array) -> Array:
        groups = self.groups(x.shape[-1])
        return x.astype(working_dtype(x.dtype)).reshape(*x.shape[:-1], groups, x.shape[-1] // groups)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QActivation:
    """Quantized activations on their way into a linear; `x @ q` with a `QArray` q multiplies integers.

    Attributes:
      codes: uint8 `[..., n]`.
      scale, lo: `[..., groups]`.
      values: `[..., n]`, `lo + scale * code` in the dtype of the activations and of products. They carry
        the gradient, see `ActivationGrid.fake_quantize`; under `jit` they cost nothing without one.
      grid: what they were quantized with.
    """

    codes: UInt8[Array, "*tokens n"]
    scale: Float[Array, "*tokens groups"]
    lo: Float[Array, "*tokens groups"]
    values: Float[Array, "*tokens n"]
    grid: ActivationGrid = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, x: Float[Array, "*tokens n"], grid: ActivationGrid, *, hadamard: int = 0) -> QActivation:
        """`x` quantized on `grid`; first blocks of `hadamard` channels are transformed, if it is not 0.

        Raises:
          UsageError: no such blocks, see `kernels.hadamard`; groups that do not divide the channels.
        """
        turned = x
        if hadamard:
            codes, scale, lo = hadamard_quantize(x, grid, hadamard)
            # Under `jit` only a gradient asks for it.
            blocks = x.astype(scale.dtype).reshape(*x.shape[:-1], x.shape[-1] // hadamard, hadamard)
            turned = hadamard_transform(blocks).reshape(x.shape)
        else:
            scale, lo = grid.fit(x)
            codes = grid.quantize(x, scale, lo)
        values = grid.dequantize(codes, scale, lo, x.dtype)
        smooth = grid._relaxed(turned, codes, scale, lo).astype(x.dtype)
        return cls(codes, scale, lo, straight_through(smooth, values), grid)


def straight_through(smooth: Array, values: Array) -> Array:
    """`values`, differentiated as if they were `smooth`, to any order; without a gradient `smooth` is free.

    Both have one shape and dtype.
    """
    return _straight_through.bind(smooth, values)


# A primitive, since `jax.custom_jvp` is forgotten where a scan is differentiated twice in reverse: the outer
# gradient would see the rounding.
_straight_through = Primitive("straight_through")
_straight_through.def_impl(lambda smooth, values: values)


@_straight_through.def_abstract_eval
def _check(smooth: Any, values: Any) -> Any:
    if (smooth.shape, smooth.dtype) != (values.shape, values.dtype):
        raise TypeError(f"straight_through: {smooth.str_short()} and {values.str_short()} must be alike")
    return values


def _jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Any]:
    return straight_through(*primals), tangents[0]


def _batch(arguments: tuple[Array, Array], axes: tuple[int | None, int | None]) -> tuple[Array, int]:
    size = next(a.shape[i] for a, i in zip(arguments, axes, strict=True) if i is not None)

    def front(a: Array, axis: int | None) -> Array:
        return jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)

    return straight_through(*map(front, arguments, axes)), 0


ad.primitive_jvps[_straight_through] = _jvp
batching.primitive_batchers[_straight_through] = _batch
mlir.register_lowering(_straight_through, lambda context, smooth, values: [values])
