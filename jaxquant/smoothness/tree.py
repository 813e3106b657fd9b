"""The decoding tree: what a model would say next, and next, as far as it is likely enough (arXiv 2605.08894).

The paper reports a sparser tree of quantized models; its limits are not public, the formulas are ours.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax import lax

from jaxquant.errors import NonFiniteError, UsageError

#: Paths int32 `[n, l]` behind a prompt to log probabilities `[n, V]` of what follows; l is 0 at the root.
NextLogProbs = Callable[[np.ndarray], jax.Array]
Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    """The likely continuations of a prompt.

    Attributes:
      nodes: log probabilities of the paths, by length and then by token; the root is no node. The parent of a
        node is one too.
      width, depth: at most so many children of a node, and tokens of a path.
      limit: least probability of a path.
    """

    nodes: dict[Path, float]
    width: int
    depth: int
    limit: float

    @property
    def size(self) -> int:
        """T, the number of nodes."""
        return len(self.nodes)

    @property
    def branching(self) -> float:
        """`T^(1/depth)`."""
        return self.size ** (1 / self.depth)

    def level(self, length: int) -> list[Path]:
        """Paths of `length` tokens."""
        return [path for path in self.nodes if len(path) == length]


def decoding_tree(
    next_log_probs: NextLogProbs, *, width: int = 8, depth: int = 4, limit: float = 1e-4, batch: int = 64
) -> Tree:
    """The tree of a model, expanded by its own probabilities, level by level.

        a path of at most `depth` tokens is a node if its parent is, its last token is one of the `width` most
        probable there, and p(path) = prod p(token | those before) >= limit

    A level is one padded batch `[min(width^l, batch), l]`, or several where it has more nodes than `batch`:
    one program is compiled per level.

    Args:
      next_log_probs: the model behind a prompt, jitted by the caller, such as
        `lambda paths: forward(concatenate([prompt, paths]))[:, -1]`; rows must not depend on one another.
      width, depth, limit: see above; at most `1 / limit` nodes a level.
      batch: rows that are run at once.

    Raises:
      UsageError: an option out of range.
      NonFiniteError: a log probability is NaN.
    """
    if min(width, depth, batch) < 1 or not 0 < limit < 1:
        raise UsageError(
            f"decoding_tree: {width=}, {depth=} and {batch=} must be positive, {limit=} between 0 and 1"
        )
    nodes: dict[Path, float] = {(): 0.0}
    level: list[Path] = [()]
    for _ in range(depth):
        grown = {}
        for parents, log_probs in _expand(next_log_probs, level, width, batch):
            values, tokens = (np.asarray(a) for a in _largest(log_probs, min(width, log_probs.shape[1])))
            for parent, row, ids in zip(parents, values, tokens, strict=False):
                total = nodes[parent] + row.astype(np.float64)
                kept = total >= math.log(limit)
                grown |= {(*parent, int(t)): float(s) for t, s in zip(ids[kept], total[kept], strict=True)}
        level = sorted(grown)
        nodes |= {path: grown[path] for path in level}
    del nodes[()]
    return Tree(nodes=nodes, width=width, depth=depth, limit=limit)


def rescore(next_log_probs: NextLogProbs, tree: Tree, *, batch: int = 64) -> Tree:
    """The nodes of `tree` with the log probabilities that another model gives them, likely or not.

    The nodes that two trees share are among those that reach the limit here: only that a node is among the
    `width` best of its parent is not asked.
    """
    scores: dict[Path, float] = {(): 0.0}
    for length in range(tree.depth):
        children: dict[Path, list[int]] = {}
        for path in tree.level(length + 1):
            children.setdefault(path[:-1], []).append(path[-1])
        for parents, log_probs in _expand(next_log_probs, list(children), tree.width, batch):
            values = np.asarray(log_probs)
            for parent, row in zip(parents, values, strict=False):
                scores |= {(*parent, t): scores[parent] + float(row[t]) for t in children[parent]}
    return dataclasses.replace(tree, nodes={path: scores[path] for path in tree.nodes})


def shared_nodes(tree: Tree, other: Tree) -> frozenset[Path]:
    """Paths that are nodes of both."""
    return frozenset(tree.nodes.keys() & other.nodes.keys())


def tree_retention(tree: Tree, reference: Tree) -> float:
    """`|nodes in both| / |nodes of the reference|`, each tree expanded by its own model; 1 for no nodes.

    What counts is what the model would say by itself: a path of the reference that the model finds likely,
    but less so than `width` others, is lost. `rescore` tells how many of those there are.
    """
    return len(shared_nodes(tree, reference)) / reference.size if reference.size else 1.0


def sparsity(tree: Tree, reference: Tree) -> float:
    """`1 - T / T_reference`: how much smaller the tree is; negative where it is larger."""
    return 1 - tree.size / reference.size if reference.size else 0.0


def _expand(
    next_log_probs: NextLogProbs, level: list[Path], width: int, batch: int
) -> Iterator[tuple[list[Path], jax.Array]]:
    """Paths of one length, and what follows them; padding comes last."""
    if not level:
        return
    length = len(level[0])
    rows = min(width**length, batch)
    for start in range(0, len(level), rows):
        part = level[start : start + rows]
        paths = np.zeros((rows, length), np.int32)
        paths[: len(part)] = np.asarray(part, np.int32).reshape(len(part), length)
        log_probs = next_log_probs(paths)
        if np.isnan(np.asarray(log_probs[: len(part)]).max()):
            raise NonFiniteError(
                f"NaN among the log probabilities of level {length + 1}; the model's weights or activations "
                "overflow"
            )
        yield part, log_probs


@functools.partial(jax.jit, static_argnames="count")
def _largest(log_probs: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    return lax.top_k(log_probs, count)
