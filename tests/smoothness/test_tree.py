"""Decoding trees of Markov chains, against a recursive reference."""

from __future__ import annotations

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxquant.errors import NonFiniteError, UsageError
from jaxquant.smoothness import decoding_tree, rescore, shared_nodes, sparsity, tree_retention

V, START = 12, 5


class Markov:
    """A chain behind a prompt that ends with `START`; remembers the shapes it was asked for."""

    def __init__(self, seed: int, concentration: float = 0.3):
        rng = np.random.default_rng(seed)
        self.p = rng.dirichlet(np.full(V, concentration), V) + 1e-9
        self.log_p = np.log(self.p).astype(np.float32)
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, paths: np.ndarray):
        self.shapes.append(paths.shape)
        last = paths[:, -1] if paths.shape[1] else np.full(len(paths), START)
        return jnp.asarray(self.log_p[last])


def recursive(p, width, depth, limit, last=START, path=(), mass=1.0):
    if len(path) == depth:
        return {}
    nodes = {}
    for v in np.argsort(-p[last])[:width]:
        if (q := mass * p[last, v]) >= limit:
            nodes |= {(*path, int(v)): q}
            nodes |= recursive(p, width, depth, limit, v, (*path, int(v)), q)
    return nodes


@pytest.mark.parametrize(
    ("width", "depth", "limit"), [(8, 4, 1e-4), (3, 5, 1e-3), (20, 3, 1e-2), (1, 4, 0.1)]
)
@pytest.mark.parametrize("seed", range(3))
def test_trees_are_those_of_the_recursion(seed, width, depth, limit):
    chain = Markov(seed)
    tree = decoding_tree(chain, width=width, depth=depth, limit=limit, batch=16)
    expected = recursive(chain.p, width, depth, limit)
    assert tree.nodes.keys() == expected.keys()
    np.testing.assert_allclose([np.exp(tree.nodes[n]) for n in expected], list(expected.values()), rtol=1e-5)
    assert list(tree.nodes) == sorted(tree.nodes, key=lambda path: (len(path), path))
    assert tree.size == len(expected)
    assert tree.branching == pytest.approx(len(expected) ** (1 / depth))
    assert sum(len(tree.level(length)) for length in range(1, depth + 1)) == tree.size
    # A level has one shape, and none is larger than a batch.
    assert len(set(chain.shapes)) <= depth
    assert max(rows for rows, _ in chain.shapes) <= 16


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from([1, 3, 6, V]))
def test_two_trees(seed, other, width):
    a, b = (Markov(s, 0.5) for s in (seed, other))
    ours, theirs = (decoding_tree(chain, width=width, depth=3, limit=1e-2) for chain in (a, b))
    both = shared_nodes(ours, theirs)
    assert both == frozenset(recursive(a.p, width, 3, 1e-2)) & frozenset(recursive(b.p, width, 3, 1e-2))
    assert tree_retention(ours, theirs) == pytest.approx(len(both) / max(theirs.size, 1))
    assert sparsity(ours, theirs) == pytest.approx(1 - ours.size / max(theirs.size, 1))
    # What the model would say itself it finds likely, too.
    likely = {path for path, score in rescore(a, theirs).nodes.items() if score >= np.log(1e-2)}
    assert both <= likely
    if width >= V:
        assert both == likely


def test_a_tree_against_itself():
    chain = Markov(0)
    tree = decoding_tree(chain)
    assert tree_retention(tree, tree) == 1
    assert sparsity(tree, tree) == 0
    assert rescore(chain, tree, batch=7).nodes == tree.nodes


def test_a_model_that_knows_nothing():
    even = decoding_tree(lambda paths: jnp.full((len(paths), 1000), -np.log(1000.0)), depth=2)
    assert even.size == 8  # all of the first level, nothing of the second
    nothing = decoding_tree(lambda paths: jnp.full((len(paths), 10**5), -np.log(1e5)))
    assert nothing.size == 0
    assert tree_retention(even, nothing) == 1
    assert sparsity(even, nothing) == 0


def test_impossible_trees():
    with pytest.raises(UsageError, match="width=0, depth=4 and batch=64 must be positive"):
        decoding_tree(Markov(0), width=0)
    with pytest.raises(UsageError, match="limit=0 between 0 and 1"):
        decoding_tree(Markov(0), limit=0)
    with pytest.raises(NonFiniteError, match="log probabilities of level 1"):
        decoding_tree(lambda paths: jnp.full((len(paths), 9), jnp.nan))
