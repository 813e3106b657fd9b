"""`report.html`: one file that tells what was done to a model and how well it went."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxquant.report import figures, frame

_COLUMNS = (
    "module", "shape", "bits", "group", "RTN error", "error", "ratio", "damping", "attempts", "seconds",
)  # fmt: skip


def write_report(
    folder: str | Path,
    run: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    *,
    histograms: Iterable[dict[str, Any]] = (),
    sites: Iterable[dict[str, Any]] = (),
    smoothness: dict[str, Any] | None = None,
    metrics: Sequence[dict[str, Any]] = (),
) -> Path:
    """Writes `report.html` into `folder`: self-contained, for phones, light and dark.

    Args:
      folder: an existing folder; an older report in it is replaced.
      run: `verb` (quantize, train), `model`, `recipe` (in words), `recipe_name`, `grid` (in words),
        `effective_bits`, `bytes_before`, `bytes_after`, `calibration`, `samples`, `seqlen`, `tokens`, `seed`,
        `seconds`, `versions` (dict), and optionally `evaluation`: any of `perplexity_before`,
        `perplexity_after`, `kl`, `kl_stderr`, `top1`, `text`, `tokens`.
      rows: one dict per linear: `module`, `block`, `linear`, `shape` `[in, out]`, `bits`, `group_size`,
        `error_rtn`, `error` (shares of the output energy that are lost), `damping`, `attempts`, `fallback`,
        `seconds`; a trained linear has what comes before `error_rtn`.
      histograms: `{"module", "edges" [n + 1], "counts" [n], "levels"}` for the linears to be shown.
      sites: `{"module", "before", "after", "rest", "error_before", "error"}` for the activations to be shown:
        channels by size before a surgery, after it, and less the offset of their group.
      smoothness: the result of `jobs.smoothness`.
      metrics: of every step of a training run: `kl`, `hidden`, `smooth`.

    Returns:
      The path of the file.
    """
    title = f"{run['model']}, {run['recipe_name']}"
    sections = [
        _headline(run, rows),
        frame.section("How it was made", _facts(run, rows)),
        frame.section("Size", figures.size_bars(run["bytes_before"], run["bytes_after"])),
        _training(metrics),
        _errors(run, rows),
        _smoothness(smoothness),
        _sites(list(sites)),
        _histograms(list(histograms)),
        frame.section("Every linear", frame.table("Every linear", _COLUMNS, map(_table_row, rows))),
    ]
    return frame.write_page(Path(folder) / "report.html", title, sections)


def _headline(run: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    before, after = run["bytes_before"], run["bytes_after"]
    summary = f"{run['recipe_name']}, {run['grid']}"
    sizes = f"{figures.human_bytes(before)} \u2192 {figures.human_bytes(after)}"
    cards = [
        (f"{run['effective_bits']:.2f}", "bits per quantized weight, scales included"),
        (f"{before / max(after, 1):.2f}\u00d7", f"smaller: {sizes}"),
    ]
    ratio = _mean_ratio(rows)
    if ratio is not None:
        cards.append((f"{ratio:.2f}\u00d7", "error relative to rounding to nearest (geometric mean)"))
    cards += _evaluation_cards(run.get("evaluation") or {})
    cards.append((_duration(run["seconds"]), f"to {run['verb']}"))
    return frame.headline(run["model"], summary, cards)


def _evaluation_cards(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    cards = []
    if evaluation.get("perplexity_after") is not None:
        before = evaluation.get("perplexity_before")
        original = "" if before is None else f" (original {before:.3f})"
        cards.append((f"{evaluation['perplexity_after']:.3f}", f"perplexity{_on(evaluation)}{original}"))
    if evaluation.get("kl") is not None:
        spread = evaluation.get("kl_stderr")
        error = "" if spread is None else f" \u00b1 {spread:.4f}"
        cards.append((f"{evaluation['kl']:.4f}", f"nats{error} of divergence from the original"))
    if evaluation.get("top1") is not None:
        cards.append((f"{100 * evaluation['top1']:.1f} %", "same most likely token as the original"))
    return cards


def _on(evaluation: dict[str, Any]) -> str:
    text = f" on {evaluation['text']}" if evaluation.get("text") else ""
    return text + (f", {evaluation['tokens']:,} tokens" if evaluation.get("tokens") else "")


def _facts(run: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    samples = f"{run['samples']} windows of {run['seqlen']}"
    facts = [
        ("Grid", str(run["grid"])),
        ("Recipe", str(run["recipe"])),
        ("Calibration", f"{run['calibration']}: {run['tokens']:,} tokens, {samples}"),
        ("Seed", str(run["seed"])),
        ("Linears", f"{len(rows)}{_incidents(rows)}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
    ]
    return frame.definitions(facts)


def _incidents(rows: Sequence[dict[str, Any]]) -> str:
    retried = sum(row.get("attempts", 0) > 1 for row in rows)
    fallen = sum(row.get("fallback", False) for row in rows)
    notes = [
        f"{retried} needed more damping" if retried else "",
        f"{fallen} rounded to nearest" if fallen else "",
    ]
    return "".join(f", {note}" for note in notes if note)


def _training(metrics: Sequence[dict[str, Any]]) -> str:
    names = {"kl": "Divergence", "hidden": "Residual stream", "smooth": "Smoothness"}
    curves = [
        figures.curve_panel(title, values)
        for name, title in names.items()
        if any(values := [row[name] for row in metrics])
    ]
    note = "Losses on the text it was trained on, step by step, with the last one's: see jaxquant.train."
    return frame.section("Training", frame.panels(curves), note) if curves else ""


def _errors(run: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    if all(row["bits"] == 16 or "error" not in row for row in rows):
        return ""
    method = str(run["recipe_name"])
    key = f'<p class="key"><i class="thin"></i> RTN <i class="thick"></i> {html.escape(method)}</p>'
    note = "Share of each linear's output energy that is lost, over the blocks of the model; lower is better."
    return frame.section("Layer error", key + frame.panels(figures.error_panels(rows, method)), note)


def _smoothness(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""

    def shown(name: str, digits: str) -> str:
        spread = result[f"{name}_stderr"]
        return f"{result[name]:{digits}}" + ("" if spread is None else f" \u00b1 {spread:{digits}}")

    facts = [
        (
            label,
            f"{shown(name, '.1f')}, original {shown(f'{name}_reference', '.1f')}; {shown(kept, '.3f')} kept",
        )
        for label, name, kept in (
            ("Candidates", "candidates", "candidate_retention"),
            ("In a neighbourhood", "neighborhood_candidates", "neighborhood_retention"),
            ("Nodes of a tree", "tree_nodes", "tree_retention"),
        )
    ]
    panels = frame.panels(
        figures.window_panel(label, result["by_window"][name], result[name], logarithmic=log)
        for label, name, log in (
            ("Gradient ratio", "gradient_ratio", True),
            ("Gradient cosine", "gradient_cosine", False),
            ("Candidates kept", "candidate_retention", False),
            ("Tree kept", "tree_retention", False),
        )
    )
    trees = frame.panels(
        (
            figures.tree_panel(title, result["trees"][key])
            for title, key in ((result["against"], "reference"), ("quantized", "model"))
        ),
        style="trees",
    )
    note = (
        f"How differently the model reacts to {result['text']} ({result['windows']} windows of "
        f"{result['seqlen']} tokens, \u00b1 standard errors) than {result['against']} does: gradients at the "
        "input, next tokens of probability 1e-3 or more, likely continuations of up to 4 tokens. Dots are "
        "windows, the line their mean; 1 is the original."
    )
    prompt = result["trees"]["prompt"][-90:]
    key = (
        f'<p class="key">Most likely continuations of \u201c\u2026{html.escape(prompt)}\u201d: filled where '
        "both models have them; the wider, the likelier</p>"
    )
    return frame.section("Smoothness", f"{frame.definitions(facts)}{panels}{key}{trees}", note)


def _sites(sites: list[dict[str, Any]]) -> str:
    if not sites:
        return ""
    key = (
        '<p class="key"><i class="thin"></i> original basis <i class="thick"></i> as quantized '
        '<i class="dashed"></i> less the offset of the group</p>'
    )
    note = (
        "Channels by the largest value that a token of the calibration text has there, and the share of the "
        "energy that is lost when they are quantized. A flat dashed line leaves little to lose."
    )
    return frame.section("Activations", key + frame.panels(map(figures.site_panel, sites)), note)


def _histograms(histograms: list[dict[str, Any]]) -> str:
    if not histograms:
        return ""
    note = "The weights before quantization, and the levels they are rounded to as thin lines."
    return frame.section(
        "Weights and their grid", frame.panels(map(figures.histogram_panel, histograms)), note
    )


def _table_row(row: dict[str, Any]) -> str:
    ratio = _ratio(row)
    cells = [
        "\u00d7".join(map(str, row["shape"])),
        str(row["bits"]),
        "column" if row["group_size"] is None else str(row["group_size"]),
        *(
            ("",) * 6
            if "error" not in row
            else (
                f"{row['error_rtn']:.3g}",
                f"{row['error']:.3g}" + (" (RTN)" if row["fallback"] else ""),
                "" if ratio is None else f"{ratio:.2f}",
                f"{row['damping']:.2g}",
                str(row["attempts"]),
                f"{row['seconds']:.1f}",
            )
        ),
    ]
    odd = row.get("fallback", False) or row.get("attempts", 0) > 1
    return frame.table_row(row["module"], cells, colour=figures.colour_class(row["linear"]), odd=odd)


def _ratio(row: dict[str, Any]) -> float | None:
    return row["error"] / row["error_rtn"] if row.get("error_rtn") else None


def _mean_ratio(rows: Sequence[dict[str, Any]]) -> float | None:
    logs = [math.log(ratio) for row in rows if (ratio := _ratio(row)) and math.isfinite(ratio)]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
