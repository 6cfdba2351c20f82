"""What was done to runs on purpose, and what it cost: one table, whichever tests have been run.

A test that inflicts a fault notes a row once it has found the outcome right; `conftest.py` prints them in the end.
"""

from dataclasses import dataclass

SURVIVORS = "the survivors' sum, bit for bit"
SAME_END = "the uninterrupted run's state, bit for bit"


@dataclass(frozen=True)
class Row:
    """A fault.

    Attributes:
        fault: what happened, and in which stage.
        on: the engine, or what else it happened to.
        outcome: what the result was held against, and equals.
        lost_rounds: that had no sum, or had to be done again after they were finished.
        seconds: its round took, or until a run was at work again.
        back: seconds of the next round, in which whoever was lost takes part again, restart included; None: nobody was.
        said: the reason that the run gives.
    """

    fault: str
    on: str
    outcome: str
    lost_rounds: int = 0
    seconds: float | None = None
    back: float | None = None
    said: str = ""


_ROWS: list[Row] = []


def note(row: Row) -> None:
    """Adds a row."""
    _ROWS.append(row)


def table() -> list[str]:
    """Its lines, in Markdown; none where no fault was noted."""
    if not _ROWS:
        return []
    lines = ["| fault | on | result equals | rounds lost | its round, s | the next, s | it says |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in _ROWS:
        seconds, back = ("" if one is None else f"{one:.1f}" for one in (row.seconds, row.back))
        lines.append(
            f"| {row.fault} | {row.on} | {row.outcome} | {row.lost_rounds} | {seconds} | {back} | {row.said[:110]} |"
        )
    return lines
