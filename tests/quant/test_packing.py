"""Packing is a bijection for every width, word and shape."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.quant import pack, packed_rows, unpack

BITS = range(1, 9)
WORDS = [jnp.uint8, jnp.uint32]


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)


def numpy_pack(codes: np.ndarray, bits: int, word_bits: int) -> np.ndarray:
    """The documented layout: planes one below another, the codes of a word `depth` rows apart."""
    planes = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]
    rows, out = codes.shape
    words, shift = [], 0
    for plane in planes:
        per_word = word_bits // plane
        depth = -(-rows // per_word)
        block = np.zeros((depth, out), np.uint64)
        for row in range(rows):
            field = (codes[row].astype(np.uint64) >> np.uint64(shift)) & np.uint64(2**plane - 1)
            block[row % depth] |= field << np.uint64(plane * (row // depth))
        words.append(block)
        shift += plane
    return np.concatenate(words)


@functools.partial(jax.jit, static_argnums=(1, 2))
def packed_and_back(codes: jax.Array, bits: int, word) -> tuple[jax.Array, jax.Array]:
    words = pack(codes, bits, word_dtype=word)
    return words, unpack(words, bits, codes.shape[-2])


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    word=st.sampled_from(WORDS),
    rows=st.integers(1, 70),
    out=st.integers(1, 5),
    stack=st.sampled_from([(), (2,), (2, 3)]),
    seed=st.integers(0, 2**31),
)
def test_round_trip(bits, word, rows, out, stack, seed):
    codes = random_codes((*stack, rows, out), bits, seed)
    words, back = packed_and_back(jnp.asarray(codes), bits, word)
    assert words.dtype == word
    assert words.shape == (*stack, packed_rows(rows, bits, jnp.iinfo(word).bits), out)
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("bits", BITS)
def test_layout_is_the_documented_one(bits, word):
    for rows in (7, 50):
        codes = random_codes((rows, 3), bits)
        expected = numpy_pack(codes, bits, jnp.iinfo(word).bits)
        np.testing.assert_array_equal(packed_and_back(jnp.asarray(codes), bits, word)[0], expected)


def test_four_bits_are_the_nibbles_of_gguf_q4_0():
    """32 rows in 16 bytes: low nibbles hold rows 0-15, high nibbles rows 16-31, as in a GGUF block."""
    gguf = pytest.importorskip("gguf")
    codes = random_codes((32, 9), 4)
    one = np.ones((9, 1), np.float16).view(np.uint8)
    block = np.concatenate([one, np.asarray(pack(jnp.asarray(codes), 4)).T], axis=1)
    values = gguf.quants.dequantize(block, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(values.T + 8, codes)


def test_every_pair_of_nibbles():
    pairs = np.asarray(list(itertools.product(range(16), range(16))), np.uint8).T
    words = pack(jnp.asarray(pairs), 4)
    np.testing.assert_array_equal(words[0], pairs[0] | pairs[1] << 4)
    np.testing.assert_array_equal(unpack(words, 4, 2), pairs)


@pytest.mark.parametrize("bits", BITS)
def test_jit_and_vmap_equal_eager(bits):
    codes = jnp.asarray(random_codes((3, 24, 4), bits))
    with jax.disable_jit():
        eager = pack(codes, bits)
    words, back = jax.jit(jax.vmap(lambda c: packed_and_back(c, bits, jnp.uint8)))(codes)
    np.testing.assert_array_equal(words, eager)
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.uint32])
def test_any_integer_dtype_and_high_bits_are_dropped(dtype):
    codes = random_codes((16, 2), 3)
    dirty = jnp.asarray(codes.astype(np.int64) + 8 * (np.arange(32).reshape(16, 2) % 9)).astype(dtype)
    np.testing.assert_array_equal(unpack(pack(dirty, 3), 3, 16), codes)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=f"bits={bits}.*1 to 8"):
        pack(jnp.zeros((8, 2), jnp.uint8), bits)


@pytest.mark.parametrize("bits", BITS)
def test_whole_words_waste_nothing(bits):
    assert packed_rows(32, bits, 8) == 4 * bits
    assert packed_rows(32, bits, 32) == bits
