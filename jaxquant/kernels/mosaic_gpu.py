"""What Pallas kernels for GPUs share: what a GPU has, tiles of a product, and codes from packed words."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxquant.quant.packing import planes

#: Bytes of shared memory that a program may ask for on an H100, as on a B200, and where two are to fit.
SHARED_BYTES = 232448
HALF_SHARED_BYTES = 233472 // 2 - 1024
#: Bytes of a row of an operand of `wgmma` that lie together, swizzled against bank conflicts.
SWIZZLE = 128
#: Programs at once, two on each of the 132 multiprocessors of an H100.
PROGRAMS = 2 * 132
#: Of scales, zeros and offsets.
AFFINE_DTYPES = (jnp.dtype(jnp.float16), jnp.dtype(jnp.float32))

# Rows of x up to which waiting for memory takes the time, so that two programs share a multiprocessor.
_DECODE_ROWS = 16
# Partial sums of a split contraction: the programs along it, and their rows in all.
_SPLITS, _PARTIAL_ROWS = 8, 128


class Mosaic:
    """`jax.experimental.pallas.mosaic_gpu`, which is slow to import, as the kernels here use it.

    Args:
      interpret: as in its `kernel`: how to run where there is no GPU; `None` compiles.
    """

    def __init__(self, interpret: Any) -> None:
        from jax.experimental.pallas import mosaic_gpu

        self.gpu, self._interpret = mosaic_gpu, interpret

    def lay(self, a: Array, layout: Any) -> Array:
        """The array in registers of this layout; the interpreter has none."""
        return self.gpu.layout_cast(a, layout) if self._interpret is None else a

    def swizzled(self, dtype: Any, width: int | None = None) -> tuple[Any, Any]:
        """Of shared memory: rows lie together in parts of `width`, of all that may where there is none."""
        itemsize = jnp.dtype(dtype).itemsize
        width = width or SWIZZLE // itemsize
        return self.gpu.TilingTransform((8, width)), self.gpu.SwizzleTransform(width * itemsize)

    def product(self, left: Any, right: Any) -> Array:
        """`left @ right` of shared memory by `wgmma`, in float32 registers."""

        def multiply(sums: Any) -> Array:
            self.gpu.wgmma(sums, left, right)
            return sums[...]

        return pl.run_scoped(multiply, self.gpu.ACC((left.shape[0], right.shape[1]), jnp.float32))

    def kernel(
        self, body: Callable[..., None], *, barriers: bool = True, **options: Any
    ) -> Callable[..., Any]:
        """`mosaic_gpu.kernel`, whose body names the layouts of registers itself.

        Args:
          barriers: around every access to shared memory; otherwise the body has those that it needs.
        """
        semantics = self.gpu.CompilerParams(
            lowering_semantics=self.gpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=not barriers
        )
        if self._interpret is not None:
            options["interpret"] = self._interpret
        return self.gpu.kernel(body, compiler_params=semantics, **options)

    def words(self) -> Any:
        """Of words `[inputs, outputs]`: 16 threads a row, each with four neighbors in all rows.

        A thread needs no other scales than its own.
        """
        tiling = self.gpu.Tiling(((8, 64), (2, 64), (4,)))
        return self.gpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


class Tiles(NamedTuple):
    """Of a product: rows, outputs, blocks of a step; programs along the inputs; steps in memory at once."""

    rows: int
    out: int
    blocks: int
    splits: int
    steps: int

    def group(self, tile: Array, per_group: int) -> Array:
        """Index of the scales of a tile among parts of as many groups as a tile has, one at least."""
        return tile if self.blocks > per_group else jax.lax.div(tile * self.blocks, np.int32(per_group))


def without_hopper(device: Any) -> str:
    """Why the device does not run kernels that multiply by `wgmma`; "" where it does."""
    # Blackwell has another instruction in place of it, and earlier GPUs have none.
    capability = str(device.compute_capability)
    return "" if capability == "9.0" else f"it needs compute capability 9.0 (Hopper), not {capability}"


def without_blackwell(device: Any) -> str:
    """Why the device does not run kernels that multiply by `tcgen05.mma`; "" where it does."""
    # 12.0, the Blackwell of desktops, has neither this instruction nor its memory.
    capability = str(device.compute_capability)
    return "" if capability.startswith("10.") else f"it needs 10.x (Blackwell), not {capability}"


def refuses_words(words: Any, scale: Any, zero: Any, *, bits: int, block: int) -> str:
    """Why products do not take a packed weight of these avals; "" where they do."""
    if words.dtype != jnp.uint8:
        return f"words are {words.dtype}, not uint8"
    if scale.dtype != zero.dtype or scale.dtype not in AFFINE_DTYPES:
        return f"scales and zeros are {scale.dtype} and {zero.dtype}, not both float16 or float32"
    blocks, _, out = words.shape
    taken = min(blocks, out) > 0 and out % 64 == 0 and unit_of(bits, block) % 8 == 0
    if not taken or not blocks_of(blocks, block, scale.shape[0]):
        return (
            "it takes outputs in multiples of 64, and blocks that fill 64 or 128 inputs, with fields of a "
            f"multiple of 8 rows, not {out} outputs and {blocks} blocks of {block} rows of {bits} bits"
        )
    return ""


def blocks_of(blocks: int, block: int, groups: int) -> int:
    """The most blocks that divide all, and groups or are divided by them, of 64 or 128 rows; 0: none are."""
    per_group = blocks // groups
    fitting = [d for d in range(1, 128 // block + 1) if blocks % d == 0 and d * block % 64 == 0]
    return max((d for d in fitting if d % per_group == 0 or per_group % d == 0), default=0)


def unit_of(bits: int, block: int) -> int:
    """Codes next to each other that lie in one field of every plane."""
    return block * min(planes(bits)) // 8


def codes_of(load: Callable[[int], Array], start: int, bits: int, block: int) -> Array:
    """The int32 codes of a unit from `start` of a block, given what loads as many words from a place."""
    fields, first, shift = [], 0, 0
    for plane in planes(bits):
        depth = block * plane // 8
        place, offset = divmod(start, depth)
        part = load(first + offset).astype(jnp.int32)
        fields.append(((part >> (place * plane)) & (2**plane - 1)) << shift)
        first, shift = first + depth, shift + plane
    return functools.reduce(jnp.bitwise_or, fields)


def shared_bytes(*buffers: int) -> int:
    """What buffers take, each at a multiple of 1024, with barriers and the scratch of a reduction."""
    return sum(-(-size // 1024) * 1024 for size in buffers) + 2048 + 128


def steps_of(kept: Sequence[int], step: Sequence[int], *, two: bool) -> int:
    """Steps in shared memory at once, 2 to 4: two programs on a multiprocessor are preferred where asked for.

    Args:
      kept: sizes of buffers that are there once.
      step: of those that are there for every step.

    Returns:
      0 where there is no room for two.
    """
    for room in (HALF_SHARED_BYTES, SHARED_BYTES) if two else (SHARED_BYTES,):
        fitting = [n for n in (2, 3, 4) if shared_bytes(*kept, *(n * size for size in step)) <= room]
        if fitting:
            return fitting[-1]
    return 0


def tiles_of(
    rows: int,
    words: tuple[int, ...],
    block: int,
    groups: int,
    bits: int,
    *,
    largest: int,
    smallest: int = 8,
    outputs: int | None = None,
    itemsizes: tuple[int, int],
    weights: int = 2,
    kept: int = 0,
    row_bytes: int = 0,
) -> Tiles:
    """Tiles of `rows` of x, from `smallest` to `largest`, and of words `[blocks, words, out]`.

    Args:
      outputs: of a tile; `None`: 128, or 64 where 128 do not divide all.
      itemsizes: bytes of a result where inputs are not divided, and of a scale.
      weights: tiles of unpacked ones in shared memory at once.
      kept: bytes of shared memory beside those of the weights and a result.
      row_bytes: what a step reads for a row beside its inputs.
    """
    blocks, _, out = words
    tile_rows = min(largest, max(smallest, 1 << (rows - 1).bit_length()))
    tile_out = outputs or (128 if out % 128 == 0 else 64)
    tile_blocks = blocks_of(blocks, block, groups)
    programs, count = math.ceil(rows / tile_rows) * math.ceil(out / tile_out), blocks // tile_blocks
    splits = max(
        d
        for d in range(1, _SPLITS + 1)
        if count % d == 0 and (d == 1 or (d * programs <= PROGRAMS and d * tile_rows <= _PARTIAL_ROWS))
    )
    width, y_bytes = tile_blocks * block, 4 if splits > 1 else itemsizes[0]
    scales = itemsizes[1] * max(1, tile_blocks * groups // blocks) * tile_out
    steps = steps_of(
        [2 * weights * width * tile_out, y_bytes * tile_rows * tile_out, kept],
        [width * tile_out * bits // 8, 2 * width * tile_rows, row_bytes * tile_rows, scales, scales],
        two=tile_rows <= _DECODE_ROWS,
    )
    return Tiles(tile_rows, tile_out, tile_blocks, splits, steps)
