"""A model against its reference on the same text: gradients, candidates, neighbourhoods, decoding trees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.errors import NonFiniteError, UsageError
from jaxquant.evaluate.scoring import Progress, check_windows, head_only, over_tokens
from jaxquant.models import decoder
from jaxquant.models.cache import KVCache, init_cache
from jaxquant.models.config import ModelConfig
from jaxquant.models.decoder import Model
from jaxquant.smoothness.measure import gradient_comparison, stderr
from jaxquant.smoothness.neighborhood import (
    Rule,
    candidates,
    effective_numbers,
    jaccard,
    retention,
    substitutions,
    union,
)
from jaxquant.smoothness.tree import (
    NextLogProbs,
    Tree,
    decoding_tree,
    rescore,
    shared_nodes,
    sparsity,
    tree_retention,
)

# The last tokens of a prompt, one of which is replaced in a neighbour; tokens of a path behind it.
_LAST, _DEPTH = 16, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mean of a quantity over windows, its standard error (NaN for one), and the values of the windows.

    That of `gradient_ratio` is a ratio of means, as `GradientComparison` has it, not the mean of its windows.
    """

    mean: float
    stderr: float
    by_window: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Estimate:
        """The mean of one value a window."""
        own = np.asarray(values, np.float64)
        return cls(mean=float(own.mean()), stderr=stderr(own), by_window=tuple(own.tolist()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothnessComparison:
    """How a model reacts to a text, against how its reference does.

    Attributes:
      estimates: by name,
        `gradient_ratio`, `gradient_cosine`: see `GradientComparison`;
        what `candidate_estimates` finds;
        `neighborhood_retention`, `neighborhood_jaccard`, `neighborhood_candidates`, `.._reference`: of the
          candidates behind a prompt or any of its substitutions;
        `tree_retention`, `tree_sparsity`: see `smoothness.tree`; `tree_likely`: share of the reference's
          nodes whose path reaches the limit under the model, whatever its rank;
        `tree_nodes`, `tree_branching`, `.._reference`, and `tree_shared` nodes.
      trees: of every prompt, the reference's and the model's.
      prompt: tokens before each of them.
    """

    estimates: dict[str, Estimate]
    trees: tuple[tuple[Tree, Tree], ...]
    prompt: int


def smoothness_comparison(
    model: Model,
    reference: Model,
    windows: np.ndarray,
    key: jax.Array,
    *,
    prompt: int = 64,
    progress: Progress | None = None,
) -> SmoothnessComparison:
    """Everything this package measures of a model against a reference, window by window.

    Gradients and candidates are those at all positions of the windows, neighbourhoods (16 substitutions) and
    trees those behind the first `prompt` tokens of each. A token is a candidate where its probability is at
    least 1e-3. Gradients hold the logits of one window, all else at most 64 MB of them.

    Args:
      model: to be measured.
      reference: its original.
      windows: int32 `[n, T]`.
      key: of the substitutions, drawn once and given to both models.
      prompt: tokens, at most those of a window.
      progress: called after every window of each of the three passes.

    Raises:
      InputError: windows do not suit the models.
      UsageError: the embeddings of the two have nothing to do with one another, or a prompt below 2.
      NonFiniteError: a model gives NaN or infinity.
    """
    if prompt < 2:
        raise UsageError(f"prompt={prompt}: trees need at least 2 tokens before them")
    windows = check_windows(check_windows(windows, model[1]), reference[1])
    total = 3 * len(windows)

    def after(start: int) -> Progress:
        return lambda done, _: None if progress is None else progress(start + done, total)

    gradients = gradient_comparison(model, reference, windows, progress=after(0))
    norms = np.asarray(gradients.norms) / np.maximum(gradients.reference_norms, 1e-300)
    found = {
        "gradient_ratio": Estimate(
            mean=gradients.ratio, stderr=gradients.ratio_stderr, by_window=tuple(norms.tolist())
        ),
        "gradient_cosine": Estimate.of(gradients.cosines),
    }
    found |= candidate_estimates(model, reference, windows, progress=after(len(windows)))
    longest = min(config.max_position for _, config in (model, reference)) - _DEPTH
    prompt = min(prompt, windows.shape[1], longest)
    rows, trees = [], []
    for index, window in enumerate(windows):
        own, pair = _behind_prompt(model, reference, window[:prompt], jax.random.fold_in(key, index))
        rows.append(own)
        trees.append(pair)
        after(2 * len(windows))(index + 1, total)
    found |= _by_window(rows)
    return SmoothnessComparison(estimates=found, trees=tuple(trees), prompt=prompt)


def candidate_estimates(
    model: Model,
    reference: Model,
    windows: np.ndarray,
    *,
    rule: Rule = "eps",
    progress: Progress | None = None,
) -> dict[str, Estimate]:
    """Candidates of a model and of its reference at all positions of `windows` int32 `[n, T]`.

    Returns:
      `candidate_retention` and `candidate_jaccard` of the two sets of a position; `candidates` by `rule`,
      `candidates_entropy` and `candidates_participation` (see `effective_numbers`), the same of the reference
      as `.._reference`. Means over positions, then over windows.

    Raises:
      InputError: windows do not suit the models.
      NonFiniteError: a model gives NaN or infinity.
    """
    windows = check_windows(check_windows(windows, model[1]), reference[1])
    rows = []
    for index, window in enumerate(windows):
        means = _candidates_of(model[0], reference[0], model[1], reference[1], window, rule=rule)
        rows.append({name: float(value) for name, value in means.items()})
        if not np.isfinite(list(rows[-1].values())).all():
            raise NonFiniteError(
                f"the predictions for window {index} are not finite; the weights or activations of a model "
                "overflow"
            )
        if progress is not None:
            progress(index + 1, len(windows))
    return _by_window(rows)


def _by_window(rows: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    return {name: Estimate.of([row[name] for row in rows]) for name in rows[0]}


@functools.partial(jax.jit, static_argnames=("config", "reference_config", "rule"))
def _candidates_of(
    params: dict[str, Any],
    reference_params: dict[str, Any],
    config: ModelConfig,
    reference_config: ModelConfig,
    window: jax.Array,
    *,
    rule: Rule,
) -> dict[str, jax.Array]:
    """Means over the positions of a window `[T]`."""
    pair = ((params, config), (reference_params, reference_config))
    hidden = [decoder.final_hidden(own, c, window[None])[0][0] for own, c in pair]
    heads = [head_only(own, c) for own, c in pair]

    def score(*hidden: jax.Array) -> dict[str, jax.Array]:
        logits = [decoder.logits(h, c, x) for h, (_, c), x in zip(heads, pair, hidden, strict=True)]
        ours, theirs = (candidates(z, rule=rule) for z in logits)
        found = {
            "candidate_retention": retention(ours, theirs),
            "candidate_jaccard": jaccard(ours, theirs),
        }
        for name, mask, z in (("", ours, logits[0]), ("_reference", theirs, logits[1])):
            entropy, participation = effective_numbers(z)
            found |= {
                f"candidates{name}": jnp.sum(mask, axis=-1).astype(jnp.float32),
                f"candidates_entropy{name}": entropy,
                f"candidates_participation{name}": participation,
            }
        return found

    return jax.tree.map(jnp.mean, over_tokens(score, config.vocab_size, *hidden))


def _behind_prompt(
    model: Model, reference: Model, prompt: np.ndarray, key: jax.Array
) -> tuple[dict[str, float], tuple[Tree, Tree]]:
    """What is measured of neighbourhood and tree, and the trees of reference and model."""
    texts = substitutions(reference[0]["embed"], jnp.asarray(prompt), key, last=_LAST)
    texts = np.concatenate([prompt[None], np.asarray(texts)])
    kept = max(len(prompt) - _LAST, 0)
    ours, theirs = (_Read.of(own, prompt) for own in (model, reference))
    sets = [union(candidates(read.next(kept, texts[:, kept:]))) for read in (ours, theirs)]
    tree, other = (decoding_tree(read.behind, depth=_DEPTH) for read in (ours, theirs))
    likely = np.asarray(list(rescore(ours.behind, other).nodes.values())) >= np.log(other.limit)
    return {
        "neighborhood_retention": float(retention(*sets)),
        "neighborhood_jaccard": float(jaccard(*sets)),
        "neighborhood_candidates": float(jnp.sum(sets[0])),
        "neighborhood_candidates_reference": float(jnp.sum(sets[1])),
        "tree_retention": tree_retention(tree, other),
        "tree_likely": float(likely.mean()) if other.size else 1.0,
        "tree_sparsity": sparsity(tree, other),
        "tree_nodes": tree.size,
        "tree_nodes_reference": other.size,
        "tree_shared": len(shared_nodes(tree, other)),
        "tree_branching": tree.branching,
        "tree_branching_reference": other.branching,
    }, (other, tree)


@dataclasses.dataclass(frozen=True)
class _Read:
    """A prompt that a model has read: what it predicts behind a part of it and other tokens."""

    model: Model
    prompt: np.ndarray
    cache: KVCache

    @classmethod
    def of(cls, model: Model, prompt: np.ndarray) -> _Read:
        params, config = model
        cache = init_cache(config, 1, len(prompt) + _DEPTH)
        return cls(model, prompt, _read(params, config, prompt[None, :-1], cache))

    def next(self, kept: int, tokens: np.ndarray) -> jax.Array:
        """Log probabilities `[n, V]` behind `kept` tokens of the prompt and `tokens` `[n, l]`, l > 0."""
        return _next(*self.model, tokens, self.cache, jnp.int32(kept))

    @property
    def behind(self) -> NextLogProbs:
        """Log probabilities behind the prompt and paths `[n, l]`."""
        last = len(self.prompt) - 1
        return lambda paths: self.next(last, np.insert(paths, 0, self.prompt[last], axis=1))


@functools.partial(jax.jit, static_argnames="config")
def _read(params: dict[str, Any], config: ModelConfig, tokens: jax.Array, cache: KVCache) -> KVCache:
    _, filled = decoder.final_hidden(params, config, tokens, cache=cache)
    assert filled is not None
    return filled


@functools.partial(jax.jit, static_argnames="config")
def _next(
    params: dict[str, Any], config: ModelConfig, tokens: jax.Array, cache: KVCache, kept: jax.Array
) -> jax.Array:
    # What is behind `kept` is masked, and overwritten.
    k, v = jax.tree.map(lambda leaf: jnp.repeat(leaf, len(tokens), axis=1), (cache.k, cache.v))
    hidden, _ = decoder.final_hidden(params, config, tokens, cache=KVCache(k=k, v=v, length=kept))
    return jax.nn.log_softmax(decoder.logits(params, config, hidden[:, -1]))
