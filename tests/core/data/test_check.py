"""What `check` says where a layout leaves things open, and what shows only when cases are compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fedsam_core.data import check as module
from fedsam_core.data.check import Report, check
from fedsam_core.data.cohort import CohortConfig, read_cohort
from fedsam_core.data.findings import Compared, find_duplicates
from fedsam_core.data.sources import Split
from fedsam_core.errors import DataError

Saver = Callable[..., None]
SHAPE = (12, 10, 8)


def warnings(report: Report) -> list[tuple[str, str, str]]:
    return [(p.kind, p.case or p.site, p.reason) for p in report.problems if not p.quarantined]


def label_of(root: Path, case: str) -> np.ndarray:
    return np.array(nib.load(root / case).dataobj)


# What the layout does not say


def test_classes_and_modality_that_nothing_names_are_read_off_the_voxels(site_folders: Path) -> None:
    """Folder per site without dataset.json: two classes by the masks; noise around 40 down to -200 and below is CT."""
    report = check(site_folders)
    assert (report.modality, report.classes) == (None, ("class-1", "class-2"))
    assert report.cohort["classes"] == ["class-1", "class-2"]
    assert report.cohort["modality"] == "ct"
    assert any("put your names for label values" in line for line in report.advice)
    assert any("looks like ct" in line for line in report.advice)
    cohort = read_cohort(CohortConfig(**report.cohort), site_folders)  # what is advised works
    assert {case.id for case in cohort.cases} == {case.id for case in report.cases if not case.quarantined}

    given = check(site_folders, classes=("kidney", "tumour"))
    assert (given.classes, given.cohort["classes"]) == (("kidney", "tumour"), ["kidney", "tumour"])
    assert not any("put your names" in line for line in given.advice)


def test_given_classes_are_the_limit(site_folders: Path, save: Saver) -> None:
    label = label_of(site_folders, "Y/labels/Case03.nii")
    save(site_folders / "Y/labels/Case03.nii", label + (label == 2).astype(np.uint8))
    report = check(site_folders, classes=("kidney", "tumour"))
    (problem,) = report.quarantined
    assert (problem.case, problem.kind) == ("Y_Case03", "mask")
    assert "label value 3, but the cohort has 2 classes" in problem.reason
    (shown,) = [case for case in report.cases if case.quarantined]
    assert (shown.id, shown.shape, shown.content) == ("Y_Case03", None, None)
    three = check(site_folders)
    assert three.classes == ("class-1", "class-2", "class-3")
    assert not three.quarantined


def test_a_mask_of_0_and_255_is_no_cohort_of_255_classes(site_folders: Path, save: Saver) -> None:
    save(site_folders / "X/Case01_label.nii.gz", (label_of(site_folders, "X/Case01_label.nii.gz") > 0) * np.uint8(255))
    report = check(site_folders)
    (problem,) = report.quarantined
    assert (problem.case, problem.kind) == ("X_Case01", "mask")
    assert "label value 255, and nothing names the classes; write masks as 0, 1, 2" in problem.reason
    assert report.classes == ("class-1", "class-2")
    assert report.verdict == "usable"


def test_mri_is_told_from_ct(tmp_path: Path, save: Saver) -> None:
    rng = np.random.default_rng(0)
    for case in range(3):
        label = np.zeros(SHAPE, np.uint8)
        label[case : case + 3, 2:5, 2:5] = 1
        save(tmp_path / "s" / f"{case}.nii.gz", rng.normal(0, 1, SHAPE).astype(np.float32))
        save(tmp_path / "s" / f"{case}_seg.nii.gz", label)
    assert check(tmp_path).cohort["modality"] == "mri"


@pytest.mark.parametrize(
    ("folder", "name"), [("our scans (2025)", "our-scans-2025"), ("_x", "x"), ("Früh", "Fr-h"), ("...", "nifti")]
)
def test_a_folders_name_becomes_a_name_for_the_cohort(decathlon: Path, folder: str, name: str) -> None:
    decathlon.rename(decathlon.parent / folder)
    assert check(decathlon.parent / folder).cohort["name"] == name


# Warnings


def test_masks_that_leave_a_question(decathlon: Path, save: Saver) -> None:
    for file in (decathlon / "labelsTr").iterdir():
        save(file, np.minimum(label_of(decathlon, f"labelsTr/{file.name}"), 1))
    save(decathlon / "labelsTr/a2.nii.gz", np.zeros(SHAPE, np.uint8))
    report = check(decathlon)
    said = warnings(report)
    assert ("mask", "a2") in {(kind, where) for kind, where, _ in said}
    assert any("labelsTr/a2.nii.gz: nothing is labelled; right for a patient without kidney" in r for _, _, r in said)
    assert any("class tumour (label value 2) is in no mask" in reason for _, _, reason in said)
    assert report.verdict == "ready"


def test_sites_without_training_or_test_cases(decathlon: Path) -> None:
    table = decathlon / "sites.csv"
    table.write_text(table.read_text().replace("site-a,test", "site-a,train").replace(",site-b,train", ",site-b,test"))
    report = check(decathlon)
    assert [(where, reason.split(";")[0]) for kind, where, reason in warnings(report) if kind == "layout"] == [
        ("site-a", "site site-a: no test case"),
        ("site-b", "site site-b: no training case can be used"),
    ]
    assert report.verdict == "unusable"
    assert "give site-b a training case" in report.advice[0]
    with pytest.raises(DataError, match="site-b: no training case"):
        read_cohort(CohortConfig(name="t", path=decathlon), decathlon)


def test_a_site_of_which_nothing_is_left_is_named(decathlon: Path) -> None:
    for i in range(6):
        (decathlon / f"labelsTr/b{i}.nii.gz").unlink()
    report = check(decathlon)
    assert any(
        "site site-b: the files of none of its cases are complete" in reason for _, _, reason in warnings(report)
    )
    assert (report.sites["site-b"].left_out, report.sites["site-b"].slices_mm) == (6, None)
    assert report.verdict == "usable"
    for i in range(6):
        (decathlon / f"labelsTr/a{i}.nii.gz").unlink()
    report = check(decathlon)
    assert (report.verdict, report.cases) == ("unusable", ())
    assert report.advice == ("no case can be used: mend what is listed, then check again",)


def test_spacings_of_sites_are_in_the_figures(decathlon: Path, save: Saver) -> None:
    """Slices lie across the coarsest axis, whichever it is; masks keep to their scan."""
    affine = np.array([[0.0, 0, 5, 0], [0.7, 0, 0, 0], [0, 0.6, 0, 0], [0, 0, 0, 1]])  # sagittal slices, axes A, S, R
    for i in range(3):
        for part in ("imagesTr", "labelsTr"):
            save(decathlon / part / f"a{i}.nii.gz", label_or_scan(decathlon / part / f"a{i}.nii.gz"), affine)
    report = check(decathlon)
    site = report.sites["site-a"]
    assert site.orientations == {"ASR": 3, "RAS": 3}
    assert site.slices_mm == pytest.approx((2, 3.5, 5))
    assert site.pixels_mm == pytest.approx((0.7, 0.85, 1))
    assert any(line.startswith("slices are 2 to 5 mm apart") for line in report.advice)


def label_or_scan(file: Path) -> np.ndarray:
    return np.array(nib.load(file).dataobj)


# Opening


def test_progress_and_workers(decathlon: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    one = check(decathlon, workers=1, progress=lambda *step: seen.append(step))
    assert seen == [("check", done, 12) for done in range(1, 13)]
    assert check(decathlon, workers=5) == one


def test_whoever_interrupts_does_not_wait_for_the_rest(decathlon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    inspect = module.inspect_scan

    def counting(*arguments: Any) -> Any:
        opened.append(arguments)
        return inspect(*arguments)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "inspect_scan", counting)
    with pytest.raises(KeyboardInterrupt):
        check(decathlon, workers=1, progress=interrupt)
    assert len(opened) < 12


def test_a_link_to_nowhere_is_a_fault_of_its_case(decathlon: Path) -> None:
    """As git-annex leaves a scan that was not fetched."""
    (decathlon / "imagesTr/a0.nii.gz").unlink()
    (decathlon / "imagesTr/a0.nii.gz").symlink_to(decathlon / "annex" / "objects" / "a0")
    (problem,) = check(decathlon).quarantined
    assert (problem.case, problem.kind) == ("a0", "unreadable")
    assert "imagesTr/a0.nii.gz: cannot read (No such file or directory)" in problem.reason


# Comparing


def case(name: str, split: Split | None, content: str, label: str = "") -> Compared:
    return Compared(id=name, site=name[0], split=split, content=content, label_content=label)


def test_the_strictest_split_keeps_a_scan() -> None:
    cases = [
        case("a1", "train", "X"),
        case("b1", "test", "X"),
        case("c1", "val", "X"),
        case("c2", "test", "X"),
        case("a2", "train", "Y"),
        case("b2", "val", "Y"),
        case("a3", "train", "Z"),
        case("a4", "train", ""),
        case("a5", "test", ""),
    ]
    found = [(p.kind, p.case, p.site, p.quarantined) for p in find_duplicates(cases)]
    assert found == [
        ("leakage", "a1", "a", True),
        ("leakage", "c1", "c", True),
        ("duplicate", "c2", "c", False),
        ("leakage", "a2", "a", True),
    ]


def test_copies_of_undecided_splits_are_a_warning() -> None:
    (problem,) = find_duplicates([case("a1", None, "X"), case("a2", None, "X")])
    assert (problem.kind, problem.case, problem.quarantined) == ("duplicate", "a2", False)
    (problem,) = find_duplicates([case("a1", None, "X"), case("a2", "test", "X")])
    assert (problem.kind, problem.case, problem.quarantined) == ("leakage", "a1", True)


def test_one_mask_on_several_scans() -> None:
    cases = [case(f"a{i}", "train", str(i), "M") for i in range(8)]
    (problem,) = find_duplicates(cases)
    assert (problem.kind, problem.quarantined) == ("duplicate", False)
    assert problem.reason.startswith(
        "a0, a1, a2, a3, a4 and 3 more: different scans with voxel for voxel the same mask"
    )
    assert find_duplicates([case("a", "train", "1"), case("b", "train", "2")]) == []  # nothing labelled, nothing alike
    same = [case("a", "train", "1", "M"), case("b", "train", "1", "M")]
    assert [problem.case for problem in find_duplicates(same)] == ["b"]  # said once, as a scan that is there twice
