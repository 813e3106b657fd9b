from __future__ import annotations

import io

from rich.console import Console

from jaxquant.report import ProgressTable
from jaxquant.report.tables import format_row

ROW = {
    "module": "blocks.3.mlp.down", "block": 3, "linear": "mlp.down", "shape": [1536, 576], "bits": 4,
    "group_size": 64, "error_rtn": 0.01234, "error": 0.00567, "damping": 0.01, "attempts": 1,
    "fallback": False, "seconds": 1.23,
}  # fmt: skip


def run(rows, *, terminal: bool, total: int = 4, skip: int = 0, width: int = 100) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width)
    with ProgressTable(total, console=console) as table:
        if skip:
            table.skip(skip)
        for row in rows:
            table.row(row)
    return out.getvalue()


def test_row_shows_what_matters():
    line = format_row(ROW)
    assert line.split() == ["blocks.3.mlp.down", "1536x576", "4", "0.0123", "0.00567", "0.01", "1.2"]
    assert len(line) < 80
    assert "0.00567*" in format_row({**ROW, "fallback": True})


def test_plain_output_has_one_aligned_line_per_row():
    lines = run([ROW] * 3, terminal=False, width=40).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["module", "shape", "bits", "RTN", "error", "error", "damping", "s", "ETA"]
    assert "\x1b" not in "".join(lines)
    assert lines[-1].endswith("0:00")


def test_terminal_output_shows_progress_and_keeps_the_rows(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # a dumb one gets no bar
    text = run([ROW] * 2, terminal=True, skip=1)
    assert text.count("blocks.3.mlp.down") == 2
    assert "3/4" in text
    assert "left" in text


def test_eta_ignores_rows_of_an_earlier_run():
    table = ProgressTable(10, console=Console(file=io.StringIO()))
    assert table.eta() == ""
    table.skip(9)
    table.row(ROW)
    assert table.eta() == "0:00"
