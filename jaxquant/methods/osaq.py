"""OSAQ: lowers the largest weights along directions that the layer's output does not see (arXiv 2605.04738).

`osaq_primal` is the paper's closed form as published. The kernel form, the soft null space, groups, the
support, the line search and the Lawson iteration are our generalization.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxquant.errors import UsageError
from jaxquant.linalg import anti_shift, conjugate_gradients, hard_null_space, soft_null_space
from jaxquant.methods.problem import Problem
from jaxquant.quant import Grid, working_dtype

Form = Literal["soft", "hard"]

_THETAS = 10
# Elements of the small systems that are in memory at a time; about what a cache holds.
_CHUNK = 2**18
# A support of at least this fraction of the rows is solved with the whole of G.
_DENSE = 4
# The line search scales the step anyway, so its third digit does not matter.
_ROUGH = 1e-3
# Without a given support the weights of at least this share of their group's largest pull.
_NEAR = 0.7
# Lawson: what vanishes never returns, so a little of the uniform weights is mixed in now and then.
_MIX, _MIX_EVERY = 1e-3, 5


def softmax_infinity(
    a: Float[Array, "in out"], *, tau: float | Array, groups: int = 1
) -> Float[Array, "in out"]:
    """Weights that concentrate on the largest entries: `s = n softmax(|a| / (tau max|a|))`.

    The paper's Softmax-infinity with its temperature relative to the largest entry, per column and group of n
    consecutive rows, scaled to mean 1 (the paper's sums to 1). `tau -> 0` is the maximum norm, `tau -> inf`
    plain least squares. All ones where `a` is 0.
    """
    grouped = jnp.abs(a).reshape(groups, -1, a.shape[-1])
    largest = jnp.max(grouped, axis=1, keepdims=True)
    relative = grouped / jnp.where(largest > 0, largest, 1)
    return (grouped.shape[1] * jax.nn.softmax(relative / jnp.asarray(tau, a.dtype), axis=1)).reshape(a.shape)


@functools.partial(jax.jit, inline=True)
def osaq_primal(
    weight: Float[Array, "in out"],
    basis: Float[Array, "in k"],
    s: Float[Array, "in out"],
    *,
    mu1: float | Array,
    mu2: float | Array = 0.0,
) -> Float[Array, "in out"]:
    """The paper's closed form: `Delta = Z B` with a `K x K` system for every output channel.

        min_b  1/2 sum_j s_ji (W_ji + b . z_j)^2 + mu1/2 ||b||^2 + mu2/2 (b . v)^2
        A_i = sum_j s_ji z_j z_j^T + mu1 I + mu2 v v^T,   b_i = -A_i^-1 sum_j s_ji W_ji z_j
        v = Z^T 1 / sqrt(n)

    z_j is row j of Z. The paper computes s from the original `|W|` and sums it to 1; any other multiple of s
    stands for mu1 and mu2 divided by it. v is our reading of its "anti-translation" term. `O(out (n K^2 +
    K^3))`: for comparison; `osaq_delta` gives the same by smaller systems.

    Args:
      weight: `[in, out]`, float32 or float64.
      basis: Z, orthonormal columns; zero columns (`HardNullSpace.basis`) are the same as none.
      s: weights >= 0.
      mu1: > 0.
      mu2: >= 0.
    """
    v = jnp.sum(basis, axis=0) / basis.shape[0] ** 0.5
    mu1, mu2 = jnp.asarray(mu1, weight.dtype), jnp.asarray(mu2, weight.dtype)
    fixed = mu1 * jnp.eye(basis.shape[1], dtype=weight.dtype) + mu2 * v[:, None] * v[None, :]

    def channel(column: tuple[Array, Array]) -> Array:
        w, s = column
        a = jnp.matmul(basis.T, s[:, None] * basis, precision="highest") + fixed
        return _solve(a, jnp.matmul(s * w, basis, precision="highest"))

    b = jax.lax.map(channel, (weight.T, s.T))
    return -jnp.matmul(basis, b.T, precision="highest")


@functools.partial(jax.jit, inline=True)
def osaq_kernel(
    weight: Float[Array, "in out"], g: Float[Array, "in in"], s: Float[Array, "in out"]
) -> Float[Array, "in out"]:
    """The same minimum from `G` alone: `delta = -G r (I + r G r)^-1 r w`, `r = diag(sqrt(s))`.

    With `G = anti_shift(P / mu1, mu2 / n)` it equals `osaq_primal`; with `soft_null_space` it minimizes

        sum_j s_j (w_j + delta_j)^2 + eta delta^T Hhat delta + mu ||delta||^2 + mu2 (1^T delta)^2

    The bracket has no eigenvalue below 1, so it always has a Cholesky factor and `s_j = 0` is harmless.
    """

    def channel(column: tuple[Array, Array]) -> Array:
        w, s = column
        r = _root(s)
        a = jnp.eye(len(w), dtype=w.dtype) + r[:, None] * g * r[None, :]
        return r * _solve(a, r * w)

    z = jax.lax.map(channel, (weight.T, s.T))
    return -jnp.matmul(g, z.T, precision="highest")


@functools.partial(jax.jit, static_argnames=("support", "groups", "tolerance"), inline=True)
def osaq_top(
    weight: Float[Array, "in out"],
    g: Float[Array, "in in"],
    s: Float[Array, "in out"],
    *,
    support: int,
    groups: int = 1,
    tolerance: float | None = None,
) -> Float[Array, "in out"]:
    """`osaq_kernel` with all but the `support` largest s of every group taken as 0.

    An `m x m` system per channel, `m = groups * min(support, n)`: the union of the groups' selections is
    solved jointly, because G couples groups. A small support gathers `G[idx, idx]`, a chunk of columns at a
    time; a large one multiplies all columns by the whole of G, which is faster than gathering most of it.
    Solved by conjugate gradients up to a relative residual of `tolerance` (see `linalg.cg`): eigenvalues lie
    in `[1, 1 + max s max G]`, most of them close to 1.
    """
    rows, columns = weight.shape
    length = rows // groups
    support = min(support, length)
    w = weight.T
    top, index = jax.lax.top_k(s.T.reshape(columns, groups, length), support)
    index = (index + (jnp.arange(groups, dtype=index.dtype) * length)[None, :, None]).reshape(columns, -1)
    r = _root(top).reshape(columns, -1)
    peaks = r * jnp.take_along_axis(w, index, axis=1)
    diagonal = 1 + jnp.square(r) * jnp.diagonal(g)[index]

    def spread(values: Array) -> Array:
        return jnp.zeros_like(w).at[jnp.arange(columns)[:, None], index].set(values)

    if groups * support * _DENSE >= rows:
        wide = spread(r)

        def multiply(x: Array) -> Array:
            return x + wide * jnp.matmul(wide * x, g, precision="highest")

        z = wide * conjugate_gradients(
            multiply, spread(peaks), diagonal=jnp.maximum(spread(diagonal), 1), tolerance=tolerance
        )
    else:

        @jax.checkpoint
        def chunk(part: tuple[Array, Array, Array, Array]) -> Array:
            index, r, peaks, diagonal = part
            small = r[:, :, None] * g[index[:, :, None], index[:, None, :]] * r[:, None, :]

            def multiply(x: Array) -> Array:
                return x + jnp.einsum("cij,cj->ci", small, x, precision="highest")

            return r * conjugate_gradients(multiply, peaks, diagonal=diagonal, tolerance=tolerance)

        size = max(1, min(columns, _CHUNK // (groups * support) ** 2))

        def chunked(a: Array) -> Array:
            return jnp.pad(a, ((0, -columns % size), (0, 0))).reshape(-1, size, a.shape[1])

        # Padding has r = 0 and no peaks, but a division by its diagonal.
        diagonal = jnp.pad(diagonal, ((0, -columns % size), (0, 0)), constant_values=1)
        chunks = (chunked(index), chunked(r), chunked(peaks), diagonal.reshape(-1, size, index.shape[1]))
        z = spread(jax.lax.map(chunk, chunks).reshape(-1, index.shape[1])[:columns])
    return -jnp.matmul(z, g, precision="highest").T


@functools.partial(jax.jit, static_argnames=("grid", "support", "steps"), inline=True)
def osaq_delta(
    weight: Float[Array, "in out"],
    g: Float[Array, "in in"],
    grid: Grid,
    *,
    tau: float | Array = 0.2,
    support: int | None = None,
    steps: int = 1,
) -> Float[Array, "in out"]:
    """The step within the space of `G` that lowers the sum of squared ranges of a column's groups.

    Per column `theta delta(s)`, `theta in {0, .1, .., 1}` the one with the least sum of squared ranges:
    `hi - lo` with 0 included, as `grid` fits it without a clip search; in groups the least range around
    c, which bounds that and asks for smaller steps. s is `softmax_infinity(w - c)` and the weights are
    pulled to c: the middle of the range in the groups of an asymmetric grid, else 0; in a whole column
    one outlier moves the middle so far that all weights on the other side are pulled along with it.

    Without a `support` the weights within 70 % of the largest of their group pull, each as if it were alone,

        delta = -G z,   z_j = s_j (w_j - c_j) / (1 + s_j G_jj)

    one product with G where `osaq_top` solves a system; the line search makes up for the difference. With a
    `support` the step is that of `osaq_top`.

    With `steps` > 1 Lawson's iteration, `s <- s |w - c + delta(s)|`, mean 1 in each group, goes on towards
    the least maximum and the best iterate counts; softmax anew at each step would oscillate.

    Args:
      weight: `[in, out]`, float32 or float64.
      g: as in `osaq_kernel`; factor it once for linears that share their inputs.
      grid: gives the groups and the symmetry.
      tau: temperature, > 0.
      support: entries per group that pull together; `None` as above.
      steps: solves, >= 1.
    """
    rows = weight.shape[0]
    groups = grid.groups(rows)

    def reach(w: Array) -> tuple[Array, Array]:
        """Ends of the ranges, `[groups, out]`."""
        grouped = w.reshape(groups, -1, w.shape[-1])
        lo, hi = jnp.minimum(jnp.min(grouped, axis=1), 0), jnp.maximum(jnp.max(grouped, axis=1), 0)
        return (-jnp.maximum(-lo, hi), jnp.maximum(-lo, hi)) if grid.symmetric else (lo, hi)

    lo, hi = reach(weight)
    middle = (lo + hi) / 2 if groups > 1 else jnp.zeros_like(lo)

    def ranges(w: Array) -> Array:
        lo, hi = reach(w)
        width = 2 * jnp.maximum(hi - middle, middle - lo) if groups > 1 else hi - lo
        return jnp.sum(jnp.square(width), axis=0)

    peaks = weight - jnp.repeat(middle, rows // groups, axis=0)

    def solve(s: Array) -> Array:
        if support is None:
            z = s * peaks / (1 + s * jnp.diagonal(g)[:, None])
            return -jnp.matmul(g, z, precision="highest")
        tolerance = _ROUGH if s.dtype == jnp.float32 else None
        return osaq_top(peaks, g, s, support=support, groups=groups, tolerance=tolerance)

    def lawson(state: tuple[Array, Array, Array], step: Array) -> tuple[tuple[Array, Array, Array], None]:
        s, delta, best = state
        s = (jnp.abs(peaks + delta) * s).reshape(groups, -1, weight.shape[1])
        mean = jnp.mean(s, axis=1, keepdims=True)
        s = jnp.where(mean > 0, s / jnp.where(mean > 0, mean, 1), 1).reshape(weight.shape)
        mix = jnp.where(step % _MIX_EVERY == 0, _MIX, 0).astype(s.dtype)
        s = (1 - mix) * s + mix
        delta = solve(s)
        best = jnp.where((ranges(weight + delta) < ranges(weight + best))[None, :], delta, best)
        return (s, delta, best), None

    s = softmax_infinity(peaks, tau=tau, groups=groups)
    if support is None:
        sizes = jnp.abs(peaks).reshape(groups, -1, weight.shape[1])
        near = sizes >= _NEAR * jnp.max(sizes, axis=1, keepdims=True)
        s = jnp.where(near.reshape(s.shape), s, 0)
    delta = solve(s)
    if steps > 1:
        (_, _, delta), _ = jax.lax.scan(lawson, (s, delta, delta), jnp.arange(1, steps))

    def consider(best: tuple[Array, Array], theta: Array) -> tuple[tuple[Array, Array], None]:
        candidate = ranges(weight + theta * delta)
        better = candidate < best[0]
        return (jnp.where(better, candidate, best[0]), jnp.where(better, theta, best[1])), None

    start = (ranges(weight), jnp.zeros(weight.shape[1], weight.dtype))
    thetas = jnp.arange(1, _THETAS + 1, dtype=weight.dtype) / _THETAS
    theta = jax.lax.stop_gradient(jax.lax.scan(consider, start, thetas)[0][1])
    # NaN never compares as better; 0 * NaN must not bring it back. Only -0 leaves every weight as it is.
    return jnp.where(theta[None, :] > 0, theta[None, :] * delta, -0.0)


@functools.partial(jax.jit, static_argnames=("form", "support", "steps", "deflate"))
def osaq(
    problem: Problem,
    *,
    form: Form = "soft",
    eta: float | Array = 1e3,
    gamma: float | Array = 1e-4,
    tau: float | Array = 0.2,
    mu: float | Array = 1.0,
    mu2: float | Array = 0.0,
    support: int | None = None,
    steps: int = 1,
    deflate: int | None = None,
) -> Problem:
    """Absorbs outliers of a layer's weight before it is rounded: `weight + delta` with `X delta` close to 0.

    `form="hard"` moves within the tail eigenspace of the paper (arXiv 2605.04738), which may be empty;
    `form="soft"`, our generalization, prices every direction by its curvature. Neither is always an
    improvement: choose `eta` by the final error against `problem.target`, "off" included (`stages.Best`). The
    output energy of the step obeys `delta^T Hhat delta <= n max|w|^2 / eta` (soft with a `support`, before
    the line search, per channel) and `tr(Delta^T Hhat Delta) <= lam_K ||Delta||_F^2` (hard). Inputs that were
    always 0 are free directions: their weights become 0.

    Differentiable in the weight and every traced option; the support and the line search count as constants.

    Args:
      problem: `weight` `[in, out]`; computed in float32, or in float64 where it or the moments are.
      form: static.
      eta: price of output energy (soft). 1e3 up to 3 bits, 3e3 above; below 1e3 other texts than those of
        the moments see the step.
      gamma: share of the energy (hard); see `hard_null_space`.
      tau: temperature relative to the largest weight of a group; .15 to .3.
      mu: price of movement, > 0. `1 / n` of it is the paper's `mu1`.
      mu2: price of a uniform shift; the paper's `mu2`.
      support, steps: see `osaq_delta`.
      deflate: see `deflated_mean`.

    Returns:
      The problem with another weight, of the same dtype; the same weight, bit for bit and dead inputs apart,
      in columns where nothing is gained, the null space is empty or something is not finite.

    Raises:
      UsageError: the group size does not divide `in`, `form` is neither word, or `support` or `steps` is
        below 1.
    """
    if form not in get_args(Form):
        raise UsageError(f"unknown form {form!r}; use {' or '.join(get_args(Form))}")
    if steps < 1 or (support is not None and support < 1):
        raise UsageError(f"support={support} and steps={steps} must be at least 1")
    dtype = working_dtype(problem.weight.dtype, problem.moments.second.dtype)
    h = problem.moments.second.astype(dtype)
    w = jnp.where((jnp.diagonal(h) == 0)[:, None], 0, problem.weight.astype(dtype))
    if form == "soft":
        g = soft_null_space(h, eta=eta, mu=mu, mu2=mu2, deflate=deflate)
    else:
        space = hard_null_space(h, gamma=gamma, deflate=deflate)
        g = anti_shift(space.projector / jnp.asarray(mu, dtype), mu2)
    delta = osaq_delta(w, g, problem.grid, tau=tau, support=support, steps=steps)
    return dataclasses.replace(problem, weight=(w + delta).astype(problem.weight.dtype))


def _root(s: Array) -> Array:
    """The square root, with the derivative 0 at 0, where s underflows at a low temperature."""
    positive = s > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, s, 1)), 0)


def _solve(a: Array, b: Array) -> Array:
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(a, symmetrize_input=False), True), b)
