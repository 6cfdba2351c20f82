import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt
from support.dicom import write_series

from fedsam_core.data.dicom import write_segmentation
from fedsam_core.errors import DataError
from fedsam_core.evaluation.metrics import (
    CaseScore,
    dice_per_class,
    dice_sums,
    score_case,
    summarize,
    truth_on_scan_grid,
)

from .conftest import MakeCase, blobs

NAN = float("nan")


def oracle(prediction: Path, truth: Path, classes: int) -> tuple[list[float], list[int], list[int]]:
    """Dice per class from two files with nibabel and numpy alone, and the voxels of each in truth and prediction."""
    p, t = (np.round(nib.load(path).get_fdata()).astype(int) for path in (prediction, truth))
    dice, true, predicted = [], [], []
    for value in range(1, classes + 1):
        both = int(((p == value) & (t == value)).sum())
        true.append(int((t == value).sum()))
        predicted.append(int((p == value).sum()))
        total = true[-1] + predicted[-1]
        dice.append(2 * both / total if total else NAN)
    return dice, true, predicted


def score(
    case: str, site: str, dice: tuple[float, ...], truth: tuple[int, ...], predicted: tuple[int, ...]
) -> CaseScore:
    return CaseScore(case, site, "test", ("kidney", "tumor"), dice, truth, predicted)


SCORES = [
    score("a1", "a", (0.9, 0.5), (10, 4), (11, 5)),
    score("a2", "a", (0.7, NAN), (10, 0), (10, 0)),  # no tumor, none predicted
    score("a3", "a", (0.8, 0.0), (10, 0), (12, 3)),  # a tumor that is not there
    score("b1", "b", (0.2, 0.0), (10, 6), (10, 0)),  # nothing predicted
    score("b2", "b", (0.4, 0.0), (10, 6), (10, 2)),  # predicted elsewhere
]


def surfaces(
    score: CaseScore, hd95: tuple[float, ...], penalised: tuple[float, ...], nsd: tuple[float, ...]
) -> CaseScore:
    return replace(score, hd95=hd95, hd95_penalised=penalised, nsd=nsd, nsd_tolerance_mm=2.0)


SURFACES = [
    surfaces(SCORES[0], (3, 8), (3, 8), (0.95, 0.6)),
    surfaces(SCORES[1], (5, NAN), (5, NAN), (0.85, NAN)),
    surfaces(SCORES[2], (4, NAN), (4, 300), (0.9, 0)),
    surfaces(SCORES[3], (20, NAN), (20, 300), (0.3, 0)),
    surfaces(SCORES[4], (10, 40), (10, 40), (0.5, 0)),
]


@pytest.mark.parametrize("seed", range(50))
def test_dice_against_numpy_on_files(make_case: MakeCase, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(1, 4))
    shape = tuple(int(n) for n in rng.integers(5, 12, 3))
    kinds = ["random", "empty truth", "empty prediction", "both empty", "missed", "equal"]
    truth, prediction = (rng.integers(0, classes + 1, shape).astype(np.uint8) for _ in range(2))
    for value in range(1, classes + 1):
        kind = kinds[(seed + value) % len(kinds)]
        if kind in ("empty truth", "both empty"):
            truth[truth == value] = 0
        if kind in ("empty prediction", "both empty"):
            prediction[prediction == value] = 0
        if kind == "missed":
            prediction[(prediction == value) & (truth == value)] = 0
        if kind == "equal":
            prediction[prediction == value] = 0
            prediction[truth == value] = value
    orientation = ["RAS", "LPS", "IPL", "SAR", "PIR"][seed % 5]
    case = make_case(truth, orientation=orientation, classes=classes, image=np.zeros(shape))
    # What a model hands over: on the grid of the file, not of the body.
    ornt = nib.orientations.ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    stored = nib.apply_orientation(prediction, ornt)
    assert case.label is not None
    file = tmp_path / "prediction.nii.gz"
    nib.save(nib.Nifti1Image(stored, nib.load(case.image).affine), file)

    scored = score_case(stored, case, [f"class {k}" for k in range(classes)])

    dice, true, predicted = oracle(file, Path(case.label), classes)
    np.testing.assert_allclose(scored.dice, dice, atol=1e-6)  # nan where nan, and only there
    assert scored.truth_voxels == tuple(true)
    assert scored.predicted_voxels == tuple(predicted)


def test_what_an_empty_class_scores() -> None:
    truth = np.array([[1, 1, 0, 0, 5]])
    prediction = np.array([[1, 0, 0, 3, 4]])
    # 1: overlap; 2: in neither; 3: only predicted; 4: only predicted; 5: there and missed
    np.testing.assert_allclose(dice_per_class(prediction, truth, 5), [2 / 3, NAN, 0, 0, 0], rtol=1e-6)
    assert dice_per_class(prediction, truth, 5).dtype == np.float64


def test_a_structure_may_be_several_labels(make_case: MakeCase) -> None:
    """KiTS: the kidney is all that is labelled, its tumour included."""
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[2:8, 2:8, 2:8] = 1
    labels[4:6, 4:6, 4:6] = 2
    prediction = np.where(labels > 0, 1, 0).astype(np.uint8)  # the kidney to the voxel, and no tumour
    case = make_case(labels)
    kits = score_case(prediction, case, ("kidney", "tumor"), ((1, 2), (2,)))
    assert kits.dice == (1.0, 0.0)
    assert kits.truth_voxels == (216, 8)
    assert kits.predicted_voxels == (216, 0)
    assert kits.missed == (False, True)
    own = score_case(prediction, case, ("kidney", "tumor"))
    assert own.dice[0] == pytest.approx(2 * 208 / (216 + 208))
    assert own.truth_voxels == (208, 8)
    np.testing.assert_array_equal(dice_per_class(prediction, labels, 2, ((1, 2), (2,))), kits.dice)


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (np.zeros((2, 3), np.uint8), "shape"),
        (np.zeros((3, 2), np.float32), "float32"),
        (np.full((3, 2), 3, np.uint8), "beyond the 2 classes"),
        (np.full((3, 2), -1, np.int16), "beyond the 2 classes"),
    ],
)
def test_what_is_no_label_map(prediction: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dice_per_class(prediction, np.zeros((3, 2), np.uint8), 2)


def test_counts_of_a_case() -> None:
    assert SCORES[1].empty == (False, True)
    assert [s.false_positive[1] for s in SCORES] == [False, False, True, False, False]
    assert [s.missed[1] for s in SCORES] == [False, False, False, True, True]
    assert not any(s.missed[0] or s.false_positive[0] or s.empty[0] for s in SCORES)
    assert SCORES[0].mean_dice == pytest.approx(0.7)
    assert SCORES[1].mean_dice == pytest.approx(0.7)
    assert math.isnan(score("x", "a", (NAN, NAN), (0, 0), (0, 0)).mean_dice)


def test_summary_by_hand() -> None:
    summary = summarize(SCORES, ("kidney", "tumor"))

    kidney, tumor = (0.9 + 0.7 + 0.8 + 0.2 + 0.4) / 5, (0.5 + 0 + 0 + 0) / 4
    assert summary["cases"] == 5
    assert summary["per_class"]["kidney"] == {
        "dice": pytest.approx(kidney),
        "n": 5,
        "n_empty": 0,
        "n_missed": 0,
        "n_false_positive": 0,
    }
    assert summary["per_class"]["tumor"] == {
        "dice": pytest.approx(tumor),
        "n": 4,
        "n_empty": 1,
        "n_missed": 2,
        "n_false_positive": 1,
    }
    assert summary["dice"] == pytest.approx((kidney + tumor) / 2)
    site_a, site_b = (0.8 + 0.25) / 2, (0.3 + 0) / 2
    assert summary["per_site"]["a"]["dice"] == pytest.approx(site_a)
    assert summary["per_site"]["a"]["per_class"]["tumor"]["dice"] == pytest.approx(0.25)
    assert summary["per_site"]["b"]["cases"] == 2
    assert summary["macro_dice"] == pytest.approx((site_a + site_b) / 2)
    assert summary["worst_site"] == {"site": "b", "dice": pytest.approx(site_b)}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_summary_of_surfaces_by_hand() -> None:
    summary = summarize(SURFACES, ("kidney", "tumor"))

    tumor = summary["per_class"]["tumor"]
    assert (tumor["n"], tumor["n_hd95"], tumor["n_empty"], tumor["n_missed"], tumor["n_false_positive"]) == (
        4,
        2,
        1,
        2,
        1,
    )
    assert tumor["hd95"] == pytest.approx((8 + 40) / 2)
    assert tumor["hd95_penalised"] == pytest.approx((8 + 300 + 300 + 40) / 4)
    assert tumor["nsd"] == pytest.approx(0.6 / 4)
    kidney = (3 + 5 + 4 + 20 + 10) / 5
    assert summary["hd95"] == pytest.approx((kidney + 24) / 2)
    site_a, site_b = (4 + 8) / 2, (15 + 40) / 2
    assert [summary["per_site"][site]["hd95"] for site in "ab"] == pytest.approx([site_a, site_b])
    assert summary["macro"]["hd95"] == pytest.approx((site_a + site_b) / 2)
    assert summary["macro"]["per_class"]["tumor"]["nsd"] == pytest.approx((0.3 + 0) / 2)
    assert summary["macro"]["per_class"]["kidney"]["dice"] == pytest.approx((0.8 + 0.3) / 2)
    assert summary["macro"]["dice"] == summary["macro_dice"]
    assert summary["worst"] == {
        "dice": {"site": "b", "value": pytest.approx(0.15)},
        "hd95": {"site": "b", "value": pytest.approx(site_b)},
        "hd95_penalised": {"site": "b", "value": pytest.approx((15 + 170) / 2)},
        "nsd": {"site": "b", "value": pytest.approx(0.2)},
    }
    assert summary["nsd_tolerance_mm"] == 2.0
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    plain = summarize(SCORES, ("kidney", "tumor"))
    assert without_surfaces(summary) == plain
    assert "nsd" not in json.dumps(plain)
    with pytest.raises(ValueError, match="tolerance"):
        summarize([*SURFACES, replace(SURFACES[0], nsd_tolerance_mm=1.0)], ("kidney", "tumor"))


def without_surfaces(summary: Any) -> Any:
    """A summary without what surfaces have added."""
    if not isinstance(summary, dict):
        return summary
    added = ("hd95", "hd95_penalised", "nsd", "n_hd95", "nsd_tolerance_mm")
    return {key: without_surfaces(value) for key, value in summary.items() if key not in added}


@pytest.mark.filterwarnings("error")
def test_intervals_stand_beside_every_mean() -> None:
    summary = summarize(SURFACES, ("kidney", "tumor"), intervals=True)
    assert summary == summarize(SURFACES, ("kidney", "tumor"), intervals=True)
    assert summary != summarize(SURFACES, ("kidney", "tumor"), intervals=True, seed=1)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary

    sites = summary["per_site"]
    groups = [summary, summary["macro"], *sites.values()]
    groups += [by_class for group in groups for by_class in group["per_class"].values()]
    for group in groups:
        assert set(group["ci95"]) == {"dice", "hd95", "hd95_penalised", "nsd"}
        for metric, ends in group["ci95"].items():
            if ends is not None:
                assert ends[0] - 1e-9 <= group[metric] <= ends[1] + 1e-9
    assert sites["a"]["per_class"]["tumor"]["ci95"]["dice"] == pytest.approx([0, 0.5])  # of two cases: one or the other
    assert sites["a"]["per_class"]["tumor"]["ci95"]["hd95"] is None  # of one case
    assert sites["b"]["per_class"]["tumor"]["ci95"]["dice"] == [0, 0]  # of two equal ones
    # Macro: sites keep their weight, so its interval is that of neither the pooled cases nor the two site means.
    assert summary["macro"]["ci95"]["dice"] != summary["ci95"]["dice"]
    assert "ci95" not in json.dumps(summarize(SURFACES, ("kidney", "tumor")))


def test_summary_of_nothing_scored() -> None:
    for scores in ([], [score("x", "a", (NAN, NAN), (0, 0), (0, 0))]):
        summary = summarize(scores, ("kidney", "tumor"), intervals=True)
        assert summary["cases"] == len(scores)
        assert summary["macro"]["per_class"]["tumor"] == {"dice": None, "ci95": {"dice": None}}
        assert (summary["dice"], summary["macro_dice"], summary["worst_site"]) == (None, None, None)
        json.dumps(summary, allow_nan=False)
    with pytest.raises(ValueError, match="kidney"):
        summarize(SCORES, ("liver", "tumor"))


def test_sums_of_sites_give_the_pooled_means() -> None:
    sums = [dice_sums([s for s in SCORES if s.site == site], 2) for site in ("a", "b", "no case here")]
    total, count = (sum(site[k] for site in sums) for k in range(2))
    summary = summarize(SCORES, ("kidney", "tumor"))
    np.testing.assert_allclose(total / count, [summary["per_class"][name]["dice"] for name in ("kidney", "tumor")])
    assert sums[0][1].tolist() == [3, 2]
    assert total.dtype == count.dtype == np.float64


def test_a_row_is_flat() -> None:
    flat = {
        "case": "a1",
        "site": "a",
        "split": "test",
        "dice": pytest.approx(0.7),
        "dice_kidney": 0.9,
        "dice_tumor": 0.5,
        "truth_voxels_kidney": 10,
        "truth_voxels_tumor": 4,
        "predicted_voxels_kidney": 11,
        "predicted_voxels_tumor": 5,
        "truth_ml_kidney": pytest.approx(0.02),
        "truth_ml_tumor": pytest.approx(0.008),
        "predicted_ml_kidney": pytest.approx(0.022),
        "predicted_ml_tumor": pytest.approx(0.01),
    }
    measured = {
        "hd95_mm_kidney": 3.0,
        "hd95_mm_tumor": 8.0,
        "hd95_penalised_mm_kidney": 3.0,
        "hd95_penalised_mm_tumor": 8.0,
        "nsd_kidney": 0.95,
        "nsd_tumor": 0.6,
    }
    assert replace(SCORES[0], voxel_ml=0.002).row() == flat
    assert replace(SURFACES[0], voxel_ml=0.002).row() == flat | measured


def test_a_row_a_class_has_the_same_columns_for_all() -> None:
    first, second = replace(SURFACES[2], voxel_ml=0.002).class_rows()
    assert list(first) == list(second)
    assert second == {
        "case": "a3",
        "site": "a",
        "split": "test",
        "class": "tumor",
        "dice": 0.0,
        "hd95_mm": None,
        "hd95_penalised_mm": 300.0,
        "nsd": 0.0,
        "truth_ml": 0.0,
        "predicted_ml": pytest.approx(0.006),
        "empty": False,
        "missed": False,
        "false_positive": True,
    }
    (_, absent) = SURFACES[1].class_rows()
    assert (absent["dice"], absent["hd95_penalised_mm"], absent["nsd"], absent["empty"]) == (None, None, None, True)


def test_truth_is_what_the_file_says(make_case: MakeCase) -> None:
    labels = blobs((9, 10, 11), (1, 1, 1))
    case = make_case(labels, orientation="IPL")
    assert case.label is not None
    stored = np.asarray(nib.load(case.label).dataobj)
    assert stored.shape == (11, 10, 9)
    np.testing.assert_array_equal(truth_on_scan_grid(case), stored)
    for dtype in (np.uint16, np.int16, np.float32, np.float64):
        nib.save(nib.Nifti1Image(stored.astype(dtype), np.eye(4), dtype=dtype), case.label)
        np.testing.assert_array_equal(truth_on_scan_grid(case), stored)
        assert truth_on_scan_grid(case).dtype == np.uint8
    scaled = nib.Nifti1Image(stored * np.uint8(2), np.eye(4))
    scaled.header.set_slope_inter(0.5, 0)
    Path(case.label).write_bytes(gzip.compress(scaled.to_bytes()))
    truth = truth_on_scan_grid(case)
    np.testing.assert_array_equal(truth, np.round(nib.load(case.label).get_fdata()))


def test_merged_labels(make_case: MakeCase) -> None:
    """Zones of a prostate are one structure: the manifest lists 0 and 1, the file holds more."""
    labels = blobs((9, 10, 11), (1, 1, 1), classes=3)
    case = make_case(labels).model_copy(update={"merge_labels": True, "label_values": (0, 1)})
    assert case.label is not None
    np.testing.assert_array_equal(truth_on_scan_grid(case), labels > 0)
    assert score_case((labels > 0).astype(np.uint8), case, ("prostate",)).dice == (1.0,)
    nib.save(nib.Nifti1Image(labels.astype(np.float32) / 2, np.eye(4)), case.label)
    with pytest.raises(DataError, match=r"case_label\.nii\.gz: holds values that are no labels; restore"):
        truth_on_scan_grid(case)


def test_truth_of_a_dicom_segmentation(make_case: MakeCase, tmp_path: Path) -> None:
    labels = blobs((16, 14, 9), (1, 1, 3))
    affine = np.diag([-1.0, -1.0, 3.0, 1.0])
    gray = np.random.default_rng(0).integers(0, 200, labels.shape).astype(np.float32)
    write_series(tmp_path / "series", gray, affine)
    write_segmentation(labels, tmp_path / "series", ("kidney", "tumor"), tmp_path / "truth.dcm")
    scan = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(gray, affine), scan)
    case = make_case(labels).model_copy(update={"label": str(tmp_path / "truth.dcm")})
    for image in (tmp_path / "series", scan):
        truth = truth_on_scan_grid(case.model_copy(update={"image": str(image)}))
        np.testing.assert_array_equal(truth, labels)
        assert truth.dtype == np.uint8
    with pytest.raises(DataError, match=r"truth\.dcm.*\(16, 14, 9\).*\(16, 14, 8\)"):
        truth_on_scan_grid(case.model_copy(update={"image": str(scan), "shape": (16, 14, 8)}))


def test_truth_that_cannot_be_used(make_case: MakeCase) -> None:
    case = make_case(blobs((9, 10, 11), (1, 1, 1)))
    assert case.label is not None
    path = Path(case.label)
    good = path.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message) as caught:
            truth_on_scan_grid(case)
        assert "\n" not in str(caught.value)

    def write(values: np.ndarray) -> None:
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)

    path.write_bytes(good[: len(good) // 2])
    refused(r"case_label\.nii\.gz: cannot read")
    path.write_bytes(good[:60] + bytes(40) + good[100:])
    refused(r"case_label\.nii\.gz: cannot read")
    path.write_bytes(b"")
    refused(r"case_label\.nii\.gz: cannot read")
    path.unlink()
    refused(r"case_label\.nii\.gz: cannot read")
    write(np.zeros((9, 10, 12), np.uint8))
    refused(r"\(9, 10, 12\).*\(9, 10, 11\)")
    for bad in (3, -1, 0.5, np.nan, 258):
        values = np.zeros((9, 10, 11), np.float32)
        values[4, 4, 4] = bad
        write(values)
        refused("integers 0 to 2")
    with pytest.raises(DataError, match="case: no label map"):
        truth_on_scan_grid(case.model_copy(update={"label": None}))
