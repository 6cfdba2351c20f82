"""Prostate MRI of six sites (SAML, Liu et al. 2020), as it lies on disk:

    PATH/RUNMC/Case00.nii.gz                             and BMC, I2CVB, UCL, BIDMC, HK
    PATH/RUNMC/Case00_segmentation.nii.gz                or Case00_Segmentation.nii.gz
    PATH/sites.csv                                       optional: case,site,split, a case as Case00

Upper and lower case vary, numbers have gaps, and some sites write zones apart: label values over 1 count as 1. Without
a table the split is that of FLAP-SAM. Cases are known as SITE_CaseNN.
"""

import re
from pathlib import Path

from fedsam_core.data.sources import CaseFiles, Listing
from fedsam_core.data.sources.tables import Faults, Pair, read_table, share_out, some
from fedsam_core.errors import DataError

# Numbers of the test cases in FLAP-SAM (arXiv 2407.21739); the other cases of a site are for training.
FLAP_TEST: dict[str, tuple[int, ...]] = {
    "RUNMC": (3, 8, 12, 15, 18, 26),
    "BMC": (3, 8, 12, 15, 18, 26),
    "I2CVB": (3, 8, 13, 15),
    "UCL": (1, 32, 34),
    "BIDMC": (0, 4, 9),
    "HK": (38, 41, 46),
}
_FILE = re.compile(r"case(\d+)(_segmentation)?\.nii(\.gz)?", re.IGNORECASE)


def list_prostate(path: Path, sites_csv: Path | None = None) -> Listing:
    """List the prostate data set.

    Args:
        path: folder that holds the sites' folders.
        sites_csv: case,site,split; None takes `path/sites.csv` if it is there, else FLAP-SAM's split.

    Raises:
        DataError: none of the sites' folders is there, or a table that cannot be read.
    """
    present = site_folders(path)
    if not present:
        raise DataError(f"{path}: no folder {', '.join(FLAP_TEST)}; set cohort.path to the folder that holds them")
    if sites_csv is None and (path / "sites.csv").is_file():
        sites_csv = path / "sites.csv"
    faults = Faults(by_site=True)
    for site in FLAP_TEST:
        if site not in present:
            faults.warn(f"{path / site}: no such folder; the cohort goes without this site unless you copy it", site)
    others = [f.name for f in sorted(path.iterdir()) if f.is_dir() and f.name not in present and f.name[0] != "."]
    if others:
        faults.warn(f"{path}: folders that are none of the data set's sites ({some(others)}) are not looked at")
    pairs = [pair for site in present for pair in _pair_up(path / site, site, faults)]
    if sites_csv is not None:
        table = read_table(sites_csv, faults)
        cases = share_out(pairs, table, faults, lambda row: path / row.site, partly=True)
    else:
        cases = [
            CaseFiles(
                faults.id(pair.site, pair.case),
                pair.site,
                "test" if int(pair.case.removeprefix("Case")) in FLAP_TEST[pair.site] else "train",
                pair.image,
                pair.label,
            )
            for pair in pairs
            if not faults.has(pair.site, pair.case)
        ]
        for site in present:
            here = {int(pair.case.removeprefix("Case")) for pair in pairs if pair.site == site}
            if missing := [_case(number) for number in FLAP_TEST[site] if number not in here]:
                reason = f"{some(missing)} of FLAP-SAM's test cases are not here: scores do not compare with others"
                faults.warn(f"{path / site}: {reason}", site)
    return Listing(tuple(cases), ("prostate",), "mri", merge_labels=True, problems=tuple(faults.problems))


def site_folders(path: Path) -> list[str]:
    """Names of the sites that have a folder with a scan and its mask, or one of them, in it."""
    return [
        site
        for site in FLAP_TEST
        if (path / site).is_dir() and any(_FILE.fullmatch(file.name) for file in (path / site).iterdir())
    ]


def _pair_up(folder: Path, site: str, faults: Faults) -> list[Pair]:
    """Scan and mask of every case of one site."""
    found: dict[bool, dict[str, Path]] = {False: {}, True: {}}  # by whether it is a mask
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or not file.name.endswith((".nii", ".nii.gz")):
            continue
        parts = _FILE.fullmatch(file.name)
        if parts is None:
            reason = "neither CaseNN.nii.gz nor CaseNN_segmentation.nii.gz; rename the file or move it away"
            faults.leave_out(file.name.partition(".")[0], f"{file}: {reason}", site)
            continue
        case, same = _case(int(parts[1])), found[parts[2] is not None]
        if case in same:
            reason = f"{file}: case {case} is there twice, also as {same[case].name}; keep one of them"
            faults.leave_out(case, reason, site)
        same[case] = file
    images, labels = found[False], found[True]
    for case, file in images.items():
        if case not in labels:
            reason = f"{file}: no mask; expected {folder / case}_segmentation.nii.gz, add it or move the scan away"
            faults.leave_out(case, reason, site)
    for case, file in labels.items():
        if case not in images:
            faults.leave_out(case, f"{file}: a mask without its scan; add the scan or move the mask away", site)
    return [Pair(case, site, image, labels[case]) for case, image in images.items() if case in labels]


def _case(number: int) -> str:
    return f"Case{number:02d}"
