"""Two independent GPTQ implementations in numpy float64, and the layers that the tests round."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibrate.moments import Moments
from jaxquant.quant import Grid

fit_grid = jax.jit(Grid.fit, static_argnums=0)


def correlated_layer(rows: int, out: int, *, tokens: int | None = None, seed: int = 0, dead: int = 0):
    """Weight, activations: random mixing, uneven channels, `dead` inputs that are always 0."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens or 3 * rows, rows)) @ (
        rng.standard_normal((rows, rows)) / rows**0.5 + np.eye(rows)
    )
    x *= rng.lognormal(0, 0.7, rows)
    x[:, rng.permutation(rows)[:dead]] = 0
    return rng.standard_normal((rows, out)), x


def moments_of(x: np.ndarray, dtype=jnp.float32) -> Moments:
    """Moments summed in float64, then stored in `dtype`."""
    x = x.astype(np.float64)
    return Moments(
        second=jnp.asarray(x.T @ x, dtype),
        count=jnp.asarray(len(x), jnp.int32),
        max_abs=jnp.asarray(np.abs(x).max(0), dtype),
    )


def fit(grid: Grid, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of one group `[rows, out]`; the grid itself has its own oracle."""
    scale, zero = fit_grid(Grid(**grid.to_dict() | {"group_size": None}), jnp.asarray(w))
    zero = np.full(w.shape[1], grid.constant_zero) if zero is None else np.asarray(zero[0], np.float64)
    return np.asarray(scale[0], np.float64), zero


def nearest(w: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    whole = np.floor(zero)
    return np.clip(np.round(w / scale + (zero - whole)) + whole, 0, 2**bits - 1)


def prepare(w, h, grid: Grid, act_order: bool, percdamp: float, bits=None):
    """Dead inputs, order, damping: what both algorithms start from."""
    w, h, dead = w.copy(), h.copy(), np.diagonal(h) == 0
    w[dead] = 0
    h[dead, dead] = np.diagonal(h)[~dead].mean()
    order = np.argsort(-np.diagonal(h), kind="stable") if act_order else np.arange(len(h))
    damped = h + percdamp * np.diagonal(h).mean() * np.eye(len(h))
    group = len(w) // grid.groups(len(w))
    bits = [grid.bits] * (len(w) // group) if bits is None else bits
    grids = [Grid(**grid.to_dict() | {"bits": int(b)}) for b in bits]
    static = [fit(own, w[i * group : (i + 1) * group]) for i, own in enumerate(grids)]
    return w[order], damped[order][:, order], order, group, static


def gptq_reference(w, h, grid: Grid, *, act_order=False, dynamic=False, percdamp=0.01, bits=None):
    """Paper, algorithm 1 with B = 1: codes in processing order, grids, order, dequantized weight."""
    w, h, order, group, grids = prepare(w, h, grid, act_order, percdamp, bits)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    codes, values = np.zeros_like(w), np.zeros_like(w)
    for k in range(len(w)):
        index = k // group if dynamic else order[k] // group
        if dynamic and k % group == 0:
            grids[index] = fit(grid, w[k : k + group])
        scale, zero = grids[index]
        codes[k] = nearest(w[k], scale, zero, grid.bits if bits is None else bits[index])
        values[k] = scale * (codes[k] - zero)
        w[k + 1 :] -= np.outer(u[k, k + 1 :], (w[k] - values[k]) / u[k, k])
    inverse = np.argsort(order)
    return codes, grids, order, values[inverse]


def ldlq_reference(w, h, grid: Grid, *, act_order=False, percdamp=0.01):
    """H = A A^T, A upper; q_k = Q(w_k + sum_{j<k} A_jk / A_kk (w_j - q_j)): no inverse, no update of w."""
    w, h, order, group, grids = prepare(w, h, grid, act_order, percdamp)
    a = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    codes, values = np.zeros_like(w), np.zeros_like(w)
    for k in range(len(w)):
        scale, zero = grids[order[k] // group]
        codes[k] = nearest(w[k] + a[:k, k] / a[k, k] @ (w[:k] - values[:k]), scale, zero, grid.bits)
        values[k] = scale * (codes[k] - zero)
    return codes, grids, order, values[np.argsort(order)]


def relative_layer_error(values: np.ndarray, w: np.ndarray, x: np.ndarray) -> float:
    """||X (What - W)||^2 / ||X W||^2 from the activations themselves."""
    return float(np.sum((x @ (values - w)) ** 2) / np.sum((x @ w) ** 2))
