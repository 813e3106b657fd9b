"""Directions of a layer's input that carry next to no energy: where a weight may move unseen.

The hard form (a tail of eigenvectors) is that of OSAQ, arXiv 2605.04738. Deflation, the soft form and the
routes without an eigendecomposition are our generalization.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxquant.linalg.psd import DampedFactor, damped_factor

# Massive directions stand far apart, so a few steps of a block this much wider than their number find them.
_OVERSAMPLING = 7
_POWER_STEPS = 12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HardNullSpace:
    """Span of the eigenvectors of `H` that hold the least energy; shapes do not depend on its dimension.

    Attributes:
      basis: `[n, k]`; orthonormal columns in the space, zero columns in place of the others.
      rank: K, columns that are not zero; 0 is a legal result.
      energy: energy of the space over the deflated trace of `H`, at most `gamma`.
      eigenvalues: `[k]` of all `k` candidates, ascending, in the unit of `H`.
    """

    basis: Float[Array, "n k"]
    rank: Int[Array, ""]
    energy: Float[Array, ""]
    eigenvalues: Float[Array, " k"]

    @property
    def projector(self) -> Float[Array, "n n"]:
        """`P = Z Z^T`: unlike the basis free of signs, order and rotations of degenerate eigenvectors."""
        return jnp.matmul(self.basis, jnp.swapaxes(self.basis, -1, -2), precision="highest")


@functools.partial(jax.jit, static_argnames="deflate", inline=True)
def deflated_mean(h: Float[Array, "n n"], *, deflate: int | None = None) -> Float[Array, ""]:
    """Mean eigenvalue of `H` without its largest ones, `(tr H - sum of the top r eigenvalues) / n`.

    A few massive tokens can multiply the trace by 1000; everything measured against it would then look like
    null space. The top eigenvalues come from block power steps. At least `eps` of the plain mean; 1 where `H`
    is 0.

    Args:
      h: symmetric positive semi-definite, float32 or float64.
      deflate: r; `None` is `ceil(n / 1000)`. At most `n - 1` are left out.
    """
    trace = jnp.trace(h)
    return _deflated(trace, lambda v: jnp.matmul(h, v, precision="highest"), h.shape[0], deflate, h.dtype)


def hard_null_space(
    h: Float[Array, "n n"], *, gamma: float | Array, deflate: int | None = None
) -> HardNullSpace:
    """The largest tail of eigenvectors whose energy stays within `gamma` of the deflated trace.

        K = #{k : sum_{i<=k} |lam_i| <= gamma sum_{i<=n-r} |lam_i|},   |lam| ascending

    The paper (arXiv 2605.04738) takes the first k at which the sum *reaches* `gamma` of the undeflated trace
    (`deflate=0`), one direction more; counting those below keeps the budget and lets K be 0. Absolute values
    as in the paper: in float32 eigenvalues below `1e-7 lam_max` are noise of either sign.

    Args:
      h: symmetric positive semi-definite, any positive multiple; float32 or float64. Where it holds NaN or
        infinity, K is 0.
      gamma: share of the energy, >= 0; may be traced.
      deflate: r, massive directions left out of the trace; `None` is `ceil(n / 1000)`.
    """
    finite = jnp.all(jnp.isfinite(h))
    h = jnp.where(finite, h, jnp.eye(h.shape[0], dtype=h.dtype))
    unit = jnp.trace(h) / h.shape[0]
    unit = jnp.where(unit > 0, unit, 1)
    eigenvalues, vectors = jnp.linalg.eigh(h / unit)
    order = jnp.argsort(jnp.abs(eigenvalues))
    eigenvalues = jnp.abs(eigenvalues)[order]
    total = jnp.sum(eigenvalues[: h.shape[0] - _number(h.shape[0], deflate)])
    return _tail(eigenvalues * unit, vectors[:, order], total * unit, gamma, finite)


@functools.partial(jax.jit, static_argnames=("rank", "steps", "deflate"), inline=True)
def tail_null_space(
    factor: DampedFactor,
    *,
    gamma: float | Array,
    rank: int,
    steps: int = 4,
    deflate: int | None = None,
) -> HardNullSpace:
    """`hard_null_space` without an eigendecomposition, from the Cholesky factor that GPTQ computes anyway.

    Subspace iteration on `(H + damping)^-1 = A^-T A^-1` (two triangular solves and a QR a step), then
    Rayleigh-Ritz with `A^T Z`. Directions far below the damping are found together, not one from another;
    their energies are Rayleigh quotients of `H` itself, so but for rounding the budget holds whatever has
    converged.

    Args:
      factor: of `H`; `A A^T = H + damping mean(diag H) I`.
      gamma: as in `hard_null_space`.
      rank: candidates, static, at most n; where `K == rank` the budget was not used up.
      steps: iterations.
      deflate: as in `hard_null_space`.
    """
    a = factor.upper
    n = a.shape[0]
    rank = min(rank, n)
    usable, damping, trace = _inside(factor)

    def solve(b: Array, *, transpose: bool) -> Array:
        return jax.lax.linalg.triangular_solve(a, b, left_side=True, lower=False, transpose_a=transpose)

    def step(_: int, z: Array) -> Array:
        return jnp.linalg.qr(solve(solve(z, transpose=False), transpose=True))[0]

    z = jax.lax.fori_loop(0, steps, step, _start(n, rank, a.dtype))
    seen = jnp.matmul(a.T, z, precision="highest")
    energies, rotation = jnp.linalg.eigh(jnp.matmul(seen.T, seen, precision="highest"))
    vectors = jnp.matmul(z, rotation, precision="highest")
    total = n * _deflated(trace, lambda v: _energy_of(a, v, damping), n, deflate, a.dtype)
    return _tail(jnp.maximum(energies - damping, 0), vectors, total, gamma, usable)


@functools.partial(jax.jit, static_argnames="deflate", inline=True)
def soft_null_space(
    h: Float[Array, "n n"],
    *,
    eta: float | Array,
    mu: float | Array = 1.0,
    mu2: float | Array = 0.0,
    deflate: int | None = None,
) -> Float[Array, "n n"]:
    """The resolvent `G = (eta Hhat + mu I + mu2 1 1^T)^-1`: a null space as graded as the curvature.

    Our generalization of the projector of arXiv 2605.04738, which is `mu G` for curvatures 0 and infinity.
    `Hhat = H / deflated_mean(H)`, so `eta` is free of units. One factorization, no eigenvectors.
    Differentiable in every argument, in `h` where it has full rank, `dG = -G d(eta Hhat + mu I) G`. Where the
    factorization fails, `mu` is doubled up to 1024 times its value (`damped_factor`); where that fails too,
    or `H` holds NaN or infinity, G is 0: nothing moves.

    Args:
      h: symmetric positive semi-definite, any positive multiple; float32 or float64.
      eta: price of output energy, >= 0; 0 leaves `I / mu`.
      mu: price of movement, > 0.
      mu2: price of a shift `(1^T delta)^2`, >= 0; see `anti_shift`.
      deflate: massive directions left out of the mean; `None` is `ceil(n / 1000)`.
    """
    finite = jnp.all(jnp.isfinite(h))
    h = jnp.where(finite, h, jnp.eye(h.shape[0], dtype=h.dtype))
    eta, mu = jnp.asarray(eta, h.dtype), jnp.asarray(mu, h.dtype)
    g = _resolvent(h / deflated_mean(h, deflate=deflate), eta, mu)
    return anti_shift(jnp.where(finite, g, 0), mu2)


@functools.partial(jax.jit, static_argnames="deflate", inline=True)
def soft_from_factor(
    factor: DampedFactor,
    *,
    mu: float | Array = 1.0,
    mu2: float | Array = 0.0,
    deflate: int | None = None,
) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    """`soft_null_space` from the factor that GPTQ computes anyway, at the strength that its damping is.

        (H + d mean(diag H))^-1 = U^T U,   eta = mu deflated_mean(H) / (d mean(diag H)),   G = U^T U
        deflated_mean(H) / eta

    A damping of 1 % is `eta = 100` where no direction is massive; `eta = 1000` asks for .1 %. Indices are
    those of the
    factor: a factor of the permuted `H` gives a permuted G.

    Returns:
      G (0 where the factor is a fallback or `H` was not finite) and eta.
    """
    n = factor.upper.shape[0]
    usable, damping, trace = _inside(factor)
    mean = _deflated(trace, lambda v: _energy_of(factor.upper, v, damping), n, deflate, damping.dtype)
    eta = jnp.asarray(mu, damping.dtype) * mean / damping
    g = factor.damped_inverse * (mean / eta)
    return anti_shift(jnp.where(usable, g, 0), mu2), eta


def anti_shift(g: Float[Array, "n n"], mu2: float | Array) -> Float[Array, "n n"]:
    """`(G^-1 + mu2 1 1^T)^-1 = G - mu2 (G 1)(G 1)^T / (1 + mu2 1^T G 1)`: a price on shifting a whole column.

    With `G = P / mu1` and `mu2 / n` this is the paper's regularizer `mu2 (b . v)^2` with `v = Z^T 1 /
    sqrt(n)`; the vector v is our reading, the paper's text leaves it open.
    """
    mu2 = jnp.asarray(mu2, g.dtype)
    ones = jnp.sum(g, axis=1)
    return g - mu2 / (1 + mu2 * jnp.sum(ones)) * ones[:, None] * ones[None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stability:
    """How far a null space found on some tokens is one of others.

    Attributes:
      mean_squared_cosine: `tr(P1 P2) / K1`; 1 where the first space lies in the second.
      random_baseline: the same for a random second space, `K2 / n`.
      largest_cosine: `||P1 P2||`, the paper's measure; near 1 for *any* two spaces of more than n/2
        dimensions.
      cross_energy: `tr(P1 H2)` over the deflated trace of `H2`; the in-sample value is
        `HardNullSpace.energy`.
      random_energy: the same for a random first space, `K1 / n`.
    """

    mean_squared_cosine: Float[Array, ""]
    random_baseline: Float[Array, ""]
    largest_cosine: Float[Array, ""]
    cross_energy: Float[Array, ""]
    random_energy: Float[Array, ""]


def subspace_stability(
    p1: Float[Array, "n n"],
    p2: Float[Array, "n n"],
    h2: Float[Array, "n n"],
    *,
    deflate: int | None = None,
) -> Stability:
    """Compares the space of one calibration shard or corpus with another's; empty spaces give cosines of 0.

    Args:
      p1, p2: projectors.
      h2: second moment of the tokens behind `p2`, any positive multiple.
      deflate: massive directions left out of the trace of `h2`.
    """
    n = p1.shape[0]
    rank = jnp.trace(p1)
    product = jnp.matmul(p1, p2, precision="highest")
    squared = _top(
        lambda v: jnp.matmul(product, jnp.matmul(product.T, v, precision="highest"), precision="highest"),
        n,
        1,
        p1.dtype,
    )
    return Stability(
        mean_squared_cosine=jnp.sum(p1 * p2) / jnp.maximum(rank, 1),
        random_baseline=jnp.trace(p2) / n,
        largest_cosine=jnp.sqrt(jnp.maximum(squared[0], 0)),
        cross_energy=jnp.sum(p1 * h2) / (n * deflated_mean(h2, deflate=deflate)),
        random_energy=rank / n,
    )


def intersect(
    projectors: Float[Array, "shards n n"], *, threshold: float | Array = 0.9
) -> Float[Array, "n n"]:
    """Projector on the directions that (nearly) all spaces share.

    Those eigenvectors of the mean projector whose eigenvalue, the mean squared cosine with the spaces,
    exceeds `threshold`; 0 where there is none.
    """
    eigenvalues, vectors = jnp.linalg.eigh(jnp.mean(projectors, axis=0))
    shared = jnp.where((eigenvalues > threshold)[None, :], vectors, 0)
    return jnp.matmul(shared, shared.T, precision="highest")


@jax.custom_jvp
def _resolvent(h: Array, eta: Array, mu: Array) -> Array:
    mean = eta * jnp.trace(h) / h.shape[0]
    factor = damped_factor(eta * h, mu / jnp.where(mean > 0, mean, 1))
    return jnp.where(factor.fallback, 0, factor.damped_inverse)


@_resolvent.defjvp
def _resolvent_jvp(primals, tangents):
    # The retry ladder is a while loop, which reverse mode cannot enter.
    (h, eta, mu), (dh, deta, dmu) = primals, tangents
    g = _resolvent(h, eta, mu)
    change = deta * h + eta * dh + dmu * jnp.eye(h.shape[0], dtype=h.dtype)
    return g, -jnp.matmul(jnp.matmul(g, change, precision="highest"), g, precision="highest")


def _inside(factor: DampedFactor) -> tuple[Bool[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Whether a factor is one of `H`; the damping in the unit of `H`; the trace of `H`."""
    n = factor.upper.shape[0]
    damped_trace = jnp.sum(jnp.square(factor.upper))
    mean = damped_trace / n / (1 + factor.damping)
    return factor.finite & ~factor.fallback, factor.damping * mean, n * mean


def _energy_of(a: Array, v: Array, damping: Array) -> Array:
    product = jnp.matmul(a, jnp.matmul(a.T, v, precision="highest"), precision="highest")
    return product - damping * v


def _number(n: int, deflate: int | None) -> int:
    return min(math.ceil(n / 1000) if deflate is None else deflate, n - 1)


def _start(n: int, block: int, dtype: jnp.dtype) -> Array:
    return jnp.linalg.qr(jax.random.normal(jax.random.key(0), (n, block), dtype))[0]


def _top(apply: Callable[[Array], Array], n: int, number: int, dtype: jnp.dtype) -> Array:
    """Ritz values of the `number` largest eigenvalues, descending."""

    def step(_: int, v: Array) -> Array:
        return jnp.linalg.qr(apply(v))[0]

    v = jax.lax.fori_loop(0, _POWER_STEPS, step, _start(n, min(number + _OVERSAMPLING, n), dtype))
    return jnp.linalg.eigvalsh(jnp.matmul(v.T, apply(v), precision="highest"))[::-1][:number]


def _deflated(
    trace: Array, apply: Callable[[Array], Array], n: int, deflate: int | None, dtype: jnp.dtype
) -> Array:
    number = _number(n, deflate)
    rest = trace if number == 0 else trace - jnp.sum(_top(apply, n, number, dtype))
    mean = jnp.maximum(rest, jnp.finfo(dtype).eps * trace) / n
    return jnp.where(mean > 0, mean, 1)


def _tail(
    eigenvalues: Array, vectors: Array, total: Array, gamma: float | Array, usable: Array
) -> HardNullSpace:
    cumulative = jnp.cumsum(eigenvalues)
    kept = (cumulative <= jnp.asarray(gamma, total.dtype) * total) & usable
    return HardNullSpace(
        basis=jnp.where(kept[None, :], vectors, 0),
        rank=jnp.sum(kept, dtype=jnp.int32),
        energy=jnp.sum(jnp.where(kept, eigenvalues, 0)) / jnp.where(total > 0, total, 1),
        eigenvalues=eigenvalues,
    )
