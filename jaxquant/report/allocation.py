"""The page beside an allocated recipe: what every unit loses at every width, and the bits that it got."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxquant.report import frame, svg

if TYPE_CHECKING:
    from jaxquant.allocation import Allocation

# Colours of the page's palette, warm where bits are few; 7 and 8 bits share the grey.
_COLOURS = {1: "c5", 2: "c4", 3: "c3", 4: "c2", 5: "c1", 6: "c0", 7: "c6", 8: "c6"}
# Below the profile, on the same axis.
_BARS_TOP, _BARS_BOTTOM, _CELL = 180, 214, 17


def write_allocation(path: Path, found: Allocation, result: dict[str, Any]) -> Path:
    """Writes the page of an allocation (TASA, arXiv 2607.00908): self-contained, for phones, light and dark.

    Args:
      path: an `.html` file in an existing folder; an older one is replaced.
      found: what is shown, KL in nats a token.
      result: what `allocation.write_recipe` tells of it: `model`, `recipe`, `table`, `budget`,
        `effective_bits`, `beta`, `metric`, `predicted`, `texts`, `shares`, and `tau` where there is one.

    Returns:
      `path`.
    """
    sections = [
        _headline(found, result),
        frame.section("How it was made", _facts(found, result)),
        _grid(found),
        _profiles(found),
        frame.section("Every unit", _table(found)),
    ]
    return frame.write_page(path, f"{result['model']}, {result['effective_bits']:.2f} bits", sections)


def _headline(found: Allocation, result: dict[str, Any]) -> str:
    table = found.table
    kept = ", ".join(f"{found.bits.count(bits)} at {bits}" for bits in table.bits if bits in found.bits)
    lead = f"{len(table.units)} {table.facts['unit']}s, of which {kept} bits"
    cards = [
        (
            f"{result['effective_bits']:.3f}",
            f"bits per weight of a budget of {result['budget']:g}, scales included",
        ),
        *(
            (f"{loss:#.3g}", f"nats of {result['metric'].upper()} a token on {name}, if losses add up")
            for name, loss in result["predicted"].items()
        ),
    ]
    if "tau" in result:
        tau = result["tau"]
        interval = f"{tau['low']:.2f} to {tau['high']:.2f}"
        label = f"Kendall\u2019s tau between tasks and general text at {tau['bits']} bits ({interval})"
        cards.append((f"{tau['tau']:.2f}", label))
    cards += [
        (f"{100 * share:.0f} %", f"of the calibration is {name}")
        for name, share in result["shares"].items()
        if share
    ]
    return frame.headline(result["model"], lead, cards)


def _facts(found: Allocation, result: dict[str, Any]) -> str:
    facts = found.table.facts
    windows = f"{result['samples']} windows of {result['seqlen']} tokens of each text"
    return frame.definitions(
        [
            ("Recipe", result["recipe"]),
            ("Table", result["table"]),
            ("Chosen by", f"{result['metric'].upper()}, tasks with a weight of {result['beta']:g}"),
            *(
                (
                    f"{'Task' if name in found.task else 'Text'} {name}",
                    f"{own['texts']} texts, {own['scored']:,} scored tokens of {result['texts'][name]}",
                )
                for name, own in facts["domains"].items()
            ),
            ("Calibration", f"{windows}, seed {result['seed']}"),
            *((f"{bits} bits", str(recipe)) for bits, recipe in found.recipes.items()),
        ]
    )


def _grid(found: Allocation) -> str:
    """Linears against blocks; blocks alone have their bars below the profiles."""
    if found.table.facts["unit"] == "block":
        return ""
    rows = _by_linear(found)
    last, step = _axis(found)
    width = min(step, _CELL)
    parts, digits = [], []
    for row, (linear, units) in enumerate(rows.items()):
        y = 2 + row * _CELL
        parts.append(svg.text(svg.LEFT - 6, y + 12, linear.split(".")[-1], "end"))
        for block, unit in enumerate(units):
            x, bits = svg.block_x(block, last), found.bits[unit]
            parts.append(_rectangle(found, unit, "cell", x, y, width, _CELL))
            digits.append(svg.text(x, y + 12, str(bits), "middle", style="digit"))
    bottom = 2 + len(rows) * _CELL
    picture = svg.picture(
        f"Bits of {len(rows)} linears in each of {last + 1} blocks",
        [*parts, _small(digits, step), *svg.block_axis(last, bottom + 16)],
        height=bottom + 22,
    )
    return frame.section(
        "Bits", _key(found) + picture, "Linears from top to bottom, blocks from left to right."
    )


def _profiles(found: Allocation) -> str:
    table = found.table
    drawn = [
        end
        for name, own in table.kl.items()
        for kl, error in zip(own.flat, table.kl_stderr[name].flat, strict=True)
        if svg.drawable(kl)
        for end in (kl, kl + error)
    ]
    low, high = svg.log_range(drawn)
    pictures = "".join(
        frame.panels(
            (_profile(found, domain, linear, units, low, high) for domain in table.kl), style="profiles"
        )
        for linear, units in _by_linear(found).items()
    )
    note = (
        "KL divergence from the original in nats a token where one unit alone is quantized, with standard "
        "errors over texts; one scale for all. Filled dots and the bars below them are the bits that it got."
    )
    return frame.section("Sensitivity", _key(found) + pictures, note)


def _profile(
    found: Allocation, domain: str, linear: str, units: Sequence[int], low: float, high: float
) -> str:
    """KL over the blocks, a line a width, above the bits of the same blocks."""
    table = found.table
    last, step = _axis(found)
    name = f"{linear}, {domain}" if linear else domain
    parts = [svg.title(name), *svg.log_rules(low, high), svg.baseline()]
    dots = []
    for column, bits in enumerate(table.bits):
        colour, points = _COLOURS[bits], []
        for block, unit in enumerate(units):
            kl, error = table.kl[domain][unit, column], table.kl_stderr[domain][unit, column]
            if not svg.drawable(kl):
                continue
            x, y = svg.block_x(block, last), svg.log_y(kl, low, high)
            points.append(f"{x:.1f},{y:.1f}")
            top, bottom = (svg.log_y(max(end, 10**low), low, high) for end in (kl + error, kl - error))
            parts.append(f'<path class="whisker {colour}" d="M{x:.1f},{top:.1f}V{bottom:.1f}"/>')
            got = found.choice[unit] == column
            style, radius = ("dot", min(step / 2, 3)) if got else ("dot open", min(step / 5, 1.8))
            dots.append(
                f'<circle class="{style} {colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">'
                f"<title>{table.units[unit]} at {bits} bits: {kl:#.3g} \u00b1 {error:.1g}</title></circle>"
            )
        if len(points) > 1:
            parts.append(f'<path class="line profile {colour}" d="M{"L".join(points)}"/>')
    return svg.picture(
        f"KL on {name} over {last + 1} blocks at {', '.join(map(str, table.bits))} bits, logarithmic scale, "
        "and the bits that they got",
        [*parts, *dots, *_bars(found, units), *svg.block_axis(last, _BARS_BOTTOM + 16)],
        height=_BARS_BOTTOM + 22,
    )


def _bars(found: Allocation, units: Sequence[int]) -> list[str]:
    last, step = _axis(found)
    width = min(0.8 * step, _CELL)
    bars, digits = [], []
    for block, unit in enumerate(units):
        x, bits = svg.block_x(block, last), found.bits[unit]
        top = _BARS_BOTTOM - bits / found.table.bits[-1] * (_BARS_BOTTOM - _BARS_TOP)
        bars.append(_rectangle(found, unit, "bar", x, top, width, _BARS_BOTTOM - top))
        digits.append(svg.text(x, top - 2, str(bits), "middle", style="digit"))
    label = svg.text(svg.LEFT - 6, _BARS_BOTTOM, "bits", "end")
    return [*bars, _small(digits, step), label, svg.baseline(_BARS_BOTTOM)]


def _rectangle(
    found: Allocation, unit: int, style: str, x: float, top: float, width: float, height: float
) -> str:
    """The bits of a unit as a colour, `x` in the middle."""
    bits = found.bits[unit]
    return (
        f'<rect class="{style} {_COLOURS[bits]}" x="{x - width / 2:.2f}" y="{top:.1f}" width="{width:.2f}" '
        f'height="{height:.1f}"><title>{found.table.units[unit]}: {bits} bits</title></rect>'
    )


def _small(digits: Sequence[str], step: float) -> str:
    """Digits that fit between blocks `step` apart, however many there are."""
    return f'<g font-size="{min(1.2 * step, 11):.1f}">{"".join(digits)}</g>'


def _key(found: Allocation) -> str:
    body = " ".join(f'<span class="swatch {_COLOURS[bits]}"></span>{bits} bits' for bits in found.table.bits)
    return f'<p class="key">{body}</p>'


def _table(found: Allocation) -> str:
    table = found.table
    columns = ["unit", "weights", "bits", "effective bits", *(f"KL {name}" for name in table.kl), "S"]
    rows = (
        frame.table_row(
            name,
            [
                f"{table.sizes[unit]:,}",
                str(table.bits[column]),
                f"{table.costs[unit, column] / table.sizes[unit]:.3f}",
                *(
                    f"{kl[unit, column]:#.3g} \u00b1 {table.kl_stderr[domain][unit, column]:.1g}"
                    for domain, kl in table.kl.items()
                ),
                f"{found.sensitivity[unit, column]:#.3g}",
            ],
            colour=_COLOURS[table.bits[column]],
        )
        for unit, (name, column) in enumerate(zip(table.units, found.choice, strict=True))
    )
    return frame.table("Every unit", columns, rows)


def _by_linear(found: Allocation) -> dict[str, list[int]]:
    """Units of each linear, in the order of the blocks; a single empty name where blocks are the units."""
    rows: dict[str, list[int]] = {}
    for unit, name in enumerate(found.table.units):
        rows.setdefault(".".join(name.split(".")[2:]), []).append(unit)
    return rows


def _axis(found: Allocation) -> tuple[int, float]:
    """The last block, and how far apart blocks are."""
    last = int(found.table.units[-1].split(".")[1])
    return last, svg.block_x(1, last) - svg.block_x(0, last) if last else float(_CELL)
