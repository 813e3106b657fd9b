"""Two models on the same windows: every number against plain forward passes without a cache."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import tiny_config, tiny_params, tiny_tokens

from jaxquant.calibrate.text import eval_windows, read_text
from jaxquant.errors import InputError, NonFiniteError, UsageError
from jaxquant.io import load_params
from jaxquant.models import Precision
from jaxquant.models.decoder import forward
from jaxquant.quant import ActivationGrid, Grid, quantize
from jaxquant.smoothness import (
    candidate_estimates,
    decoding_tree,
    gradient_comparison,
    smoothness_comparison,
    substitutions,
)

PROMPT = 18


@pytest.fixture(scope="module")
def reference():
    config = tiny_config("llama3")
    # Random models are undecided; sharper ones have trees and candidates to lose.
    params = jax.tree.map(jnp.asarray, tiny_params(config))
    return {**params, "head": 8 * params["head"]}, config


@pytest.fixture(scope="module")
def model(reference):
    def rounded(path, leaf):
        grid = Grid(bits=3, group_size=16)
        return quantize(leaf, grid).dequantize() if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(rounded, reference[0]), reference[1]


@pytest.fixture(scope="module")
def windows():
    return np.tile(np.asarray(tiny_tokens("llama3")), (2, 1))[:3]


@pytest.fixture(scope="module")
def compared(model, reference, windows):
    seen = []
    result = smoothness_comparison(
        model, reference, windows, jax.random.key(0), prompt=PROMPT,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(done, 9) for done in range(1, 10)]
    return result


@functools.partial(jax.jit, static_argnums=1)
def logits_of(params, config, tokens):
    return forward(params, config, tokens).logits


def probabilities(model, tokens) -> np.ndarray:
    logits = np.asarray(logits_of(*model, jnp.asarray(tokens)), np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@pytest.mark.slow
def test_candidates_of_all_positions(compared, model, reference, windows):
    p, q = (probabilities(own, windows) for own in (model, reference))
    ours, theirs = p >= 1e-3, q >= 1e-3
    both = (ours & theirs).sum(-1)
    expected = {
        "candidates": ours.sum(-1),
        "candidates_reference": theirs.sum(-1),
        "candidates_entropy": np.exp(-(p * np.log(p)).sum(-1)),
        "candidates_participation_reference": 1 / (q**2).sum(-1),
        "candidate_retention": both / theirs.sum(-1),
        "candidate_jaccard": both / (ours | theirs).sum(-1),
    }
    for name, values in expected.items():
        by_window = values.mean(1)
        found = compared.estimates[name]
        np.testing.assert_allclose(found.by_window, by_window, rtol=1e-4)
        assert found.mean == pytest.approx(by_window.mean(), rel=1e-4)
        assert found.stderr == pytest.approx(by_window.std(ddof=1) / 3**0.5, rel=1e-2)
    assert compared.estimates["candidate_retention"].mean < 0.95
    rarer = candidate_estimates(model, reference, windows, rule="min_p")["candidates"]
    assert rarer.mean == pytest.approx((p >= 0.05 * p.max(-1, keepdims=True)).sum(-1).mean(), rel=1e-4)


@pytest.mark.slow
def test_neighbourhoods_of_prompts(compared, model, reference, windows):
    shares = []
    for index, window in enumerate(windows):
        prompt = jnp.asarray(window[:PROMPT])
        texts = substitutions(reference[0]["embed"], prompt, jax.random.fold_in(jax.random.key(0), index))
        texts = jnp.concatenate([prompt[None], texts])
        ours, theirs = ((probabilities(own, texts)[:, -1] >= 1e-3).any(0) for own in (model, reference))
        shares.append((ours & theirs).sum() / theirs.sum())
        assert compared.estimates["neighborhood_candidates"].by_window[index] == ours.sum()
        assert compared.estimates["neighborhood_candidates_reference"].by_window[index] == theirs.sum()
    np.testing.assert_allclose(compared.estimates["neighborhood_retention"].by_window, shares, rtol=1e-6)


@pytest.mark.slow
def test_trees_are_those_of_whole_texts(compared, model, reference, windows):
    for index, (window, trees) in enumerate(zip(windows, compared.trees, strict=True)):
        for own, tree in zip((reference, model), trees, strict=True):

            def whole(paths, own=own, prompt=window[:PROMPT]):
                texts = np.concatenate([np.tile(prompt, (len(paths), 1)), paths], axis=1)
                return jax.nn.log_softmax(logits_of(*own, jnp.asarray(texts))[:, -1])

            expected = decoding_tree(whole)
            assert tree.nodes.keys() == expected.nodes.keys()
            np.testing.assert_allclose(list(tree.nodes.values()), list(expected.nodes.values()), atol=2e-4)
        found = {name: e.by_window[index] for name, e in compared.estimates.items()}
        both = trees[0].nodes.keys() & trees[1].nodes.keys()
        assert [found["tree_nodes_reference"], found["tree_nodes"]] == [tree.size for tree in trees]
        assert found["tree_shared"] == len(both)
        assert found["tree_retention"] == len(both) / trees[0].size
        assert found["tree_retention"] <= found["tree_likely"] <= 1


@pytest.mark.slow
def test_gradients_are_those_of_the_gradient_comparison(compared, model, reference, windows):
    gradients = gradient_comparison(model, reference, windows)
    for name in ("ratio", "cosine"):
        found = compared.estimates[f"gradient_{name}"]
        assert found.mean == pytest.approx(getattr(gradients, name), rel=1e-5)
        assert found.stderr == pytest.approx(getattr(gradients, f"{name}_stderr"), rel=1e-4)


def test_a_model_against_itself(reference, windows):
    result = smoothness_comparison(reference, reference, windows[:1], jax.random.key(1))
    for name, estimate in result.estimates.items():
        if name.endswith(("retention", "jaccard", "likely", "ratio", "cosine")):
            assert estimate.mean == pytest.approx(1, abs=1e-6), name
        assert np.isnan(estimate.stderr)
    assert result.estimates["tree_sparsity"].mean == 0
    assert result.estimates["candidates"].mean == result.estimates["candidates_reference"].mean


@pytest.mark.slow
def test_a_packed_cache_predicts_what_the_forward_pass_does(reference, windows):
    """Trees are grown behind a cache, whose keys and values are packed here."""
    params, config = reference
    coarse = dataclasses.replace(
        config, precision=Precision.uniform(ActivationGrid(bits=8), ActivationGrid(bits=4))
    )
    result = smoothness_comparison((params, coarse), reference, windows, jax.random.key(0), prompt=6)
    prompt = windows[0, :6]
    first = np.log(probabilities((params, coarse), prompt[None])[0, -1])
    tree = result.trees[0][1]
    for (token,) in tree.level(1):
        assert tree.nodes[(token,)] == pytest.approx(first[token], abs=1e-3)


@pytest.mark.slow
def test_windows_as_long_as_the_context(reference):
    windows = np.ones((1, reference[1].max_position), np.int32)
    result = smoothness_comparison(reference, reference, windows, jax.random.key(0), prompt=1000)
    assert result.estimates["tree_retention"].mean == 1


@pytest.mark.slow
def test_fewer_bits_leave_less_of_smollm2(smollm2):
    params, config = load_params(smollm2), smollm2.config
    windows = eval_windows(read_text("corpus:evaluation"), smollm2.tokenizer(), config, seqlen=96, limit=1)
    kept = []
    for bits in (8, 3):
        blocks = jax.tree_util.tree_map_with_path(
            lambda path, leaf, grid=Grid(bits=bits, group_size=64): (
                quantize(leaf, grid) if path[-1].key == "kernel" else leaf
            ),
            params["blocks"],
        )
        quantized = ({**params, "blocks": blocks}, config)
        found = smoothness_comparison(quantized, (params, config), windows, jax.random.key(0)).estimates
        names = ("gradient_cosine", "candidate_retention", "neighborhood_retention", "tree_retention")
        kept.append([found[name].mean for name in names])
    assert np.all(np.asarray(kept[0]) > 0.9)
    assert np.all(np.asarray(kept[1]) < 0.8)


def test_bad_input(model, reference, windows):
    params, config = reference
    with pytest.raises(InputError, match="outside the vocabulary"):
        smoothness_comparison(model, reference, windows + config.vocab_size, jax.random.key(0))
    broken = {**params, "norm": params["norm"].at[0].set(jnp.nan)}
    with pytest.raises(NonFiniteError, match="predictions for window 0 are not finite"):
        candidate_estimates((broken, config), reference, windows)
    small = {**params, "embed": params["embed"][:, :16]}
    with pytest.raises(UsageError, match="compare equal ones"):
        smoothness_comparison((small, config), reference, windows, jax.random.key(0))
