"""The table of losses: its cells are those of models that were quantized by hand."""

from __future__ import annotations

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, MemorySource, run

from jaxquant.calibrate.collect import embed_all, model_moments
from jaxquant.errors import InputError, NonFiniteError, UsageError
from jaxquant.evaluate.probe import Domain, Probe
from jaxquant.evaluate.task_data import Item
from jaxquant.methods import Problem
from jaxquant.models.init import init_params
from jaxquant.named import named
from jaxquant.quant import Grid, QArray
from jaxquant.recipe import chain
from jaxquant.sensitivity import measure_sensitivity, read_sensitivity, stored_bits, units_of
from jaxquant.stages import GPTQ, GroupBits

RECIPES = {bits: named("rtn", Grid(bits=bits, group_size=16)) for bits in (2, 4)}
FEEDBACK = {bits: named("gptq", Grid(bits=bits, group_size=16)) for bits in (2, 4)}


@pytest.fixture(scope="module")
def source():
    return MemorySource(init_params(jax.random.key(0), CONFIG))


@pytest.fixture(scope="module")
def tokens():
    return np.asarray(jax.random.randint(jax.random.key(1), (4, 12), 0, 64), np.int32)


@pytest.fixture(scope="module")
def domains(tokens):
    items = [Item(contexts=(f"w{i} w2",), continuations=(" w3" * (i + 1),), gold=0) for i in range(1, 4)]
    # Words without spaces between: a context and its continuation are tokens of their own.
    task = Domain.of_items(items, WORDS, CONFIG)
    return {"task": task, "text": Domain.of_windows(tokens)}


class _Words:
    """Splits at spaces."""

    truncation = padding = None

    def encode(self, text, add_special_tokens=False):
        return types.SimpleNamespace(ids=[int(word[1:]) for word in text.split()])


WORDS = _Words()


@pytest.fixture(scope="module")
def moments(source, tokens):
    return model_moments(source.params, CONFIG, tokens)


@pytest.fixture(scope="module")
def table(source, moments, domains, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "t.json"
    return measure_sensitivity(source, FEEDBACK, moments, domains, path, unit="linear"), path


def replaced(source, moments, recipe, block, linears):
    """The model with some linears of a block rounded."""
    blocks = jax.tree.map(lambda leaf: leaf, source.params["blocks"])
    taps = {"attn.q": "attn_in", "attn.k": "attn_in", "attn.v": "attn_in", "attn.o": "attn_out",
            "mlp.gate": "mlp_in", "mlp.up": "mlp_in", "mlp.down": "mlp_hidden"}  # fmt: skip
    for path in linears or taps:
        part, name = path.split(".")
        kernel = blocks[part][name]["kernel"]
        own = jax.tree.map(lambda leaf: leaf[block], moments[taps[path]])
        values = recipe(Problem.of(kernel[block], own, recipe.grid)).pack().dequantize()
        blocks[part][name] = {"kernel": kernel.at[block].set(values)}
    return {**source.params, "blocks": blocks}


def losses(params, original, domain):
    """By token, of whole logits."""
    ours, theirs = (jax.nn.log_softmax(run(p, CONFIG, domain.tokens).logits) for p in (params, original))
    text, place = np.nonzero(domain.scored)
    ours, theirs = (np.asarray(a, np.float64)[text, place - 1] for a in (ours, theirs))
    at = np.arange(len(text)), domain.tokens[text, place]
    return text, theirs[at] - ours[at], np.sum(np.exp(theirs) * (theirs - ours), axis=-1)


@pytest.mark.parametrize(("unit", "column"), [("blocks.1.mlp.down", 0), ("blocks.2.attn.q", 1)])
def test_cells_are_losses_with_one_linear_rounded(unit, column, source, moments, domains, table):
    found, _ = table
    _, block, linear = unit.split(".", 2)
    params = replaced(source, moments, FEEDBACK[found.bits[column]], int(block), [linear])
    for name, domain in domains.items():
        _, nll, kl = losses(params, source.params, domain)
        row = found.units.index(unit)
        assert found.nll[name][row, column] == pytest.approx(nll.mean(), abs=1e-5)
        assert found.kl[name][row, column] == pytest.approx(kl.mean(), rel=1e-3, abs=1e-6)


def test_blocks_are_rounded_whole(source, moments, domains, tmp_path):
    found = measure_sensitivity(source, RECIPES, moments, domains, tmp_path / "t.json")
    assert found.units == ("blocks.0", "blocks.1", "blocks.2")
    params = replaced(source, moments, RECIPES[2], 0, None)
    text, nll, kl = losses(params, source.params, domains["task"])
    assert found.nll["task"][0, 0] == pytest.approx(nll.mean(), abs=1e-5)
    assert found.kl["task"][0, 0] == pytest.approx(kl.mean(), rel=1e-3)
    # The error of a ratio of sums over texts, by its linearization.
    apart = [np.sum(kl[text == t] - kl.mean()) / (len(text) / 3) for t in range(3)]
    assert found.kl_stderr["task"][0, 0] == pytest.approx(np.std(apart, ddof=1) / 3**0.5, rel=1e-3)
    sizes = sum(np.prod(CONFIG.linear_shape(path)) for path in ("attn.q", "attn.k", "attn.v", "attn.o",
                "mlp.gate", "mlp.up", "mlp.down"))  # fmt: skip
    np.testing.assert_array_equal(found.sizes, sizes)
    np.testing.assert_array_equal(found.costs, np.outer([sizes] * 3, [4, 6]))


def test_costs_are_the_bytes_of_the_packed_linears(source, moments):
    grid = Grid(bits=3, group_size=16)
    recipes = {
        "dynamic": chain(GPTQ(groups="dynamic"), grid=grid),
        "group bits": chain(GroupBits(shares=(0.5,)), GPTQ(), grid=grid),
    }
    for recipe in recipes.values():
        sizes, costs = stored_bits(CONFIG, {3: recipe}, ["blocks.1.mlp.down"])
        seen = jax.tree.map(lambda leaf: leaf[1], moments["mlp_hidden"])
        kernel = source.params["blocks"]["mlp"]["down"]["kernel"][1]
        packed = recipe(Problem.of(kernel, seen, grid)).pack()
        assert sizes == kernel.size
        # Where no swap pays, the order of the 3 groups is not stored.
        spared = recipe.mixes_groups and isinstance(packed, QArray)
        assert costs[0, 0] == 8 * (packed.nbytes + 4 * 3 * spared)


def test_a_probe_measures_whole_models_by_token(source, moments, domains):
    params = replaced(source, moments, RECIPES[2], 0, None)
    params = replaced(MemorySource(params), moments, RECIPES[2], 2, None)
    first = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    for domain in domains.values():
        probe = Probe.of(source.params, CONFIG, domain)
        state = embed_all(params, CONFIG, domain.tokens)
        text, nll, kl = losses(params, source.params, domain)
        np.testing.assert_array_equal(probe.text, text)
        found = probe.by_token(params, CONFIG, first, state, 0)
        np.testing.assert_allclose(found, [nll, kl], rtol=1e-3, atol=2e-5)


def test_an_interrupted_table_goes_on(source, moments, domains, table, tmp_path):
    whole, path = table
    stored = json.loads(path.read_text())
    for unit in list(stored["cells"])[9:]:
        del stored["cells"][unit]
    stored["cells"]["blocks.0.attn.q"]["2"]["text"]["kl"] = 7.0
    (tmp_path / "t.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"t\.json lacks blocks\.1\.attn\.v at 2 bits and 23 more; finish"):
        read_sensitivity(tmp_path / "t.json", source)
    done = []
    found = measure_sensitivity(
        source, FEEDBACK, moments, domains, tmp_path / "t.json", unit="linear",
        on_cell=lambda *cell: done.append(cell),
    )  # fmt: skip
    assert done[-1] == (42, 42)
    assert found.kl["text"][0, 0] == 7.0  # what is there is not measured again
    np.testing.assert_array_equal(found.kl["text"].ravel()[1:], whole.kl["text"].ravel()[1:])


def test_a_table_of_something_else_is_refused(source, moments, domains, table, tmp_path):
    _, path = table
    other = MemorySource(init_params(jax.random.key(5), CONFIG))
    with pytest.raises(InputError, match="is a table of memory, not of memory; give the model"):
        read_sensitivity(path, other)
    with pytest.raises(InputError, match="was measured with a different model; give the same"):
        measure_sensitivity(other, FEEDBACK, moments, domains, path, unit="linear")
    with pytest.raises(InputError, match="was measured with a different recipe;"):
        measure_sensitivity(source, RECIPES, moments, domains, path, unit="linear")
    with pytest.raises(InputError, match="was measured with a different unit"):
        measure_sensitivity(source, FEEDBACK, moments, domains, path)
    (tmp_path / "notes.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match=r"notes\.json is no sensitivity table"):
        read_sensitivity(tmp_path / "notes.json", source)
    with pytest.raises(InputError, match="no such table; measure one first"):
        read_sensitivity(tmp_path / "none.json", source)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"broken\.json cannot be read"):
        read_sensitivity(tmp_path / "broken.json", source)


def test_bad_input(source, moments, domains, tmp_path):
    path = tmp_path / "t.json"
    with pytest.raises(UsageError, match="unknown unit 'layer'; use block or linear"):
        measure_sensitivity(source, RECIPES, moments, domains, path, unit="layer")
    with pytest.raises(UsageError, match="a domain and a recipe at least"):
        measure_sensitivity(source, RECIPES, moments, {}, path)
    with pytest.raises(UsageError, match="does more than round linears"):
        measure_sensitivity(source, {3: named("awq-rtn", Grid(bits=3))}, moments, domains, path)
    assert not path.exists()
    blocks = jax.tree.map(lambda leaf: leaf, source.params["blocks"])
    blocks["mlp_norm"] = blocks["mlp_norm"].at[1, 3].set(jnp.nan)
    broken = MemorySource({**source.params, "blocks": blocks})
    with pytest.raises(NonFiniteError, match=r"blocks\.0 at 2 bits: the loss on task is not finite"):
        measure_sensitivity(broken, RECIPES, moments, domains, path)


def test_domains():
    items = [Item(contexts=("w1 w2",), continuations=(" w3 w4",), gold=0),
             Item(contexts=("w9", "w5"), continuations=(" w6", " w7"), gold=1)]  # fmt: skip
    domain = Domain.of_items(items, WORDS, CONFIG)
    np.testing.assert_array_equal(domain.tokens, [[1, 2, 3, 4], [5, 7, 0, 0]])
    np.testing.assert_array_equal(domain.scored, [[0, 0, 1, 1], [0, 1, 0, 0]])
    assert len(Domain.of_items(items, WORDS, CONFIG, longest=3).tokens) == 1
    with pytest.raises(InputError, match="none of 2 items has at most 1 tokens"):
        Domain.of_items(items, WORDS, CONFIG, longest=1)
    assert units_of(CONFIG, "linear")[7] == "blocks.1.attn.q"
