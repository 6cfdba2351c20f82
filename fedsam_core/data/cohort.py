"""Cohort, site, case: which scans there are, whose they are, what they serve for, and what they contain.

The manifest lists every case with its geometry, intensities and content hashes, so that later steps need not open the
scans again to know them, and two people can tell whether they hold the same cohort.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fedsam_core.data.findings import Opened, fault_of, find_clipped, find_duplicates
from fedsam_core.data.scans import inspect_scan
from fedsam_core.data.sources import CaseFiles, Listing, Modality, Problem, Split
from fedsam_core.data.sources.layouts import list_source
from fedsam_core.data.sources.nifti import list_site
from fedsam_core.data.sources.phantom import PhantomConfig, list_phantom
from fedsam_core.errors import DataError
from fedsam_core.hashing import derive_seed, stable_hash
from fedsam_core.settings import Settings

Progress = Callable[[str, int, int], None]  # stage, done, total
Each = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
"""Applies a picklable function to every item and gives the results in order: `map`, or the same in parallel."""

Source = Literal["nifti", "kits19", "ixi", "prostate", "phantom"]


class Case(Settings):
    """One scan with its label map. A case belongs to one site."""

    id: str = Field(description="name of the case, unique in the cohort")
    site: str = Field(description="hospital that holds the case")
    split: Split = Field(description="what the case serves for: train, val or test")
    image: str = Field(description="path of the scan: .nii, .nii.gz or the folder of a DICOM series")
    label: str | None = Field(description="path of the label map; null for a scan that is only predicted on")
    merge_labels: bool = Field(default=False, description="label values over 1 count as 1")
    shape: tuple[int, int, int] = Field(description="voxels of the scan's own grid (X, Y, Z)")
    spacing: tuple[float, float, float] = Field(description="voxel size along X, Y, Z in mm")
    orientation: str = Field(description="axis codes of X, Y, Z: the directions in which the indices grow, like RAS")
    label_values: tuple[int, ...] = Field(description="values that occur in the label map, 0 included")
    intensity: dict[str, float] = Field(description="min, max, p01, p99, mean, std of the scan's voxels")
    image_sha256: str = Field(description="SHA-256 of the scan's file")
    label_sha256: str | None = Field(description="SHA-256 of the label map's file")
    content: str = Field(default="", description="SHA-256 of the voxels: equal for one scan stored in two ways")
    label_content: str = Field(default="", description="the same of the label map; empty where nothing is labelled")
    labelled_slices: tuple[int, int] = Field(default=(0, 0), description="slices with a label, and all slices")


class Cohort(Settings):
    """All cases of a study, or those of one site. Label value k means `classes[k - 1]`; 0 is background."""

    name: str = Field(description="name of the cohort")
    source: Source = Field(description="reader that listed it")
    modality: Modality = Field(description="ct (Hounsfield units) or mri (arbitrary units)")
    classes: tuple[str, ...] = Field(description="foreground classes in the order of their label values 1, 2, ...")
    scored_as: dict[str, tuple[str, ...]] = Field(
        default={}, description="classes that are scored as a union of classes, such as kidney: [kidney, tumour]"
    )
    synthetic: bool = Field(description="true if the scans were made by a program and belong to no patient")
    cases: tuple[Case, ...] = Field(description="the cases, in the order of their names")
    problems: tuple[Problem, ...] = Field(default=(), description="cases left out, with the reason, and warnings")

    @property
    def structures(self) -> tuple[tuple[int, ...], ...]:
        """Per class, the label values that count as it when it is scored."""
        values = {name: value for value, name in enumerate(self.classes, start=1)}
        return tuple(tuple(sorted(values[part] for part in self.scored_as.get(name, (name,)))) for name in self.classes)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, sorted."""
        return tuple(sorted({case.site for case in self.cases}))

    def select(self, site: str | None = None, split: Split | None = None) -> tuple[Case, ...]:
        """Cases of a site and/or a split, in the manifest's order."""
        return tuple(c for c in self.cases if site in (None, c.site) and split in (None, c.split))

    def share_hash(self, site: str) -> str:
        """SHA-256 (hex) of the content of a site's share: files by their hashes, splits, classes; no path, no name."""
        own = sorted((c.id, c.site, c.split, c.image_sha256, c.label_sha256 or "") for c in self.select(site))
        meaning = {"modality": self.modality, "classes": self.classes, "scored_as": self.scored_as}
        return stable_hash({**meaning, "cases": own})

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over the shares of all sites: whoever knows their hashes knows it, and no case."""
        return cohort_hash({site: self.share_hash(site) for site in self.sites})


def cohort_hash(shares: Mapping[str, str]) -> str:
    """Hash of a cohort from the hashes of its sites' shares."""
    return stable_hash(dict(shares))


class CohortConfig(Settings):
    """Where the scans are and how they are shared out."""

    name: str = Field(description="name of the cohort, used in titles and folders", pattern=r"^[\w][\w.-]*$")
    source: Source = Field(
        default="nifti",
        description="layout of `path`: nifti (Decathlon, nnU-Net, a folder a site), kits19, ixi, prostate; or phantom: "
        "synthetic CT made on the spot",
    )
    path: Path | None = Field(default=None, description="folder that holds the scans of all sites")
    sites: dict[str, Path] | None = Field(
        default=None,
        description="instead of `path`: folder of each site's own scans, on the site's own node, by the site's name",
    )
    sites_csv: Path | None = Field(
        default=None,
        description="table with the columns case,site,split; default: sites.csv in `path`, else the published split",
    )
    modality: Modality | None = Field(default=None, description="ct or mri; default: what the layout says")
    classes: tuple[str, ...] | None = Field(
        default=None, description="names of label values 1, 2, ...; default: what the layout says"
    )
    scored_as: dict[str, tuple[str, ...]] | None = Field(
        default=None,
        description="classes scored as a union, such as {kidney: [kidney, tumour]}; default: what the layout says",
    )
    strict: bool = Field(
        default=False, description="stop at the first case that cannot be used, instead of leaving it out with a reason"
    )
    val_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="share of each site's training cases used for validation; 0: none"
    )
    test_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="share of each site's cases used for testing where no split is given"
    )
    split_seed: int = Field(default=0, description="seed of the splits that are drawn")
    phantom: PhantomConfig = Field(default=PhantomConfig(), description="what the phantom source makes")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.source == "phantom":
            return self
        if self.sites is not None and (self.path is not None or self.sites_csv is not None or self.source != "nifti"):
            raise ValueError(
                "`sites` gives each site's own folder (source nifti, with a splits.csv in it): leave out path and "
                "sites_csv"
            )
        if self.path is None and not self.sites:
            raise ValueError(
                f"source {self.source} needs `path`, the folder that holds the scans, or `sites`, a folder a site"
            )
        if odd := [site for site in self.sites or {} if not re.fullmatch(r"\w[\w-]*", site)]:
            raise ValueError(
                f"site name {odd[0]!r} in `sites`: use letters, digits, dash and underscore, no dash first"
            )
        return self


def list_cohort(
    config: CohortConfig, work_dir: Path, progress: Progress | None = None, site: str | None = None
) -> Listing:
    """Which files make up which cases, of all sites or of one; no voxel is read.

    Args:
        work_dir: where the phantom source writes its scans; other sources write nothing.
        progress: called as (stage, done, total) while the phantom is made.
        site: only this one; with `config.sites` no other folder is looked at.

    Raises:
        DataError: the layout makes no sense as a whole, or classes or modality are nowhere said.
    """
    if config.source == "phantom":
        listing = list_phantom(config.phantom, work_dir, progress)
    elif config.sites is not None:
        listing = _join([list_site(name, path) for name, path in config.sites.items() if site in (None, name)])
    else:
        assert config.path is not None  # checked by CohortConfig
        listing = list_source(config.source, config.path, config.sites_csv)
    classes, modality = config.classes or listing.classes, config.modality or listing.modality
    where = config.path or config.name
    if not classes:
        raise DataError(f"{where}: no dataset.json names the classes; set cohort.classes, like [kidney, tumour]")
    if modality is None:
        raise DataError(f"{where}: no dataset.json names the modality; set cohort.modality to ct or mri")
    if twice := next((name for name in classes if classes.count(name) > 1), None):
        raise DataError(
            f"{where}: class {twice} is there twice; give each label value a name of its own (cohort.classes)"
        )
    scored_as = listing.scored_as if config.scored_as is None else config.scored_as
    for name, parts in scored_as.items():
        if unknown := [part for part in (name, *parts) if part not in classes]:
            raise DataError(f"{where}: cohort.scored_as names {unknown[0]}, which is not among {', '.join(classes)}")
    return replace(
        listing,
        cases=tuple(files for files in listing.cases if site in (None, files.site)),
        problems=tuple(problem for problem in listing.problems if site in (None, problem.site) or not problem.site),
        classes=tuple(classes),
        modality=modality,
        scored_as=scored_as,
    )


def _join(listings: Sequence[Listing]) -> Listing:
    """The listings of several sites as one. What only one of them says counts for all; they must not disagree."""
    first = listings[0]
    for other in listings[1:]:
        if (first.classes, first.modality) != (other.classes, other.modality):
            raise DataError(
                f"sites disagree on what their labels mean ({first.classes} and {other.classes}, {first.modality} and "
                f"{other.modality}): set cohort.classes and cohort.modality"
            )
    cases = tuple(files for listing in listings for files in listing.cases)
    return replace(first, cases=cases, problems=tuple(problem for listing in listings for problem in listing.problems))


def read_cohort(
    config: CohortConfig,
    work_dir: Path,
    progress: Progress | None = None,
    site: str | None = None,
    each: Each = map,
) -> Cohort:
    """List the cases of `config` and open every scan once: geometry, intensities, hashes, faults.

    A case that cannot be used is left out and listed in `Cohort.problems` with the reason. So is the training or
    validation copy of a scan that is a test case too: a model that has seen it would be scored on it.

    Args:
        work_dir, site: see `list_cohort`.
        progress: called as (stage, done, total) after each case.
        each: how the scans are gone through.

    Raises:
        DataError: naming the file, site or row that is wrong, and the fix: the cohort makes no sense as a whole, a site
            has no training case left, or, with `config.strict`, the first case that would be left out.
    """
    listing = list_cohort(config, work_dir, progress, site)
    assert listing.classes is not None  # by list_cohort
    assert listing.modality is not None
    problems = list(listing.problems)
    _stop_if(config.strict, problems)
    files = sorted(listing.cases, key=lambda files: files.id)
    inspect = partial(_inspect, classes=len(listing.classes), merge=listing.merge_labels)
    opened: list[Opened] = []
    for done, found in enumerate(each(inspect, files), start=1):
        if isinstance(found, Problem):
            problems.append(found)
            _stop_if(config.strict, problems)
        else:
            opened.append(found)
        if progress is not None:
            progress("read", done, len(files))
    problems += find_duplicates(one.compared for one in opened)
    if config.source == "prostate":
        problems += find_clipped(opened)
    _stop_if(config.strict, problems)
    left_out = {problem.case for problem in problems if problem.quarantined}
    usable = [one for one in opened if one.id not in left_out]
    for name in sorted({one.site for one in files} | ({site} if site else set())):
        if not any(one.site == name and one.split in ("train", None) for one in usable):
            raise DataError(_nothing_to_train_on(name, problems))
    splits = _splits(usable, config)
    return Cohort(
        name=config.name,
        source=config.source,
        modality=listing.modality,
        classes=listing.classes,
        scored_as=dict(listing.scored_as),
        synthetic=listing.synthetic,
        cases=tuple(_case(one, splits[one.id], listing.merge_labels) for one in usable),
        problems=tuple(problems),
    )


def without(cohort: Cohort, problems: Sequence[Problem], strict: bool) -> Cohort:
    """A cohort with what is found about its cases: those that are quarantined are left out.

    Raises:
        DataError: no training case is left, or with `strict`, a case is left out.
    """
    new = [problem for problem in problems if problem not in cohort.problems]
    _stop_if(strict, new)
    left_out = {problem.case for problem in new if problem.quarantined}
    cases = tuple(case for case in cohort.cases if case.id not in left_out)
    for site in cohort.sites:
        if not any(case.site == site and case.split == "train" for case in cases):
            raise DataError(_nothing_to_train_on(site, new))
    return cohort.model_copy(update={"cases": cases, "problems": (*cohort.problems, *new)})


def _nothing_to_train_on(site: str, problems: Iterable[Problem]) -> str:
    reason = next((problem.reason for problem in problems if problem.quarantined and problem.site == site), "")
    return (
        f"site {site}: no training case; give it at least one row with split train in sites.csv, or leave the site out"
        + (f" (of those left out, the first: {reason})" if reason else "")
    )


def _stop_if(strict: bool, problems: Iterable[Problem]) -> None:
    if strict and (first := next((problem for problem in problems if problem.quarantined), None)):
        raise DataError(first.reason)


def _inspect(files: CaseFiles, classes: int, merge: bool) -> Opened | Problem:
    """A fault of one case is a value, not an exception: the others go on."""
    try:
        return Opened(files, inspect_scan(files.image, files.label, classes, merge))
    except DataError as error:
        return fault_of(files, error)


def _case(opened: Opened, split: Split, merge: bool) -> Case:
    files = opened.files
    return Case(
        id=files.id,
        site=files.site,
        split=split,
        image=str(files.image),
        label=str(files.label),
        merge_labels=merge,
        **asdict(opened.facts),
    )


def _splits(cases: Sequence[Opened], config: CohortConfig) -> dict[str, Split]:
    """The split of every case: as given, else test drawn from all of a site; validation drawn from what trains.

    A scan that is there twice is never drawn: one copy would be trained on, the other scored.
    """
    splits: dict[str, Split] = {}
    for site in sorted({case.site for case in cases}):
        members = [case for case in cases if case.site == site]
        contents = [case.facts.content for case in members]
        once = {case.id for case in members if contents.count(case.facts.content) == 1}
        undecided = [case.id for case in members if case.split is None]
        n_test = min(max(1, round(config.test_fraction * len(undecided))), len(undecided) - 1) if undecided else 0
        test = _draw(once.intersection(undecided), n_test, config.split_seed, "test")
        splits |= {case.id: case.split or ("test" if case.id in test else "train") for case in members}

        train = [case.id for case in members if splits[case.id] == "train"]
        if any(splits[case.id] == "val" for case in members):
            continue  # the site chose its validation cases itself
        n_val = round(config.val_fraction * len(train))
        if config.val_fraction > 0 and len(train) >= 4:
            n_val = max(1, n_val)
        val = _draw(once.intersection(train), min(n_val, len(train) - 1), config.split_seed, "val")
        splits |= dict.fromkeys(val, "val")
    return splits


def _draw(ids: Iterable[str], count: int, seed: int, purpose: str) -> set[str]:
    """`count` of `ids`, by the rank of a seeded hash: a case's luck does not depend on which other cases there are."""
    return set(sorted(ids, key=lambda case: derive_seed(seed, purpose, case))[:count])
