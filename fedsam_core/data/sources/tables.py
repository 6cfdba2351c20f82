"""Who holds which case: `sites.csv` (case,site,split), or `splits.csv` (case,split) in a site's own folder.

A fault of a row is a fault of its case: the case is left out and the others go on. Only a table that cannot be read at
all, or lacks a column, raises.
"""

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsam_core.data.sources import SPLITS, CaseFiles, Problem, ProblemKind, Split
from fedsam_core.errors import DataError

EXAMPLE = "case,site,split on the first line, then rows such as {case},site-a,train"
_NAME = re.compile(r"\w[\w.-]*")  # a case or site names files and folders later


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    line: int
    case: str
    site: str
    split: Split


@dataclass(frozen=True)
class Table:
    """A table that was read: its good rows by the id of their case. `own`: a site's own, without a column `site`."""

    path: Path
    rows: Mapping[str, Row]
    own: bool = False


@dataclass(frozen=True)
class Pair:
    """A scan and its mask; `site` is empty where only the table says whose they are."""

    case: str
    site: str
    image: Path
    label: Path


class Faults:
    """What is wrong with single cases, found while listing. A case has one problem: the first, without its echoes.

    Attributes:
        by_site: sites may number their cases alike, so that a case is known as SITE_CASE.
        problems: in the order in which they were found.
    """

    def __init__(self, by_site: bool = False) -> None:
        self.by_site = by_site
        self.problems: list[Problem] = []
        self._cases: set[str] = set()

    def id(self, site: str, case: str) -> str:
        """Name of a case in the cohort."""
        return f"{site}_{case}" if self.by_site and site and case else case

    def has(self, site: str, case: str) -> bool:
        """Whether the case is left out already."""
        return self.id(site, case) in self._cases

    def leave_out(self, case: str, reason: str, site: str = "", kind: ProblemKind = "layout") -> None:
        """A case, or with an empty `case` a whole site, cannot be used."""
        name = self.id(site, case)
        if name and name in self._cases:
            return
        self._cases.add(name)
        self.problems.append(Problem(kind=kind, case=name, site=site, reason=reason, quarantined=True))

    def warn(self, reason: str, site: str = "", kind: ProblemKind = "layout") -> None:
        """Something to know; no case is left out for it."""
        self.problems.append(Problem(kind=kind, site=site, reason=reason, quarantined=False))

    def name_sites(self, rows: Iterable[Row]) -> None:
        """Fill in whose the faulty cases are where only the table knows."""
        sites = {self.id(row.site, row.case): row.site for row in rows}
        self.problems = [
            p if p.site or p.case not in sites else p.model_copy(update={"site": sites[p.case]}) for p in self.problems
        ]


def is_name(name: str) -> bool:
    """Whether a name can serve for a case or a site."""
    return _NAME.fullmatch(name) is not None


def bad_name(name: str, where: Path | str) -> str:
    """What to tell a person about a name that cannot serve."""
    return f"{where}: name {name!r}; cases and sites may have letters, digits, dot, dash and underscore only"


def read_table(path: Path, faults: Faults, site: str | None = None) -> Table:
    """Read a table; what is wrong with a row goes to `faults`.

    Args:
        site: the table is this site's own and has no column `site`.

    Raises:
        DataError: the table cannot be read, or lacks a column.
    """
    example = EXAMPLE.format(case="CASE")
    columns: tuple[str, ...] = ("case", "site", "split")
    if site is not None:
        columns, example = ("case", "split"), "case,split on the first line, then rows such as CASE,train"
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets like to begin with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the table of sites as UTF-8 text; check cohort.sites_csv") from error
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; write {example}")
    rows: dict[str, Row] = {}
    known: dict[str, Split] = {word: word for word in SPLITS}
    for cells in reader:
        where = f"{path}, line {reader.line_num}"
        case, split = ((cells[name] or "").strip() for name in ("case", "split"))
        whose = (cells["site"] or "").strip() if site is None else site
        name = faults.id(whose, case)
        if split not in known:
            reason = f"{where}: split {split!r} is not one of {', '.join(SPLITS)}; mend the row"
            faults.leave_out(case, reason, whose if is_name(whose) else "")
        elif not is_name(case) or not is_name(whose):
            faults.leave_out(case, bad_name(whose if is_name(case) else case, where), whose if is_name(whose) else "")
        elif name in rows:
            of = f" of {whose}" if faults.by_site else ""
            faults.leave_out(case, f"{where}: case {case}{of} is listed twice; keep one row a case", whose)
        else:
            rows[name] = Row(reader.line_num, case, whose, known[split])
    return Table(path, rows, own=site is not None)


def share_out(
    pairs: Sequence[Pair], table: Table, faults: Faults, where: Callable[[Row], Path], partly: bool = False
) -> list[CaseFiles]:
    """The cases that both a row and a scan speak for; a row without scan goes to `faults`.

    Args:
        where: folder in which the scan of a row should be.
        partly: the table may be about some of the scans only, as of a published data set; the others are worth a
            warning. Otherwise a scan without row is a fault.
    """
    known = {faults.id(pair.site, pair.case) for pair in pairs}
    for name, row in table.rows.items():
        if name not in known:
            reason = f"case {row.case} has no scan in {where(row)}; add the scan or delete the row"
            faults.leave_out(row.case, f"{table.path}, line {row.line}: {reason}", row.site)
    cases, unlisted = [], []
    for pair in pairs:
        name = faults.id(pair.site, pair.case)
        if faults.has(pair.site, pair.case):
            continue
        if name in table.rows:
            cases.append(CaseFiles(name, table.rows[name].site, table.rows[name].split, pair.image, pair.label))
        elif partly:
            unlisted.append(name)
        else:
            example = f"{pair.case},train" if table.own else f"{pair.case},{pair.site or 'site-a'},train"
            reason = f"{pair.image}: no row in {table.path}; add one, such as {example}, or move the scan away"
            faults.leave_out(pair.case, reason, pair.site)
    if unlisted:
        faults.warn(not_listed(unlisted, table.path))
    return cases


def not_listed(names: Sequence[str], table: Path | str) -> str:
    """What to tell a person about cases of a data set that a split does not name."""
    are = "cases are" if len(names) > 1 else "case is"
    return f"{table}: {len(names)} {are} there but not listed, so not used ({some(names)}); add rows to use them"


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
