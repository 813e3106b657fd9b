from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
from report_samples import Page
from small_model import CONFIG, MemorySource

from jaxquant.allocation import allocation, write_recipe
from jaxquant.io.checkpoint import PATHS
from jaxquant.named import named
from jaxquant.quant import Grid
from jaxquant.report import terminal, write_allocation
from jaxquant.sensitivity import FORMAT, read_sensitivity, units_of

WIDTHS = (2, 3, 4)
# Nothing here is computed with the weights; the name asks to be escaped.
SOURCE = MemorySource({"embed": jnp.zeros((64, 32))})
SOURCE.name = "<b>memory</b>"


def write_table(path, unit, *, kl=None):
    rng = np.random.default_rng(0)

    def cell(bits):
        value = 0.3 * 5.0**-bits * rng.lognormal() if kl is None else kl
        return {"nll": value, "kl": value, "kl_stderr": value / 10}

    table = {
        "format": FORMAT,
        "model": {"name": SOURCE.name, "fingerprint": SOURCE.fingerprint()},
        "recipes": {str(b): named("gptq", Grid(bits=b, group_size=16)).to_dict() for b in WIDTHS},
        "domains": {name: {"texts": 64, "scored": 7421} for name in ("gsm8k", "wiki & co")},
        "unit": unit,
        "calibration": {
            "tasks": ["gsm8k"], "seed": 7,
            "windows": {name: {"samples": 16, "seqlen": 512} for name in ("gsm8k", "wiki & co")},
        },
        "notes": {
            "texts": {"gsm8k": "train.jsonl", "wiki & co": "wiki.raw"},
            "shares": {"gsm8k": 0.25, "wiki & co": 0.75},
        },
        "cells": {
            name: {str(b): {domain: cell(b) for domain in ("gsm8k", "wiki & co")} for b in WIDTHS}
            for name in units_of(CONFIG, unit)
        },
    }  # fmt: skip
    path.write_text(json.dumps(table))
    return path


@pytest.fixture(scope="module", params=["block", "linear"])
def made(request, tmp_path_factory):
    """The result of `write_recipe`, the allocation, and the page."""
    folder = tmp_path_factory.mktemp("allocation")
    table = write_table(folder / "mixed.table.json", request.param)
    result = write_recipe(SOURCE, table, folder / "mixed.toml", budget=5.1, beta=0.7, metric="kl")
    assert result["page"] == str(folder / "mixed.html")
    found = allocation(read_sensitivity(table, SOURCE), 5.1)
    assert len(set(found.bits)) > 1
    return result, found, (folder / "mixed.html").read_text(encoding="utf-8")


def test_page_parses_and_requests_nothing(made):
    page = made[2]
    tags = Page(page).tags
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags
    assert not [tag for tag, _ in tags if tag in ("script", "link", "iframe", "img", "object")]
    assert not [attrs for _, attrs in tags if {"src", "href", "srcset", "xlink:href"} & attrs.keys()]
    assert not re.findall(r"https?:|url\(|@import|\bnan\b|\binf\b|None", page)
    assert "<b>memory" not in page


def test_pictures_are_well_formed_and_describe_themselves(made):
    _, found, page = made
    pictures = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    linears = found.table.facts["unit"] == "linear"
    assert len(pictures) == (2 * len(PATHS) + 1 if linears else 2)
    assert all(len(picture.attrib["aria-label"]) > 20 for picture in pictures)
    for picture in pictures:
        width, height = map(float, picture.attrib["viewBox"].split()[2:])
        for mark in picture.iter():
            assert 0 <= float(mark.get("x", mark.get("cx", 0))) <= width
            assert 0 <= float(mark.get("y", mark.get("cy", 0))) <= height


def test_page_tells_what_was_decided(made):
    result, found, page = made
    text = Page(page).text
    tau = result["tau"]
    for fact in (
        SOURCE.name, result["recipe"], result["table"], f"{result['effective_bits']:.3f}", "budget of 5.1",
        *(f"{loss:#.3g}nats of KL a token on {name}" for name, loss in result["predicted"].items()),
        f"{tau['tau']:.2f}Kendall\u2019s tau", f"at 2 bits ({tau['low']:.2f} to {tau['high']:.2f})",
        "25 %of the calibration is gsm8k", "75 %of the calibration is wiki & co", "weight of 0.7",
        "Task gsm8k64 texts, 7,421 scored tokens of train.jsonl", "Text wiki & co", "seed 7", "W3 g16",
        f"{found.bits.count(3)} at 3",
    ):  # fmt: skip
        assert fact in text


def test_table_has_a_row_for_every_unit(made):
    _, found, page = made
    table = found.table
    body = re.search(r"<tbody>(.*)</tbody>", page, re.DOTALL).group(1)
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in body.split("<tr>")[1:]]
    assert re.findall(r"</i>(.*?)</th>", body) == list(table.units)
    for unit, (size, bits, effective, *losses, s) in enumerate(rows):
        column = found.choice[unit]
        assert int(size.replace(",", "")) == table.sizes[unit]
        assert int(bits) == table.bits[column]
        assert float(effective) == pytest.approx(table.costs[unit, column] / table.sizes[unit], abs=6e-4)
        for loss, (domain, kl) in zip(losses, table.kl.items(), strict=True):
            value, error = loss.split(" \u00b1 ")
            assert float(value) == pytest.approx(kl[unit, column], rel=6e-3)
            assert float(error) == pytest.approx(table.kl_stderr[domain][unit, column], rel=0.5)
        assert float(s) == pytest.approx(found.sensitivity[unit, column], rel=6e-3)


def test_every_width_is_a_dot_and_the_one_that_a_unit_got_is_filled(made):
    _, found, page = made
    table = found.table
    dots = re.findall(r'<circle class="dot( open)? c\d" cx="[\d.]+" cy="([\d.]+)".*?<title>(.*?)<', page)
    assert len(dots) == 2 * table.kl["gsm8k"].size
    got = dict(zip(table.units, found.bits, strict=True))
    for style, _, title in dots:
        unit, bits = re.match(r"(\S+) at (\d) bits", title).groups()
        assert (style == "") == (got[unit] == int(bits))
    # One log scale for all pictures: equal ratios are equal distances.
    heights = [float(y) for _, y, _ in dots]
    exponents = np.log10([float(re.search(r": (\S+)", title).group(1)) for *_, title in dots])
    line = np.polyfit(exponents, heights, 1)
    assert line[0] < 0
    np.testing.assert_allclose(np.polyval(line, exponents), heights, atol=0.3)


def test_bars_are_proportional_and_cells_are_labelled(made):
    _, found, page = made
    got = dict(zip(found.table.units, found.bits, strict=True))
    shape = r'<rect class="(bar|cell) (c\d)".*? height="([\d.]+)"><title>(\S+): (\d) bits<'
    rectangles = re.findall(shape, page)
    bars = [row for row in rectangles if row[0] == "bar"]
    assert len(bars) == 2 * len(got)
    assert all(got[unit] == int(bits) for _, _, _, unit, bits in rectangles)
    assert len({colour for _, colour, *_ in rectangles}) == len(set(found.bits))
    assert {round(float(height) / int(bits), 1) for _, _, height, _, bits in bars} == {8.5}
    if found.table.facts["unit"] == "linear":
        (grid,) = re.findall(r"<h2>Bits</h2>.*?</svg>", page, re.DOTALL)
        digits = [int(bits) for bits in re.findall(r'<text class="digit"[^>]*>(\d)<', grid)]
        blocks = range(CONFIG.num_layers)
        assert digits == [got[f"blocks.{block}.{path}"] for path in PATHS for block in blocks]
        assert re.findall(r'text-anchor="end">(\w+)<', grid) == [path.split(".")[1] for path in PATHS]


def test_what_cannot_be_drawn_or_ranked_is_left_out(tmp_path):
    """No tau where a text cannot tell blocks apart; a KL below 0, by rounding, is on no log scale."""
    path = write_table(tmp_path / "t.json", "block", kl=-1e-9)
    content = json.loads(path.read_text())
    content["cells"]["blocks.1"]["2"]["gsm8k"]["kl"] = 0.5
    content["notes"]["shares"] = {"gsm8k": 0.0, "wiki & co": 1.0}
    path.write_text(json.dumps(content))
    result = write_recipe(SOURCE, path, tmp_path / "t.toml", budget=5, beta=0.7, metric="kl")
    page = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert "Kendall" not in Page(page).text
    assert "0 %of" not in Page(page).text.replace("100 %of", "")
    assert page.count('<circle class="dot') == 1
    assert 'class="line' not in page
    found = allocation(read_sensitivity(path, SOURCE), 5)
    assert write_allocation(tmp_path / "again.html", found, result).read_text(encoding="utf-8") == page


def test_terminal_names_the_page(made, capsys):
    terminal.print_allocation(made[0])
    out = capsys.readouterr().out
    assert f"pictured in {made[0]['page']}" in out
    assert "--calibration gsm8k=train.jsonl --calibration wiki.raw --mix 0.25,0.75 --samples 32" in out
