"""What the pages share: a self-contained file for phones, light and dark, and what it is composed of."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from jaxquant.report import figures


def write_page(path: Path, title: str, sections: Iterable[str]) -> Path:
    """Writes the page of `sections` to `path`, which it returns; an older one is replaced."""
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title>\n<style>\n{_style()}</style></head>\n"
        f"<body><main>\n{''.join(sections)}</main></body></html>\n",
        encoding="utf-8",
    )
    return path


def headline(title: str, lead: str, cards: Iterable[tuple[str, str]]) -> str:
    """The top of a page; cards are values and what they are."""
    body = "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
        for value, label in cards
    )
    return (
        f"<header><h1>{html.escape(title)}</h1>"
        f'<p class="lead">{html.escape(lead)}</p></header>\n'
        f'<div class="cards">{body}</div>\n'
    )


def section(heading: str, content: str, note: str = "") -> str:
    """`content`, which is HTML, under a heading and a sentence on what it shows."""
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<section><h2>{html.escape(heading)}</h2>{note}{content}</section>\n"


def definitions(facts: Iterable[tuple[str, str]]) -> str:
    """Names and values, one a line."""
    body = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
    return f"<dl>{body}</dl>"


def panels(pictures: Iterable[str], *, style: str = "panels") -> str:
    """Pictures side by side, as many as there is room for; `style` is a CSS class."""
    body = "".join(f"<figure>{picture}</figure>" for picture in pictures)
    return f'<div class="{style}">{body}</div>'


def table(label: str, columns: Sequence[str], rows: Iterable[str]) -> str:
    """A table that scrolls under its head, of what `table_row` returns."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    body = "\n".join(rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def table_row(name: str, cells: Iterable[str], *, colour: str, odd: bool = False) -> str:
    """A row that begins with a swatch of the CSS class `colour`; an odd one stands out."""
    mark = ' class="odd"' if odd else ""
    return (
        f'<tr{mark}><th scope="row"><i class="swatch {colour}"></i>'
        f"{html.escape(name)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
    )


def _style() -> str:
    css = (resources.files("jaxquant.report") / "style.css").read_text(encoding="utf-8")
    light = "".join(f".c{i}{{--c:{pair[0]}}}" for i, pair in enumerate(figures.COLOURS.values()))
    dark = "".join(f".c{i}{{--c:{pair[1]}}}" for i, pair in enumerate(figures.COLOURS.values()))
    return f"{css}{light}\n@media (prefers-color-scheme: dark){{{dark}}}\n"
