"""Reading a cohort: every layout, every split rule, and every fault in one line with its fix."""

import gzip
import json
import os
import shutil
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydantic import ValidationError

from fedsam_core.data.cohort import Cohort, CohortConfig, read_cohort
from fedsam_core.errors import DataError


def read(path: Path, **settings: object) -> Cohort:
    return read_cohort(CohortConfig(name="t", source="nifti", path=path, **settings), path / "work")


def refused(path: Path, *words: str, **settings: object) -> str:
    """Reading fails with one line that holds all `words`."""
    with pytest.raises(DataError) as caught:
        read(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def test_decathlon_case_facts_are_those_nibabel_sees(decathlon: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    config = CohortConfig(name="t", source="nifti", path=decathlon)
    cohort = read_cohort(config, decathlon, lambda *step: seen.append(step))
    assert seen == [("read", i, 12) for i in range(1, 13)]
    assert (cohort.modality, cohort.classes, cohort.sites) == ("ct", ("kidney", "tumour"), ("site-a", "site-b"))
    assert not cohort.synthetic
    case = cohort.cases[3]
    voxels = np.asarray(nib.load(case.image).dataobj, np.float64)
    assert (case.id, case.site, case.shape, case.spacing) == ("a3", "site-a", (12, 10, 8), (1, 1, 2))
    assert (case.orientation, case.label_values) == ("RAS", (0, 1, 2))
    expected = [voxels.min(), voxels.max(), *np.percentile(voxels, (1, 99)), voxels.mean(), voxels.std()]
    found = [case.intensity[key] for key in ("min", "max", "p01", "p99", "mean", "std")]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_validation_is_carved_from_training_per_site_and_by_seed(decathlon: Path) -> None:
    cohort = read(decathlon)
    for site in cohort.sites:
        counts = [len(cohort.select(site, split)) for split in ("train", "val", "test")]
        assert counts == [4, 1, 1]
        assert [case.id[1] for case in cohort.select(site, "test")] == ["5"]
    assert read(decathlon).hash == cohort.hash
    drawn = {tuple(case.id for case in read(decathlon, split_seed=seed).select(split="val")) for seed in range(8)}
    assert len(drawn) > 1
    assert not read(decathlon, val_fraction=0).select(split="val")


def test_given_validation_cases_stand(decathlon: Path) -> None:
    table = decathlon / "sites.csv"
    table.write_text(table.read_text().replace("a2,site-a,train", "a2,site-a,val"))
    cohort = read(decathlon, val_fraction=0.5)
    assert [case.id for case in cohort.select("site-a", "val")] == ["a2"]
    assert len(cohort.select("site-b", "val")) == 2


def test_hash_follows_content_not_place(decathlon: Path, tmp_path: Path, save) -> None:
    cohort = read(decathlon)
    shutil.copytree(decathlon, tmp_path / "elsewhere")
    assert read(tmp_path / "elsewhere").hash == cohort.hash
    label = np.zeros((12, 10, 8), np.uint8)
    save(tmp_path / "elsewhere" / "labelsTr" / "a0.nii.gz", label)
    assert read(tmp_path / "elsewhere").hash != cohort.hash


def test_nnunet_layout(decathlon: Path) -> None:
    for image in list((decathlon / "imagesTr").iterdir()):
        image.rename(image.with_name(image.name.replace(".nii.gz", "_0000.nii.gz")))
    (decathlon / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "T2"}, "labels": {"background": 0, "tumour": 2, "kidney": 1}})
    )
    cohort = read(decathlon)
    assert (cohort.modality, cohort.classes) == ("mri", ("kidney", "tumour"))
    assert [case.id for case in cohort.cases[:2]] == ["a0", "a1"]
    shutil.copy(decathlon / "imagesTr/a0_0000.nii.gz", decathlon / "imagesTr/a0_0001.nii.gz")
    refused(decathlon, "a0_0001.nii.gz", "second channel", strict=True)
    (decathlon / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T2", "1": "ADC"}, "labels": {}}))
    refused(decathlon, "dataset.json", "2 channels (T2, ADC)")


def test_hidden_files_are_no_scans(decathlon: Path) -> None:
    for name in ("imagesTr/._a0.nii.gz", "labelsTr/._a0.nii.gz", "imagesTr/.DS_Store"):
        (decathlon / name).write_bytes(b"junk")
    assert len(read(decathlon).cases) == 12


def test_site_folders_draw_test_and_validation(site_folders: Path) -> None:
    needs = {"classes": ("kidney", "tumour"), "modality": "ct"}
    cohort = read(site_folders, **needs)
    assert cohort.sites == ("X", "Y")
    assert cohort.cases[0].id == "X_Case00"
    for site in cohort.sites:
        assert [len(cohort.select(site, split)) for split in ("train", "val", "test")] == [7, 1, 2]
    assert len(read(site_folders, **needs, test_fraction=0.5).select("X", "test")) == 5
    refused(site_folders, "cohort.modality", classes=("kidney", "tumour"))
    refused(site_folders, "cohort.classes", modality="ct")


def test_site_folders_with_a_table(site_folders: Path, tmp_path: Path) -> None:
    needs = {"classes": ("kidney", "tumour"), "modality": "ct", "val_fraction": 0}
    rows = [f"Case{i:02d},{site},{'test' if i < 3 else 'train'}" for site in "XY" for i in range(10)]
    table = tmp_path / "table.csv"
    table.write_text("case,site,split\n" + "\n".join(rows))
    cohort = read(site_folders, sites_csv=table, **needs)
    assert [case.id for case in cohort.select("Y", "test")] == ["Y_Case00", "Y_Case01", "Y_Case02"]
    table.write_text("case,site,split\n" + "\n".join(rows[:-1]))
    refused(site_folders, "Case09.nii", "no row", "Case09,Y,train", sites_csv=table, strict=True, **needs)


# Each spoils a good cohort in one way; the message must name the thing and say what to do.
def _truncate(root: Path, save) -> None:
    file = root / "imagesTr/a0.nii.gz"
    file.write_bytes(file.read_bytes()[:-300])


def _truncate_plain(root: Path, save) -> None:
    (root / "imagesTr/a0.nii.gz").unlink()
    save(root / "imagesTr/a0.nii", np.arange(960, dtype=np.float32).reshape(12, 10, 8))
    (root / "imagesTr/a0.nii").write_bytes((root / "imagesTr/a0.nii").read_bytes()[:-100])


def _label(array: np.ndarray, affine: np.ndarray | None = None):
    def spoil(root: Path, save) -> None:
        save(root / "labelsTr/a0.nii.gz", array, np.diag([1.0, 1, 2, 1]) if affine is None else affine)

    return spoil


def _image(array: np.ndarray):
    return lambda root, save: save(root / "imagesTr/a0.nii.gz", array)


def _flatten(root: Path, save) -> None:
    (root / "imagesTr/a0.nii.gz").unlink()
    path = root / "imagesTr/a0.nii"
    save(path, _filled(1))
    data = bytearray(path.read_bytes())
    data[312:328] = bytes(16)  # srow_z of the header
    path.write_bytes(data)


def _rows(old: str, new: str):
    def spoil(root: Path, save) -> None:
        text = (root / "sites.csv").read_text()
        assert old in text
        (root / "sites.csv").write_text(text.replace(old, new))

    return spoil


def _drop(*names: str):
    return lambda root, save: [(root / name).unlink() for name in names]


def _filled(value: float, dtype: type = np.float32) -> np.ndarray:
    array = np.zeros((12, 10, 8), dtype)
    array[5, 5, 5] = value
    return array


def _header(change):
    """A byte of the header is changed in the unpacked file."""

    def spoil(root: Path, save) -> None:
        path = root / "imagesTr/a0.nii.gz"
        data = bytearray(gzip.decompress(path.read_bytes()))
        change(data)
        path.write_bytes(gzip.compress(bytes(data)))

    return spoil


def _put(at: int, kind: str, *values: float):
    return lambda data: struct.pack_into(f"<{len(values)}{kind}", data, at, *values)


def _pipe(root: Path, save) -> None:
    (root / "imagesTr/a0.nii.gz").unlink()
    os.mkfifo(root / "imagesTr/a0.nii.gz")


def _link_to_nowhere(root: Path, save) -> None:
    (root / "imagesTr/a0.nii.gz").unlink()
    (root / "imagesTr/a0.nii.gz").symlink_to(root / "nowhere.nii.gz")


SHIFTED = np.array([[1.0, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
FAULTS = {
    "truncated": (_truncate, ["imagesTr/a0.nii.gz", "truncated", "copy or download it again"]),
    "truncated, not compressed": (_truncate_plain, ["imagesTr/a0.nii", "truncated"]),
    "packed text": (
        lambda r, s: (r / "imagesTr/a0.nii.gz").write_bytes(gzip.compress(b"hello world" * 50)),
        ["a0.nii.gz", "not a NIfTI file"],
    ),
    "broken magic": (_header(_put(344, "I", 0x78787878)), ["a0.nii.gz", "not a NIfTI file"]),
    "header that asks for terabytes": (_header(_put(42, "h", 30000, 30000, 30000)), ["a0.nii.gz", "30000 x 30000"]),
    "header of another length": (_header(_put(0, "i", 540)), ["a0.nii.gz", "copy or download it again"]),
    "offset without end": (_header(_put(108, "f", 1e30)), ["a0.nii.gz", "copy or download it again"]),
    "pipe": (_pipe, ["a0.nii.gz", "not a file"]),
    "link to nowhere": (_link_to_nowhere, ["a0.nii.gz", "cannot read (No such file"]),
    "no nifti": (lambda r, s: (r / "imagesTr/a0.nii.gz").write_bytes(b"hello"), ["a0.nii.gz", "not a NIfTI"]),
    "mask of another shape": (
        _label(np.zeros((12, 10, 9), np.uint8)),
        ["labelsTr/a0.nii.gz", "(12, 10, 9)", "(12, 10, 8)", "resample"],
    ),
    "mask elsewhere": (_label(_filled(1, np.uint8), SHIFTED), ["labelsTr/a0.nii.gz", "0.5 mm off", "resample"]),
    "mask flipped": (_label(_filled(1, np.uint8), np.diag([-1.0, 1, 2, 1])), ["labelsTr/a0.nii.gz", "22 mm off"]),
    "unknown class": (
        _label(_filled(3, np.uint8)),
        ["labelsTr/a0.nii.gz", "label value 3", "2 classes", "cohort.classes"],
    ),
    "negative label": (_label(_filled(-1, np.int16)), ["labelsTr/a0.nii.gz", "label value -1"]),
    "fractional label": (_label(_filled(0.5)), ["labelsTr/a0.nii.gz", "0.5 is not an integer", "nearest"]),
    "NaN label": (_label(_filled(np.nan)), ["labelsTr/a0.nii.gz", "nan is not an integer"]),
    "infinite label": (_label(_filled(np.inf)), ["labelsTr/a0.nii.gz", "label value inf"]),
    "NaN": (_image(_filled(np.nan)), ["imagesTr/a0.nii.gz", "1 voxel is NaN or infinite"]),
    "infinite": (_image(_filled(np.inf)), ["imagesTr/a0.nii.gz", "NaN or infinite"]),
    "4D": (_image(np.zeros((12, 10, 8, 2), np.float32)), ["imagesTr/a0.nii.gz", "4 dimensions", "3D"]),
    "2D": (_image(np.zeros((12, 10), np.float32)), ["imagesTr/a0.nii.gz", "2 dimensions"]),
    "constant": (_image(np.full((12, 10, 8), 7, np.int16)), ["imagesTr/a0.nii.gz", "one value everywhere"]),
    "complex": (_image(np.zeros((12, 10, 8), np.complex64)), ["imagesTr/a0.nii.gz", "complex64"]),
    "flat affine": (_flatten, ["imagesTr/a0.nii", "affine", "spacing"]),
    "row without scan": (
        _drop("imagesTr/a0.nii.gz", "labelsTr/a0.nii.gz"),
        ["sites.csv, line 2", "case a0 has no scan", "delete the row"],
    ),
    "scan without row": (_rows("b2,site-b,train\n", ""), ["imagesTr/b2.nii.gz", "no row", "b2,site-a,train"]),
    "case twice in the table": (_rows("a1,site-a", "a0,site-a"), ["sites.csv, line 3", "a0 is listed twice"]),
    "case twice on disk": (lambda r, s: s(r / "imagesTr/a0.nii", _filled(1)), ["a0.nii.gz", "there twice", "a0.nii"]),
    "unknown split": (
        _rows("a1,site-a,train", "a1,site-a,trian"),
        ["sites.csv, line 3", "'trian'", "train, val, test"],
    ),
    "short row": (_rows("a1,site-a,train", "a1,site-a"), ["sites.csv, line 3", "split ''"]),
    "unusable name": (_rows("a1,site-a", "a1,site/a"), ["sites.csv, line 3", "'site/a'"]),
    "no column": (_rows("case,site,split", "case,hospital,split"), ["sites.csv", "no column site", "case,site,split"]),
    "site without training": (_rows(",site-b,train", ",site-b,test"), ["site site-b", "no training case"]),
    "missing label": (_drop("labelsTr/a4.nii.gz"), ["imagesTr/a4.nii.gz", "no mask", "labelsTr/a4.nii.gz"]),
    "label without scan": (_drop("imagesTr/a4.nii.gz"), ["labelsTr/a4.nii.gz", "without its scan"]),
    "no table": (_drop("sites.csv"), ["no sites.csv", "case,site,split", "a0,site-a,train"]),
    "no description": (_drop("dataset.json"), ["dataset.json", "missing"]),
    "broken description": (lambda r, s: (r / "dataset.json").write_text("{"), ["dataset.json", "JSON"]),
    "gap in the classes": (
        lambda r, s: (r / "dataset.json").write_text('{"modality": {"0": "CT"}, "labels": {"0": "bg", "2": "x"}}'),
        ["dataset.json", "[0, 2]"],
    ),
    "no folder of labels": (lambda r, s: shutil.rmtree(r / "labelsTr"), ["labelsTr", "no such folder"]),
}


# What is wrong with the cohort as a whole: nothing is left to go on with.
OF_THE_WHOLE = {
    "no column",
    "site without training",
    "no table",
    "no description",
    "broken description",
    "gap in the classes",
    "no folder of labels",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_in_one_line(fault: str, decathlon: Path, save) -> None:
    spoil, words = FAULTS[fault]
    spoil(decathlon, save)
    message = refused(decathlon, *words, strict=True)
    if fault in OF_THE_WHOLE:
        assert refused(decathlon, *words) == message


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - OF_THE_WHOLE))
def test_a_bad_case_is_left_out_with_its_reason_and_the_rest_goes_on(fault: str, decathlon: Path, save) -> None:
    spoil, words = FAULTS[fault]
    spoil(decathlon, save)
    cohort = read(decathlon)
    left_out = [problem for problem in cohort.problems if problem.quarantined]
    assert any(all(word in problem.reason for word in words) for problem in left_out), left_out
    assert {problem.case for problem in left_out}.isdisjoint(case.id for case in cohort.cases)
    assert 10 <= len(cohort.cases) <= 12
    assert Cohort.model_validate_json(cohort.model_dump_json()).problems == cohort.problems


def test_small_header_rounding_of_a_mask_is_no_fault(decathlon: Path, save) -> None:
    affine = np.diag([1.0, 1, 2, 1])
    affine[:3, 3] += 1e-3
    save(decathlon / "labelsTr/a0.nii.gz", _filled(1, np.uint16), affine)
    assert read(decathlon).cases[0].label_values == (0, 1)


def test_float_and_scaled_masks_with_integer_values_are_read(decathlon: Path) -> None:
    image = nib.Nifti1Image(_filled(4, np.float64), np.diag([1.0, 1, 2, 1]))
    image.header.set_data_dtype(np.int16)
    image.header.set_slope_inter(0.5, 0)  # 4 on disk reads as 2
    nib.save(image, decathlon / "labelsTr/a0.nii.gz")
    assert read(decathlon).cases[0].label_values == (0, 2)


def test_faults_of_folders(site_folders: Path, tmp_path: Path) -> None:
    needs = {"classes": ("kidney", "tumour"), "modality": "ct"}
    refused(tmp_path / "nowhere", "nowhere", "no such folder", "cohort.path")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no scans found", "imagesTr")
    (site_folders / "notes").mkdir()
    refused(site_folders, "notes", "without scans", strict=True, **needs)
    (site_folders / "notes").rmdir()
    (site_folders / "X/Case03_seg.nii.gz").unlink()
    refused(site_folders, "X/Case03.nii.gz", "no mask", "Case03_seg.nii.gz", strict=True, **needs)


def test_nifti_needs_a_path() -> None:
    with pytest.raises(ValidationError, match="source nifti needs `path`"):
        CohortConfig(name="t", source="nifti")


def test_a_scan_that_is_trained_on_and_tested_on_leaves_training(decathlon: Path, save) -> None:
    """The same voxels, stored flipped, as int and uncompressed: files differ, the scan does not."""
    scan = nib.load(decathlon / "imagesTr/b5.nii.gz")
    voxels = np.rint(scan.get_fdata())
    save(decathlon / "imagesTr/b5.nii.gz", voxels.astype(np.float32), scan.affine)
    (decathlon / "imagesTr/a0.nii.gz").unlink()
    flipped = scan.affine @ np.diag([-1.0, 1, 1, 1])
    flipped[:3, 3] += scan.affine[:3, 0] * (scan.shape[0] - 1)
    save(decathlon / "imagesTr/a0.nii", voxels[::-1].astype(np.int16), flipped)
    save(
        decathlon / "labelsTr/a0.nii.gz", np.asarray(nib.load(decathlon / "labelsTr/a0.nii.gz").dataobj)[::-1], flipped
    )
    cohort = read(decathlon)
    (leak,) = [problem for problem in cohort.problems if problem.kind == "leakage"]
    assert (leak.case, leak.quarantined) == ("a0", True)
    assert "b5" in leak.reason
    assert "b5" in {case.id for case in cohort.select(split="test")}
    assert "a0" not in {case.id for case in cohort.cases}


def test_structures_are_unions_where_the_cohort_says_so(decathlon: Path) -> None:
    assert read(decathlon).structures == ((1,), (2,))
    kits = read(decathlon, scored_as={"kidney": ("kidney", "tumour")})
    assert kits.structures == ((1, 2), (2,))
    assert kits.hash != read(decathlon).hash
    refused(decathlon, "scored_as", "cyst", scored_as={"kidney": ("kidney", "cyst")})


def test_sites_in_folders_of_their_own(site_folders: Path) -> None:
    needs = {"classes": ("kidney", "tumour"), "modality": "ct"}
    folders = {"X": site_folders / "X", "Y": site_folders / "Y"}
    config = CohortConfig(name="t", sites=folders, **needs)
    cohort = read_cohort(config, site_folders)
    assert cohort.sites == ("X", "Y")
    alone = read_cohort(config, site_folders, site="Y")
    assert alone.cases == cohort.select("Y")
    assert alone.share_hash("Y") == cohort.share_hash("Y")
    (site_folders / "Y" / "splits.csv").write_text(
        "case,split\n" + "\n".join(f"Case{i:02d},{'test' if i < 4 else 'train'}" for i in range(10))
    )
    assert len(read_cohort(config, site_folders).select("Y", "test")) == 4
    for wrong, word in (
        ({"sites": folders, "path": site_folders}, "leave out path"),
        ({"sites": {"a.b": site_folders}}, "site name 'a.b'"),
        ({"sites": {}}, "needs `path`"),
    ):
        with pytest.raises(ValidationError, match=word):
            CohortConfig(name="t", **wrong, **needs)


def test_a_class_has_one_name_and_a_name_one_class(decathlon: Path) -> None:
    refused(decathlon, "class kidney is there twice", classes=("kidney", "kidney"))
