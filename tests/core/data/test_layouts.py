"""KiTS19, IXI and prostate as they lie on disk, with the quirks that they have, and `check` finds what is planted."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fedsam_core.data.check import Report, check
from fedsam_core.data.cohort import CohortConfig, read_cohort
from fedsam_core.data.sources import Listing
from fedsam_core.data.sources.ixi import FED_IXI_TEST, list_ixi
from fedsam_core.data.sources.kits19 import FED_KITS19, list_kits19
from fedsam_core.data.sources.layouts import detect
from fedsam_core.data.sources.prostate import FLAP_TEST, list_prostate
from fedsam_core.errors import DataError

IPL = np.array([[0.0, 0, -0.8, 60], [0, -0.8, 0, 70], [-5.0, 0, 0, 900], [0, 0, 0, 1]])  # KiTS: slices downwards first


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = IPL) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(nib.Nifti1Image(voxels, affine).to_bytes(), 1))


def scan(seed: int, shape: tuple[int, ...] = (6, 12, 10)) -> np.ndarray:
    return np.random.default_rng(seed).normal(40, 60, shape).round().astype(np.int16)


def mask(seed: int = 0, value: int = 1, shape: tuple[int, ...] = (6, 12, 10), dtype: Any = np.uint8) -> np.ndarray:
    voxels = np.zeros(shape, dtype)
    voxels[1:-1, 2 : 6 + seed % 3, 2:7] = 1
    voxels[2, 3:5, 3 : 5 + seed % 2] = value
    voxels[1, seed % 12, seed % 10] = 1  # no two masks alike
    return voxels


def kits_case(root: Path, number: int, dtype: Any = np.uint8) -> Path:
    folder = root / "data" / f"case_{number:05d}"
    save(folder / "imaging.nii.gz", scan(number))
    save(folder / "segmentation.nii.gz", mask(number, 2, dtype=dtype))
    return folder


def reasons(found: Report | Listing, kind: str | None = None, quarantined: bool | None = None) -> list[str]:
    return [
        problem.reason
        for problem in found.problems
        if kind in (None, problem.kind) and quarantined in (None, problem.quarantined)
    ]


def cases_left_out(found: Report | Listing) -> set[str]:
    return {problem.case for problem in found.problems if problem.quarantined}


# The published splits


def test_published_splits_have_the_published_numbers(real_data: Path) -> None:
    counts = {site: (len(train), len(test)) for site, (train, test) in FED_KITS19.items()}
    assert counts == {"A": (9, 3), "B": (11, 3), "C": (9, 3), "D": (9, 3), "E": (12, 4), "F": (24, 6)}
    rows = (real_data / "kits19" / "fed_kits19_sites.csv").read_text().splitlines()[1:]
    ours = [
        f"case_{number:05d},{site},{split}"
        for site, parts in FED_KITS19.items()
        for split, numbers in zip(("train", "test"), parts, strict=True)
        for number in numbers
    ]
    assert sorted(ours) == sorted(rows)
    assert {site: len(set(numbers)) for site, numbers in FED_IXI_TEST.items()} == {"Guys": 62, "HH": 36, "IOP": 15}
    assert {site: len(numbers) for site, numbers in FLAP_TEST.items()} == {
        "RUNMC": 6,
        "BMC": 6,
        "I2CVB": 4,
        "UCL": 3,
        "BIDMC": 3,
        "HK": 3,
    }


# KiTS19


def test_kits_as_it_is_downloaded(tmp_path: Path) -> None:
    for number in (21, 15, 181, 5):
        kits_case(tmp_path, number, np.uint16 if number == 21 else np.uint8)
    for number in (210, 255):
        save(tmp_path / "data" / f"case_{number:05d}" / "imaging.nii.gz", scan(number))  # the challenge's test set
    (kits_case(tmp_path, 38) / "imaging.nii.gz").unlink()  # the repository holds masks alone
    (kits_case(tmp_path, 55) / "segmentation.nii.gz").unlink()
    for path in (tmp_path, tmp_path / "data"):
        assert detect(path) == "kits19"
        listing = list_kits19(path)
        assert [(f.id, f.site, f.split) for f in listing.cases] == [
            ("case_00005", "F", "train"),
            ("case_00021", "A", "train"),
            ("case_00181", "A", "test"),
        ]
        assert (listing.classes, listing.modality) == (("kidney", "tumour"), "ct")
        assert listing.scored_as == {"kidney": ("kidney", "tumour")}
        assert len(cases_left_out(listing)) == 96 - 3
        said = "\n".join(reasons(listing))
        assert "case_00038/imaging.nii.gz: no scan" in said
        assert "get_imaging.py" in said
        assert "case_00055/segmentation.nii.gz: no mask" in said
        assert "2 cases of the challenge's test set" in said
        assert "1 case is there but not listed, so not used (case_00015)" in said
        assert "case_00022: no such folder" in said


def test_kits_with_a_table_of_ones_own(tmp_path: Path) -> None:
    for number in (1, 2, 15, 37):
        kits_case(tmp_path, number)
    rows = ["case,site,split", *(f"case_{n:05d},mine,{'test' if n == 2 else 'train'}" for n in (1, 2, 15, 37))]
    (tmp_path / "sites.csv").write_text("\n".join(rows))
    listing = list_kits19(tmp_path)
    assert {(f.site, f.split) for f in listing.cases} == {("mine", "train"), ("mine", "test")}
    (corrected,) = reasons(listing, "release")
    assert "case_00015, case_00037 were corrected after the release" in corrected
    cohort = read_cohort(CohortConfig(name="k", source="kits19", path=tmp_path), tmp_path)
    assert cohort.structures == ((1, 2), (2,))
    assert {case.orientation for case in cohort.cases} == {"IPL"}
    assert cohort.cases[0].spacing == pytest.approx((5, 0.8, 0.8))


@pytest.mark.real_data
def test_check_on_the_real_kits_masks(real_data: Path, tmp_path: Path) -> None:
    """Twelve real masks, two a site (axes I,P,L, 0.5 to 5 mm apart, two of them uint16), with imaging made to fit."""
    sources = sorted((real_data / "kits19" / "data").iterdir())
    dtypes = set()
    for source in sources:
        label = nib.load(source / "segmentation.nii.gz")
        voxels = np.asarray(label.dataobj)
        dtypes.add(voxels.dtype.name)
        folder = tmp_path / "data" / source.name
        folder.mkdir(parents=True)
        (folder / "segmentation.nii.gz").symlink_to(source / "segmentation.nii.gz")
        image = np.where(voxels > 0, np.int16(40), np.int16(-100))
        image[0, 0, 0] = int(source.name[-3:])
        save(folder / "imaging.nii.gz", image, label.affine)
    assert dtypes == {"uint8", "uint16"}
    image = nib.load(tmp_path / "data/case_00038/imaging.nii.gz")
    save(tmp_path / "data/case_00038/imaging.nii.gz", np.asarray(image.dataobj)[:-1], image.affine)
    broken = tmp_path / "data/case_00113/imaging.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-500])

    report = check(tmp_path)
    assert report.source == "kits19"
    assert len(report.cases) == 12
    assert sum(case.quarantined for case in report.cases) == 2
    assert len(cases_left_out(report)) == 84 + 2
    (shape,) = reasons(report, "mask", True)
    assert "case_00038/segmentation.nii.gz: mask of shape (32, 512, 512) for a scan of shape (31, 512, 512)" in shape
    (truncated,) = reasons(report, "unreadable", True)
    assert "case_00113/imaging.nii.gz: truncated" in truncated
    usable = [case for case in report.cases if not case.quarantined]
    assert {case.orientation for case in usable} == {"IPL"}
    assert min(case.spacing[0] for case in usable) == 0.5
    assert max(case.spacing[0] for case in usable) == 5
    assert report.sites["C"].slices_mm == (0.5, 0.75, 1.0)
    assert report.sites["C"].largest == (548, 512, 512)
    assert {value for case in usable for value in case.label_values} == {0, 1, 2}


# IXI


def ixi_subject(root: Path, name: str, value: int = 1) -> Path:
    seed = int(name[3:6])
    affine = np.diag([2.5, 4.0, 4.0, 1])
    save(root / "IXI_sample" / name / "T1" / f"{name}-T1_image.nii.gz", scan(seed), affine)
    save(root / "IXI_sample" / name / "label" / f"{name}-T1_label.nii.gz", mask(seed) * np.uint8(value), affine)
    return root / "IXI_sample" / name


def test_ixi_as_it_is_downloaded(tmp_path: Path) -> None:
    names = ["IXI002-Guys-0828", "IXI016-Guys-0697", "IXI012-HH-1211", "IXI013-HH-1212", "IXI231-IOP-0866"]
    for name in names:
        ixi_subject(tmp_path, name, value=255 if "IOP" in name else 1)
    ixi_subject(tmp_path, "IXI035-IOP-0873")
    (ixi_subject(tmp_path, "IXI014-HH-1236") / "label" / "IXI014-HH-1236-T1_label.nii.gz").unlink()
    twice = ixi_subject(tmp_path, "IXI019-Guys-0702") / "T1" / "copy_image.nii.gz"
    save(twice, scan(1))
    (tmp_path / "IXI_sample" / "IXI9-Guys").mkdir()
    assert detect(tmp_path) == detect(tmp_path / "IXI_sample") == "ixi"
    listing = list_ixi(tmp_path)
    assert {f.id: (f.site, f.split) for f in listing.cases} == {
        "IXI002-Guys-0828": ("Guys", "test"),
        "IXI012-HH-1211": ("HH", "test"),
        "IXI013-HH-1212": ("HH", "train"),
        "IXI016-Guys-0697": ("Guys", "train"),
        "IXI035-IOP-0873": ("IOP", "train"),
        "IXI231-IOP-0866": ("IOP", "test"),
    }
    assert cases_left_out(listing) == {"IXI014-HH-1236", "IXI019-Guys-0702", "IXI9-Guys"}
    report = check(tmp_path)
    assert report.modality == "mri"
    assert {case.label_values for case in report.cases} == {(0, 1)}  # 255 means brain as well
    assert {site: summary.cases["test"] for site, summary in report.sites.items()} == {"Guys": 1, "HH": 1, "IOP": 1}


# Prostate


def prostate_case(root: Path, site: str, number: int, suffix: str = "_segmentation", **how: Any) -> None:
    seed = number + 100 * sorted(FLAP_TEST).index(site)
    affine = np.diag([0.6, 0.6, 3.6, 1])
    label = np.moveaxis(mask(seed, **how), 0, 2)
    save(root / site / f"Case{number:02d}.nii.gz", np.moveaxis(scan(seed), 0, 2), affine)
    save(root / site / f"Case{number:02d}{suffix}.nii.gz", label, affine)


def prostate_tree(root: Path) -> None:
    for site, numbers in FLAP_TEST.items():
        for number in (*numbers, 40, 47):  # numbers have gaps
            suffix = "_Segmentation" if site in ("BMC", "HK") else "_segmentation"
            prostate_case(root, site, number, suffix, value=3 if site == "BIDMC" else 1)


def test_prostate_as_it_is_downloaded(tmp_path: Path) -> None:
    prostate_tree(tmp_path)
    (tmp_path / "UCL" / "Case40_segmentation.nii.gz").unlink()
    (tmp_path / "BMC" / "Case47.nii.gz").rename(tmp_path / "BMC" / "case47.nii.gz")
    (tmp_path / "readme").mkdir()
    assert detect(tmp_path) == "prostate"
    listing = list_prostate(tmp_path)
    tests = {site: sum(f.split == "test" for f in listing.cases if f.site == site) for site in FLAP_TEST}
    assert tests == {site: len(numbers) for site, numbers in FLAP_TEST.items()}
    assert sum(f.split == "train" for f in listing.cases) == 11
    assert cases_left_out(listing) == {"UCL_Case40"}
    assert any("readme" in reason for reason in reasons(listing, quarantined=False))
    cohort = read_cohort(CohortConfig(name="p", source="prostate", path=tmp_path), tmp_path)
    assert {case.label_values for case in cohort.cases} == {(0, 1)}  # 3 in BIDMC's masks counts as 1
    assert not [problem for problem in cohort.problems if problem.kind == "release"]


def test_the_clipped_release_is_noticed(tmp_path: Path) -> None:
    prostate_tree(tmp_path)
    affine = np.diag([0.6, 0.6, 3.6, 1])
    for file in (tmp_path / "HK").iterdir():
        voxels = np.asarray(nib.load(file).dataobj)[:, :, 1:-1]  # the slices that show the prostate
        save(file, voxels, affine)
    report = check(tmp_path)
    (clipped,) = reasons(report, "release")
    assert clipped.startswith("site HK: 5 of 5 cases have a label in every slice")
    assert report.verdict != "unusable"


# What is planted is found


@pytest.fixture
def planted(tmp_path: Path, decathlon: Path, save: Callable[..., None]) -> tuple[Report, Path]:
    """The Decathlon cohort with one fault of each kind."""
    root = decathlon
    loaded = {n: np.asarray(nib.load(root / f"imagesTr/{n}.nii.gz").dataobj) for n in ("a1", "a5", "b5", "b0")}
    labels = {n: np.asarray(nib.load(root / f"labelsTr/{n}.nii.gz").dataobj) for n in ("a1", "b0")}
    (root / "imagesTr/a0.nii.gz").write_bytes((root / "imagesTr/a0.nii.gz").read_bytes()[:-200])
    save(root / "labelsTr/a2.nii.gz", np.zeros((12, 10, 7), np.uint8))
    nan = loaded["a1"].copy()
    nan[0, 0, 0] = np.nan
    save(root / "imagesTr/a3.nii.gz", nan)
    save(root / "labelsTr/a4.nii.gz", np.full((12, 10, 8), 7, np.uint8))
    save(root / "imagesTr/b1.nii", loaded["a5"])  # a test scan of another site, uncompressed
    (root / "imagesTr/b1.nii.gz").unlink()
    save(root / "imagesTr/b2.nii.gz", loaded["b0"])  # the same scan twice in training
    shifted = np.array([[1.0, 0, 0, 4], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
    save(root / "labelsTr/b3.nii.gz", labels["b0"], shifted)
    (root / "labelsTr/b4.nii.gz").unlink()
    table = root / "sites.csv"
    table.write_text(table.read_text() + "gone,site-a,train\nodd,site-b,trian\n")
    return check(root), root


def test_every_planted_fault_is_found(planted: tuple[Report, Path]) -> None:
    report, root = planted
    by_case = {problem.case: problem for problem in report.problems if problem.quarantined}
    expected = {
        "a0": ("unreadable", "truncated"),
        "a2": ("mask", "mask of shape (12, 10, 7)"),
        "a3": ("scan", "NaN"),
        "a4": ("mask", "label value 7"),
        "b1": ("leakage", "voxel for voxel the same scan as a5"),
        "b3": ("mask", "4 mm off"),
        "b4": ("layout", "no mask"),
        "gone": ("layout", "no scan"),
        "odd": ("layout", "'trian'"),
    }
    assert {case: problem.kind for case, problem in by_case.items()} == {c: kind for c, (kind, _) in expected.items()}
    for case, (_, words) in expected.items():
        assert words in by_case[case].reason
        assert "\n" not in by_case[case].reason
    assert any("b2: voxel for voxel the same scan as b0" in reason for reason in reasons(report, "duplicate", False))
    assert (report.verdict, report.sites["site-b"].cases["test"]) == ("usable", 1)
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert {"cases", "problems"} <= written.keys()
    assert {case["id"] for case in written["cases"] if not case["quarantined"]} == {"a1", "a5", "b0", "b2", "b5"}
    cohort = read_cohort(CohortConfig(name="t", source="nifti", path=root), root)
    assert {case.id for case in cohort.cases} == {"a1", "a5", "b0", "b2", "b5"}
    assert {problem.case for problem in cohort.problems if problem.quarantined} == by_case.keys()


def test_a_sound_cohort_is_ready(decathlon: Path) -> None:
    report = check(decathlon)
    assert report.verdict == "ready"
    assert not reasons(report, quarantined=True)
    assert {site: summary.cases["train"] for site, summary in report.sites.items()} == {"site-a": 5, "site-b": 5}
    assert report.cohort["path"] == str(decathlon)


def test_one_sites_own_folder(site_folders: Path) -> None:
    report = check(site_folders / "X", site="X", classes=("kidney", "tumour"))
    assert (len(report.cases), list(report.sites)) == (10, ["X"])
    with pytest.raises(DataError, match="one site's own folder"):
        detect(site_folders / "X")


def test_no_layout_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no layout that is known; looked for imagesTr .*case_00000.*IXI_sample"):
        detect(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        detect(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="a file, not a folder"):
        detect(tmp_path / "file")


@pytest.mark.real_data
def test_check_on_the_hippocampus(real_data: Path) -> None:
    report = check(real_data / "Task04_Hippocampus")
    assert (len(report.cases), report.verdict, report.classes) == (66, "ready", ("Anterior", "Posterior"))
    counts = {site: (s.cases["train"], s.cases["test"]) for site, s in report.sites.items()}
    assert counts == {"site-a": (16, 6), "site-b": (22, 8), "site-c": (10, 4)}
