"""Integers of 1..8 bits <-> words, planar along the input axis.

A width is split into planes of 1, 2, 4 or 8 bits (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1), so that a
code never straddles two words. Inside a plane a word holds `f = word_bits / plane_bits` codes that lie
`ceil(rows / f)` rows apart: unpacking is one shift and one concatenation on the major axis, which is the
form that TPU, GPU and CPU compilers all lower well.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, UInt

from jaxquant.errors import InputError

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
_LARGEST_BLOCK = 128


def planes(bits: int) -> tuple[int, ...]:
    """Bits of the planes that a code of `bits` bits is split into, from its lowest bit up."""
    if bits not in _PLANES:
        raise ValueError(f"bits={bits} cannot be packed; use 1 to 8")
    return _PLANES[bits]


def block_rows(group_rows: int) -> int:
    """Rows packed together: the largest divisor of the group, at most 128, that fills whole words."""
    if group_rows <= _LARGEST_BLOCK:
        return group_rows
    divisors = [d for d in range(8, _LARGEST_BLOCK + 1, 8) if group_rows % d == 0]
    return max(divisors, default=group_rows)


def packed_rows(rows: int, bits: int, word_bits: int = 8) -> int:
    """Words that `rows` codes of `bits` bits take: `sum_p ceil(rows * p / word_bits)` over planes p."""
    return sum(-(-rows * plane // word_bits) for plane in planes(bits))


def pack(
    codes: Integer[Array, "*stack rows out"], bits: int, *, word_dtype: jax.typing.DTypeLike = jnp.uint8
) -> UInt[Array, "*stack words out"]:
    """Packs unsigned codes `0 .. 2**bits - 1` along the second axis from the end.

    Args:
      codes: integers of any dtype; higher bits than `bits` are dropped.
      bits: 1 to 8.
      word_dtype: `uint8` or `uint32`.

    Returns:
      `[..., packed_rows(rows, bits), out]`. Rows past the end of a ragged plane are zero.
    """
    word_bits = jnp.iinfo(word_dtype).bits
    rows = codes.shape[-2]
    codes = codes.astype(word_dtype)
    packed, shift = [], 0
    for plane in planes(bits):
        fields = (codes >> jnp.asarray(shift, word_dtype)) & jnp.asarray(2**plane - 1, word_dtype)
        per_word = word_bits // plane
        depth = -(-rows // per_word)
        pad = [(0, 0)] * (codes.ndim - 2) + [(0, depth * per_word - rows), (0, 0)]
        fields = jnp.pad(fields, pad).reshape(*codes.shape[:-2], per_word, depth, codes.shape[-1])
        offsets = (jnp.arange(per_word, dtype=word_dtype) * jnp.asarray(plane, word_dtype))[:, None, None]
        offsets = offsets.reshape((1,) * (codes.ndim - 2) + offsets.shape)
        packed.append(jnp.sum(fields << offsets, axis=-3, dtype=word_dtype))
        shift += plane
    return jnp.concatenate(packed, axis=-2)


def unpack(words: UInt[Array, "*stack words out"], bits: int, rows: int) -> UInt[Array, "*stack rows out"]:
    """The `uint8` codes that `pack` was given; `rows` is their number."""
    word_bits = jnp.iinfo(words.dtype).bits
    codes, start, shift = None, 0, 0
    for plane in planes(bits):
        per_word = word_bits // plane
        depth = -(-rows // per_word)
        part = words[..., start : start + depth, :]
        mask = jnp.asarray(2**plane - 1, words.dtype)
        fields = [(part >> jnp.asarray(k * plane, words.dtype)) & mask for k in range(per_word)]
        plane_codes = jnp.concatenate(fields, axis=-2)[..., :rows, :].astype(jnp.uint8)
        plane_codes = plane_codes << jnp.asarray(shift, jnp.uint8)
        codes = plane_codes if codes is None else codes | plane_codes
        start, shift = start + depth, shift + plane
    assert codes is not None
    return codes


def pair(
    scale: Float[Array, "*stack groups out"], zero: Float[Array, "*stack groups out"]
) -> UInt[Array, "*stack groups 1 out"]:
    """float16 scales and zeros as uint32: the bits of the scale below those of the zero.

    The axis of length 1 keeps TPUs from padding groups: their arrays come in tiles of 8 rows of 128 numbers,
    of 16 bits in pairs of rows, but a single row of 32 bits is a tile of its own. No gradient passes bits.
    """
    low, high = (jax.lax.bitcast_convert_type(a, jnp.uint16).astype(jnp.uint32) for a in (scale, zero))
    return (low | high << 16)[..., None, :]


def unpair(
    pairs: UInt[Array, "*stack groups 1 out"],
) -> tuple[Float[Array, "*stack groups out"], Float[Array, "*stack groups out"]]:
    """The scales and zeros that `pair` was given."""
    halves = (part.astype(jnp.uint16)[..., 0, :] for part in (pairs, pairs >> 16))
    scale, zero = (jax.lax.bitcast_convert_type(half, jnp.float16) for half in halves)
    return scale, zero


def check_packed(
    x: Array,
    words: Array,
    scale: Array | jax.ShapeDtypeStruct,
    zero: Array | jax.ShapeDtypeStruct,
    *,
    bits: int,
    block: int,
) -> None:
    """InputError unless words, scales and zeros are those of the inputs x has: kernels rely on it."""
    if bits not in _PLANES or block < 1:
        raise InputError(
            f"{bits} bits in blocks of {block} cannot be packed; use 1 to 8, and at least one row"
        )
    if x.ndim < 1 or words.ndim != 3 or not jnp.issubdtype(words.dtype, jnp.unsignedinteger):
        raise InputError(
            f"x {x.shape} and words {words.shape} of {words.dtype} do not fit: give x an axis of inputs, and "
            "unsigned words (blocks, words, outputs), as quant.packing.pack makes them"
        )
    channels = x.shape[-1]
    depth = packed_rows(block, bits, jnp.iinfo(words.dtype).bits)
    blocks, out = words.shape[0], words.shape[2]
    groups = scale.shape[0] if scale.ndim else 0
    if words.shape[1] != depth or blocks * block != channels or blocks < 1:
        raise InputError(
            f"words {words.shape} of {words.dtype} do not hold {channels} rows of {bits}-bit codes in blocks "
            f"of {block}: that is {(channels // block, depth, out)}"
        )
    if scale.shape != (groups, out) or zero.shape != scale.shape or groups < 1 or blocks % groups:
        raise InputError(
            f"scales {scale.shape} and zeros {zero.shape} do not fit {blocks} blocks of {out} outputs: give "
            "both one row for each group, which has a whole number of blocks"
        )
