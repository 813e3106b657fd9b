"""Hadamard matrices of nearly every order that models have, their fast transform, and random rotations.

Sylvester's doubling of Paley's matrices (J. Math. Phys. 12, 1933): `H_n = H_m (x) H_2 (x) .. (x) H_2` with
the smallest m there is. Matrices are made on the host, in exact integers or float64.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxquant.errors import UsageError

# Of a power of two, by measurement on CPUs.
_LARGEST_FACTOR = 64
_SYLVESTER = np.array([[1, 1], [1, -1]], np.int8)
_TURN = np.array([[1, -1], [-1, -1]], np.int8)


@functools.cache
def hadamard(n: int) -> np.ndarray:
    """`H` with entries +-1, `H H^T = n I`, first row and first column all ones; int8 `[n, n]`, read-only.

    Orders 1, 2, and multiples of 4 that doubling reaches from `q + 1` (q = 3 mod 4) or `2 (q + 1)` (q = 1 mod
    4), q a power of a prime: up to 200 all but 92, 116, 156, 172, 184 and 188.

    Raises:
      UsageError: another order.
    """
    m = base_order(n)
    h = functools.reduce(np.kron, [_SYLVESTER] * ((n // m).bit_length() - 1), _paley(m))
    h.setflags(write=False)
    return h


def base_order(n: int) -> int:
    """m in `hadamard(n) = H_m (x) H_2 (x) .. (x) H_2`, the smallest possible; 1 for powers of two.

    Raises:
      UsageError: there is none.
    """
    doublings = (n & -n).bit_length() if n > 0 else 0
    for m in (n >> k for k in reversed(range(doublings))):
        if m == 1 or _field_order(m):
            return m
    raise UsageError(
        f"no Hadamard matrix of order {n} is known here; use blocks of an order that divides it, or a random "
        "orthogonal matrix"
    )


def hadamard_factors(n: int) -> tuple[int, ...]:
    """Orders of which `hadamard(n)` is the Kronecker product, in this order, as even as they can be.

    The first has the odd part, the others are powers of two; as few as there are with none above 64, or
    above the base where that is larger.

    Raises:
      UsageError: no Hadamard matrix of that order.
    """
    base = base_order(n)
    doublings = (n // base).bit_length() - 1
    room, most = max(0, (_LARGEST_FACTOR // base).bit_length() - 1), _LARGEST_FACTOR.bit_length() - 1
    factors = [base] + [1] * math.ceil(max(0, doublings - room) / most)
    for _ in range(doublings):
        factors[factors.index(min(factors))] *= 2
    return tuple(factors)


def hadamard_transform(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """`x H / sqrt(n)` with `hadamard(n)`: orthogonal, and its own inverse where n is a power of two.

    One product for each factor f of H (`hadamard_factors`), `n sum(f)` operations a row: a row is a tensor
    with an axis a factor, and `x (A (x) B)` are products over each of its axes. Computed in float32, or in
    float64 for such an x; differentiable.

    Raises:
      UsageError: no Hadamard matrix of that order, or x is not of a float dtype.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UsageError(f"hadamard_transform: x is {x.dtype}; cast it to a float dtype")
    n = x.shape[-1]
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    y, rows = x.astype(dtype), math.prod(x.shape[:-1])
    for order in reversed(hadamard_factors(n)):
        # The axes rotate: each is the last when it is multiplied, and after all of them the first again.
        h = jnp.asarray(hadamard(order), dtype)
        y = jnp.matmul(y.reshape(rows, n // order, order), h, precision="highest").swapaxes(1, 2)
    return (y * jnp.asarray(n**-0.5, dtype)).reshape(x.shape).astype(x.dtype)


def random_orthogonal(n: int, seed: int) -> np.ndarray:
    """A rotation or reflection, uniform over all of them: float64 `[n, n]`."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return q * np.where(np.diagonal(r) < 0, -1, 1)


def random_hadamard(n: int, seed: int) -> np.ndarray:
    """`diag(+-1) hadamard(n) / sqrt(n)`, the signs on the input side: float64 `[n, n]`.

    Raises:
      UsageError: no Hadamard matrix of that order.
    """
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], n)
    return signs[:, None] * hadamard(n) / n**0.5


def _field_order(m: int) -> int:
    """The q of Paley's construction of order m; 0 where there is none."""
    if m % 4 == 0 and _prime_of(m - 1):
        return m - 1
    return m // 2 - 1 if m % 8 == 4 and _prime_of(m // 2 - 1) else 0


def _prime_of(q: int) -> int:
    """p where q is a power of the prime p, else 0."""
    if q < 2:
        return 0
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    while q % p == 0:
        q //= p
    return p if q == 1 else 0


def _paley(m: int) -> np.ndarray:
    if m == 1:
        return np.ones((1, 1), np.int8)
    q = _field_order(m)
    character = _character(q)
    conference = np.ones((q + 1, q + 1), np.int8)
    conference[0, 0], conference[1:, 1:] = 0, character
    one = np.eye(q + 1, dtype=np.int8)
    if q % 4 == 3:
        conference[1:, 0] = -1
        h = one + conference
    else:
        h = np.kron(conference, _SYLVESTER) + np.kron(one, _TURN)
    h = h * h[:1]
    return h * h[:, :1]


def _character(q: int) -> np.ndarray:
    """`chi(a_i - a_j)` over the field of q elements: 1 for squares, -1 for the others, 0 for 0."""
    p = _prime_of(q)
    degree = round(np.log(q) / np.log(p))
    elements = np.array(list(itertools.product(range(p), repeat=degree)))
    places = p ** np.arange(degree)[::-1]
    differences = (elements[:, None] - elements[None]) % p @ places
    # The field is the polynomials modulo one in which x^degree is `top`; no other ring passes the test below.
    for top in elements:
        squares = np.zeros((q, 2 * degree - 1), int)
        for i, j in itertools.product(range(degree), repeat=2):
            squares[:, i + j] += elements[:, i] * elements[:, j]
        for power in range(2 * degree - 2, degree - 1, -1):
            squares[:, power - degree : power] += squares[:, power : power + 1] * top
        chi = np.full(q, -1, np.int8)
        chi[squares[:, :degree] % p @ places] = 1
        chi[0] = 0
        character = chi[differences]
        if np.array_equal(character.astype(int) @ character.T, q * np.eye(q, dtype=int) - 1):
            return character
    raise AssertionError(f"no field of order {q}")
