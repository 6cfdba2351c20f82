"""There and back: every orientation exactly, other spacings closely, and nothing shifts."""

import itertools

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy.ndimage import zoom

from fedsam_core.data.geometry import Geometry, resize, slice_plane

SHAPE = (7, 9, 5)
CODES = ["".join(code) for axes in itertools.permutations(("LR", "PA", "IS")) for code in itertools.product(*axes)]


def affine_for(codes: str, spacing: tuple[float, float, float], tilt: float = 0.0) -> np.ndarray:
    """Affine of a grid with these axis codes and spacings, tilted about the patient's x axis (radians)."""
    inverse = nib.orientations.inv_ornt_aff(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes)), (1, 1, 1))
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    affine = turn @ inverse @ np.diag([*spacing, 1])
    affine[:3, 3] = (11.5, -7.25, 30)
    return affine


def blob(shape: tuple[int, ...], sizes: tuple[float, ...]) -> np.ndarray:
    """An off-centre ellipsoid that is smooth in mm, label 1, with a second class in it."""
    grid = np.stack(
        np.meshgrid(*((np.arange(n) + 0.5) * s for n, s in zip(shape, sizes, strict=True)), indexing="ij"), -1
    )
    extent = np.array(shape) * sizes
    square = (((grid - 0.45 * extent) / (0.33 * extent)) ** 2).sum(-1)
    return (square < 1).astype(np.uint8) + (square < 0.4)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.sum(a & b) / (a.sum() + b.sum())


@pytest.mark.parametrize("tilt", [0.0, 0.3])
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_native_round_trip_is_exact(codes: str, tilt: float, plane) -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, SHAPE, dtype=np.uint8)
    affine = affine_for(codes, (0.8, 1.1, 3.0), tilt)
    assert "".join(nib.aff2axcodes(affine)) == codes
    geometry = Geometry.plan(affine, SHAPE, plane, None)
    slices = geometry.to_slices(label, order=0)
    assert slices.shape == geometry.shape
    back = geometry.to_scan(slices, order=0)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, label)

    probabilities = rng.random((2, *geometry.shape), dtype=np.float32)
    there = geometry.to_scan(probabilities, order=1)
    assert there.shape == (2, *SHAPE)
    np.testing.assert_array_equal(geometry.to_slices(there[1], order=1), probabilities[1])


@pytest.mark.parametrize(("plane", "axes"), [("axial", "SPL"), ("coronal", "PIL"), ("sagittal", "LIP")])
def test_slices_lie_as_radiology_looks_at_them(plane, axes: str) -> None:
    """Against nibabel's own reorientation of an image whose grid is already in the wanted axes."""
    image = nib.Nifti1Image(np.random.default_rng(1).random(SHAPE).astype(np.float32), affine_for("IPR", (1, 2, 3)))
    turned = image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(axes)))
    geometry = Geometry.plan(image.affine, SHAPE, plane, None)
    np.testing.assert_array_equal(geometry.to_slices(np.asarray(image.dataobj), 1), np.asarray(turned.dataobj))
    np.testing.assert_allclose(geometry.spacing, nib.affines.voxel_sizes(turned.affine))


@pytest.mark.parametrize(
    ("scan", "target"),
    [
        ((0.8, 0.8, 5.0), (1.0, 1.0, 1.0)),
        ((1.0, 1.0, 1.0), (5.0, 1.0, 1.0)),
        ((0.7, 0.9, 2.5), (3.0, 1.3, 1.3)),
        ((0.5, 0.85, 0.85), (1.0, None, None)),
    ],
)
def test_resampled_labels_come_back(scan, target) -> None:
    shape = tuple(round(120 / size) for size in scan)
    label = blob(shape, scan)
    geometry = Geometry.plan(affine_for("LPS", scan, 0.2), shape, "axial", target)
    for wanted, got, native in zip(target, geometry.spacing, (scan[2], scan[1], scan[0]), strict=True):
        assert got == pytest.approx(wanted or native, rel=0.04)  # a whole number of voxels fills the field of view
    prepared = geometry.to_slices(label, order=0)
    back = geometry.to_scan(prepared, order=0)
    onehot = np.stack([prepared == k for k in range(3)]).astype(np.float32)
    smooth = geometry.to_scan(onehot, order=1).argmax(0)
    assert back.shape == smooth.shape == shape
    for result in (back, smooth):
        assert dice(result >= 1, label >= 1) >= 0.97  # of the size of a kidney
        assert dice(result >= 2, label >= 2) >= 0.96  # 50 mm across


def test_resampling_keeps_positions_in_mm() -> None:
    """The centre of mass in patient coordinates stays put to a hundredth of a voxel, up and down."""
    scan, shape = (0.7, 0.9, 2.5), (60, 50, 20)
    affine = affine_for("RAS", scan)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    image = np.exp(-((((grid - (33, 21, 8)) * scan) / 6) ** 2).sum(-1)).astype(np.float32)
    for target in ((1.0, 1.0, 1.0), (5.0, 2.0, 2.0)):
        geometry = Geometry.plan(affine, shape, "axial", target)
        back = geometry.to_scan(geometry.to_slices(image, 1), 1)
        centre = (grid * back[..., None]).sum((0, 1, 2)) / back.sum()
        np.testing.assert_allclose(centre, (33, 21, 8), atol=0.02)


@pytest.mark.parametrize("order", [0, 1])
def test_enlarging_equals_scipy_on_centred_grids(order) -> None:
    array = np.random.default_rng(2).random((4, 6, 5)).astype(np.float32)
    shape = (9, 13, 5)
    factors = [new / old for new, old in zip(shape, array.shape, strict=True)]
    expected = zoom(array.astype(np.float64), factors, order=order, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(resize(array, shape, order), expected, atol=1e-5)
    stacked = resize(np.stack([array, 2 * array]), shape, order)
    np.testing.assert_allclose(stacked[1], 2 * expected, atol=1e-5)


def test_shrinking_keeps_the_mean_and_thin_structures() -> None:
    array = np.zeros((20, 40, 40), np.float32)
    array[:, :, 17] = 1  # one pixel wide: subsampling four to one would miss it or quadruple it
    small = resize(array, (5, 10, 10), 1)
    assert small.mean() == pytest.approx(array.mean(), rel=0.05)
    assert small.max() < 0.5


def test_geometry_survives_json() -> None:
    import json

    geometry = Geometry.plan(affine_for("IPL", (0.1, 0.77929690, 5), 0.123), SHAPE, "axial", (2.0, None, 1.5))
    again = Geometry.from_dict(json.loads(json.dumps(geometry.to_dict())))
    np.testing.assert_array_equal(again.affine, geometry.affine)
    assert (again.shape, again.scan_shape, again.plane) == (geometry.shape, geometry.scan_shape, geometry.plane)


@pytest.mark.parametrize(
    ("spacing", "orientation", "plane"),
    [
        ((5, 0.8, 0.8), "IPL", "axial"),
        ((0.5, 0.85, 0.85), "IPL", "axial"),  # thin slices: no single coarsest axis
        ((1, 1, 1), "RAS", "axial"),
        ((1, 1.0001, 1), "RAS", "axial"),  # header rounding is no plane
        ((1, 4, 1), "RAS", "coronal"),
        ((3, 1, 1), "LPS", "sagittal"),
    ],
)
def test_slice_plane_is_across_the_coarsest_axis(spacing, orientation: str, plane: str) -> None:
    assert slice_plane(spacing, orientation) == plane


def test_to_scan_refuses_another_shape() -> None:
    geometry = Geometry.plan(affine_for("RAS", (1, 1, 1)), SHAPE, "axial", None)
    with pytest.raises(ValueError, match="prepared volume"):
        geometry.to_scan(np.zeros((3, 3, 3)), 0)
