"""`Grid`: how a weight is rounded - bits, groups, range convention, clip search."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt

from jaxquant.errors import UsageError
from jaxquant.quant.packing import block_rows, packed_rows

Convention = Literal["half-step", "restricted", "full", "narrow"]
Clip = Literal["minmax", "mse"]

# Denominators of `scale = max|w| / DEN`, b bits.
_DENOMINATOR = {
    "half-step": lambda b: (2**b - 1) / 2,  # GPTQ's reference code, compressed-tensors, gpt-fast
    "restricted": lambda b: 2 ** (b - 1) - 1,  # QuaRot, SpinQuant, AWQ
    "narrow": lambda b: 2 ** (b - 1) - 1,  # BitNet b1.58 at 2 bits
    "full": lambda b: 2 ** (b - 1),  # auto-round, GGUF Q4_0; the extreme keeps its sign
}
_CLIP_STEPS = 80
_CLIP_GRID = 100
# Rows of a group whose errors are added up in one step.
_SEARCH_ROWS = 16
# Groups, rows and columns of them alike, that CPUs search at a time: 64 rows of float32 in a quarter of a
# megabyte, and of no power of two, which would map all rows to the same lines of the cache.
_SEARCH_LANES = 960


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A uniform grid `what = scale * (code - zero)`, `code in 0 .. 2**bits - 1`; frozen and hashable.

    Scale and zero belong to one group of `group_size` consecutive inputs of one output column. A scale is
    rounded to `scale_dtype` before anything is quantized with it, so stored and used values agree.

    Attributes:
      bits: 1 to 8.
      group_size: inputs per group; `None` is one group per column ("per channel").
      symmetric: `True`: zero is the constant `2**(bits-1)` (1 bit: 1/2, levels +-scale/2) and is not stored.
        `False`: `scale = (hi - lo) / (2**b - 1)`, `zero = round(-lo / scale)`, `lo <= 0 <= hi`, an integer
        in `0 .. 2**b - 1`.
      convention: range of a symmetric grid, `scale = max|w| / DEN`: `"half-step"` DEN = (2**b - 1)/2,
        `"restricted"` DEN = 2**(b-1) - 1, `"narrow"` the same without the lowest code, so that levels are
        symmetric (2 bits: three of them), `"full"` DEN = 2**(b-1) with the sign of the extreme in the scale.
        At 2 bits the convention matters more than the algorithm, so tables name it.
      clip: `"minmax"` keeps the whole range; `"mse"` tries the shrink factors 1, .99, .., .21 and keeps that
        with the least squared error per group; up to 2 bits it tries the neighbouring zeros too.
      scale_dtype: dtype of stored scales and zeros, `"float16"` or `"float32"`.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    convention: Convention = "half-step"
    clip: Clip = "minmax"
    scale_dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError(f"bits={self.bits} is out of range; use 1 to 8")
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(
                f"group_size={self.group_size} is not positive; "
                "use None (0 on the command line) for one group a column"
            )
        if self.convention not in _DENOMINATOR:
            raise UsageError(f"unknown convention {self.convention!r}; use one of {', '.join(_DENOMINATOR)}")
        if self.clip not in ("minmax", "mse"):
            raise UsageError(f"unknown clip {self.clip!r}; use minmax or mse")
        if self.scale_dtype not in ("float16", "float32"):
            raise UsageError(f"unknown scale_dtype {self.scale_dtype!r}; use float16 or float32")

    def __str__(self) -> str:
        group = "per-channel" if self.group_size is None else f"g{self.group_size}"
        kind = f"symmetric {self.convention}" if self.symmetric else "asymmetric"
        clip = {"minmax": "min-max", "mse": "mse clip search"}[self.clip]
        return f"W{self.bits} {group} {kind}, {clip}"

    def groups(self, rows: int, *, where: str = "weight") -> int:
        """Groups in a column of `rows` inputs; `UsageError` where they do not divide."""
        if self.group_size is None:
            return 1
        if rows % self.group_size:
            choices = [d for d in range(16, min(rows, 257)) if rows % d == 0 and d % 8 == 0] or [rows]
            raise UsageError(
                f"{where}: {rows} inputs are not divisible by group_size={self.group_size}; "
                f"use {', '.join(map(str, choices))} or per-channel groups (group size 0 on the command line)"
            )
        return rows // self.group_size

    def effective_bits(self, rows: int) -> float:
        """Bits per weight, in whole words: at least `bits + (scale and zero bits) / group_size`."""
        groups = self.groups(rows)
        block = block_rows(rows // groups)
        metadata = jnp.finfo(self.scale_dtype).bits * (1 if self.symmetric else 2)
        return 8 * packed_rows(block, self.bits) / block + metadata * groups / rows

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `Grid(**d)` inverts it."""
        return dataclasses.asdict(self)

    @property
    def constant_zero(self) -> float:
        """Zero of a symmetric grid."""
        return 2.0 ** (self.bits - 1) if self.bits > 1 else 0.5

    @property
    def lowest(self) -> int:
        """The lowest code in use: 1 on a narrow symmetric grid, else 0."""
        return int(self.symmetric and self.convention == "narrow" and self.bits > 1)

    def fit(
        self, w: Float[Array, "*stack in out"]
    ) -> tuple[Float[Array, "*stack groups out"], Float[Array, "*stack groups out"] | None]:
        """Scale and zero of every group, in `scale_dtype`; zero is `None` for a symmetric grid.

        Args:
          w: weights; leading axes are free. Computed in float32 (float64 stays float64).

        Raises:
          UsageError: `in` is not divisible by `group_size`.
        """
        g = self._grouped(_real(w))
        lo = jnp.minimum(jnp.min(g, axis=-2), 0)  # the range of an asymmetric grid includes 0
        hi = jnp.maximum(jnp.max(g, axis=-2), 0)
        if self.clip == "minmax":
            scale, zero = self._from_range(lo, hi)
        else:
            scale, zero = self._search(g, lo, hi)
        return scale.astype(self.scale_dtype), None if zero is None else zero.astype(self.scale_dtype)

    def quantize(
        self,
        w: Float[Array, "*stack in out"],
        scale: Float[Array, "*stack groups out"],
        zero: Float[Array, "*stack groups out"] | None,
    ) -> UInt[Array, "*stack in out"]:
        """Nearest codes (ties to even), `clip(round(w / scale) + zero, lowest, 2**bits - 1)` as uint8."""
        w = _real(w)
        zero = self._zero(zero, w.dtype)
        zero = zero if zero.ndim == 0 else zero[..., None, :]
        codes = self._encode(self._grouped(w), scale.astype(w.dtype)[..., None, :], zero)
        return codes.astype(jnp.uint8).reshape(w.shape)

    def dequantize(
        self,
        codes: Shaped[Array, "*stack in out"],
        scale: Float[Array, "*stack groups out"],
        zero: Float[Array, "*stack groups out"] | None,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> Float[Array, "*stack in out"]:
        """`scale * (code - zero)`, computed in float32 or wider and rounded to `dtype` once."""
        wide = working_dtype(dtype)
        shift = self._zero(zero, wide)
        shift = shift if shift.ndim == 0 else shift[..., None, :]
        values = (self._grouped(codes).astype(wide) - shift) * scale.astype(wide)[..., None, :]
        return values.astype(dtype).reshape(codes.shape)

    def fake_quantize(self, w: Float[Array, "*stack in out"]) -> Float[Array, "*stack in out"]:
        """`w` rounded to the grid fitted to it, in the dtype of `w`."""
        scale, zero = self.fit(w)
        return self.dequantize(self.quantize(w, scale, zero), scale, zero, _real(w).dtype).astype(w.dtype)

    def _zero(self, zero: Array | None, dtype: jax.typing.DTypeLike) -> Array:
        return jnp.asarray(self.constant_zero, dtype) if zero is None else zero.astype(dtype)

    def _grouped(self, w: Array) -> Array:
        groups = self.groups(w.shape[-2])
        return w.reshape(*w.shape[:-2], groups, w.shape[-2] // groups, w.shape[-1])

    def _encode(self, w: Array, scale: Array, zero: Array) -> Array:
        # round(w / scale) + zero is what the field computes; a half-integer zero (1 bit) must shift first.
        whole = jnp.floor(zero)
        return jnp.clip(jnp.round(w / scale + (zero - whole)) + whole, self.lowest, 2**self.bits - 1)

    def storable(self, scale: Array) -> Array:
        """A scale as it will be stored: rounded to `scale_dtype`, kept off 0 and infinity."""
        info = jnp.finfo(self.scale_dtype)
        # At 8 bits max|w| < 0.008 already asks for a subnormal float16. Those are normal in float32, where
        # all arithmetic happens; the subnormals of float32 are flushed to 0 by most backends.
        smallest = info.smallest_subnormal if self.scale_dtype == "float16" else info.tiny
        tiny, largest = jnp.asarray(smallest, scale.dtype), jnp.asarray(info.max, scale.dtype)
        magnitude = jnp.clip(jnp.abs(scale), tiny, largest).astype(self.scale_dtype).astype(scale.dtype)
        return jnp.where(scale < 0, -magnitude, magnitude)

    def _from_range(self, lo: Array, hi: Array) -> tuple[Array, Array | None]:
        if not self.symmetric:
            scale = self.storable((hi - lo) / (2**self.bits - 1))
            return scale, jnp.clip(jnp.round(-lo / scale), 0, 2**self.bits - 1)
        extreme = jnp.maximum(-lo, hi)
        if self.convention == "full" and self.bits > 1:
            extreme = jnp.where(-lo >= hi, extreme, -extreme)  # code 0 (value -2**(b-1) scale) is the extreme
        denominator = 0.5 if self.bits == 1 else _DENOMINATOR[self.convention](self.bits)
        return self.storable(extreme / denominator), None

    # Inlined where it is traced; without `jit` its loops would be compiled at every call.
    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def _search(self, g: Array, lo: Array, hi: Array) -> tuple[Array, Array | None]:
        rows = jnp.moveaxis(g, -2, 0)
        # A symbolic size cannot be divided, and axes that are divided over devices cannot be merged.
        in_one = not isinstance(lo.size, int) or any(jax.typeof(g).sharding.spec)
        if in_one or lo.size <= _SEARCH_LANES:
            return self._search_at_once(rows, lo, hi)
        return jax.lax.platform_dependent(
            rows, lo, hi, cpu=self._search_by_parts, default=self._search_at_once
        )

    def _search_by_parts(self, rows: Array, lo: Array, hi: Array) -> tuple[Array, Array | None]:
        """`_search_at_once` of so many groups at a time as stay in a core's cache."""
        parts = -(-lo.size // _SEARCH_LANES)
        lanes = -(-lo.size // parts)

        def cut(a: Array) -> Array:
            a = a.reshape(*a.shape[: a.ndim - lo.ndim], -1)
            a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, parts * lanes - lo.size)])
            return jnp.moveaxis(a.reshape(*a.shape[:-1], parts, lanes), -2, 0)

        found = jax.lax.map(lambda part: self._search_at_once(*part), (cut(rows), cut(lo), cut(hi)))
        return jax.tree.map(lambda a: a.reshape(-1)[: lo.size].reshape(lo.shape), found)

    def _search_at_once(self, rows: Array, lo: Array, hi: Array) -> tuple[Array, Array | None]:
        shifts = (0.0, -1.0, 1.0) if not self.symmetric and self.bits <= 2 else (0.0,)
        length = rows.shape[0]
        some = max(d for d in range(1, _SEARCH_ROWS + 1) if length % d == 0)
        rows = rows.reshape(length // some, some, *lo.shape)

        def consider(
            best: tuple[Array, Array, Array], shrink: Array
        ) -> tuple[tuple[Array, Array, Array], None]:
            scale, zero = self._from_range(lo * shrink, hi * shrink)
            base = jnp.broadcast_to(self._zero(zero, rows.dtype), scale.shape)
            shifted = [jnp.clip(base + shift, 0, 2**self.bits - 1) for shift in shifts]

            def add(errors: list[Array], part: Array) -> tuple[list[Array], None]:
                # A reduction over rows would run column by column; written out, whole rows are added up.
                def total(error: Array, zero: Array) -> Array:
                    for row in part:
                        error += jnp.square((self._encode(row, scale, zero) - zero) * scale - row)
                    return error

                return list(map(total, errors, shifted)), None

            errors, _ = jax.lax.scan(add, [jnp.zeros_like(lo)] * len(shifts), rows)
            for candidate, zero in zip(errors, shifted, strict=True):
                error, best_scale, best_zero = best
                better = candidate < error
                best = (
                    jnp.where(better, candidate, error),
                    jnp.where(better, scale, best_scale),
                    jnp.where(better, zero, best_zero),
                )
            return best, None

        scale, zero = self._from_range(lo, hi)
        start = (
            jnp.full_like(lo, jnp.inf), scale, jnp.broadcast_to(self._zero(zero, rows.dtype), scale.shape)
        )  # fmt: skip
        shrink = 1 - jnp.arange(_CLIP_STEPS, dtype=rows.dtype) / _CLIP_GRID
        (_, scale, best_zero), _ = jax.lax.scan(consider, start, shrink)
        return scale, None if zero is None else best_zero


def working_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """float64 where one of `dtypes` is, else float32: halves cannot hold the search's small differences."""
    return jnp.dtype(jnp.float64 if any(jnp.dtype(d) == jnp.float64 for d in dtypes) else jnp.float32)


def _real(w: Array) -> Array:
    return w.astype(working_dtype(w.dtype))
