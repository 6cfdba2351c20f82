"""Whether a folder of scans can be used, and what is wrong with it: what `fedsam data check` knows.

Lists the cases, opens every scan and mask once, compares the cases with each other, and says what to do. Nothing is
written, and no fault of a case stops the others.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import Field

from fedsam_core.data.findings import Opened, fault_of, find_clipped, find_duplicates
from fedsam_core.data.geometry import slice_axis
from fedsam_core.data.scans import ScanFacts, inspect_scan
from fedsam_core.data.sources import SPLITS, CaseFiles, Listing, Modality, Problem, Split
from fedsam_core.data.sources.layouts import detect, list_source
from fedsam_core.data.sources.nifti import list_site
from fedsam_core.errors import DataError
from fedsam_core.settings import Settings

Progress = Callable[[str, int, int], None]  # stage, done, total
Verdict = Literal["ready", "usable", "unusable"]
Range = tuple[float, float, float]  # smallest, median, largest

ANY_CLASS = 255  # where nothing names the classes, all values are let through and counted
MOST_CLASSES = 32  # a higher value is hardly a class: masks of one structure are often written as 0 and 255
HOUNSFIELD = -200.0  # air in CT is at -1000, MRI hardly goes below zero: tells them apart where the layout does not


class CheckedCase(Settings):
    """A case that was listed, and what its files hold; the latter is null where they could not be read."""

    id: str = Field(description="name of the case")
    site: str = Field(description="hospital that holds it")
    split: Split | None = Field(description="what it serves for; null: drawn when the cohort is prepared")
    image: str = Field(description="path of the scan")
    label: str = Field(description="path of the mask")
    quarantined: bool = Field(description="whether it is left out")
    shape: tuple[int, int, int] | None = Field(default=None, description="voxels along the scan's axes")
    spacing: tuple[float, float, float] | None = Field(default=None, description="mm along the scan's axes")
    orientation: str | None = Field(default=None, description="axis codes, like RAS")
    label_values: tuple[int, ...] | None = Field(default=None, description="values in the mask, 0 included")
    labelled_slices: tuple[int, int] | None = Field(default=None, description="slices with a label, and all slices")
    intensity: dict[str, float] | None = Field(default=None, description="min, max, p01, p99, mean, std of the scan")
    content: str | None = Field(default=None, description="SHA-256 of the voxels, however they are stored")


class SiteSummary(Settings):
    """A site's usable cases in figures."""

    cases: dict[str, int] = Field(description="train, val, test, and undecided: the split is drawn later")
    left_out: int = Field(description="cases that cannot be used")
    slices_mm: Range | None = Field(description="distance of the slices: smallest, median, largest")
    pixels_mm: Range | None = Field(description="size of a pixel: smallest, median, largest")
    orientations: dict[str, int] = Field(description="cases by axis codes")
    label_values: tuple[int, ...] = Field(description="values that occur in the masks")
    smallest: tuple[int, int, int] | None = Field(description="shape of the scan of fewest voxels")
    largest: tuple[int, int, int] | None = Field(description="shape of the scan of most voxels")


class Report(Settings):
    """What a check found."""

    source: str = Field(description="layout")
    path: str = Field(description="folder")
    modality: Modality | None = Field(description="as the layout says; null: it does not")
    classes: tuple[str, ...] = Field(description="names of label values 1, 2, ...; made up where nothing names them")
    cases: tuple[CheckedCase, ...] = Field(description="every case whose files were listed")
    problems: tuple[Problem, ...] = Field(description="cases that are left out, with the reason, and warnings")
    sites: dict[str, SiteSummary] = Field(description="figures of each site")
    verdict: Verdict = Field(description="ready; usable: with warnings or without some cases; unusable: not as it is")
    advice: tuple[str, ...] = Field(description="what to do next, a line each")
    cohort: dict[str, Any] = Field(description="settings that read this cohort, for `cohort:` in a YAML file")

    @property
    def quarantined(self) -> tuple[Problem, ...]:
        """Problems that leave a case or a site out."""
        return tuple(problem for problem in self.problems if problem.quarantined)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return self.model_dump(mode="json")


class _Scan(Opened):
    """A case that was opened, and how it is sliced."""

    @property
    def slices_mm(self) -> float:
        """Distance of the slices, as they were acquired."""
        return self.facts.spacing[self._across]

    @property
    def pixels_mm(self) -> float:
        """Size of a pixel within a slice, the longer side."""
        return max(size for axis, size in enumerate(self.facts.spacing) if axis != self._across)

    @property
    def _across(self) -> int:
        return slice_axis(self.facts.spacing, self.facts.orientation)


def check(
    path: Path,
    source: str | None = None,
    sites_csv: Path | None = None,
    classes: Sequence[str] | None = None,
    site: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Look at everything in a cohort's folder.

    Args:
        source: kits19, ixi, prostate or nifti; None finds out.
        sites_csv: table that says whose the cases are and what for; None: what the layout says.
        classes: names of label values 1, 2, ...; None: what the layout says, else what occurs in the masks.
        site: the folder is this one site's own; `sites_csv` is then its table of case,split.
        workers: scans read at once; each takes up to seven times the memory of its voxels as int16. None: 4, or as
            many as there are CPUs.
        progress: called as ("check", done, total) after each case.

    Raises:
        DataError: the folder is in no layout, or what the layout needs as a whole is missing or broken.
    """
    if site is not None:
        listing, source = list_site(site, path, sites_csv), "nifti"
    else:
        source = source or detect(path)
        listing = list_source(source, path, sites_csv)
    named = tuple(classes or listing.classes or ())
    if twice := next((name for name in named if named.count(name) > 1), None):
        raise DataError(f"{path}: class {twice} is there twice; give each label value a name of its own")
    scans, faults = _open(listing, len(named) or ANY_CLASS, workers or min(4, os.cpu_count() or 1), progress)
    problems = [*listing.problems, *faults, *find_duplicates(scan.compared for scan in scans)]
    if source == "prostate":
        problems += find_clipped(scans)
    if not named:
        problems += _not_classes(scans)
    left_out = {problem.case for problem in problems if problem.quarantined}
    usable = [scan for scan in scans if scan.id not in left_out]
    highest = max((value for scan in usable for value in scan.facts.label_values), default=0)
    given = named or tuple(f"class-{value}" for value in range(1, highest + 1))
    sites = _sites(listing, usable, problems)
    listed = {files.site for files in listing.cases}
    problems += [*_masks(usable, given), *_splits(sites, listed)]
    untrained = [name for name, summary in sites.items() if name in listed and not _trains(summary)]
    cohort = _cohort(path, source, sites_csv, site, listing, given, usable)
    facts = {scan.id: scan.facts for scan in scans}
    return Report(
        source=source,
        path=str(path),
        modality=listing.modality,
        classes=given,
        cases=tuple(_case(files, facts.get(files.id), files.id in left_out) for files in listing.cases),
        problems=tuple(problems),
        sites=sites,
        verdict="unusable" if untrained or not usable else "usable" if left_out else "ready",
        advice=tuple(_advice(usable, problems, untrained, named, cohort)),
        cohort=cohort,
    )


def _open(listing: Listing, classes: int, workers: int, progress: Progress | None) -> tuple[list[_Scan], list[Problem]]:
    """Open every case, several at once: unpacking and hashing let other threads run."""
    scans: list[_Scan] = []
    problems: list[Problem] = []
    pool = ThreadPoolExecutor(workers)
    try:
        found = pool.map(lambda files: _inspect(files, classes, listing.merge_labels), listing.cases)
        for done, one in enumerate(found, start=1):
            if isinstance(one, Problem):
                problems.append(one)
            else:
                scans.append(one)
            if progress is not None:
                progress("check", done, len(listing.cases))
    finally:
        pool.shutdown(cancel_futures=True)  # whoever interrupts does not wait for the cases that were not begun
    return scans, problems


def _inspect(files: CaseFiles, classes: int, merge: bool) -> _Scan | Problem:
    try:
        return _Scan(files, inspect_scan(files.image, files.label, classes, merge))
    except DataError as error:
        return fault_of(files, error)


def _case(files: CaseFiles, facts: ScanFacts | None, quarantined: bool) -> CheckedCase:
    kept = {name: value for name, value in asdict(facts).items() if name in CheckedCase.model_fields} if facts else {}
    return CheckedCase(
        id=files.id,
        site=files.site,
        split=files.split,
        image=str(files.image),
        label=str(files.label),
        quarantined=quarantined,
        **kept,
    )


def _not_classes(scans: Sequence[_Scan]) -> list[Problem]:
    """Masks whose values can hardly be classes, where nothing names these."""
    return [
        Problem(
            kind="mask",
            case=scan.id,
            site=scan.site,
            reason=f"{scan.files.label}: label value {max(scan.facts.label_values)}, and nothing names the classes; "
            "write masks as 0, 1, 2, ..., of one structure as 0 and 1",
            quarantined=True,
        )
        for scan in scans
        if max(scan.facts.label_values) > MOST_CLASSES
    ]


def _masks(usable: Sequence[_Scan], classes: Sequence[str]) -> list[Problem]:
    """Masks that are right one by one, but leave a question."""
    named = " or ".join(classes) or "the structures"
    problems = [
        Problem(
            kind="mask",
            case=scan.id,
            site=scan.site,
            reason=f"{scan.files.label}: nothing is labelled; right for a patient without {named}, else "
            "export the mask again",
            quarantined=False,
        )
        for scan in usable
        if scan.facts.label_values == (0,)
    ]
    occurring = {value for scan in usable for value in scan.facts.label_values}
    for value, name in enumerate(classes, start=1):
        if usable and value not in occurring:
            reason = f"class {name} (label value {value}) is in no mask; number the values 1, 2, ... or drop the class"
            problems.append(Problem(kind="mask", reason=reason, quarantined=False))
    return problems


def _sites(listing: Listing, usable: Sequence[_Scan], problems: Sequence[Problem]) -> dict[str, SiteSummary]:
    """Figures of every site that has a case, usable or not."""
    left_out = Counter(problem.site for problem in problems if problem.quarantined and problem.case)
    summaries = {}
    for site in sorted({files.site for files in listing.cases} | (left_out.keys() - {""})):
        own = [scan for scan in usable if scan.site == site]
        by_size = sorted((scan.facts.shape for scan in own), key=lambda shape: (prod(shape), shape))
        splits = [str(scan.split or "undecided") for scan in own]
        summaries[site] = SiteSummary(
            cases={split: splits.count(split) for split in (*SPLITS, "undecided")},
            left_out=left_out[site],
            slices_mm=_range([scan.slices_mm for scan in own]),
            pixels_mm=_range([scan.pixels_mm for scan in own]),
            orientations=dict(Counter(scan.facts.orientation for scan in own)),
            label_values=tuple(sorted({value for scan in own for value in scan.facts.label_values})),
            smallest=by_size[0] if own else None,
            largest=by_size[-1] if own else None,
        )
    return summaries


def _range(values: Sequence[float]) -> Range | None:
    return (min(values), median(values), max(values)) if values else None


def _splits(sites: Mapping[str, SiteSummary], listed: Set[str]) -> list[Problem]:
    """Sites that have nothing to train on, or nothing to test on."""
    problems = []
    for name, site in sites.items():
        if name not in listed:
            reason = f"site {name}: the files of none of its cases are complete; the cohort goes without the site"
        elif not _trains(site):
            reason = f"site {name}: no training case can be used; mend or add one, or leave the site out"
        elif site.cases["test"] == 0 and site.cases["undecided"] < 2:
            reason = f"site {name}: no test case; it trains, but no score tells how well it fares"
        else:
            continue
        problems.append(Problem(kind="layout", site=name, reason=reason, quarantined=False))
    return problems


def _trains(site: SiteSummary) -> bool:
    """Whether a site has a training case, now or when the splits are drawn."""
    return site.cases["train"] + site.cases["undecided"] > 0


def _cohort(
    path: Path,
    source: str,
    sites_csv: Path | None,
    site: str | None,
    listing: Listing,
    classes: Sequence[str],
    usable: Sequence[_Scan],
) -> dict[str, Any]:
    """Settings that read this cohort; what the layout says for itself is left out."""
    folder = os.path.abspath(path)
    settings: dict[str, Any] = {"name": re.sub(r"[^A-Za-z0-9._-]+", "-", Path(folder).name).strip("-._") or source}
    if site is None:
        settings |= {"source": source, "path": folder}
        if sites_csv is not None:
            settings["sites_csv"] = os.path.abspath(sites_csv)
    else:
        settings["sites"] = {site: folder}
    if listing.classes is None or tuple(classes) != listing.classes:
        settings["classes"] = list(classes)
    if listing.modality is None:
        lowest = min((scan.facts.intensity["min"] for scan in usable), default=0.0)
        settings["modality"] = "ct" if lowest < HOUNSFIELD else "mri"
    return settings


def _advice(
    usable: Sequence[_Scan],
    problems: Sequence[Problem],
    untrained: Sequence[str],
    named: Sequence[str],
    cohort: Mapping[str, Any],
) -> Iterator[str]:
    """What to do, most pressing first."""
    left_out = len({(problem.case, problem.site) for problem in problems if problem.quarantined})
    leaking = sum(problem.kind == "leakage" for problem in problems)
    if not usable:
        yield "no case can be used: mend what is listed, then check again"
        return
    if left_out:
        yield f"{left_out} left out, {len(usable)} used: mend what is listed, or go on without; --strict stops instead"
    if untrained:
        yield f"give {', '.join(untrained)} a training case, or leave the site out: without one prepare stops"
    if leaking:
        yield f"{leaking} of them would be trained on though they are tested on: mend the split at its source"
    if any(problem.kind == "release" for problem in problems):
        yield "say beside every score which release of the data set this is"
    apart = [scan.slices_mm for scan in usable]
    if max(apart) > 2 * min(apart):
        yield (
            f"slices are {min(apart):.3g} to {max(apart):.3g} mm apart: each scan keeps its own spacing, unless "
            "preprocess.spacing gives one for all"
        )
    if not named:
        yield "nothing names the classes: put your names for label values 1, 2, ... in place of class-1, ..."
    if "modality" in cohort:
        yield f"nothing names the modality: by its values it looks like {cohort['modality']}; make sure"
    if "sites" in cohort:
        yield "this is one site's own folder: the coordinator lists the folders of all sites under cohort.sites"
