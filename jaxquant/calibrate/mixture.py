"""Mixtures of calibration texts, by what layers see of each (TASA, arXiv 2607.00908).

Everything here is linear in the shares of tokens: moments of several sources, collected apart, give those of
every mixture. What has to be searched is searched without another pass through the model.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxquant.calibrate.collect import batches
from jaxquant.calibrate.fisher import fisher_weights
from jaxquant.calibrate.moments import Moments
from jaxquant.errors import InputError, UsageError
from jaxquant.io.source import Source, load_params
from jaxquant.models.config import ModelConfig
from jaxquant.models.decoder import TAPS, Params, reduce_taps

#: By tap, as `collect.model_moments` returns them: with a leading layer axis.
TapMoments = Mapping[str, Moments]

#: How the number of directions in use is counted; see `effective_rank`.
Rank = Literal["participation", "entropy"]


def mix(sources: Mapping[str, TapMoments], weights: Mapping[str, float]) -> dict[str, Moments]:
    """Moments of a mixture with `weights[s]` tokens of source s to every token in all:

        H(w) = sum_s w_s H_s,   H_s = sum x x^T / n_s,   sum_s w_s = 1

    The mean over tokens, so that long documents, or a source with more of them, count no more than their
    share. Sums and counts are those of `sum_s n_s` tokens, as if the mixture had been as large as all sources
    together. Output moments are left out.

    Args:
      sources: by name, of the same taps.
      weights: by name, >= 0, not all 0; what is missing has none. Only their ratios matter.

    Raises:
      InputError: a source that takes part has no tokens.
      UsageError: a name that no source has, weights that are no shares, or sources of different models.
    """
    if unknown := set(weights) - set(sources):
        raise UsageError(f"mixture: no source {', '.join(sorted(unknown))}; there are {', '.join(sources)}")
    total = sum(weights.values())
    if not (min(weights.values(), default=0) >= 0 and 0 < total < np.inf):
        raise UsageError(f"mixture: weights {dict(weights)}; give numbers >= 0, not all 0")
    shares = {name: weight / total for name, weight in weights.items() if weight > 0}
    first = next(iter(sources.values()))
    for name, source in sources.items():
        shapes = {tap: moments.second.shape for tap, moments in source.items()}
        if shapes != {tap: moments.second.shape for tap, moments in first.items()}:
            raise UsageError(f"mixture: {name} has other taps or layers; collect all sources on one model")
        if name in shares and not all(np.all(moments.count > 0) for moments in source.values()):
            raise InputError(
                f"mixture: {name} has no tokens at some tap; give more text, or mask fewer tokens"
            )

    def of_tap(tap: str) -> Moments:
        count = functools.reduce(jnp.add, (source[tap].count for source in sources.values()))
        mean = functools.reduce(jnp.add, (p * sources[name][tap].mean_second for name, p in shares.items()))
        return Moments(
            second=mean * count.astype(jnp.float32)[..., None, None],
            count=count,
            max_abs=functools.reduce(jnp.maximum, (sources[name][tap].max_abs for name in shares)),
        )

    return {tap: of_tap(tap) for tap in first}


def energy_traces(moments: TapMoments) -> Float[np.ndarray, " entries"]:
    """`h = tr H = E |x|^2` at the four taps of every block: how much energy a text sends where.

    Forward only. The trace of a mixture is the mixture of the traces. Collect with `mask="first"`: the first
    token of a window alone can be most of the energy of a tap, the same in every text.

    Args:
      moments: of all `TAPS`, with a leading layer axis.

    Returns:
      float64 `[4 L]`, block by block, taps in the order of `TAPS`; units of the activations, squared.

    Raises:
      InputError: no energy at a tap, or a trace that is not finite; names it.
    """
    traces = [np.asarray(jnp.trace(moments[tap].mean_second, axis1=-2, axis2=-1), np.float64) for tap in TAPS]
    return _entries(traces)


def gradient_traces(source: Source, tokens: np.ndarray) -> Float[np.ndarray, " entries"]:
    """`h = E |g|^2 |x|^2` at the four taps of every block: the trace of the loss's Fisher matrix.

    g are the gradients of the summed loss at the outputs of all linears that read the tap, absolute (those of
    `fisher_weights` with `relative=False`): relative ones would lose what one text's loss feels more than
    another's. Linear in the mixture as well; costs a backward pass. The first token of a window is left out.

    Args:
      source: the model, unquantized.
      tokens: int32 `[samples, seqlen]`.

    Returns:
      As `energy_traces`, in squared nats.

    Raises:
      InputError: no gradient at a tap; names it.
      NonFiniteError: a gradient is NaN or infinite; names the block and tap.
    """
    weights = fisher_weights(source, tokens, relative=False)
    params, config = load_params(source), source.config.in_floats()
    sums = {tap: np.zeros(config.num_layers) for tap in TAPS}
    for part in batches(tokens):
        energies = _energies(params, config, jnp.asarray(tokens[part]))
        for tap in TAPS:
            squares = np.stack([of_block[tap][part] for of_block in weights]).astype(np.float64)
            sums[tap] += np.sum(squares[..., 1:] * np.asarray(energies[tap])[..., 1:], axis=(1, 2))
    return _entries([sums[tap] / tokens[:, 1:].size for tap in TAPS])


def alignment(
    traces: Float[np.ndarray, "*mixtures entries"],
    target: Float[np.ndarray, " entries"],
    scale: Float[np.ndarray, " entries"],
) -> Float[np.ndarray, "*mixtures"]:
    """`cos(h / scale, target / scale)`: whether a text spreads its energy over the layers as the target does.

    Without the scale, the mean of h over the sources, late layers alone would decide. That normalization is
    ours, the paper's is not public.

    Args:
      traces, target, scale: > 0, `energy_traces` or `gradient_traces`.
    """
    h, goal = traces / scale, target / scale
    return h @ goal / (np.linalg.norm(h, axis=-1) * np.linalg.norm(goal))


@functools.partial(jax.jit, static_argnames="rank")
def effective_rank(h: Float[Array, "*stack n n"], rank: Rank = "participation") -> Float[Array, "*stack"]:
    """How many directions share the energy of H: 1 for one direction, n for the identity.

        participation: tr(H)^2 / |H|_F^2         entropy: exp(-sum p log p),   p = eigenvalues / tr H

    The first needs no eigenvalues and is never above the second.

    Args:
      h: symmetric positive semi-definite, not 0, any scale; leading axes are free.
      rank: `"participation"` or `"entropy"`.

    Raises:
      UsageError: `rank` is neither.
    """
    if rank not in get_args(Rank):
        raise UsageError(f"unknown rank {rank!r}; use {' or '.join(get_args(Rank))}")
    p = h / jnp.trace(h, axis1=-2, axis2=-1)[..., None, None]
    if rank == "participation":
        return 1 / jnp.sum(jnp.square(p), axis=(-2, -1))
    eigenvalues = jnp.maximum(jnp.linalg.eigvalsh(p), 0)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(eigenvalues, eigenvalues), axis=-1))


def diversity(moments: TapMoments, rank: Rank = "participation") -> float:
    """`mean log(effective_rank(H) / N)` over taps and blocks: <= 0, and 0 where every spectrum is flat.

    Calibration on the task alone leaves directions empty, and a rounding that spends nothing on them; this is
    the term that speaks for general text. It is ours: the paper argues with degenerate spectra, but whether
    its search has such a term is not public.

    Args:
      moments: of any taps.
      rank: see `effective_rank`.
    """
    logs = [np.log(np.asarray(effective_rank(m.second, rank)) / m.second.shape[-1]) for m in moments.values()]
    return float(np.mean(np.concatenate([np.ravel(log) for log in logs]), dtype=np.float64))


def best_mixture(
    a: Float[np.ndarray, " entries"], b: Float[np.ndarray, " entries"], target: Float[np.ndarray, " entries"]
) -> float:
    """The share of tokens of `a`, the rest being `b`, whose traces align best with the target:

        alpha* = argmax alignment(alpha a + (1 - alpha) b, target, (a + b) / 2) = r_a / (r_a + r_b)
        r_a = max(<a,t> <b,b> - <b,t> <a,b>, 0),   r_b = max(<b,t> <a,a> - <a,t> <a,b>, 0)

    in closed form, after the division by the scale. Where the traces of both are alike every mixture is as
    good, and the halves are returned.

    Args:
      a, b, target: > 0, as in `alignment`.

    Warns:
      UserWarning: the target is one of the two, which then always wins.
    """
    scale = (a + b) / 2
    _warn_degenerate({"a": a, "b": b}, target, scale)
    a, b, target = a / scale, b / scale, target / scale
    of_a = max((a @ target) * (b @ b) - (b @ target) * (a @ b), 0.0)
    of_b = max((b @ target) * (a @ a) - (a @ target) * (a @ b), 0.0)
    return float(of_a / (of_a + of_b)) if of_a + of_b > 0 else 0.5


@dataclasses.dataclass(frozen=True)
class MixtureSearch:
    """What `search_mixture` tried.

    Attributes:
      names: of the sources.
      shares: `[candidates, sources]`, of the tokens.
      alignment, diversity: `[candidates]`, see the functions of these names.
      nu: weight of the diversity.
    """

    names: tuple[str, ...]
    shares: np.ndarray
    alignment: np.ndarray
    diversity: np.ndarray
    nu: float

    @property
    def objective(self) -> np.ndarray:
        """`J = alignment + nu diversity` of every candidate."""
        return self.alignment + self.nu * self.diversity

    @property
    def best(self) -> dict[str, float]:
        """Weights, for `mix`, of the candidate with the largest objective; the first of equals."""
        shares = self.shares[np.argmax(self.objective)]
        return dict(zip(self.names, shares.tolist(), strict=True))


def search_mixture(
    sources: Mapping[str, TapMoments],
    target: Float[np.ndarray, " entries"],
    *,
    traces: Mapping[str, Float[np.ndarray, " entries"]] | None = None,
    nu: float | None = None,
    rank: Rank = "participation",
    steps: int = 4,
) -> MixtureSearch:
    """The mixture that is like the target and still uses many directions:

        argmax_w J(w) = alignment(sum_s w_s h_s, target, mean_s h_s) + nu diversity(mix(sources, w))

    over all w in multiples of `1 / steps` that add up to 1. With nu = 0 it is the paper's search as far as it
    is known, and then no source may be the target: that source alone would be the answer.

    Args:
      sources: two or more, by name, of all `TAPS`.
      target: traces of the domains to be good at, the mean over them; from other text than the sources.
      traces: of every source, the kind of the target; `None`: `energy_traces` of `sources`.
      nu: >= 0; `None` gives both terms the same spread (largest less smallest) over the candidates.
      rank: see `effective_rank`.
      steps: >= 1.

    Raises:
      InputError: a source without tokens, or no energy at a tap.
      UsageError: fewer than two sources, traces of others, sources of different models, `nu` or `steps` out
        of range.

    Warns:
      UserWarning: nu is 0 and the target is one of the sources.
    """
    if len(sources) < 2 or steps < 1 or (nu is not None and not 0 <= nu < np.inf):
        raise UsageError(f"search: {len(sources)} sources, steps={steps}, nu={nu}; needs >= 2, >= 1, >= 0")
    names = tuple(sources)
    if traces is None:
        traces = {name: energy_traces(source) for name, source in sources.items()}
    if set(traces) != set(names) or {traces[name].shape for name in names} != {target.shape}:
        raise UsageError("search: traces of every source and of the target are needed, all of one model")
    rows = np.stack([traces[name] for name in names])
    scale = rows.mean(axis=0)
    counts = itertools.product(range(steps + 1), repeat=len(names))
    shares = np.array([count for count in counts if sum(count) == steps]) / steps
    aligned = alignment(shares @ rows, target, scale)
    diverse = np.array([diversity(mix(sources, dict(zip(names, w, strict=True))), rank) for w in shares])
    if nu is None:
        nu = float(np.ptp(aligned) / np.ptp(diverse)) if np.ptp(diverse) > 0 else 0.0
    if nu == 0:
        _warn_degenerate(traces, target, scale)
    return MixtureSearch(names=names, shares=shares, alignment=aligned, diversity=diverse, nu=nu)


@functools.partial(jax.jit, static_argnames="config")
def _energies(params: Params, config: ModelConfig, tokens: jax.Array) -> dict[str, jax.Array]:
    """`|x|^2` of every token, by tap, `[L, B, T]`."""
    return reduce_taps(params, config, tokens, lambda x: jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))


def _entries(by_tap: list[np.ndarray]) -> Float[np.ndarray, " entries"]:
    traces = np.stack(by_tap, axis=1)
    if not np.all((traces > 0) & (traces < np.inf)):
        block, tap = np.argwhere(~((traces > 0) & (traces < np.inf)))[0]
        raise InputError(
            f"blocks.{block}.{TAPS[tap]}: trace {traces[block, tap]:g}; "
            "give more text, mask fewer tokens, or check the model file"
        )
    return traces.ravel()


def _warn_degenerate(traces: Mapping[str, np.ndarray], target: np.ndarray, scale: np.ndarray) -> None:
    for name, trace in traces.items():
        if alignment(trace, target, scale) > 1 - 1e-9:
            warnings.warn(
                f"the target's traces are those of source {name}: alignment alone always picks that source; "
                "give the mean of several domains as the target, or search with nu > 0",
                stacklevel=3,
            )
