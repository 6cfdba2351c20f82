"""Preparation: right voxels, done once, resumed, and never half-written."""

import errno
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydantic import ValidationError

from fedsam_core.data.cohort import Cohort, CohortConfig, read_cohort
from fedsam_core.data.preprocess import PreparedCohort, PreprocessConfig, prepare, prepare_image
from fedsam_core.data.survey import take_survey
from fedsam_core.errors import DataError, StoreError
from fedsam_core.store import LocalStore


@pytest.fixture
def cohort(decathlon: Path) -> Cohort:
    return read_cohort(CohortConfig(name="t", source="nifti", path=decathlon), decathlon)


def stamps(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_ct_is_windowed_and_labels_are_kept(cohort: Cohort, tmp_path: Path) -> None:
    prepared = prepare(cohort, PreprocessConfig(ct_window=(-100, 200)), LocalStore(tmp_path / "p"))
    for case in cohort.cases:
        loaded = prepared.load(case.id)
        scan = np.asarray(nib.load(case.image).dataobj, np.float64)
        expected = np.clip((scan + 100) / 300, 0, 1)[::-1, ::-1].transpose(
            2, 1, 0
        )  # RAS to slices S, rows P, columns L
        assert (loaded.image.dtype, loaded.label.dtype) == (np.float32, np.uint8)
        np.testing.assert_allclose(loaded.image, expected, atol=5e-4)  # stored as float16
        assert loaded.spacing == (2, 1, 1)
        truth = np.asarray(nib.load(case.label).dataobj)
        np.testing.assert_array_equal(loaded.geometry.to_scan(loaded.label, 0), truth)
        np.testing.assert_array_equal(loaded.geometry.affine, nib.load(case.image).affine)


def test_mri_is_scaled_per_volume_so_that_scanner_units_do_not_matter(decathlon: Path, tmp_path: Path, save) -> None:
    scan = nib.load(decathlon / "imagesTr/a0.nii.gz").get_fdata()
    save(decathlon / "imagesTr/a1.nii.gz", (scan * 4321 + 1e5).astype(np.float32))
    cohort = read_cohort(CohortConfig(name="t", source="nifti", path=decathlon, modality="mri"), decathlon)
    prepared = prepare(cohort, PreprocessConfig(), LocalStore(tmp_path / "p"))
    low, high = np.percentile(scan, (0.5, 99.5))
    image = prepared.load("a0").image
    expected = np.clip((scan - low) / (high - low), 0, 1)[::-1, ::-1].transpose(2, 1, 0)
    np.testing.assert_allclose(image, expected, atol=5e-4)
    np.testing.assert_allclose(prepared.load("a1").image, image, atol=2e-3)


def test_mri_that_is_nearly_one_value_is_not_divided_by_zero(decathlon: Path, tmp_path: Path, save) -> None:
    scan = np.zeros((12, 10, 8), np.float32)
    scan[5, 5, 5] = 9
    save(decathlon / "imagesTr/a0.nii.gz", scan)
    image = prepare_image(decathlon / "imagesTr/a0.nii.gz", PreprocessConfig(), "mri").image
    assert (image.min(), image.max(), image.sum()) == (0, 1, 1)


def test_second_run_does_nothing(cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    first = prepare(cohort, PreprocessConfig(), LocalStore(tmp_path / "p"), lambda *step: seen.append(step))
    assert seen == [("prepare", i, 12) for i in range(1, 13)]
    before = stamps(tmp_path / "p")
    monkeypatch.setattr("fedsam_core.data.preprocess.read_image", lambda path: pytest.fail("opened a scan"))
    again = prepare(cohort, PreprocessConfig(), LocalStore(tmp_path / "p"), lambda *step: pytest.fail("worked"))
    assert again.key == first.key == PreparedCohort.open(LocalStore(tmp_path / "p")).key
    assert stamps(tmp_path / "p") == before


def test_changed_configuration_makes_all_anew_and_cleans_up(cohort: Cohort, tmp_path: Path) -> None:
    first = prepare(cohort, PreprocessConfig(), LocalStore(tmp_path / "p"))
    old = set(stamps(tmp_path / "p"))
    second = prepare(cohort, PreprocessConfig(ct_window=(0, 100)), LocalStore(tmp_path / "p"))
    assert second.key != first.key
    assert set(stamps(tmp_path / "p")) & old == {"cohort.json"}
    assert len(list((tmp_path / "p/cases").iterdir())) == 12


def test_one_changed_case_is_made_anew_alone(cohort: Cohort, decathlon: Path, tmp_path: Path, save) -> None:
    prepare(cohort, PreprocessConfig(), LocalStore(tmp_path / "p"))
    before = stamps(tmp_path / "p")
    save(decathlon / "labelsTr/a0.nii.gz", np.ones((12, 10, 8), np.uint8))
    changed = read_cohort(CohortConfig(name="t", source="nifti", path=decathlon), decathlon)
    assert prepare(changed, PreprocessConfig(), LocalStore(tmp_path / "p")).load("a0").label.all()
    after = stamps(tmp_path / "p")
    assert sorted(name[:2] for name in after if before.get(name) != after[name]) == ["a0", "co"]


def test_interrupted_run_leaves_no_manifest_and_is_resumed(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(cohort, PreprocessConfig(), LocalStore(tmp_path / "p"), interrupt)
    with pytest.raises(DataError, match="run prepare first"):
        PreparedCohort.open(LocalStore(tmp_path / "p"))
    before = stamps(tmp_path / "p")
    assert len(before) == 5
    prepared = prepare(cohort, PreprocessConfig(), LocalStore(tmp_path / "p"))
    after = stamps(tmp_path / "p")
    assert {name: after[name] for name in before} == before
    assert {prepared.load(case.id).case.id for case in cohort.cases} == {case.id for case in cohort.cases}


def test_old_cohort_stays_readable_until_the_new_one_is_done(cohort: Cohort, tmp_path: Path) -> None:
    first = prepare(cohort, PreprocessConfig(), LocalStore(tmp_path / "p"))

    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(cohort, PreprocessConfig(ct_window=(0, 9)), LocalStore(tmp_path / "p"), interrupt)
    assert PreparedCohort.open(LocalStore(tmp_path / "p")).key == first.key
    first.load("a0")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_full_disk_is_one_line_and_leaves_nothing_half_written(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    calls = 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StoreError, match=r"cases/a2\..*safetensors: (the disk is full|cannot write).*folder"):
            prepare(cohort, PreprocessConfig(), LocalStore(tmp_path / "p"))
    assert sorted(name[:3] for name in stamps(tmp_path / "p")) == ["a0.", "a1."]  # no temporary file, no manifest
    prepare(cohort, PreprocessConfig(), LocalStore(tmp_path / "p")).load("a2")


def test_fault_found_while_preparing_leaves_no_manifest(cohort: Cohort, decathlon: Path, tmp_path: Path, save) -> None:
    save(decathlon / "imagesTr/b3.nii.gz", np.arange(960, dtype=np.float32).reshape(12, 10, 8))
    with pytest.raises(DataError, match=r"b3.nii.gz: changed since the cohort was read"):
        prepare(cohort, PreprocessConfig(), LocalStore(tmp_path / "p"))
    assert not (tmp_path / "p/cohort.json").exists()


def test_damage_is_found_on_reading_and_mended_by_preparing_again(cohort: Cohort, tmp_path: Path) -> None:
    prepared = prepare(cohort, PreprocessConfig(), LocalStore(tmp_path / "p"))
    file = next((tmp_path / "p/cases").glob("a0.*"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"a0\..*damaged.*run prepare again"):
        prepared.load("a0")
    file.unlink()
    with pytest.raises(DataError, match=r"a0\..*cannot read.*run prepare again"):
        prepared.load("a0")
    prepare(cohort, PreprocessConfig(), LocalStore(tmp_path / "p")).load("a0")
    with pytest.raises(DataError, match="case zz: not in the prepared cohort"):
        prepared.load("zz")


def test_damage_is_not_taken_over_when_something_else_is_prepared_anew(
    cohort: Cohort, decathlon: Path, tmp_path: Path, save
) -> None:
    store = LocalStore(tmp_path / "p")
    good = prepare(cohort, PreprocessConfig(), store).load("a0").image
    file = next((tmp_path / "p/cases").glob("a0.*"))
    data = bytearray(file.read_bytes())
    data[-2000] ^= 64
    file.write_bytes(data)
    save(decathlon / "labelsTr/a1.nii.gz", np.ones((12, 10, 8), np.uint8))
    changed = read_cohort(CohortConfig(name="t", source="nifti", path=decathlon), decathlon)
    np.testing.assert_array_equal(prepare(changed, PreprocessConfig(), store).load("a0").image, good)


def test_broken_manifest(tmp_path: Path) -> None:
    (tmp_path / "cohort.json").write_text("{}")
    with pytest.raises(DataError, match=r"cohort.json: not a readable manifest; delete it and run prepare again"):
        PreparedCohort.open(LocalStore(tmp_path))


def test_one_plane_for_the_cohort(cohort: Cohort) -> None:
    coronal = [case.model_copy(update={"spacing": (1.0, 4.0, 1.0)}) for case in cohort.cases]
    mostly = cohort.model_copy(update={"cases": (*coronal[:7], *cohort.cases[7:])})
    half = cohort.model_copy(update={"cases": (*coronal[:6], *cohort.cases[6:])})
    for one, plane in ((cohort, "axial"), (mostly, "coronal"), (half, "axial")):
        survey = take_survey(one, histogram=False)
        assert PreprocessConfig().resolve(survey, "ct").slice_axis == plane
        assert PreprocessConfig(slice_axis="sagittal").resolve(survey, "ct").slice_axis == "sagittal"


def test_scan_alone_is_prepared_as_in_its_cohort(cohort: Cohort, tmp_path: Path) -> None:
    config = PreprocessConfig(spacing=(1.5, 1.5, 1.5))
    prepared = prepare(cohort, config, LocalStore(tmp_path / "p"))
    inside, alone = prepared.load("b1"), prepare_image(Path(cohort.cases[7].image), prepared.config, "ct")
    assert cohort.cases[7].id == alone.case.id == "b1"
    assert alone.label is None
    assert alone.case.intensity == inside.case.intensity
    np.testing.assert_array_equal(alone.image, inside.image)
    assert inside.label.shape == inside.image.shape == (11, 7, 8)
    assert alone.geometry.to_dict() == inside.geometry.to_dict()


@pytest.mark.parametrize(
    "wrong",
    [
        {"ct_window": (5, 5)},
        {"ct_window": "soft"},
        {"ct_percentiles": (9, 9)},
        {"mri_percentiles": (1, 101)},
        {"spacing": (1, 0, 1)},
        {"windw": (0, 1)},
    ],
)
def test_wrong_configuration_is_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        PreprocessConfig(**wrong)
