"""Problems of cases that were opened: what is wrong with one by itself, and what only shows when they are compared: the
same scan twice, training on what is tested on, a clipped release.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedsam_core.data.scans import ScanFacts
from fedsam_core.data.sources import CaseFiles, Problem, ProblemKind, Split
from fedsam_core.data.sources.tables import some
from fedsam_core.errors import DataError, UnfitMask, UnfitScan

_RANK: dict[Split | None, int] = {None: 0, "train": 1, "val": 2, "test": 3}


@dataclass(frozen=True)
class Compared:
    """What is compared of a case. `split` is None where that is yet to be drawn; an empty content matches no other."""

    id: str
    site: str
    split: Split | None
    content: str
    label_content: str


@dataclass(frozen=True)
class Opened:
    """A case whose files were read. Its `split` is None where that is yet to be drawn."""

    files: CaseFiles
    facts: ScanFacts

    @property
    def id(self) -> str:
        return self.files.id

    @property
    def site(self) -> str:
        return self.files.site

    @property
    def split(self) -> Split | None:
        return self.files.split

    @property
    def compared(self) -> Compared:
        """What is compared of it."""
        return Compared(self.id, self.site, self.split, self.facts.content, self.facts.label_content)


def fault_of(files: CaseFiles, error: DataError) -> Problem:
    """What opening a case came to: it is left out, and the others go on."""
    kinds: dict[type[DataError], ProblemKind] = {UnfitScan: "scan", UnfitMask: "mask"}
    kind = kinds.get(type(error), "unreadable")
    return Problem(kind=kind, case=files.id, site=files.site, reason=str(error), quarantined=True)


def find_duplicates(cases: Iterable[Compared]) -> list[Problem]:
    """The same scan under several names, and the same mask on several scans.

    Of a scan that serves for several splits, the copies outside the strictest one (test, then val) are quarantined:
    whoever has trained on a scan must not be scored on it. Other copies are a warning, one a copy; so is a mask that
    several scans share, one for all of them.
    """
    cases = list(cases)
    problems = []
    for copies in _groups((case.content, case) for case in cases):
        kept = max(copies, key=lambda case: _RANK[case.split])  # the first of its split
        for copy in copies:
            if copy is kept:
                continue
            same = f"{copy.id}: voxel for voxel the same scan as {kept.id} of site {kept.site}"
            if copy.split != kept.split:
                reason = (
                    f"{same}, but that is a {kept.split} case and this would be {_serves(copy.split)}; left out, so "
                    "that no model is scored on what it has seen: delete one of them or put both into one split"
                )
                problems.append(_about(copy, reason, leak=True))
            elif copy.split is None:
                problems.append(
                    _about(copy, f"{same}, so it counts twice where the splits are drawn; keep one of them")
                )
            else:
                problems.append(_about(copy, f"{same}, both {copy.split} cases, so it counts twice; keep one of them"))
    for sharing in _groups((case.label_content, case) for case in cases):
        if len({case.content for case in sharing}) < 2:
            continue  # the same scan twice has the same mask, and was said above
        reason = (
            f"{some([case.id for case in sharing])}: different scans with voxel for voxel the same mask; a mask copied "
            "to a wrong name, or several scans of one patient, who belongs into one split?"
        )
        problems.append(_about(sharing[0], reason))
    return problems


def find_clipped(cases: Iterable[Opened]) -> list[Problem]:
    """Sites whose scans were cut to the slices that show the organ, as one release of the prostate data set was.

    A site is warned of where at least half of its cases have a label in every slice.
    """
    problems = []
    by_site: dict[str, list[Opened]] = {}
    for case in cases:
        by_site.setdefault(case.site, []).append(case)
    for site, members in by_site.items():
        clipped = [case.id for case in members if 0 < case.facts.labelled_slices[1] == case.facts.labelled_slices[0]]
        if 2 * len(clipped) >= len(members):
            reason = (
                f"site {site}: {len(clipped)} of {len(members)} cases have a label in every slice "
                f"({', '.join(clipped)}): the clipped release, which inflates Dice; use the raw one, or say so beside "
                "every score"
            )
            problems.append(Problem(kind="release", site=site, reason=reason, quarantined=False))
    return problems


def _groups(keyed: Iterable[tuple[str, Compared]]) -> list[Sequence[Compared]]:
    """Cases that share a key, in their order; an empty key is shared by nobody."""
    groups: dict[str, list[Compared]] = {}
    for key, case in keyed:
        if key:
            groups.setdefault(key, []).append(case)
    return [group for group in groups.values() if len(group) > 1]


def _about(case: Compared, reason: str, leak: bool = False) -> Problem:
    return Problem(
        kind="leakage" if leak else "duplicate", case=case.id, site=case.site, reason=reason, quarantined=leak
    )


def _serves(split: Split | None) -> str:
    return "of a split yet to be drawn" if split is None else f"a {split} case"
