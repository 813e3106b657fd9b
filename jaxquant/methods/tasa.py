"""TASA: bits where tasks feel them, between layers and within (arXiv 2607.00908)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxquant.errors import NonFiniteError, UsageError
from jaxquant.linalg import damped_factor
from jaxquant.quant import Grid, working_dtype

# Partial allocations that are carried along. Measured tables need a few hundred; a table whose gains are all
# in proportion to the cost would need one for every sum of costs.
_STATES = 2048


def normalize(increase: Float[np.ndarray, "units widths"]) -> Float[np.ndarray, "units widths"]:
    """`max(D, 0) / mean |D|`: one domain's loss increases on a scale that domains share.

    An increase below zero is noise of the measurement; that a unit gains from fewer bits is no reason to
    give it fewer. The normalization is ours, the paper's is not public.

    Args:
      increase: D, how much a loss (nats a token, or a KL divergence) grows where one unit is quantized.

    Raises:
      NonFiniteError: an increase is NaN or infinite.
      UsageError: not a table, or all of it 0.
    """
    increase = _table(increase, "increase")
    mean = np.abs(increase).mean()
    if mean == 0:
        raise UsageError("sensitivity: nothing is lost at any width; measure fewer bits or more tokens")
    return np.maximum(increase, 0) / mean


def aggregate(
    task: Float[np.ndarray, "units widths"],
    general: Float[np.ndarray, "units widths"],
    *,
    beta: float = 0.7,
) -> Float[np.ndarray, "units widths"]:
    """`S = beta normalize(D_task) + (1 - beta) normalize(D_general)`: the sensitivity to two domains.

    Args:
      task, general: loss increases, as in `normalize`.
      beta: weight of the task, 0 to 1; the paper takes .7.

    Raises:
      NonFiniteError: an increase is NaN or infinite.
      UsageError: `beta` is out of range, the shapes differ, or a table is 0 everywhere.
    """
    if not 0 <= beta <= 1:
        raise UsageError(f"beta={beta} is out of range; use 0 (general loss alone) to 1 (task loss alone)")
    if np.shape(task) != np.shape(general):
        raise UsageError(
            f"sensitivity: {np.shape(task)} of the task, {np.shape(general)} of the general text; "
            "measure the same units at the same widths"
        )
    return beta * normalize(task) + (1 - beta) * normalize(general)


def isotonic(sensitivity: Float[np.ndarray, "units widths"]) -> Float[np.ndarray, "units widths"]:
    """The nearest table, in squares, that does not grow with the bits: `S[u, b] >= S[u, b + 1]`.

    Pools adjacent violators; a table that is in order already comes back as it is. Without this, noise could
    make a unit refuse bits that are free.

    Args:
      sensitivity: widths in ascending order.

    Raises:
      NonFiniteError: an entry is NaN or infinite.
      UsageError: not a table.
    """
    from scipy.optimize import isotonic_regression  # half a second to import

    rows = _table(sensitivity, "sensitivity")
    return np.stack([isotonic_regression(row, increasing=False).x for row in rows])


def allocate(
    sensitivity: Float[np.ndarray, "units widths"],
    costs: Int[np.ndarray, "units widths"],
    sizes: Int[np.ndarray, " units"],
    budget: float,
) -> Int[np.ndarray, " units"]:
    """The width of every unit that loses least within a budget of effective bits per weight:

        min_k sum_u S[u, k_u]   s.t.   sum_u costs[u, k_u] <= budget sum_u sizes[u]

    A knapsack with one choice per unit, solved by dynamic programming over the partial allocations that no
    other beats in both cost and loss (Nemhauser & Ullmann, 1969). Those that even at the price of
    `allocate_lagrangian` cannot end below its result are dropped, which leaves few to carry. Exact for any
    sizes and costs, and so monotone in the budget, unless more than 2048 partial allocations remain: then an
    even selection of them is carried on. The result never exceeds the budget and never loses more than that
    of `allocate_lagrangian`.

    Args:
      sensitivity: S, additive over units, any finite numbers.
      costs: bits stored for a unit at a width, whole numbers >= 0, metadata included.
      sizes: weights of a unit, > 0.
      budget: effective bits per weight.

    Returns:
      int64 `[units]`, columns of the tables.

    Raises:
      NonFiniteError: a sensitivity is NaN or infinite.
      UsageError: the shapes do not fit, a cost is no whole number, or no allocation meets the budget; names
        the least and the largest effective bits.
    """
    s, extra, capacity = _knapsack(sensitivity, costs, sizes, budget)
    start, price = _relax(s, extra, capacity)
    units = np.arange(len(s))
    # With R = sum_u min_k (S + price extra), any allocation loses R - price capacity + its sum of `excess`
    # + price times the bits it leaves over. The first two are the same for all.
    excess = s + price * extra
    excess -= excess.min(axis=1, keepdims=True)
    gap = excess[units, start].sum() + price * (capacity - extra[units, start].sum())
    limit = gap + 1e-12 * s.max(axis=1).sum()  # rounding

    alive = excess <= limit
    # What is undecided comes last, so that it meets one partial allocation instead of multiplying many.
    order = np.argsort(-np.sort(excess, axis=1)[:, :2][:, -1], kind="stable")
    least = np.where(alive, extra, np.iinfo(np.int64).max).min(axis=1)[order]
    most = np.where(alive, extra, 0).max(axis=1)[order]
    least_left, most_left = (rest[::-1].cumsum()[::-1] - rest for rest in (least, most))

    cost, above, loss = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    trail = []
    for position, unit in enumerate(order):
        widths = np.flatnonzero(alive[unit])
        states = len(cost)
        cost, above, loss = (
            np.add.outer(table[unit, widths], old).ravel()
            for table, old in ((extra, cost), (excess, above), (s, loss))
        )
        left_over = np.maximum(capacity - cost - most_left[position], 0)
        hopeful = (cost + least_left[position] <= capacity) & (above + price * left_over <= limit)
        index = np.flatnonzero(hopeful)
        index = index[np.lexsort((loss[index], cost[index]))]
        best = np.minimum.accumulate(loss[index])
        index = index[np.append(True, loss[index][1:] < best[:-1])[: len(index)]]
        if len(index) > _STATES:
            index = index[np.linspace(0, len(index) - 1, _STATES).astype(np.int64)]
        trail.append((widths[index // states], index % states))
        cost, above, loss = cost[index], above[index], loss[index]
        if not len(index):
            return start  # the selection kept nothing that still fits

    found = np.empty_like(start)
    state = np.argmin(loss)
    for unit, (width, parent) in zip(order[::-1], reversed(trail), strict=True):
        found[unit], state = width[state], parent[state]
    return found if s[units, found].sum() < s[units, start].sum() else start


def allocate_lagrangian(
    sensitivity: Float[np.ndarray, "units widths"],
    costs: Int[np.ndarray, "units widths"],
    sizes: Int[np.ndarray, " units"],
    budget: float,
) -> tuple[Int[np.ndarray, " units"], float]:
    """A nearly optimal allocation, and the price of a bit at which it is one:

        k_u = argmin_k S[u, k] + price costs[u, k],   the least price >= 0 that meets the budget

    by bisection; what is left over is spent on the largest gain per bit that fits, again and again. The price
    is what one more bit of storage saves. It reaches only the lower convex hull of the losses over the cost:
    its error is that of a unit or two, which is nothing for many small units and much for few large ones.

    Args:
      sensitivity, costs, sizes, budget: as in `allocate`, with the same errors.

    Returns:
      int64 `[units]`, columns of the tables, and the price.
    """
    return _relax(*_knapsack(sensitivity, costs, sizes, budget))


def kendall_interval(
    a: Float[np.ndarray, " units"],
    b: Float[np.ndarray, " units"],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Kendall's tau-b between two rankings of the same units, and its percentile bootstrap interval.

    The paper's "perplexity illusion" is a tau of about 0 between the sensitivities of layers to perplexity
    and to a task; for 30 independent layers chance alone gives a standard error of .13, so tau needs its
    interval. A unit drawn twice ties with itself in both rankings, which tau-b leaves out.

    Args:
      a, b: what to rank by; finite.
      seed: of the resampling.
      resamples: of the units, with replacement; those where all units tie have no tau and do not count.
      level: coverage, 0 to 1.

    Returns:
      `(tau, low, high)`, -1 to 1.

    Raises:
      UsageError: the shapes differ, or all units tie in one of the rankings.
    """
    from scipy.stats import kendalltau  # a second to import

    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise UsageError(f"rankings of shapes {a.shape} and {b.shape}; give two of the same units")
    draws = np.random.default_rng(seed).integers(0, len(a), (resamples, len(a)))
    tau, *taus = np.array([kendalltau(a[draw], b[draw]) for draw in (np.arange(len(a)), *draws)])[:, 0]
    if np.isnan(tau):
        raise UsageError("Kendall's tau: a ranking ties everywhere or is not finite; leave it out")
    low, high = np.nanquantile(taus, [(1 - level) / 2, (1 + level) / 2])
    return float(tau), float(low), float(high)


@functools.partial(jax.jit, static_argnames="group_size")
def group_salience(
    weight: Float[Array, "in out"],
    second: Float[Array, "in in"],
    group_size: int | None,
    *,
    percdamp: float | Array = 0.01,
) -> Float[Array, " groups"]:
    """What deleting a group of inputs would cost by the optimal brain surgeon, inputs one at a time:

        sum_{j in group, i} W_ji^2 / [H^-1]_jj,   H = second + damping

    `[H^-1]_jj` does not depend on an order, unlike the diagonal of GPTQ's factor that SliM-LLM (arXiv
    2405.14917) divides by. Inputs that were always 0 count nothing.

    Args:
      weight: `[in, out]`, any float dtype; computed in float32, or in float64 where it or `second` is.
      second: `sum x x^T` or any positive multiple, which multiplies the result.
      group_size: inputs per group, as in `Grid`.
      percdamp: damping in units of `mean(diag H)`, doubled on failure (see `linalg.psd`).

    Returns:
      >= 0; NaN where `second` is not finite.

    Raises:
      UsageError: the group size does not divide `in`.
    """
    dtype = working_dtype(weight.dtype, second.dtype)
    w, h = weight.astype(dtype), second.astype(dtype)
    groups = Grid(group_size=group_size).groups(w.shape[0])
    factor = damped_factor(h, percdamp)
    inverse_diagonal = jnp.sum(jnp.square(factor.inverse), axis=0)  # of U^T U
    salience = jnp.sum(jnp.square(w), axis=1) / inverse_diagonal
    salience = jnp.where(jnp.diagonal(h) == 0, 0, salience)
    return jnp.where(factor.finite, jnp.sum(salience.reshape(groups, -1), axis=1), jnp.nan)


def salience_swap(
    salience: Float[Array, " groups"],
    bits: int,
    error: Callable[[Int[Array, " groups"]], Array],
    *,
    shares: Sequence[float] = (1 / 8, 1 / 4),
) -> Int[Array, " groups"]:
    """Bits of the groups of a layer, `bits` on average: the p least salient lend one to the p most salient.

    Of p = 0 and `share * groups`, rounded down, the one with the least error is taken, the smallest p of
    equals: by its own measure the result is never worse than the uniform layer. SliM-LLM (arXiv 2405.14917)
    tries every p; the paper's rule is not public. Few p leave few layouts to be compiled.

    Args:
      salience: of the groups, see `group_salience`; equals are ordered by position.
      bits: of the layer, 2 to 7.
      error: layer error of the bits of all groups, int32 `[groups]`; called once per p. NaN never wins.
      shares: of the groups that lend, 0 to 1/2.

    Returns:
      int32 `[groups]`, values `bits - 1`, `bits` and `bits + 1`.

    Raises:
      UsageError: `bits` or a share is out of range.
    """
    if not 2 <= bits <= 7:
        raise UsageError(f"bits={bits}: groups would need {bits - 1} to {bits + 1}; use 2 to 7")
    if not all(0 <= share <= 1 / 2 for share in shares):
        raise UsageError(f"shares={tuple(shares)} are out of range; use 0 to 1/2")
    groups = salience.shape[0]
    rank = jnp.argsort(jnp.argsort(salience, stable=True), stable=True)
    trials = []
    for p in sorted({0, *(int(share * groups) for share in shares)}):
        step = (rank >= groups - p).astype(jnp.int32) - (rank < p).astype(jnp.int32)
        trials.append(bits + step)
    errors = jnp.stack([error(trial) for trial in trials])
    return jnp.stack(trials)[jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors))]


def _table(values: np.ndarray, name: str) -> Float[np.ndarray, "units widths"]:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.size == 0:
        raise UsageError(f"{name}: a table [units, widths] is needed, found shape {values.shape}")
    if not np.all(np.isfinite(values)):
        unit, width = np.argwhere(~np.isfinite(values))[0]
        raise NonFiniteError(f"{name}: unit {unit} at width {width} is not finite; measure it again")
    return values


def _knapsack(
    sensitivity: np.ndarray, costs: np.ndarray, sizes: np.ndarray, budget: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Sensitivities and costs above each unit's least, and how much of the costs can be spent."""
    s, stored, sizes = _table(sensitivity, "sensitivity"), _table(costs, "costs"), np.asarray(sizes)
    if stored.shape != s.shape or sizes.shape != s.shape[:1]:
        raise UsageError(
            f"sensitivity {s.shape}, costs {stored.shape}, sizes {sizes.shape}: "
            "give [units, widths], [units, widths] and [units]"
        )
    if np.any(stored != np.round(stored)) or np.any(stored < 0) or np.any(sizes <= 0):
        raise UsageError("costs are whole numbers of bits, 0 or more, and sizes are at least 1")
    whole, total = stored.astype(np.int64), int(sizes.sum())
    least = whole.min(axis=1, keepdims=True)
    largest = int(whole.max(axis=1).sum())
    # The product with a decimal budget may end just below a whole number, as 4.35 * 100 does.
    capacity = min(np.floor(budget * total * (1 + 1e-15)), largest) - int(least.sum())
    if not capacity >= 0:
        raise UsageError(
            f"budget={budget} effective bits per weight cannot be met; "
            f"these widths take {least.sum() / total:.4g} to {largest / total:.4g}"
        )
    return s - s.min(axis=1, keepdims=True), whole - least, int(capacity)


def _relax(s: np.ndarray, extra: np.ndarray, capacity: int) -> tuple[np.ndarray, float]:
    units = np.arange(len(s))

    def at(price: float) -> np.ndarray:
        return np.argmin(s + price * extra, axis=1)

    # Whatever bits could save, one bit costs more than that at this price.
    low, high = 0.0, 2 * float(s.max()) + np.finfo(np.float64).tiny
    if extra[units, at(low)].sum() <= capacity:
        high = low
    while low < (middle := (low + high) / 2) < high:
        if extra[units, at(middle)].sum() <= capacity:
            high = middle
        else:
            low = middle

    choice = at(high)
    while True:
        gain = s[units, choice][:, None] - s
        more = extra - extra[units, choice][:, None]
        fits = (gain > 0) & (more <= capacity - extra[units, choice].sum())
        if not fits.any():
            return choice, high
        rate = np.where(fits, gain / np.maximum(more, 0.5), -1)
        unit, width = np.unravel_index(np.argmax(rate), rate.shape)
        choice[unit] = width
