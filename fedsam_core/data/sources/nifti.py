"""NIfTI cohorts as people keep them: Medical Segmentation Decathlon, nnU-Net, or one folder a site.

Decathlon and nnU-Net, recognised by `imagesTr`; the table says whose the cases are:

    PATH/dataset.json                                    modality and class names
    PATH/imagesTr/CASE.nii.gz                            nnU-Net: CASE_0000.nii.gz, single channel
    PATH/labelsTr/CASE.nii.gz
    PATH/sites.csv                                       case,site,split

Folder per site, each site in any of these forms; a case is known as SITE_CASE, so that sites may number their cases
alike:

    PATH/SITE/CASE.nii.gz or CASE_image.nii.gz           with CASE_seg, _label, _mask or _segmentation.nii.gz
    PATH/SITE/images/CASE.nii.gz                         with labels/CASE.nii.gz
    PATH/SITE/imagesTr/CASE.nii.gz                       with labelsTr/CASE.nii.gz, as above; dataset.json optional
    PATH/sites.csv                                       optional: case,site,split; or case,split in SITE/splits.csv;
                                                         without them the splits are drawn

In place of a scan's file there may be a folder CASE with its DICOM series, in place of a mask's a DICOM segmentation
(CASE_seg.dcm and so on). Names that begin with a dot (such as the `._*` files of macOS) are not scans. `.nii` serves as
well as `.nii.gz`.

A fault of one case leaves that case out, with a problem in the listing that says why.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from fedsam_core.data.dicom import is_series
from fedsam_core.data.sources import CaseFiles, Listing, Modality
from fedsam_core.data.sources.tables import (
    EXAMPLE,
    Faults,
    Pair,
    bad_name,
    is_name,
    read_table,
    share_out,
)
from fedsam_core.errors import DataError

_LABEL_SUFFIX = re.compile(r"_(seg|label|mask|segmentation)$", re.IGNORECASE)
_IMAGE_SUFFIX = re.compile(r"_image$", re.IGNORECASE)
_CHANNEL = re.compile(r"_\d{4}$")
_NOTHING = re.compile(r"$^")

_File = tuple[str, Path]  # name without extension, path


def list_nifti(path: Path, sites_csv: Path | None = None) -> Listing:
    """List the cases of a folder in one of the layouts above.

    Args:
        path: the cohort's folder.
        sites_csv: the table; None takes `path/sites.csv` if it is there.

    Raises:
        DataError: the folder is in none of these layouts, or a table or description that it needs is missing or broken.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; set cohort.path to the folder that holds the scans")
    if sites_csv is None and (path / "sites.csv").is_file():
        sites_csv = path / "sites.csv"
    if (path / "imagesTr").is_dir():
        return _list_decathlon(path, sites_csv)
    return _list_site_folders(path, sites_csv)


def list_site(site: str, path: Path, table: Path | None = None) -> Listing:
    """List the cases of one site from its own folder, which is in one of the forms of a site's folder above.

    Args:
        table: case,split; None takes `path/splits.csv` if it is there, else the splits are drawn.

    Raises:
        DataError: the site's name cannot serve, the folder holds no scans, or a table or description is broken.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; give the folder that holds the scans of site {site}")
    if not is_name(site):
        raise DataError(bad_name(site, path))
    faults = Faults(by_site=True)
    pairs = _pair_up(path, site, faults)
    cases = _own_split(path, site, pairs, table, faults)
    return _listing(path, cases, faults)


def _list_decathlon(path: Path, sites_csv: Path | None) -> Listing:
    description = _read_description(path / "dataset.json")
    faults = Faults()
    pairs = _pair_decathlon(path, "", description, faults)
    if not pairs and not faults.problems:
        raise DataError(f"{path / 'imagesTr'}: no .nii.gz file in it; copy the scans there")
    if sites_csv is None:
        example = EXAMPLE.format(case=pairs[0].case if pairs else "CASE")
        raise DataError(f"{path}: no sites.csv, so nothing says which site holds which case; write one with {example}")
    table = read_table(sites_csv, faults)
    cases = share_out(pairs, table, faults, lambda row: path / "imagesTr")
    faults.name_sites(table.rows.values())
    return _listing(path, cases, faults)


def _list_site_folders(path: Path, sites_csv: Path | None) -> Listing:
    faults = Faults(by_site=True)
    pairs: list[Pair] = []
    cases: list[CaseFiles] = []
    for folder in sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")):
        site = folder.name
        try:
            if not is_name(site):
                raise DataError(bad_name(site, folder))
            found = _pair_up(folder, site, faults)
            if sites_csv is None:
                cases += _own_split(folder, site, found, None, faults)
            pairs += found
        except DataError as error:  # a fault of the site, not of the others
            faults.leave_out("", str(error), site)
    if not pairs and not any(problem.case for problem in faults.problems):
        raise DataError(
            f"{path}: no scans found; expected imagesTr and labelsTr (Decathlon, nnU-Net) or a folder a site with "
            "CASE.nii.gz and CASE_seg.nii.gz in it"
        )
    if sites_csv is not None:
        cases = share_out(pairs, read_table(sites_csv, faults), faults, lambda row: path / row.site)
    names = Counter(files.id for files in cases)
    for name in (name for name, count in names.items() if count > 1):
        faults.leave_out(name, f"{path}: two cases would both be called {name}; rename one of the files")
    return _listing(path, [files for files in cases if names[files.id] == 1], faults)


def _listing(path: Path, cases: list[CaseFiles], faults: Faults) -> Listing:
    description = _read_description(path / "dataset.json") if (path / "dataset.json").is_file() else {}
    classes = _classes(description, path / "dataset.json")
    return Listing(tuple(cases), classes, _modality(description), problems=tuple(faults.problems))


def _own_split(folder: Path, site: str, pairs: list[Pair], table: Path | None, faults: Faults) -> list[CaseFiles]:
    """Cases of one site, by its own table; without one nothing is said of their splits."""
    if table is None and (folder / "splits.csv").is_file():
        table = folder / "splits.csv"
    if table is not None:
        return share_out(pairs, read_table(table, faults, site), faults, lambda row: folder)
    return [
        CaseFiles(faults.id(site, pair.case), site, None, pair.image, pair.label)
        for pair in pairs
        if not faults.has(site, pair.case)
    ]


def _pair_up(folder: Path, site: str, faults: Faults) -> list[Pair]:
    """Scan and mask of every case of one site.

    Raises:
        DataError: of the folder as a whole: no scans, no folder of masks, a description that is broken.
    """
    before = len(faults.problems)
    if (folder / "imagesTr").is_dir():
        description = _read_description(folder / "dataset.json") if (folder / "dataset.json").is_file() else {}
        pairs = _pair_decathlon(folder, site, description, faults)
    elif (folder / "images").is_dir():
        images = _name(_files(folder / "images", site, faults)[0], _NOTHING, site, faults)
        labels = _name(_files(folder / "labels", site, faults)[1], _NOTHING, site, faults)
        pairs = _match(images, labels, site, f"{folder / 'labels'}/{{}}.nii.gz", faults)
    else:
        scans, masks = _files(folder, site, faults)
        images = _name([(n, file) for n, file in scans if not _LABEL_SUFFIX.search(n)], _IMAGE_SUFFIX, site, faults)
        labels = _name([(n, file) for n, file in masks if _LABEL_SUFFIX.search(n)], _LABEL_SUFFIX, site, faults)
        pairs = _match(images, labels, site, f"{folder}/{{}}_seg.nii.gz", faults)
    if not pairs and len(faults.problems) == before:
        if is_series(folder):
            raise DataError(
                f"{folder}: a DICOM series directly in a site's folder; put each series into a folder of its own, "
                "named after the case, with CASE_seg.nii.gz or CASE_seg.dcm beside it"
            )
        raise DataError(
            f"{folder}: a site's folder without scans; put CASE.nii.gz and CASE_seg.nii.gz in it or move it away"
        )
    return pairs


def _pair_decathlon(folder: Path, site: str, description: dict[str, Any], faults: Faults) -> list[Pair]:
    """Scan and mask of every case in imagesTr and labelsTr."""
    scans = _files(folder / "imagesTr", site, faults)[0]
    suffix = _NOTHING
    if "channel_names" in description or (scans and all(_CHANNEL.search(name) for name, _ in scans)):
        scans, suffix = _first_channel(scans, site, faults), _CHANNEL
    images = _name(scans, suffix, site, faults)
    labels = _name(_files(folder / "labelsTr", site, faults)[1], _NOTHING, site, faults)
    return _match(images, labels, site, f"labelsTr/{{}}.nii.gz beside {folder / 'imagesTr'}", faults)


def _files(folder: Path, site: str, faults: Faults) -> tuple[list[_File], list[_File]]:
    """What in a folder may be a scan (NIfTI, folder of a DICOM series), and what a mask (NIfTI, .dcm), sorted."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; the layout needs it beside the scans")
    scans: list[_File] = []
    masks: list[_File] = []
    for file in sorted(folder.iterdir()):
        if file.name.startswith("."):
            continue
        if file.is_dir():
            try:
                scans += [(file.name, file)] if is_series(file) else []
            except DataError as error:
                faults.leave_out(file.name, str(error), site, "unreadable")
        elif file.name.endswith((".nii", ".nii.gz")):
            named = (re.sub(r"\.nii(\.gz)?$", "", file.name), file)
            scans.append(named)
            masks.append(named)
        elif file.name.endswith(".dcm"):
            masks.append((file.stem, file))
    return scans, masks


def _first_channel(scans: list[_File], site: str, faults: Faults) -> list[_File]:
    """nnU-Net's CASE_0000 only. A second channel or a name without channel is a fault of the case."""
    for name, path in scans:
        if not _CHANNEL.search(name):
            faults.leave_out(name, f"{path}: nnU-Net names its scans CASE_0000.nii.gz; rename the file", site)
        elif not name.endswith("_0000"):
            reason = f"{path}: a second channel; only single-channel scans are read: keep the _0000 files"
            faults.leave_out(_CHANNEL.sub("", name), reason, site)
    return [(name, path) for name, path in scans if name.endswith("_0000")]


def _name(files: list[_File], suffix: re.Pattern[str], site: str, faults: Faults) -> dict[str, Path]:
    """Files by their case, which is their name without `suffix`. Two of the same case are a fault of the case."""
    named: dict[str, Path] = {}
    for name, path in files:
        case = suffix.sub("", name)
        if not is_name(case):
            faults.leave_out(case, bad_name(case, path), site)
        elif case in named:
            reason = f"{path}: case {case} is there twice, also as {named[case].name}; keep one of them"
            faults.leave_out(case, reason, site)
        else:
            named[case] = path
    return named


def _match(images: dict[str, Path], labels: dict[str, Path], site: str, expected: str, faults: Faults) -> list[Pair]:
    """Scans with their masks. One without the other is a fault of the case."""
    for name, path in images.items():
        if name not in labels:
            reason = f"{path}: no mask; expected {expected.format(name)}, add it or move the scan away"
            faults.leave_out(name, reason, site)
    for name, path in labels.items():
        if name not in images:
            reason = f"{path}: a mask without its scan; add the scan or move the mask away"
            faults.leave_out(name, reason, site)
    return [Pair(name, site, image, labels[name]) for name, image in images.items() if name in labels]


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
