"""Distances of surfaces against plain scipy, and what the definitions say about borders, empties and tolerances."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure

from fedsam_core.evaluation.metrics import score_case
from fedsam_core.evaluation.surfaces import SurfaceConfig, bounding_box, compare_surfaces, image_diagonal

from .conftest import MakeCase

Array = np.ndarray[Any, Any]
KINDS = ("overlap", "missed", "false positive", "both empty", "border", "apart", "equal", "one voxel", "noise")


def independent(prediction: Array, truth: Array, spacing: tuple[float, ...], tolerance: float) -> tuple[float, ...]:
    """HD95, penalised HD95 and NSD over whole volumes, without MONAI: erosion by the face neighbours, distance maps."""
    if not prediction.any() and not truth.any():
        return math.nan, math.nan, math.nan
    if not prediction.any() or not truth.any():
        return math.nan, math.sqrt(sum((n * s) ** 2 for n, s in zip(truth.shape, spacing, strict=True))), 0.0
    faces = generate_binary_structure(3, 1)
    ours, theirs = (m & ~binary_erosion(m, faces, border_value=0) for m in (prediction, truth))
    forth = distance_transform_edt(~theirs, sampling=spacing)[ours]
    back = distance_transform_edt(~ours, sampling=spacing)[theirs]
    hd95 = max(np.percentile(forth, 95), np.percentile(back, 95))
    within = (forth <= tolerance + 1e-4).sum() + (back <= tolerance + 1e-4).sum()
    return hd95, hd95, within / (ours.sum() + theirs.sum())


def ellipsoid(shape: tuple[int, ...], center: Array, radii: Array) -> Array:
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return np.asarray((((grid - center) / radii) ** 2).sum(axis=-1) <= 1)


def pairs() -> Iterator[tuple[str, Array, Array, tuple[float, float, float], float]]:
    """50 pairs of masks: kind, prediction, truth, spacing, tolerance; every kind five times at least."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        kind = KINDS[seed % len(KINDS)]
        shape = tuple(int(n) for n in rng.integers(12, 30, 3))
        spacing = tuple(float(size) for size in rng.uniform(0.4, 5.0, 3))
        center, radii = np.array(shape) * rng.uniform(0.3, 0.7, 3), np.array(shape) * rng.uniform(0.1, 0.3, 3)
        truth = ellipsoid(shape, center, radii)
        prediction = ellipsoid(shape, center + rng.uniform(-3, 3, 3), radii * rng.uniform(0.7, 1.4, 3))
        if kind == "border":
            truth[:, :, : shape[2] // 2] = True
            prediction[: shape[0] // 3] = True
        elif kind == "apart":
            truth[:], prediction[:] = False, False
            truth[:3, 1:4, :2], prediction[-2:, -5:, -1:] = True, True
        elif kind == "equal":
            prediction = truth.copy()
        elif kind == "one voxel":
            prediction[:] = False
            prediction[tuple(rng.integers(0, shape))] = True
        elif kind == "noise":
            truth, prediction = rng.random(shape) < 0.1, rng.random(shape) < 0.05
        if kind in ("missed", "both empty"):
            prediction[:] = False
        if kind in ("false positive", "both empty"):
            truth[:] = False
        yield kind, prediction, truth, spacing, float(rng.uniform(0.5, 4.0))


def test_equal_to_plain_scipy_on_50_pairs() -> None:
    seen = set()
    for kind, prediction, truth, spacing, tolerance in pairs():
        diagonal = image_diagonal(truth.shape, spacing)
        found = compare_surfaces(prediction, truth, spacing, diagonal, SurfaceConfig(tolerance))
        expected = independent(prediction, truth, spacing, tolerance)
        np.testing.assert_allclose(
            (found.hd95, found.hd95_penalised, found.nsd), expected, rtol=1e-6, atol=1e-6, err_msg=kind
        )
        seen.add((kind, math.isnan(found.hd95), math.isnan(found.nsd)))
    assert {kind for kind, _, _ in seen} == set(KINDS)
    assert {"missed", "false positive", "both empty"} == {kind for kind, no_distance, _ in seen if no_distance}
    assert {"both empty"} == {kind for kind, _, no_nsd in seen if no_nsd}


def test_equal_to_monai_on_whole_volumes() -> None:
    for _, prediction, truth, spacing, tolerance in pairs():
        if prediction.any() and truth.any():
            found = compare_surfaces(prediction, truth, spacing, 0.0, SurfaceConfig(tolerance))
            whole = [torch.from_numpy(mask)[None, None] for mask in (prediction, truth)]
            hd95 = compute_hausdorff_distance(*whole, include_background=True, percentile=95, spacing=spacing)
            nsd = compute_surface_dice(*whole, [tolerance], include_background=True, spacing=spacing)
            assert found.hd95 == pytest.approx(hd95.item(), rel=1e-5)
            assert found.nsd == pytest.approx(nsd.item(), abs=1e-6)


def test_cropping_changes_nothing() -> None:
    for _, prediction, truth, spacing, tolerance in pairs():
        diagonal, config = image_diagonal(truth.shape, spacing), SurfaceConfig(tolerance)
        whole = compare_surfaces(prediction, truth, spacing, diagonal, config)
        around = [np.pad(mask, ((4, 1), (0, 3), (2, 2))) for mask in (prediction, truth)]
        assert repr(compare_surfaces(*around, spacing, diagonal, config)) == repr(whole)
        box = bounding_box(prediction, truth)
        if box is not None:
            assert repr(compare_surfaces(prediction[box], truth[box], spacing, diagonal, config)) == repr(whole)


def test_by_hand() -> None:
    truth, prediction = np.zeros((2, 20, 8, 8), bool)
    truth[2:6, 2:6, 2:6] = True
    prediction[5:9, 2:6, 2:6] = True  # three voxels further along the first axis
    spacing, config = (2.0, 1.0, 1.0), SurfaceConfig(0.0)
    found = compare_surfaces(prediction, truth, spacing, 1.0, config)
    # 4 x 4 x 4 voxels have 56 on the surface; the far face (16 of them, over 5%) is 3 voxels of 2 mm away.
    assert found.hd95 == pytest.approx(6.0)
    assert found.hd95_penalised == found.hd95
    # In common: the slab where both are (12 of its 16 are on the rim), the truth's last face, the prediction's first.
    ours, theirs = np.zeros((2, *truth.shape), bool)
    for mask, edge in ((prediction, ours), (truth, theirs)):
        edge |= mask
        x = np.flatnonzero(mask.any(axis=(1, 2)))
        edge[x[1] : x[-1], 3:5, 3:5] = False
    assert found.nsd == pytest.approx(2 * (ours & theirs).sum() / (56 + 56))
    assert compare_surfaces(prediction, truth, spacing, 1.0, SurfaceConfig(6.0)).nsd == 1.0


def test_a_structure_that_the_image_cuts_off_has_a_surface_there() -> None:
    truth = np.zeros((10, 10, 10), bool)
    truth[:, :, :6] = True  # a slab through the whole image
    prediction = truth.copy()
    prediction[:, :, 5] = False
    found = compare_surfaces(prediction, truth, (1.0, 1.0, 3.0), 1.0, SurfaceConfig(2.0))
    expected = independent(prediction, truth, (1.0, 1.0, 3.0), 2.0)
    assert (found.hd95, found.nsd) == pytest.approx((expected[0], expected[2]))
    # The four sides, which lie in the border of the image, and the bottom agree. The tops are 3 mm apart: all 100
    # voxels of the truth's are out, and of ours those 16 that have no side within 2 mm either.
    surface = (10 * 10 * 6 - 8 * 8 * 4) + (10 * 10 * 5 - 8 * 8 * 3)
    assert found.nsd == pytest.approx((surface - 100 - 16) / surface)


def test_a_tolerance_holds_in_spite_of_rounded_headers() -> None:
    size = float(np.float32(0.4))  # 0.4000000059604645 in a NIfTI header
    truth, prediction = np.zeros((2, 9, 3, 3), bool)
    truth[1, 1, 1] = prediction[6, 1, 1] = True
    assert compare_surfaces(prediction, truth, (size,) * 3, 1.0, SurfaceConfig(2.0)).nsd == 1.0
    assert compare_surfaces(prediction, truth, (size,) * 3, 1.0, SurfaceConfig(1.99)).nsd == 0.0


def test_empty_masks_are_no_warning() -> None:
    empty, full = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prediction, truth in ((empty, empty), (empty, full), (full, empty)):
            found = compare_surfaces(prediction, truth, (1.0, 2.0, 3.0), 15.0, SurfaceConfig())
            assert math.isnan(found.hd95)
            assert repr(found.hd95_penalised) == ("nan" if truth is prediction else "15.0")
            assert repr(found.nsd) == ("nan" if truth is prediction else "0.0")


@pytest.mark.parametrize("orientation", ["RAS", "IPL"])
def test_a_case_is_scored_in_its_own_spacing(make_case: MakeCase, orientation: str) -> None:
    """The tumour is part of the kidney, and the axes of the file are not those of the body."""
    labels = np.zeros((24, 22, 10), np.uint8)
    labels[4:16, 5:15, 2:8] = 1
    labels[8:12, 8:12, 4:7] = 2
    case = make_case(labels, spacing=(0.8, 1.1, 4.0), orientation=orientation)
    assert case.label is not None
    rng = np.random.default_rng(3)
    prediction = np.zeros(case.shape, np.uint8)
    prediction[2:9, 3:15, 4:17] = 1
    prediction[rng.random(case.shape) < 0.01] = 2

    structures = ((1, 2), (2,))
    scored = score_case(prediction, case, ("kidney", "tumor"), structures, SurfaceConfig(1.5))

    truth = np.asarray(nib.load(case.label).dataobj)
    for k, values in enumerate(structures):
        masks = np.isin(prediction, values), np.isin(truth, values)
        expected = independent(*masks, case.spacing, 1.5)
        assert (scored.hd95[k], scored.hd95_penalised[k], scored.nsd[k]) == pytest.approx(expected, rel=1e-5)
        assert scored.dice[k] == pytest.approx(2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum()))
    assert scored.truth_ml[0] == pytest.approx(12 * 10 * 6 * 0.8 * 1.1 * 4 / 1000)
    assert scored.nsd_tolerance_mm == 1.5

    missed = score_case(np.zeros(case.shape, np.uint8), case, ("kidney", "tumor"), structures, SurfaceConfig(1.5))
    assert missed.hd95_penalised == pytest.approx([math.dist((0, 0, 0), (24 * 0.8, 22 * 1.1, 10 * 4.0))] * 2, rel=1e-6)
    assert missed.nsd == (0, 0)
    assert all(map(math.isnan, missed.hd95))
    alone = score_case(prediction, case, ("kidney", "tumor"), structures)
    assert alone.dice == scored.dice
    assert alone.nsd_tolerance_mm is None
    assert all(map(math.isnan, (*alone.hd95, *alone.hd95_penalised, *alone.nsd)))
