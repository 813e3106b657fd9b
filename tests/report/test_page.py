from __future__ import annotations

import math
import re

import pytest
import report_samples as samples
from report_samples import Page

from jaxquant.report import write_report
from jaxquant.report.figures import (
    COLOURS,
    curve_panel,
    error_panels,
    histogram_panel,
    human_bytes,
    size_bars,
    tree_panel,
    window_panel,
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    evaluation = {"perplexity_before": 21.994, "perplexity_after": 22.913, "kl": 0.0412, "top1": 0.887}
    path = write_report(
        tmp_path_factory.mktemp("report"),
        samples.make_run(evaluation=evaluation),
        samples.make_rows(30),
        histograms=[samples.make_histogram("blocks.3.attn.q", 4)],
        sites=[samples.make_site("blocks.3.attn_in"), samples.make_site("blocks.3.mlp_hidden")],
    )
    assert path.name == "report.html"
    return path.read_text(encoding="utf-8")


def test_page_parses_and_fits_a_phone(report):
    tags = Page(report).tags
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags
    assert len(report.encode()) < 1_000_000
    assert "prefers-color-scheme: dark" in report
    assert "overflow: auto" in report


def test_page_requests_nothing(report):
    tags = Page(report).tags
    assert not [tag for tag, _ in tags if tag in ("script", "link", "iframe", "img", "object")]
    assert not re.findall(r"https?:|url\(|@import", report)
    assert not [attrs for _, attrs in tags if {"src", "href", "srcset", "xlink:href"} & attrs.keys()]


def test_page_tells_everything_about_the_run(report):
    text = Page(report).text
    for row in samples.make_rows(30):
        assert row["module"] in text
    for fact in (
        "smollm2-135m", "W4 g64 asymmetric, mse clip search", "4.50", "2.31\u00d7", "269 MB", "116 MB",
        "embedded corpus", "8,192 tokens", "16 windows of 512", "act-order", "static groups",
        "clip search", "Seed", "4 min 14 s", "jax 0.10.2", "22.913", "original 21.994", "0.0412", "88.7 %",
        "1 needed more damping", "576\u00d71536", "less the offset of the group", "blocks.3.mlp_hidden",
        "lost: 2.1 % \u2192 0.35 %",
    ):  # fmt: skip
        assert fact in text


def test_every_picture_describes_itself(report):
    pictures = [attrs for tag, attrs in Page(report).tags if tag == "svg"]
    assert len(pictures) == 1 + len(COLOURS) + 2 + 1
    assert all(picture["role"] == "img" and len(picture["aria-label"]) > 20 for picture in pictures)


def test_names_are_escaped(tmp_path):
    run = samples.make_run(model="<script>alert(1)</script>", calibration="a & b")
    text = write_report(tmp_path, run, samples.make_rows(1)).read_text()
    assert "<script" not in text
    assert "a &amp; b" in text


@pytest.mark.parametrize("values", [(0.0, 0.0), (math.nan, 1e-3), (1e-3, math.inf), (5e-4, 5e-4)])
def test_odd_errors_leave_a_valid_page(tmp_path, values):
    rows = [{**row, "error_rtn": values[0], "error": values[1]} for row in samples.make_rows(2)]
    Page(write_report(tmp_path, samples.make_run(), rows).read_text())


def test_fallback_is_marked(tmp_path):
    rows = samples.make_rows(1)
    rows[0] = {**rows[0], "fallback": True, "group_size": None}
    text = Page(write_report(tmp_path, samples.make_run(), rows).read_text()).text
    assert "1 rounded to nearest" in text
    assert "(RTN)" in text
    assert "column" in text


def test_error_panels_share_one_scale_and_keep_colours():
    panels = error_panels(samples.make_rows(3), "gptq")
    assert len(panels) == 7
    ticks = [re.findall(r'text-anchor="end">([^<]+)<', panel) for panel in panels]
    assert ticks[0]
    assert all(tick == ticks[0] for tick in ticks)
    assert 'class="line rtn c6"' in panels[-1]
    assert 'class="line method c6"' in panels[-1]


def test_one_block_is_drawn_as_points():
    panel = error_panels(samples.make_rows(1), "gptq")[0]
    assert panel.count("<circle") == 2
    assert 'class="line' not in panel


def test_histogram_draws_levels_unless_they_run_together():
    assert histogram_panel(samples.make_histogram("blocks.0.mlp.up", 3)).count('"grid-level"') == 8
    assert histogram_panel(samples.make_histogram("blocks.0.mlp.up", 8)).count('"grid-level"') == 2
    empty = {"module": "blocks.0.mlp.up", "edges": [0.0, 0.0], "counts": [0], "levels": []}
    assert "mlp.up" in histogram_panel(empty)


def test_trees_have_an_edge_and_a_label_for_every_node():
    nodes = samples.make_smoothness()["trees"]["reference"]
    panel = tree_panel("a < b", nodes)
    assert "a &lt; b" in panel
    assert panel.count('class="edge') == 4
    assert panel.count('class="edge shared"') == 3
    labels = re.findall(r'<text class="label"[^>]*>([^<]*)<', panel)
    assert labels == ["the", "\u23ce", "&lt;unbelievab\u2026", "old"]
    widths = [float(width) for width in re.findall(r'stroke-width="([\d.]+)"', panel)]
    assert widths == sorted(widths, reverse=True)
    rows = [float(y) for y in re.findall(r'<circle class="node[^>]* cy="([\d.]+)"', panel)]
    _, the, line, unbelievable, old = rows
    assert the == pytest.approx((unbelievable + old) / 2)
    assert len({line, unbelievable, old}) == 3
    assert "its 0 most likely nodes" in tree_panel("nothing", [])


def test_windows_are_dots_on_one_scale():
    panel = window_panel("Gradient ratio", [0.5, 2.0, math.nan, 0.0], 1.1, logarithmic=True)
    assert panel.count('<circle class="window"') == 2
    low, high = (float(y) for y in re.findall(r'<circle class="window"[^>]* cy="([\d.]+)"', panel))
    (original,) = (float(y) for y in re.findall(r'class="original" d="M46,([\d.]+)H', panel))
    assert original == pytest.approx((low + high) / 2, abs=0.1)
    shares = window_panel("Cosine", [-0.2, 0.9], 0.35, logarithmic=False)
    assert shares.count('<circle class="window"') == 2
    assert 'class="mean"' not in window_panel("Gradient ratio", [0.0], 0.0, logarithmic=True)


def test_smoothness_is_shown_if_it_was_measured(tmp_path):
    run, rows = samples.make_run(), samples.make_rows(1)
    assert "Smoothness" not in Page(write_report(tmp_path, run, rows).read_text()).text
    measured = samples.make_smoothness()
    text = Page(write_report(tmp_path, run, rows, smoothness=measured).read_text(encoding="utf-8")).text
    for fact in (
        "Smoothness",
        "83.2 \u00b1 2.5",
        "0.750 \u00b1 0.011 kept",
        "Tree kept",
        "Once <upon>",
        "old",
    ):
        assert fact in text
    alone = measured | {f"{name}_stderr": None for name in measured["by_window"]}
    assert "0.750 kept" in Page(write_report(tmp_path, run, rows, smoothness=alone).read_text()).text


def test_training_is_shown_as_curves_of_what_was_lost(tmp_path):
    run, rows = samples.make_run(verb="train"), [
        {key: row[key] for key in ("module", "block", "linear", "shape", "bits", "group_size")}
        for row in samples.make_rows(1)
    ]  # fmt: skip
    metrics = [{"kl": 1 / step, "hidden": 0.5, "smooth": 0.0} for step in range(1, 21)]
    page = write_report(tmp_path, run, rows, metrics=metrics).read_text()
    text = Page(page).text
    assert "to train" in text
    assert "Divergence over 20 steps, 1 to 0.05" in page
    assert "Residual stream over 20 steps" in page
    assert "Smoothness over" not in page
    assert "Layer error" not in text
    (line,) = re.findall(r'd="M([^"]*)"', curve_panel("Divergence", [row["kl"] for row in metrics]))[-1:]
    heights = [float(point.split(",")[1]) for point in line.split("L")]
    assert len(heights) == 20
    assert heights == sorted(heights)


def test_size_bars_are_proportional():
    lengths = [float(n) for n in re.findall(r'<rect[^>]* width="([\d.]+)"', size_bars(400, 100))]
    assert lengths[0] == pytest.approx(4 * lengths[1], rel=1e-2)


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 bytes"), (1500, "1.5 kB"), (94_321_000, "94.3 MB"), (2.5e9, "2.5 GB")]
)
def test_human_bytes(size, text):
    assert human_bytes(size) == text


def test_what_is_not_there_is_left_out(tmp_path):
    """No activations are quantized, no weights: no empty panels."""
    kept = [{**row, "bits": 16, "error": 0.0, "error_rtn": 0.0} for row in samples.make_rows(2)]
    text = Page(write_report(tmp_path, samples.make_run(), kept).read_text(encoding="utf-8")).text
    assert "Layer error" not in text
    assert "Activations" not in text
    assert "error relative to rounding" not in text


def test_sites_with_nothing_to_draw(tmp_path):
    site = samples.make_site("blocks.0.keys") | {"before": [0.0], "after": [0.0], "rest": [0.0]}
    page = Page(write_report(tmp_path, samples.make_run(), samples.make_rows(1), sites=[site]).read_text())
    assert "blocks.0.keys" in page.text
