"""IXI Tiny, brains in T1-weighted MRI of three London hospitals, as Fed-IXI lies on disk:

    PATH/IXI_sample/IXI002-Guys-0828/T1/*_image.nii.gz   or PATH itself is that IXI_sample folder
    PATH/IXI_sample/IXI002-Guys-0828/label/*_label.nii.gz
    PATH/sites.csv                                       optional: case,site,split

The site is the middle word of a folder: Guys, HH or IOP. Without a table the split is that of Fed-IXI.

The masks come from a brain extraction and know one structure, brain, so any value but 0 means it: values over 1 (255,
or tissues apart, as tools write them) count as 1.
"""

import re
from pathlib import Path

from fedsam_core.data.sources import CaseFiles, Listing
from fedsam_core.data.sources.tables import Faults, Pair, read_table, share_out, some
from fedsam_core.errors import DataError

SITES = ("Guys", "HH", "IOP")

# Fed-IXI of FLamby (Ogier du Terrail et al. 2022, https://github.com/owkin/FLamby, MIT licence): numbers of the test
# subjects; the other subjects of a site are for training.
FED_IXI_TEST: dict[str, tuple[int, ...]] = {
    "Guys": (
        *(2, 17, 24, 27, 36, 54, 58, 63, 65, 75, 106, 107, 111, 112, 116, 118, 120, 121, 129, 135, 141),
        *(145, 151, 153, 185, 189, 194, 229, 240, 264, 269, 270, 279, 289, 319, 336, 364, 369, 398, 401),
        *(402, 406, 408, 415, 420, 428, 456, 461, 479, 492, 496, 499, 502, 503, 504, 523, 585, 589, 594),
        *(607, 626, 648),
    ),
    "HH": (
        *(12, 15, 34, 49, 97, 127, 148, 161, 201, 211, 214, 218, 248, 254, 256, 282, 313, 327, 328, 329),
        *(362, 383, 437, 444, 451, 485, 511, 518, 519, 524, 586, 598, 612, 633, 634, 635),
    ),
    "IOP": (231, 238, 291, 293, 294, 310, 314, 337, 388, 430, 470, 543, 547, 571, 595),
}
_SUBJECT = re.compile(rf"IXI(\d{{3}})-({'|'.join(SITES)})-\d+")


def list_ixi(path: Path, sites_csv: Path | None = None) -> Listing:
    """List IXI Tiny.

    Args:
        path: folder that holds IXI_sample, or that folder itself.
        sites_csv: case,site,split, a case by the name of its folder; None takes `path/sites.csv` if it is there, else
            Fed-IXI.

    Raises:
        DataError: no folder such as IXI002-Guys-0828, or a table that cannot be read.
    """
    sample = path / "IXI_sample" if (path / "IXI_sample").is_dir() else path
    if not subject_folders(sample):
        raise DataError(f"{path}: no folders such as IXI_sample/IXI002-Guys-0828; set cohort.path to those of IXI Tiny")
    if sites_csv is None and (path / "sites.csv").is_file():
        sites_csv = path / "sites.csv"
    faults = Faults()
    pairs = _pair_up(sample, faults)
    if sites_csv is not None:
        table = read_table(sites_csv, faults)
        cases = share_out(pairs, table, faults, lambda row: sample, partly=True)
        faults.name_sites(table.rows.values())
    else:
        cases = [
            CaseFiles(p.case, p.site, "test" if _number(p.case) in FED_IXI_TEST[p.site] else "train", p.image, p.label)
            for p in pairs
        ]
        present = {_number(folder) for folder in subject_folders(sample)}
        missing = {site: len(set(numbers) - present) for site, numbers in FED_IXI_TEST.items()}
        if any(missing.values()):
            counts = ", ".join(f"{count} of {site}" for site, count in missing.items() if count)
            faults.warn(
                f"{sample}: test subjects of Fed-IXI are not here ({counts}): scores do not compare with others"
            )
    return Listing(tuple(cases), ("brain",), "mri", merge_labels=True, problems=tuple(faults.problems))


def subject_folders(sample: Path) -> list[str]:
    """Names of the folders of subjects, sorted."""
    if not sample.is_dir():
        return []
    return sorted(folder.name for folder in sample.iterdir() if _SUBJECT.fullmatch(folder.name) and folder.is_dir())


def _pair_up(sample: Path, faults: Faults) -> list[Pair]:
    """Scan and mask of every subject."""
    pairs = []
    subjects = subject_folders(sample)
    for case in subjects:
        site = case.split("-")[1]
        found = {}
        for part, suffix in (("T1", "image"), ("label", "label")):
            files = _files(sample / case / part, suffix)
            if len(files) == 1:
                found[part] = files[0]
            else:
                have = f"{len(files)} files {some([file.name for file in files])}" if files else "no file"
                want = "keep one of them" if files else f"copy {case}_{suffix}.nii.gz there or move the folder away"
                faults.leave_out(case, f"{sample / case / part}: {have} for {case}_{suffix}.nii.gz; {want}", site)
        if len(found) == 2:
            pairs.append(Pair(case, site, found["T1"], found["label"]))
    others = [f.name for f in sorted(sample.iterdir()) if f.is_dir() and f.name not in subjects and f.name[0] != "."]
    for name in others:
        if name.startswith("IXI"):
            reason = f"name {name!r} is not IXI, three digits, {', '.join(SITES)}, number, as in IXI002-Guys-0828"
            faults.leave_out(name, f"{sample / name}: {reason}; rename the folder or move it away")
    if odd := [name for name in others if not name.startswith("IXI")]:
        faults.warn(f"{sample}: folders that hold no subject ({some(odd)}) are not looked at")
    return pairs


def _files(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        return []
    pattern = re.compile(rf"[^.].*_{suffix}\.nii(\.gz)?")
    return sorted(file for file in folder.iterdir() if pattern.fullmatch(file.name))


def _number(case: str) -> int:
    return int(case[3:6])
