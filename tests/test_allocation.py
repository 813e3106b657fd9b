"""From a table to a recipe, and from texts to a table."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxquant.allocation import Texts, allocation, measure
from jaxquant.errors import InputError, UsageError
from jaxquant.io import open_model
from jaxquant.named import named
from jaxquant.quant import Grid
from jaxquant.recipe import read_toml, to_toml
from jaxquant.sensitivity import Sensitivity

RECIPES = {bits: named("gptq", Grid(bits=bits, group_size=32, clip="mse")) for bits in (2, 3, 4)}
FALL = 4.0 ** -np.arange(3)


def table(units: tuple[str, ...], task: list[float], general: list[float], tasks=("t",)) -> Sensitivity:
    losses = {"t": np.outer(task, FALL), "g": np.outer(general, FALL)}
    sizes = np.full(len(units), 1000)
    return Sensitivity(
        units=units,
        bits=(2, 3, 4),
        sizes=sizes,
        costs=np.outer(sizes, [3, 4, 5]),
        nll={name: loss / 2 for name, loss in losses.items()},
        kl=losses,
        kl_stderr={name: loss / 10 for name, loss in losses.items()},
        facts={
            "recipes": {str(bits): recipe.to_dict() for bits, recipe in RECIPES.items()},
            "calibration": {"tasks": list(tasks)},
        },
    )


BLOCKS = tuple(f"blocks.{i}" for i in range(4))


def test_bits_go_where_the_weighted_loss_is():
    found = table(BLOCKS, task=[9, 1, 1, 1], general=[1, 1, 1, 9])
    assert allocation(found, 4.0, beta=1).bits[0] == 4
    assert allocation(found, 4.0, beta=0).bits[3] == 4
    balanced = allocation(found, 4.0, beta=0.5)
    assert balanced.bits[0] == balanced.bits[3]
    assert balanced.effective_bits <= 4.0
    assert (balanced.task, balanced.general) == (("t",), ("g",))


def test_what_is_predicted_is_the_sum_over_units():
    found = allocation(table(BLOCKS, task=[4, 3, 2, 1], general=[1, 1, 1, 1]), 5.0)
    assert found.bits == [4, 4, 4, 4]
    assert found.predicted("kl", "t") == pytest.approx(10 / 16)
    assert found.predicted("nll", "g") == pytest.approx(4 / 32)


def test_domains_of_one_kind_count_equally_whatever_their_size():
    found = table(BLOCKS, task=[1] * 4, general=[1] * 4, tasks=("t", "u"))
    for losses in (found.kl, found.nll):
        losses["t"], losses["u"] = np.outer([9, 1, 1, 1], FALL), np.outer([0.01, 0.01, 0.01, 0.09], FALL)
    chosen = allocation(found, 4.0, beta=1)
    assert chosen.bits[0] == chosen.bits[3] > chosen.bits[1]


def test_both_kinds_of_domains_are_needed():
    with pytest.raises(UsageError, match="domains t, g: a task and a general text are needed"):
        allocation(table(BLOCKS, task=[1] * 4, general=[1] * 4, tasks=()), 4.0)


def test_the_recipe_has_the_bits_of_every_block(tmp_path):
    found = allocation(table(BLOCKS, task=[9, 0.01, 3, 3], general=[9, 0.01, 3, 3]), 4.0)
    assert found.bits == [4, 2, 3, 3]
    recipe = found.recipe()
    assert {pattern for pattern, _ in recipe.rules} == {r"^blocks\.(0)\.", r"^blocks\.(1)\."}
    for block, bits in enumerate(found.bits):
        assert recipe.at(f"blocks.{block}.mlp.down").grid.bits == bits
    assert recipe.at("blocks.10.mlp.down").grid.bits == 3  # "blocks.1" is not its beginning
    (tmp_path / "r.toml").write_text(to_toml(recipe))
    assert read_toml(tmp_path / "r.toml") == recipe


def test_the_recipe_has_the_bits_of_every_linear():
    units = tuple(f"{block}.{path}" for block in BLOCKS for path in ("attn.q", "mlp.up"))
    found = allocation(table(units, task=[9, 1, 1, 9, 1, 1, 9, 9], general=[1] * 8), 4.0, beta=1)
    recipe = found.recipe()
    for unit, bits in zip(units, found.bits, strict=True):
        assert recipe.at(unit).grid.bits == bits


def test_bad_budgets_and_options():
    found = table(BLOCKS, task=[1] * 4, general=[1] * 4)
    with pytest.raises(UsageError, match=r"budget=2\.5 .* cannot be met; these widths take 3 to 5"):
        allocation(found, 2.5)
    with pytest.raises(UsageError, match="unknown metric 'ppl'; use kl or nll"):
        allocation(found, 4.0, metric="ppl")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="beta=2 is out of range"):
        allocation(found, 4.0, beta=2)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "sums.jsonl"
    texts = [{"question": f"What is {i} and {i}?", "answer": f"Twice {i}.\n#### {2 * i}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


def test_measured_rows_do_not_calibrate(rows):
    source = open_model("tiny")
    domain, measured, rest = Texts(name="gsm8k", source=str(rows), task=True).parts(source, items=6)
    assert len(domain.tokens) == 6
    assert measured.count("Question:") == 6
    assert rest.count("Question:") == 34
    assert "What is 5 and 5?" in measured
    assert "What is 5 and 5?" not in rest
    decoded = source.tokenizer().decode(domain.tokens[3][domain.scored[3]].tolist())
    assert decoded.strip() == "Twice 3.\n#### 6"
    text, measured, rest = Texts(name="corpus", source="corpus", task=False).parts(source, items=6)
    assert text.tokens.shape == (6, 128)
    assert rest not in measured
    with pytest.raises(InputError, match="40 rows, of which 40 are measured; give a longer file"):
        Texts(name="gsm8k", source=str(rows), task=True).parts(source, items=40)


def test_long_rows_calibrate(rows):
    rows.write_text(
        json.dumps({"question": "word " * 300, "answer": "long\n#### 1"}) + "\n" + rows.read_text()
    )
    parts = Texts(name="gsm8k", source=str(rows), task=True).parts(open_model("tiny"), items=6)
    domain, measured, rest = parts
    assert len(domain.tokens) == measured.count("Question:") == 6
    assert "word word" in rest


def test_domains_must_be_two_of_different_names(tmp_path):
    source, text = open_model("tiny"), Texts(name="a", source="corpus", task=False)
    other = Texts(name="b", source="corpus", task=False)
    for texts in ([text], [text, text], [text, other], []):
        with pytest.raises(UsageError, match="give a task and a general text, of different names"):
            measure(source, RECIPES, texts, tmp_path / "t.json")
