"""The table that grows while a model is quantized."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

_COLUMNS = (
    ("module", -22),
    ("shape", 11),
    ("bits", 4),
    ("RTN error", 9),
    ("error", 9),
    ("damping", 8),
    ("s", 6),
)


class ProgressTable:
    """One printed line per linear; on a terminal a progress bar with the remaining time stays below them.

    Elsewhere (a file, a pipe) the remaining time is the last column instead.

        with ProgressTable(plan.linears) as table:
            table.row(row)      # the keys of a row are those of `write_report`

    Args:
      total: number of linears of the whole run.
      console: a `rich.console.Console`; standard output by default.
    """

    def __init__(self, total: int, *, console: Any = None) -> None:
        from rich.console import Console

        self._console = console or Console()
        self._total = total
        self._done = self._skipped = 0
        self._started = time.monotonic()
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> ProgressTable:
        self._started = time.monotonic()
        if self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            # The time is our own: rich's estimate looks at the last lines only and jumps between small and
            # large linears.
            columns = (
                TextColumn("quantizing"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[eta]}"),
            )
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task("", total=self._total, eta="")
            self._progress.start()
        header = " ".join(f"{name:{_align(width)}}" for name, width in _COLUMNS)
        self._print(header if self._progress else f"{header}   {'ETA':>7}", style="bold")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def skip(self, count: int) -> None:
        """Counts `count` linears as done by an earlier run; they say nothing about this run's speed."""
        self._skipped += count
        self._update()

    def note(self, text: str) -> None:
        """Shows in the progress bar what precedes the first linear; elsewhere nothing."""
        if self._progress:
            self._progress.update(self._task, eta=text)

    def row(self, row: dict[str, Any]) -> None:
        """Adds the line of a finished linear."""
        self._done += 1
        line = format_row(row)
        odd = row["fallback"] or row["attempts"] > 1
        if self._progress is None:
            line = f"{line}   {self.eta():>7}"
        self._print(line, style="yellow" if odd else None)
        self._update()

    def eta(self) -> str:
        """Remaining time at the mean speed of this run, `m:ss`; empty before the first linear."""
        if not self._done:
            return ""
        per_row = (time.monotonic() - self._started) / self._done
        remaining = round(per_row * max(self._total - self._done - self._skipped, 0))
        return f"{remaining // 60}:{remaining % 60:02d}"

    def _print(self, line: str, *, style: str | None) -> None:
        # One line stays one line: wrapping would tear the columns apart.
        self._console.print(
            line, style=style, markup=False, highlight=False, no_wrap=True, overflow="ignore", crop=False
        )

    def _update(self) -> None:
        if self._progress:
            eta = self.eta()
            text = f"{eta} left" if eta else ""
            self._progress.update(self._task, completed=self._done + self._skipped, eta=text)


def format_row(row: dict[str, Any]) -> str:
    """`row` in the columns of the table; a fallback to rounding is marked with `*`."""
    values = (
        row["module"],
        "x".join(map(str, row["shape"])),
        row["bits"],
        f"{row['error_rtn']:.3g}",
        f"{row['error']:.3g}" + ("*" if row["fallback"] else ""),
        f"{row['damping']:.2g}",
        f"{row['seconds']:.1f}",
    )
    return " ".join(f"{value!s:{_align(width)}}" for value, (_, width) in zip(values, _COLUMNS, strict=True))


def _align(width: int) -> str:
    return f"<{-width}" if width < 0 else f">{width}"
