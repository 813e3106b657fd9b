"""What pictures share: the size of a panel, its scales, axes and labels, the `<svg>` around them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 26, 30


def drawable(value: float | None) -> bool:
    """A log scale has no place for 0, and a report must not fail on NaN."""
    return value is not None and math.isfinite(value) and value > 0


def log_range(values: Sequence[float]) -> tuple[float, float]:
    """Exponents that enclose `values`, at least half a decade apart."""
    if not values:
        return -3.0, 0.0
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.25 - (high - low) / 2, 0.05 * (high - low))
    return low - margin, high + margin


def log_y(value: float, low: float, high: float) -> float:
    """Height of `value` in a panel of exponents `low` to `high`."""
    share = (math.log10(value) - low) / (high - low)
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def log_rules(low: float, high: float) -> list[str]:
    """Lines at the ticks of a log scale, with their labels."""
    parts = []
    for tick in _log_ticks(low, high):
        y = log_y(tick, low, high)
        parts.append(f'<path class="rule" d="M{LEFT},{y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(text(LEFT - 6, y + 4, f"{tick:.0e}" if tick < 1e-3 else f"{tick:g}", "end"))
    return parts


def share_x(share: float) -> float:
    """Place in a panel from its left, 0, to its right, 1."""
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def block_x(block: float, last: int) -> float:
    """Place of a block on the axis of blocks 0 to `last`; one alone stands in the middle."""
    share = block / last if last else 0.5
    return LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 16)


def block_axis(last: int, y: float) -> list[str]:
    """Labels of the blocks, at `y`."""
    step = max(1, round(last / 5))
    ticks = [block for block in range(0, last + 1, step) if last - block >= step / 2] + [last]
    return [text(block_x(block, last), y, str(block), "middle") for block in ticks]


def baseline(y: float = HEIGHT - BOTTOM) -> str:
    """A line from side to side of a panel."""
    return f'<path class="axis" d="M{LEFT},{y}H{WIDTH - RIGHT}"/>'


def title(name: str) -> str:
    """What a panel shows, above it."""
    return text(LEFT, 15, name, "start", style="panel-title")


def text(x: float, y: float, label: str, anchor: str, *, style: str = "tick") -> str:
    """A label: `style` is a CSS class, `anchor` is start, middle or end."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(label)}</text>'


def picture(description: str, parts: Sequence[str], *, width: int = WIDTH, height: int = HEIGHT) -> str:
    """The picture of `parts`, with its description for those who cannot see it."""
    label = html.escape(description, quote=True)
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}">'
        f"<title>{label}</title>{''.join(parts)}</svg>"
    )


def _log_ticks(low: float, high: float) -> list[float]:
    """Decades if there are enough of them, else 1, 2, 5 times decades."""
    steps = (1,) if high - low >= 2 else (1, 2, 5)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]
