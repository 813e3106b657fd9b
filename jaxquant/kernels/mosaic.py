"""What Pallas kernels for TPUs share: tiles, packed words, float16, which no vector unit of a TPU knows."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt

from jaxquant.quant.packing import planes

#: A register of 32-bit values.
LANES, SUBLANES = 128, 8


def even(size: int, largest: int, unit: int) -> int:
    """Length of a tile so that as few as possible cover `size`, about equally long, in whole units."""
    if size <= largest:
        return size
    return math.ceil(size / math.ceil(size / largest) / unit) * unit


def bits_of_half(a: Array) -> Array:
    """The bits of float16 as int16; other floats as float32."""
    # Widened in HBM small groups would double what is read.
    return jax.lax.bitcast_convert_type(a, jnp.int16) if a.dtype == jnp.float16 else a.astype(jnp.float32)


def halves(pairs: Array) -> tuple[Array, Array]:
    """The lower and the upper 16 bits of int32, extended by their signs."""
    return (pairs << 16) >> 16, pairs >> 16


def widened(a: Array) -> Array:
    """float32 of the bits of float16 in an integer: exact, with subnormals, infinities and NaN."""
    if a.dtype == jnp.float32:
        return a
    half = a.astype(jnp.int32)
    exponent, fraction = (half >> 10) & 31, half & 1023
    bias = jnp.where(exponent == 31, 224, 112) << 23
    normal = jax.lax.bitcast_convert_type(((half & 0x7FFF) << 13) + bias, jnp.float32)
    magnitude = jnp.where(exponent == 0, fraction.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(half < 0, -magnitude, magnitude)


def unpack_int32(words: UInt[Array, "words out"], bits: int, rows: int) -> Int[Array, "rows out"]:
    """`quant.packing.unpack` in int32: shifts of narrower integers do not compile everywhere."""
    word_bits = jnp.iinfo(words.dtype).bits
    wide = words.astype(jnp.int32)
    codes, start, shift = [], 0, 0
    for plane in planes(bits):
        per_word = word_bits // plane
        depth = -(-rows // per_word)
        part = wide[start : start + depth]
        fields = [(part >> (k * plane)) & (2**plane - 1) for k in range(per_word)]
        codes.append(jnp.concatenate(fields, axis=0)[:rows] << shift)
        start, shift = start + depth, shift + plane
    return functools.reduce(jnp.bitwise_or, codes)
