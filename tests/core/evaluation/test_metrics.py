import gzip
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt

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


def test_summary_of_nothing_scored() -> None:
    for scores in ([], [score("x", "a", (NAN, NAN), (0, 0), (0, 0))]):
        summary = summarize(scores, ("kidney", "tumor"))
        assert summary["cases"] == len(scores)
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
    assert SCORES[0].row() == {
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
    }


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
