"""Which of the layouts a folder is in, and listing it by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fedsam_core.data.dicom import is_series
from fedsam_core.data.sources import Listing
from fedsam_core.data.sources.ixi import list_ixi, subject_folders
from fedsam_core.data.sources.kits19 import case_folders, list_kits19
from fedsam_core.data.sources.nifti import list_nifti
from fedsam_core.data.sources.prostate import list_prostate, site_folders
from fedsam_core.errors import DataError

Layout = Literal["kits19", "ixi", "prostate", "nifti"]

LAYOUTS: dict[Layout, Callable[[Path, Path | None], Listing]] = {
    "kits19": list_kits19,
    "ixi": list_ixi,
    "prostate": list_prostate,
    "nifti": list_nifti,
}


def detect(path: Path) -> Layout:
    """Which layout a folder is in.

    Raises:
        DataError: in none of them; says what was looked for.
    """
    if path.is_file():
        raise DataError(f"{path}: a file, not a folder; unpack it if it is an archive, and give the folder of a cohort")
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; give the folder that holds a cohort")
    if (path / "imagesTr").is_dir():
        return "nifti"
    if case_folders(path / "data") or case_folders(path):
        return "kits19"
    if subject_folders(path / "IXI_sample") or subject_folders(path):
        return "ixi"
    if len(site_folders(path)) > 1:  # a hospital of one's own may be called UCL, too
        return "prostate"
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if inner := [f for f in folders if (f / "imagesTr").is_dir() and (f / "sites.csv").is_file()]:
        raise DataError(f"{path}: holds cohorts, but is none; give the folder of one, such as {inner[0]}")
    if any(_holds_scans(folder) for folder in folders):
        return "nifti"
    if _holds_scans(path):
        raise DataError(
            f"{path}: looks like one site's own folder, not like a cohort; check it with --site NAME, or give the "
            "folder above it, which holds a folder a site"
        )
    raise DataError(
        f"{path}: no layout that is known; looked for imagesTr (Decathlon, nnU-Net), data/case_00000 (KiTS19), "
        "IXI_sample/IXI002-Guys-0828 (IXI Tiny), RUNMC, BMC, ... (prostate), and SITE/CASE.nii.gz or SITE/CASE/ with "
        "a DICOM series"
    )


def list_source(source: str, path: Path, sites_csv: Path | None = None) -> Listing:
    """List a cohort in the layout `source`; the arguments and errors of `list_nifti`."""
    for name, lister in LAYOUTS.items():
        if name == source:
            return lister(path, sites_csv)
    raise DataError(f"source {source}: not one of {', '.join(LAYOUTS)}")


def _holds_scans(folder: Path) -> bool:
    """Whether a folder looks like one site's."""
    if (folder / "images").is_dir() or (folder / "imagesTr").is_dir():
        return True
    return any(
        file.name.endswith((".nii", ".nii.gz")) if file.is_file() else file.is_dir() and is_series(file)
        for file in folder.iterdir()
        if not file.name.startswith(".")
    )
