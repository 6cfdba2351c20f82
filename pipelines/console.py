"""What a person sees: progress bars on a terminal, plain lines in a job's log, and tables."""

import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape as plain
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedsam_core import logs
from fedsam_core.logs import LoggedStream

__all__ = ["Bars", "err", "out", "plain", "size", "table"]

logs.set_up()
# With JSON lines there is no other output: what a person would read becomes records.
_records = logging.getLogger("pipelines.console")
_streams: Any = (LoggedStream(_records, logging.INFO), LoggedStream(_records, logging.ERROR))
_out, _err = _streams if logs.wanted() else (None, None)
out = Console(file=_out, highlight=False, soft_wrap=True)
err = Console(file=_err, stderr=_err is None, highlight=False, soft_wrap=True)


class Bars:
    """Progress bars by stage. Where the output is no terminal, a line when a stage starts and one when it ends."""

    def __init__(self) -> None:
        self._live = out.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=out
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "Bars":
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of a stage are finished."""
        if self._live:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=total)
            self._progress.update(self._tasks[stage], completed=done, total=total)
        elif stage not in self._tasks or (done == total and self._tasks[stage] != total):
            self._tasks[stage] = done
            out.print(f"{stage}: {done} of {total}")
            sys.stdout.flush()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table whose numbers stand to the right."""
    result = Table(title=title, title_justify="left", title_style="bold")
    cells = [[_cell(value) for value in row] for row in rows]
    for index, column in enumerate(columns):
        known = [row[index] for row in cells if row[index] != "-"]
        numeric = all(cell.replace(",", "").replace(".", "").removeprefix("-").strip().isdigit() for cell in known)
        result.add_column(column, justify="right" if numeric and known else "left", overflow="fold")
    for row in cells:
        result.add_row(*row)
    return result


def size(count: float) -> str:
    """Bytes in words, decimal units."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
