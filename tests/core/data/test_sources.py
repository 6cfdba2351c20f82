"""Listing folders: one bad case leaves the others alone, every form of a site's folder, DICOM, tables, names."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.dicom import write_series

from fedsam_core.data.check import check
from fedsam_core.data.dicom import write_segmentation
from fedsam_core.data.sources import Listing, Problem
from fedsam_core.data.sources.ixi import list_ixi
from fedsam_core.data.sources.kits19 import list_kits19
from fedsam_core.data.sources.layouts import detect, list_source
from fedsam_core.data.sources.nifti import list_nifti, list_site
from fedsam_core.data.sources.prostate import list_prostate
from fedsam_core.errors import DataError

Saver = Callable[..., None]
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def ids(listing: Listing) -> list[str]:
    return [files.id for files in listing.cases]


def left_out(listing: Listing) -> dict[str, Problem]:
    """The quarantined problems by case; none of these is listed as well, and each has its say in one line."""
    problems = [problem for problem in listing.problems if problem.quarantined]
    by_case = {problem.case: problem for problem in problems}
    assert len(by_case) == len(problems), problems
    assert by_case.keys().isdisjoint(ids(listing))
    assert all("\n" not in problem.reason for problem in problems)
    return by_case


def touch(*files: Path) -> None:
    """Listing reads no voxel: empty files will do."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def pairs(folder: Path, *cases: str) -> None:
    touch(*(folder / f"{case}{end}.nii.gz" for case in cases for end in ("", "_seg")))


# A fault of one case


def test_a_fault_has_one_problem_and_no_echo(decathlon: Path, save: Saver) -> None:
    """The scan, the mask and the row of a bad case are all there or not: it is said once, with its site."""
    save(decathlon / "imagesTr/a0.nii", np.zeros((2, 2, 2)))
    (decathlon / "labelsTr/a1.nii.gz").unlink()
    (decathlon / "imagesTr/a2.nii.gz").unlink()
    for folder in ("imagesTr", "labelsTr"):
        (decathlon / folder / "b0.nii.gz").unlink()
        (decathlon / folder / "b1.nii.gz").rename(decathlon / folder / "b 1.nii.gz")
    table = decathlon / "sites.csv"
    rows = table.read_text().replace("b2,site-b,train", "b2,site-b,tset").replace("b3,site-b,train\n", "")
    table.write_text(rows.replace("b1,site-b,train\n", "") + "b4,site-a,test\nb9/x,site-b,train\n")
    listing = list_nifti(decathlon)
    assert ids(listing) == ["a3", "a4", "a5", "b5"]
    found = left_out(listing)
    assert {case: (problem.site, problem.kind) for case, problem in found.items()} == {
        "a0": ("site-a", "layout"),
        "a1": ("site-a", "layout"),
        "a2": ("site-a", "layout"),
        "b 1": ("", "layout"),
        "b0": ("site-b", "layout"),
        "b2": ("site-b", "layout"),
        "b3": ("", "layout"),
        "b4": ("site-a", "layout"),
        "b9/x": ("site-b", "layout"),
    }
    for case, words in (
        ("a0", "case a0 is there twice"),
        ("a1", "no mask; expected labelsTr/a1.nii.gz"),
        ("a2", "a mask without its scan"),
        ("b 1", "letters, digits"),
        ("b0", "line 8: case b0 has no scan"),
        ("b2", "split 'tset' is not one of"),
        ("b3", "no row in"),
        ("b4", "case b4 is listed twice"),
        ("b9/x", "name 'b9/x'"),
    ):
        assert words in found[case].reason


def test_nnunet_channels_are_faults_of_their_case(decathlon: Path) -> None:
    for image in list((decathlon / "imagesTr").iterdir()):
        image.rename(image.with_name(image.name.replace(".nii.gz", "_0000.nii.gz")))
    touch(decathlon / "imagesTr/a0_0001.nii.gz")
    (decathlon / "dataset.json").write_text('{"channel_names": {"0": "T2"}, "labels": {"background": 0, "x": 1}}')
    touch(decathlon / "imagesTr/plain.nii.gz")
    listing = list_nifti(decathlon)
    found = left_out(listing)
    assert {case: problem.site for case, problem in found.items()} == {"a0": "site-a", "plain": ""}
    assert "a second channel" in found["a0"].reason
    assert "nnU-Net names its scans CASE_0000.nii.gz" in found["plain"].reason
    assert len(listing.cases) == 11


def test_a_site_that_cannot_be_read_leaves_the_others(tmp_path: Path) -> None:
    pairs(tmp_path / "good", "c1", "c2")
    touch(tmp_path / "halved" / "images" / "c1.nii.gz")
    pairs(tmp_path / "bad name", "c1")
    (tmp_path / "notes").mkdir()
    pairs(tmp_path / "table", "c1")
    (tmp_path / "table" / "splits.csv").write_text("case;split\nc1;train\n")
    listing = list_nifti(tmp_path)
    assert ids(listing) == ["good_c1", "good_c2"]
    sites = {problem.site: problem for problem in listing.problems}
    assert all(problem.quarantined and not problem.case for problem in listing.problems)
    for site, words in (
        ("halved", "labels: no such folder"),
        ("bad name", "letters, digits"),
        ("notes", "without scans"),
        ("table", "no column case, split; write case,split"),
    ):
        assert words in sites[site].reason
    assert len(sites) == 4


def test_two_cases_of_one_name_are_both_left_out(tmp_path: Path) -> None:
    pairs(tmp_path / "a", "b_c", "d")
    pairs(tmp_path / "a_b", "c")
    listing = list_nifti(tmp_path)
    assert ids(listing) == ["a_d"]
    assert "would both be called a_b_c" in left_out(listing)["a_b_c"].reason


def test_rows_of_site_folders(tmp_path: Path) -> None:
    pairs(tmp_path / "x", "c1", "c2", "c3")
    pairs(tmp_path / "y", "c1")
    (tmp_path / "sites.csv").write_text(
        "\ufeffcase, site, split\nc1, x, test\nc2, x, train\nc2,x,test\nc1,y,val\nc7,y,train\nc1,z,train\n",
        encoding="utf-8",
    )
    listing = list_nifti(tmp_path)
    assert [(f.id, f.site, f.split) for f in listing.cases] == [("x_c1", "x", "test"), ("y_c1", "y", "val")]
    found = left_out(listing)
    assert found.keys() == {"x_c2", "x_c3", "y_c7", "z_c1"}
    assert "line 4: case c2 of x is listed twice" in found["x_c2"].reason
    assert "add one, such as c3,x,train" in found["x_c3"].reason
    assert f"case c7 has no scan in {tmp_path / 'y'}" in found["y_c7"].reason


# One site's own folder


@pytest.mark.parametrize("form", ["side by side", "images", "imagesTr", "nnunet"])
def test_forms_of_a_sites_own_folder(tmp_path: Path, form: str) -> None:
    for case in ("c1", "c2"):
        files = {
            "side by side": (f"{case}_image.nii.gz", f"{case}_Mask.nii"),
            "images": (f"images/{case}.nii", f"labels/{case}.nii.gz"),
            "imagesTr": (f"imagesTr/{case}.nii.gz", f"labelsTr/{case}.nii.gz"),
            "nnunet": (f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz"),
        }[form]
        touch(*(tmp_path / file for file in files))
    listing = list_site("ucl", tmp_path)
    assert [(f.id, f.site, f.split) for f in listing.cases] == [("ucl_c1", "ucl", None), ("ucl_c2", "ucl", None)]
    assert (listing.classes, listing.modality, listing.problems) == (None, None, ())
    (tmp_path / "dataset.json").write_text('{"modality": {"0": "CT"}, "labels": {"0": "b", "1": "kidney"}}')
    (tmp_path / "splits.csv").write_text("case,split\nc1,test\nc3,train\n")
    listing = list_site("ucl", tmp_path)
    assert [(f.id, f.split) for f in listing.cases] == [("ucl_c1", "test")]
    assert (listing.classes, listing.modality) == (("kidney",), "ct")
    found = left_out(listing)
    assert f"case c3 has no scan in {tmp_path};" in found["ucl_c3"].reason
    assert "add one, such as c2,train, or" in found["ucl_c2"].reason
    other = tmp_path / "other.csv"
    other.write_text("case,split\nc1,train\nc2,val\n")
    assert [f.split for f in list_site("ucl", tmp_path, other).cases] == ["train", "val"]


def test_a_sites_folder_that_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder; give the folder that holds the scans of site ucl"):
        list_site("ucl", tmp_path / "nowhere")
    with pytest.raises(DataError, match="without scans"):
        list_site("ucl", tmp_path)
    with pytest.raises(DataError, match="name 'u/c'"):
        list_site("u/c", tmp_path)


# DICOM


def series(folder: Path, seed: int) -> np.ndarray:
    """A made-up CT series; returns its voxels [columns, rows, slices]."""
    voxels = np.random.default_rng(seed).integers(-100, 200, (10, 12, 5)).astype(np.float32)
    write_series(folder, voxels, AFFINE, seed=seed)
    return voxels


def test_a_case_may_be_the_folder_of_a_dicom_series(tmp_path: Path, save: Saver) -> None:
    """With its mask as NIfTI or as DICOM segmentation beside it, among cases in NIfTI, and opened by check."""
    site = tmp_path / "dicom"
    label = np.zeros((10, 12, 5), np.uint8)
    label[2:5, 3:7, 1:3] = 1
    scans = {case: series(site / case, seed) for seed, case in enumerate(("p1", "p2", "p3"))}
    label_p2 = np.flip(label, 0).copy()
    write_segmentation(label, site / "p1", ["kidney"], site / "p1_seg.dcm")
    save(site / "p2_label.nii.gz", label_p2, AFFINE)
    save(site / "p4.nii.gz", scans["p1"] + 1, AFFINE)
    save(site / "p4_seg.nii.gz", np.roll(label, 1, 1), AFFINE)
    (site / "reports").mkdir()
    (site / "reports" / "p1.txt").write_text("no scan")
    for case in ("q1", "q2"):
        series(tmp_path / "split" / "images" / case, ord(case[1]))
    for case, value in (("q1", 2), ("q2", 1)):
        labels = tmp_path / "split" / "labels"
        labels.mkdir(exist_ok=True)
        mask = np.roll(label, value, 1)
        write_segmentation(mask, tmp_path / "split" / "images" / case, ["kidney"], labels / f"{case}.dcm")
    assert detect(tmp_path) == "nifti"
    listing = list_source("nifti", tmp_path)
    assert ids(listing) == ["dicom_p1", "dicom_p2", "dicom_p4", "split_q1", "split_q2"]
    assert left_out(listing).keys() == {"dicom_p3"}
    assert f"expected {site}/p3_seg.nii.gz" in left_out(listing)["dicom_p3"].reason
    assert ids(list_site("dicom", site)) == ids(listing)[:3]
    report = check(tmp_path)
    assert {(case.id, case.label_values) for case in report.cases} == {(name, (0, 1)) for name in ids(listing)}
    assert {case.shape for case in report.cases} == {(10, 12, 5)}
    assert not any(case.quarantined for case in report.cases)


def test_a_series_directly_in_a_sites_folder_is_told_where_to_go(tmp_path: Path) -> None:
    series(tmp_path / "ucl", 0)
    with pytest.raises(DataError, match=r"put each series into a folder of its own, named after the case"):
        list_site("ucl", tmp_path / "ucl")


# Published data sets


def test_the_named_data_sets_say_what_they_look_for(tmp_path: Path) -> None:
    for lister, words in (
        (list_kits19, "data/case_00000"),
        (list_ixi, "IXI_sample/IXI002-Guys-0828"),
        (list_prostate, "RUNMC, BMC"),
    ):
        for path in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(DataError, match=words):
                lister(path)
    with pytest.raises(DataError, match="source phantasm: not one of kits19, ixi, prostate, nifti"):
        list_source("phantasm", tmp_path)


def test_a_row_for_what_kits_never_published(tmp_path: Path) -> None:
    for number in (0, 210):
        touch(tmp_path / f"case_{number:05d}" / "imaging.nii.gz")
    touch(tmp_path / "case_00000" / "segmentation.nii.gz")
    table = tmp_path / "mine.csv"
    table.write_text("case,site,split\ncase_00000,x,train\ncase_00210,x,test\ncase_00000,y,test\nodd,x,train\n")
    listing = list_kits19(tmp_path, table)
    found = left_out(listing)
    assert ids(listing) == []
    assert "never published those of its test set; delete the row" in found["case_00210"].reason
    assert "line 4: case case_00000 is listed twice" in found["case_00000"].reason
    assert "odd: no such folder" in found["odd"].reason


def ixi(root: Path, *subjects: str) -> None:
    for name in subjects:
        touch(root / name / "T1" / f"{name}_image.nii.gz", root / name / "label" / f"{name}_label.nii.gz")


def test_a_table_replaces_the_split_of_ixi(tmp_path: Path) -> None:
    ixi(tmp_path, "IXI002-Guys-0828", "IXI012-HH-1211", "IXI013-HH-1212")
    (tmp_path / "IXI012-HH-1211" / "T2").mkdir()
    (tmp_path / "sites.csv").write_text(
        "case,site,split\nIXI002-Guys-0828,london,train\nIXI012-HH-1211,london,test\nIXI020-HH-0001,london,test\n"
    )
    listing = list_ixi(tmp_path)
    assert [(f.id, f.site, f.split) for f in listing.cases] == [
        ("IXI002-Guys-0828", "london", "train"),
        ("IXI012-HH-1211", "london", "test"),
    ]
    assert left_out(listing).keys() == {"IXI020-HH-0001"}
    (warning,) = [problem.reason for problem in listing.problems if not problem.quarantined]
    assert "1 case is there but not listed, so not used (IXI013-HH-1212)" in warning


def test_missing_test_subjects_are_counted(tmp_path: Path) -> None:
    ixi(tmp_path, "IXI002-Guys-0828", "IXI013-HH-1212")
    (tmp_path / "IXI003-Elsewhere-0001").mkdir()
    (tmp_path / "notes").mkdir()
    listing = list_ixi(tmp_path)
    said = [problem.reason for problem in listing.problems if not problem.quarantined]
    assert any("(61 of Guys, 36 of HH, 15 of IOP)" in reason for reason in said)
    assert any("hold no subject (notes)" in reason for reason in said)
    assert left_out(listing).keys() == {"IXI003-Elsewhere-0001"}


def test_faults_and_table_of_the_prostate_data_set(tmp_path: Path) -> None:
    for case in ("UCL/Case01", "UCL/case32", "HK/Case38", "HK/Case40"):
        touch(tmp_path / f"{case}.nii.gz", tmp_path / f"{case}_SEGMENTATION.nii.gz")
    touch(tmp_path / "HK" / "Case40.nii", tmp_path / "HK" / "T2w.nii.gz", tmp_path / "HK" / "Case41_segmentation.nii")
    listing = list_prostate(tmp_path)
    assert [(f.id, f.split) for f in listing.cases] == [
        ("UCL_Case01", "test"),
        ("UCL_Case32", "test"),
        ("HK_Case38", "test"),
    ]
    found = left_out(listing)
    assert found.keys() == {"HK_Case40", "HK_T2w", "HK_Case41"}
    assert "there twice" in found["HK_Case40"].reason
    assert "a mask without its scan" in found["HK_Case41"].reason
    warned = {(problem.site, problem.reason) for problem in listing.problems if not problem.quarantined}
    assert {site for site, reason in warned if "no such folder" in reason} == {"RUNMC", "BMC", "I2CVB", "BIDMC"}
    assert any(site == "UCL" and "Case34 of FLAP-SAM's test cases" in reason for site, reason in warned)
    table = tmp_path / "mine.csv"
    table.write_text("case,site,split\nCase01,UCL,train\nCase32,UCL,test\nCase99,UCL,test\n")
    listing = list_prostate(tmp_path, table)
    assert [(f.id, f.split) for f in listing.cases] == [("UCL_Case01", "train"), ("UCL_Case32", "test")]
    assert "UCL_Case99" in left_out(listing)
    assert any("(HK_Case38)" in problem.reason for problem in listing.problems if not problem.quarantined)


def test_a_hospital_called_like_a_prostate_site_is_ones_own(tmp_path: Path) -> None:
    for site in ("UCL", "north"):
        pairs(tmp_path / site, "Case01")
    assert detect(tmp_path) == "nifti"
    assert ids(list_source("nifti", tmp_path)) == ["UCL_Case01", "north_Case01"]


def test_a_folder_of_cohorts_is_told_apart(decathlon: Path) -> None:
    with pytest.raises(DataError, match=r"holds cohorts, but is none; give the folder of one, such as .*decathlon"):
        detect(decathlon.parent)
