"""The pictures of the report as inline SVG: strings that need no file, follow the page's colours and scale.

Colours come from CSS (`.c0` .. `.c6`, one per linear in the order of `COLOURS`), so the page decides how they
look on dark and on light ground. Every picture carries its description as `aria-label`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from jaxquant.report import svg

#: Linear -> colours of the Okabe-Ito palette on light and on dark ground, told apart by colour-blind readers;
#: its yellow, invisible on white, is replaced by grey.
COLOURS: dict[str, tuple[str, str]] = {
    "attn.q": ("#0072b2", "#4aa8e0"),
    "attn.k": ("#56b4e9", "#9ad4f5"),
    "attn.v": ("#009e73", "#2fc79b"),
    "attn.o": ("#e69f00", "#f2b632"),
    "mlp.gate": ("#d55e00", "#f0803c"),
    "mlp.up": ("#cc79a7", "#e39cc3"),
    "mlp.down": ("#5c5c5c", "#bdbdbd"),
}

#: Activations take the colours of linears that read or write them.
_SITE_COLOURS = {
    "attn_in": "c0",
    "keys": "c1",
    "values": "c2",
    "attn_out": "c3",
    "mlp_in": "c4",
    "mlp_hidden": "c5",
}


def colour_class(linear: str) -> str:
    """CSS class of the colour of `linear`, the same in every table and picture."""
    names = list(COLOURS)
    return f"c{names.index(linear)}" if linear in COLOURS else "c6"


def error_panels(rows: Sequence[dict[str, Any]], method: str) -> list[str]:
    """One panel per linear: error over blocks on a common log scale, RTN thin, the method thick."""
    values = [row[key] for row in rows for key in ("error_rtn", "error")]
    low, high = svg.log_range([value for value in values if svg.drawable(value)])
    last = max((row["block"] for row in rows), default=0)
    linears = list(dict.fromkeys(row["linear"] for row in rows))
    return [
        _error_panel([row for row in rows if row["linear"] == linear], linear, method, low, high, last)
        for linear in linears
    ]


def histogram_panel(histogram: dict[str, Any]) -> str:
    """Weights of one linear as an area, the levels of its grid as lines.

    Args:
      histogram: `module`, `edges` (n + 1, ascending), `counts` (n), `levels`.
    """
    module, edges, counts = histogram["module"], histogram["edges"], histogram["counts"]
    levels = [level for level in histogram["levels"] if edges[0] <= level <= edges[-1]]
    span = (edges[-1] - edges[0]) or 1.0
    peak = max(max(counts, default=0), 1)

    def x(value: float) -> float:
        return svg.share_x((value - edges[0]) / span)

    def y(count: float) -> float:
        return svg.HEIGHT - svg.BOTTOM - count / peak * (svg.HEIGHT - svg.TOP - svg.BOTTOM)

    steps = [f"M{x(edges[0]):.1f},{y(0):.1f}"]
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        steps.append(f"L{x(left):.1f},{y(count):.1f}L{x(right):.1f},{y(count):.1f}")
    steps.append(f"L{x(edges[-1]):.1f},{y(0):.1f}Z")
    # More lines than this run into one another.
    drawn = levels if len(levels) <= 64 else [levels[0], levels[-1]]
    parts = [f'<path class="grid-level" d="M{x(level):.1f},{y(0) + 4:.1f}V{svg.TOP}"/>' for level in drawn]
    linear = module.split(".", 2)[-1]
    parts.append(f'<path class="area {colour_class(linear)}" d="{"".join(steps)}"/>')
    parts.append(svg.baseline())
    if levels:
        labelled = levels if len(levels) <= 8 else [levels[0], levels[len(levels) // 2], levels[-1]]
        parts += [svg.text(x(level), svg.HEIGHT - 12, f"{level:.3g}", "middle") for level in labelled]
    parts += [
        svg.text(svg.LEFT - 6, y(0) + 4, "0", "end"),
        svg.text(svg.LEFT - 6, svg.TOP + 4, _short_count(peak), "end"),
    ]
    description = f"Histogram of the weights of {module} with the {len(levels)} levels of its grid"
    return svg.picture(description, [svg.title(module), *parts])


def site_panel(site: dict[str, Any]) -> str:
    """Channels by size, on a log scale: in the original basis, as they are quantized, less their offset.

    Args:
      site: `module`; `before`, `after`, `rest`: channels in descending order; `error_before`, `error`.
    """
    curves = {"before": "rtn", "after": "method", "rest": "rest"}
    values = [value for key in curves for value in site[key] if svg.drawable(value)]
    low, high = svg.log_range(values)
    name = site["module"].split(".", 2)[-1]

    def points(channels: Sequence[float]) -> str:
        last = max(len(channels) - 1, 1)
        return "L".join(
            f"{svg.share_x(i / last):.1f},{svg.log_y(value, low, high):.1f}"
            for i, value in enumerate(channels)
            if svg.drawable(value)
        )

    parts = [svg.title(site["module"]), *svg.log_rules(low, high), svg.baseline()]
    parts += [
        f'<path class="line {style} {_SITE_COLOURS.get(name, "c6")}" d="M{line}"/>'
        for key, style in curves.items()
        if (line := points(site[key]))
    ]
    errors = [f"{100 * site[key]:.2g} %" for key in ("error_before", "error")]
    lost = errors[0] if errors[0] == errors[1] else " \u2192 ".join(errors)
    parts.append(svg.text(svg.LEFT, svg.HEIGHT - 12, "channels by size", "start"))
    parts.append(svg.text(svg.WIDTH - svg.RIGHT, svg.HEIGHT - 12, f"lost: {lost}", "end"))
    description = (
        f"Largest values of the channels of {site['module']} in descending order; energy lost: {lost}"
    )
    return svg.picture(description, parts)


def size_bars(before: int, after: int) -> str:
    """Two bars, size before and after."""
    height, width = 78, 360
    largest = max(before, after, 1)
    parts = []
    for top, label, size, style in ((6, "before", before, "bar-before"), (44, "after", after, "bar-after")):
        length = max(size / largest * (width - 125), 2)
        parts += [
            svg.text(44, top + 18, label, "end", style="label"),
            f'<rect class="{style}" x="52" y="{top}" width="{length:.1f}" height="28" rx="3"/>',
            svg.text(59 + length, top + 18, human_bytes(size), "start", style="label"),
        ]
    description = f"Size before {human_bytes(before)}, after {human_bytes(after)}"
    return svg.picture(description, parts, width=width, height=height)


def window_panel(title: str, values: Sequence[float], mean: float, *, logarithmic: bool) -> str:
    """A dot for every window and a line at their mean; the original, 1, is dashed.

    Args:
      title: what is measured.
      values: of the windows.
      mean: of them.
      logarithmic: scale for ratios; shares go from 0 to 1.
    """
    drawn = [v for v in values if math.isfinite(v) and (v > 0 or not logarithmic)]
    low, high = min([0.0, *drawn]), max([1.0, *drawn])
    if logarithmic:
        low, high = svg.log_range([1.0, *drawn])

    def y(value: float) -> float:
        if logarithmic:
            return svg.log_y(value, low, high)
        return svg.HEIGHT - svg.BOTTOM - (value - low) / (high - low) * (svg.HEIGHT - svg.TOP - svg.BOTTOM)

    parts = [svg.title(title), svg.text(svg.WIDTH - svg.RIGHT, 15, f"{mean:.3g}", "end", style="panel-title")]
    if logarithmic:
        parts += svg.log_rules(low, high)
    else:
        for tick in (0, 0.5, 1):
            parts.append(f'<path class="rule" d="M{svg.LEFT},{y(tick):.1f}H{svg.WIDTH - svg.RIGHT}"/>')
            parts.append(svg.text(svg.LEFT - 6, y(tick) + 4, f"{tick:g}", "end"))
    parts += [
        f'<circle class="window" cx="{svg.share_x((i + 0.5) / len(values)):.1f}" cy="{y(value):.1f}" r="3.5">'
        f"<title>window {i}: {value:.3g}</title></circle>"
        for i, value in enumerate(values)
        if value in drawn
    ]
    parts.append(f'<path class="original" d="M{svg.LEFT},{y(1):.1f}H{svg.WIDTH - svg.RIGHT}"/>')
    if drawn and math.isfinite(mean) and (mean > 0 or not logarithmic):
        parts.append(f'<path class="mean" d="M{svg.LEFT},{y(mean):.1f}H{svg.WIDTH - svg.RIGHT}"/>')
    parts.append(svg.text(svg.LEFT, svg.HEIGHT - 12, "windows of the text", "start"))
    return svg.picture(f"{title} of {len(values)} windows, mean {mean:.3g}; 1 is the original", parts)


def curve_panel(title: str, values: Sequence[float]) -> str:
    """What a number was at every step, on a log scale, at most as many points as are wide apart enough.

    Args:
      title: what it is.
      values: of all steps.
    """
    low, high = svg.log_range([value for value in values if svg.drawable(value)])
    last = max(len(values) - 1, 1)
    kept = range(0, len(values), max(1, len(values) // 200))
    line = "L".join(
        f"{svg.share_x(i / last):.1f},{svg.log_y(values[i], low, high):.1f}"
        for i in kept
        if svg.drawable(values[i])
    )
    parts = [svg.title(title), *svg.log_rules(low, high), svg.baseline()]
    parts += [f'<path class="line method c0" d="M{line}"/>'] if line else []
    parts.append(svg.text(svg.LEFT, svg.HEIGHT - 12, f"{len(values)} steps", "start"))
    parts.append(svg.text(svg.WIDTH - svg.RIGHT, 15, f"{values[-1]:.3g}", "end", style="panel-title"))
    return svg.picture(f"{title} over {len(values)} steps, {values[0]:.3g} to {values[-1]:.3g}", parts)


def tree_panel(title: str, nodes: Sequence[dict[str, Any]]) -> str:
    """A decoding tree from left to right: tokens as labels, width by probability, shared nodes filled.

    Args:
      title: whose tree.
      nodes: `path` (token ids), `token`, `probability` (of the path), `shared`; parents before children.
    """
    column, row = 112, 21
    children: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for node in nodes:
        children.setdefault(tuple(node["path"][:-1]), []).append(node)
    height = {}
    free = 0

    def place(path: tuple[int, ...]) -> float:
        nonlocal free
        below = [place(tuple(node["path"])) for node in children.get(path, [])]
        if not below:
            below, free = [svg.TOP + 12 + row * free], free + 1
        height[path] = sum(below) / len(below)
        return height[path]

    place(())
    labels = {(): ""} | {tuple(node["path"]): _token_label(node["token"]) for node in nodes}
    edges, marks = [], [f'<circle class="node shared" cx="8" cy="{height[()]:.1f}" r="4"/>']
    for node in nodes:
        path, style = tuple(node["path"]), " shared" if node["shared"] else ""
        parent = path[:-1]
        x, y, above = 8 + column * len(path), height[path], height[parent]
        start = x - column + (6.5 * len(labels[parent]) + 9 if parent else 4)
        middle = (start + x) / 2
        edges.append(
            f'<path class="edge{style}" stroke-width="{max(9 * node["probability"] ** 0.5, 0.7):.1f}" '
            f'd="M{start:.1f},{above:.1f}C{middle:.1f},{above:.1f} {middle:.1f},{y:.1f} {x - 4},{y:.1f}"/>'
        )
        marks.append(
            f'<circle class="node{style}" cx="{x}" cy="{y:.1f}" r="4"><title>'
            f"{html.escape(repr(node['token']))}: {node['probability']:.2g}</title></circle>"
        )
        marks.append(svg.text(x + 7, y + 4, labels[path], "start", style="label"))
    shared = sum(bool(node["shared"]) for node in nodes)
    return svg.picture(
        f"Decoding tree of {title}: its {len(nodes)} most likely nodes, {shared} of them shared",
        [svg.text(4, 15, title, "start", style="panel-title"), *edges, *marks],
        width=8 + column * (1 + max((len(node["path"]) for node in nodes), default=0)),
        height=svg.TOP + 12 + row * max(free, 1),
    )


def human_bytes(size: float) -> str:
    """`size` with a decimal unit: `94.3 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 1000 * scale else f"{size / scale:,.0f} {unit}"
    return f"{size:.0f} bytes"


def _token_label(token: str) -> str:
    """A token without the spaces around it, at most 12 letters."""
    label = token.strip() or {"": "\u2205", "\n": "\u23ce"}.get(token, "\u2423")
    return label if len(label) <= 12 else label[:11] + "\u2026"


def _error_panel(
    rows: list[dict[str, Any]], linear: str, method: str, low: float, high: float, last: int
) -> str:
    parts = [svg.title(linear), *svg.log_rules(low, high), svg.baseline()]
    parts += svg.block_axis(last, svg.HEIGHT - 12)
    colour = colour_class(linear)
    for key, name, style in (("error_rtn", "RTN", "rtn"), ("error", method, "method")):
        points = [
            (row, svg.block_x(row["block"], last), svg.log_y(row[key], low, high))
            for row in rows
            if svg.drawable(row[key])
        ]
        if len(points) > 1:
            line = "L".join(f"{x:.1f},{y:.1f}" for _, x, y in points)
            parts.append(f'<path class="line {style} {colour}" d="M{line}"/>')
        radius = (2.0 if style == "rtn" else 3.0) if last < 16 else (1.2 if style == "rtn" else 2.0)
        parts += [
            f'<circle class="dot {style} {colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
            f"<title>block {row['block']}, {html.escape(name)}: {row[key]:.3g}</title></circle>"
            for row, x, y in points
        ]
    return svg.picture(
        f"Error of {linear} over {last + 1} blocks, RTN and {method}, logarithmic scale", parts
    )


def _short_count(count: float) -> str:
    return f"{count / 1000:.3g}k" if count >= 1000 else f"{count:.0f}"
