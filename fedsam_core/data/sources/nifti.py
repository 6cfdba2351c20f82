"""NIfTI cohorts as people keep them: Medical Segmentation Decathlon, nnU-Net, or one folder a site.

Decathlon and nnU-Net, recognised by `imagesTr`; the table says whose the cases are:

    PATH/dataset.json                                    modality and class names
    PATH/imagesTr/CASE.nii.gz                            nnU-Net: CASE_0000.nii.gz, single channel
    PATH/labelsTr/CASE.nii.gz
    PATH/sites.csv                                       case,site,split

Folder per site, each site in either form; a case is known as SITE_CASE, so that sites may number their cases alike:

    PATH/SITE/CASE.nii.gz or CASE_image.nii.gz           with CASE_seg, _label, _mask or _segmentation.nii.gz
    PATH/SITE/images/CASE.nii.gz                         with labels/CASE.nii.gz
    PATH/sites.csv                                       optional; without it the splits are drawn

Names that begin with a dot (such as the `._*` files of macOS) are not scans. `.nii` serves as well as `.nii.gz`.
"""

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsam_core.data.sources import SPLITS, CaseFiles, Listing, Modality, Split
from fedsam_core.errors import DataError

_LABEL_SUFFIX = re.compile(r"_(seg|label|mask|segmentation)$", re.IGNORECASE)
_IMAGE_SUFFIX = re.compile(r"_image$", re.IGNORECASE)
_NAME = re.compile(r"^\w[\w.-]*$")  # a case or site names files and folders later
_EXAMPLE = "case,site,split on the first line, then rows such as {case},site-a,train"


@dataclass(frozen=True)
class _Row:
    """One row of sites.csv."""

    line: int
    case: str
    site: str
    split: Split


def list_nifti(path: Path, sites_csv: Path | None = None) -> Listing:
    """List the cases of a folder in one of the layouts above.

    Args:
        path: the cohort's folder.
        sites_csv: the table; None takes `path/sites.csv` if it is there.

    Raises:
        DataError: for a layout that is not one of these, a scan without mask or mask without scan, a row without
            scan or scan without row, a case twice, an unknown split.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; set cohort.path to the folder that holds the scans")
    if sites_csv is None and (path / "sites.csv").is_file():
        sites_csv = path / "sites.csv"
    if (path / "imagesTr").is_dir():
        return _list_decathlon(path, sites_csv)
    return _list_site_folders(path, sites_csv)


def _list_decathlon(path: Path, sites_csv: Path | None) -> Listing:
    description = _read_description(path / "dataset.json")
    images = _scans(path / "imagesTr")
    if "channel_names" in description or (images and all(re.search(r"_\d{4}$", name) for name in images)):
        images = _strip_channel(images)
    labels = _scans(path / "labelsTr")
    _match(images, labels, f"labelsTr/{{}}.nii.gz beside {path / 'imagesTr'}")
    if not images:
        raise DataError(f"{path / 'imagesTr'}: no .nii.gz file in it; copy the scans there")
    if sites_csv is None:
        example = _EXAMPLE.format(case=next(iter(images)))
        raise DataError(f"{path}: no sites.csv, so nothing says which site holds which case; write one with {example}")

    rows = _read_rows(sites_csv)
    by_case: dict[str, _Row] = {}
    for row in rows:
        if row.case in by_case:
            raise DataError(f"{sites_csv}, line {row.line}: case {row.case} is listed twice; keep one row a case")
        if row.case not in images:
            raise DataError(
                f"{sites_csv}, line {row.line}: case {row.case} has no scan in {path / 'imagesTr'}; "
                "add the scan or delete the row"
            )
        by_case[row.case] = row
    for name, image in images.items():
        if name not in by_case:
            raise DataError(
                f"{image}: no row in {sites_csv}; add one, such as {name},site-a,train, or move the scan away"
            )
    cases = tuple(
        CaseFiles(name, by_case[name].site, by_case[name].split, image, labels[name]) for name, image in images.items()
    )
    return Listing(cases, _classes(description, path / "dataset.json"), _modality(description))


def _list_site_folders(path: Path, sites_csv: Path | None) -> Listing:
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    pairs = {(f.name, case): files for f in folders for case, files in _list_site(f).items()}
    if not pairs:
        raise DataError(
            f"{path}: no scans found; expected imagesTr and labelsTr (Decathlon, nnU-Net) or a folder a site with "
            "CASE.nii.gz and CASE_seg.nii.gz in it"
        )
    splits: dict[tuple[str, str], Split] = {}
    if sites_csv is not None:
        for row in _read_rows(sites_csv):
            key = (row.site, row.case)
            if key in splits:
                raise DataError(
                    f"{sites_csv}, line {row.line}: case {row.case} of {row.site} is listed twice; keep one row"
                )
            if key not in pairs:
                raise DataError(
                    f"{sites_csv}, line {row.line}: no scan {row.case} in {path / row.site}; "
                    "add the scan or delete the row"
                )
            splits[key] = row.split
        for (site, case), (image, _) in pairs.items():
            if (site, case) not in splits:
                raise DataError(
                    f"{image}: no row in {sites_csv}; add one, such as {case},{site},train, or move the scan away"
                )
    cases = tuple(
        CaseFiles(f"{site}_{case}", site, splits.get((site, case)), image, label)
        for (site, case), (image, label) in pairs.items()
    )
    clash = _first_repeated(files.id for files in cases)
    if clash is not None:
        raise DataError(f"{path}: two cases would both be called {clash}; rename one of the files")
    description = _read_description(path / "dataset.json") if (path / "dataset.json").is_file() else {}
    return Listing(cases, _classes(description, path / "dataset.json"), _modality(description))


def _list_site(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Scan and mask of every case of one site."""
    if (folder / "images").is_dir():
        images, labels = _scans(folder / "images"), _scans(folder / "labels")
        _match(images, labels, f"{folder / 'labels'}/{{}}.nii.gz")
    else:
        files = _scans(folder)
        images = _rename(((n, p) for n, p in files.items() if not _LABEL_SUFFIX.search(n)), _IMAGE_SUFFIX)
        labels = _rename(((n, p) for n, p in files.items() if _LABEL_SUFFIX.search(n)), _LABEL_SUFFIX)
        _match(images, labels, f"{folder}/{{}}_seg.nii.gz")
    if not images:
        raise DataError(
            f"{folder}: a site's folder without scans; put CASE.nii.gz and CASE_seg.nii.gz in it or move it away"
        )
    _check_name(folder.name, folder)
    return {name: (image, labels[name]) for name, image in images.items()}


def _scans(folder: Path) -> dict[str, Path]:
    """NIfTI files of a folder by name without extension, sorted. Raises DataError for X.nii beside X.nii.gz."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; the layout needs it beside the scans")
    found: list[tuple[str, Path]] = []
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or not file.name.endswith((".nii", ".nii.gz")):
            continue
        found.append((re.sub(r"\.nii(\.gz)?$", "", file.name), file))
    return _rename(found, re.compile("$^"))


def _rename(files: Iterable[tuple[str, Path]], suffix: re.Pattern[str]) -> dict[str, Path]:
    """Names without `suffix`. Raises DataError if two files then name the same case."""
    named: dict[str, Path] = {}
    for name, path in files:
        case = suffix.sub("", name)
        _check_name(case, path)
        if case in named:
            raise DataError(f"{path}: case {case} is there twice, also as {named[case].name}; keep one of them")
        named[case] = path
    return named


def _strip_channel(images: dict[str, Path]) -> dict[str, Path]:
    """nnU-Net's CASE_0000 -> CASE. Raises DataError for a second channel or a name without channel."""
    for name, path in images.items():
        if re.search(r"_\d{4}$", name) and not name.endswith("_0000"):
            raise DataError(f"{path}: a second channel; only single-channel scans are read: keep the _0000 files")
        if not name.endswith("_0000"):
            raise DataError(f"{path}: nnU-Net names its scans CASE_0000.nii.gz; rename the file")
    return _rename(images.items(), re.compile(r"_0000$"))


def _match(images: dict[str, Path], labels: dict[str, Path], expected: str) -> None:
    for name, path in images.items():
        if name not in labels:
            raise DataError(f"{path}: no mask; expected {expected.format(name)}, add it or move the scan away")
    for name, path in labels.items():
        if name not in images:
            raise DataError(f"{path}: a mask without its scan; add the scan or move the mask away")


def _read_rows(table: Path) -> list[_Row]:
    try:
        text = table.read_text(encoding="utf-8-sig")  # spreadsheets like to begin with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table}: cannot read the table of sites as UTF-8 text; check cohort.sites_csv") from error
    lines = csv.DictReader(text.splitlines(), skipinitialspace=True)
    missing = [name for name in ("case", "site", "split") if name not in (lines.fieldnames or ())]
    if missing:
        example = _EXAMPLE.format(case="CASE")
        raise DataError(f"{table}: no column {', '.join(missing)}; write {example}")
    rows = []
    for line in lines:
        where = f"{table}, line {lines.line_num}"
        case, site, split = ((line[name] or "").strip() for name in ("case", "site", "split"))
        known: dict[str, Split] = {word: word for word in SPLITS}
        if split not in known:
            raise DataError(f"{where}: split {split!r} is not one of {', '.join(SPLITS)}; mend the row")
        _check_name(case, where)
        _check_name(site, where)
        rows.append(_Row(lines.line_num, case, site, known[split]))
    return rows


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: missing; Decathlon and nnU-Net cohorts name modality and classes there: copy it")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); mend or copy it again") from error
    if not isinstance(description, dict):
        raise DataError(f"{path}: not a JSON object; copy it again")
    channels = description.get("channel_names", description.get("modality", {}))
    if isinstance(channels, dict) and len(channels) > 1:
        names = ", ".join(str(name) for name in channels.values())
        raise DataError(
            f"{path}: {len(channels)} channels ({names}); only single-channel scans are read: keep one of them"
        )
    return description


def _classes(description: dict[str, Any], path: Path) -> tuple[str, ...] | None:
    """Foreground classes by label value. Decathlon writes {"1": "kidney"}, nnU-Net {"kidney": 1}."""
    labels = description.get("labels")
    if labels is None:
        return None
    try:
        named = (
            {int(k): str(v) if not str(v).isdigit() else "" for k, v in labels.items()}
            if all(str(k).isdigit() for k in labels)
            else {int(v): str(k) for k, v in labels.items()}
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: labels must give each class one value (regions are not read); name them in cohort.classes"
        ) from error
    if sorted(named) != list(range(len(named))):
        raise DataError(f"{path}: label values {sorted(named)} are not 0, 1, 2, ...; renumber the masks and the file")
    return tuple(named[value] for value in range(1, len(named)))


def _modality(description: dict[str, Any]) -> Modality | None:
    channels = description.get("channel_names", description.get("modality"))
    if isinstance(channels, dict) and channels:
        channels = next(iter(channels.values()))
    if not isinstance(channels, str):
        return None
    word = channels.lower()
    if word.startswith("ct"):
        return "ct"
    return "mri" if re.match(r"mr|t1|t2|flair|pd|adc|dwi", word) else None


def _check_name(name: str, where: Path | str) -> None:
    if not _NAME.match(name):
        raise DataError(
            f"{where}: name {name!r}; cases and sites may have letters, digits, dot, dash and underscore only"
        )


def _first_repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
