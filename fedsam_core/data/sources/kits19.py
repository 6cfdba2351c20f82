"""KiTS19, kidneys and their tumours in CT, as the challenge's repository leaves it on disk:

    PATH/data/case_00000/imaging.nii.gz                  or PATH itself is that data folder
    PATH/data/case_00000/segmentation.nii.gz             1 kidney, 2 tumour
    PATH/sites.csv                                       optional: case,site,split

Without a table the cases, sites and splits are those of Fed-KiTS19. Kidney is scored as kidney with its tumour.
"""

import re
from pathlib import Path

from fedsam_core.data.sources import CaseFiles, Listing
from fedsam_core.data.sources.tables import Faults, Row, not_listed, read_table, some
from fedsam_core.errors import DataError

CLASSES = ("kidney", "tumour")
UNLABELLED = range(210, 300)  # the challenge's test set: its labels were never published
CORRECTED = (15, 23, 37, 125)  # their labels were corrected after the release

# Fed-KiTS19 of FLamby (Ogier du Terrail et al. 2022, https://github.com/owkin/FLamby, MIT licence):
# site: (case numbers for training, case numbers for testing).
FED_KITS19: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "A": ((21, 38, 55, 62, 74, 129, 164, 173, 175), (181, 195, 208)),
    "B": ((0, 27, 51, 86, 101, 108, 116, 139, 141, 142, 155), (161, 165, 198)),
    "C": ((3, 14, 33, 42, 98, 100, 102, 103, 120), (154, 156, 157)),
    "D": ((53, 67, 70, 75, 78, 87, 113, 126, 135), (140, 159, 188)),
    "E": ((11, 20, 39, 56, 69, 73, 77, 80, 119, 122, 136, 152), (153, 177, 184, 209)),
    "F": (
        (1, 2, 5, 16, 22, 26, 30, 47, 49, 52, 59, 63, 68, 71, 76, 89, 91, 93, 96, 110, 114, 115, 118, 132),
        (144, 146, 147, 148, 151, 158),
    ),
}


def list_kits19(path: Path, sites_csv: Path | None = None) -> Listing:
    """List KiTS19.

    Args:
        path: folder of the repository, or its data folder.
        sites_csv: case,site,split; None takes `path/sites.csv` if it is there, else Fed-KiTS19.

    Raises:
        DataError: no folder case_00000 or the like, or a table that cannot be read.
    """
    data = path / "data" if (path / "data").is_dir() else path
    present = case_folders(data)
    if not present:
        raise DataError(f"{path}: no folders such as data/case_00000; set cohort.path to the folder of KiTS19")
    if sites_csv is None and (path / "sites.csv").is_file():
        sites_csv = path / "sites.csv"
    faults = Faults()
    rows = _published() if sites_csv is None else read_table(sites_csv, faults).rows
    split = "the split of Fed-KiTS19" if sites_csv is None else str(sites_csv)
    cases = []
    for case, row in sorted(rows.items()):
        if fault := _fault(data / case, split):
            faults.leave_out(case, fault, row.site)
        elif not faults.has(row.site, case):
            image, label = data / case / "imaging.nii.gz", data / case / "segmentation.nii.gz"
            cases.append(CaseFiles(case, row.site, row.split, image, label))
    others = [case for case in present if case not in rows and not faults.has("", case)]
    unlabelled = [c for c in others if _number(c) in UNLABELLED and not (data / c / "segmentation.nii.gz").is_file()]
    if unlabelled:
        faults.warn(
            f"{data}: {len(unlabelled)} cases of the challenge's test set (case_00210 to case_00299) have no published "
            "labels; they are not used, nothing to do"
        )
    if unlisted := [case for case in others if case not in unlabelled]:
        faults.warn(not_listed(unlisted, split))
    if corrected := [files.id for files in cases if _number(files.id) in CORRECTED]:
        faults.warn(
            f"{data}: the labels of {some(corrected)} were corrected after the release; make sure that yours are of "
            "the repository's present state (git pull)",
            kind="release",
        )
    return Listing(
        tuple(cases),
        CLASSES,
        "ct",
        scored_as={"kidney": CLASSES},
        problems=tuple(faults.problems),
    )


def case_folders(data: Path) -> list[str]:
    """Names of the folders of cases, sorted."""
    if not data.is_dir():
        return []
    return sorted(f.name for f in data.iterdir() if re.fullmatch(r"case_\d{5}", f.name) and f.is_dir())


def _published() -> dict[str, Row]:
    rows = [
        Row(0, f"case_{number:05d}", site, "train" if number in train else "test")
        for site, (train, test) in FED_KITS19.items()
        for number in (*train, *test)
    ]
    return {row.case: row for row in rows}


def _number(case: str) -> int:
    return int(case.removeprefix("case_")) if re.fullmatch(r"case_\d{5}", case) else -1


def _fault(folder: Path, split: str) -> str | None:
    """What a case lacks, and where to get it."""
    image, label = folder / "imaging.nii.gz", folder / "segmentation.nii.gz"
    if not folder.is_dir():
        return (
            f"{folder}: no such folder, but {split} lists the case; download it, or list what you have in a sites.csv"
        )
    if not label.is_file() and _number(folder.name) in UNLABELLED:
        return f"{label}: no mask, KiTS19 never published those of its test set; delete the row from {split}"
    if not label.is_file():
        return f"{label}: no mask; get it again from the repository of KiTS19 (git checkout)"
    if not image.is_file():
        return (
            f"{image}: no scan; the repository of KiTS19 holds the masks alone, download the scans with its "
            "starter_code/get_imaging.py"
        )
    return None
