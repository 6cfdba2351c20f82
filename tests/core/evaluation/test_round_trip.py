"""From a scan on disk to slices on another grid, through a model that knows the truth, and back into a file.

SimpleITK reads what was written: it shares no code with nibabel, nor with this package.
"""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from fedsam_core.data.preprocess import PreprocessConfig, prepare_image
from fedsam_core.data.slices import SliceConfig
from fedsam_core.evaluation.inference import save_segmentation, segment_scan

from .conftest import GrayReader, blobs

Spacing = tuple[float | None, float | None, float | None] | None
GRAY = 50.0  # HU a label value
ORIENTATIONS = ("IPL", "RAS", "LPS", "oblique")


def oriented(label: nib.Nifti1Image, orientation: str) -> nib.Nifti1Image:
    """The same label map with other axes, or turned in space by 15 and 10 degrees."""
    if orientation != "oblique":
        now, then = nib.io_orientation(label.affine), nib.orientations.axcodes2ornt(orientation)
        return label.as_reoriented(nib.orientations.ornt_transform(now, then))
    first, second = (nib.eulerangles.euler2mat(**{axis: np.radians(by)}) for axis, by in (("z", 15), ("x", -10)))
    return nib.Nifti1Image(np.asarray(label.dataobj), nib.affines.from_matvec(first @ second) @ label.affine)


def round_trip(label: nib.Nifti1Image, folder: Path, spacing: Spacing = None) -> dict[int, float]:
    """Dice by class after the way there and back; whatever else must hold is asserted."""
    truth = np.asarray(label.dataobj).astype(np.uint8)
    scan, mask = folder / "scan.nii.gz", folder / "mask.nii.gz"
    nib.save(nib.Nifti1Image(truth * np.float32(GRAY), label.affine), scan)
    config = PreprocessConfig(spacing=spacing, slice_axis="axial", ct_window=(0, 2 * GRAY))
    case = prepare_image(scan, config, "ct")
    height, width = (n * mm for n, mm in zip(case.image.shape[1:], case.spacing[1:], strict=True))
    side = round(max(height, width) / min(case.spacing[1:]))  # pixels of the square: nothing is lost in it

    labels = segment_scan(GrayReader(2, keep=False), case, SliceConfig(), side, batch_size=8)
    save_segmentation(labels, case.case, mask)

    written, read = sitk.ReadImage(str(mask)), sitk.ReadImage(str(scan))
    assert written.GetSize() == read.GetSize() == truth.shape
    assert written.GetPixelID() == sitk.sitkUInt8
    for of in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(written, of)(), getattr(read, of)(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(nib.load(mask).affine, label.affine, rtol=1e-6, atol=1e-6)
    found = sitk.GetArrayFromImage(written).T
    return {value: dice(found == value, truth == value) for value in (1, 2)}


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.fixture
def balls() -> nib.Nifti1Image:
    """Two classes at 0.8 x 0.8 x 5 mm; wider than high."""
    affine = np.diag([-0.8, -0.8, 5.0, 1])
    affine[:3, 3] = 101.25, 34.5, -210.125
    return nib.Nifti1Image(blobs((60, 44, 12), (0.8, 0.8, 5)), affine)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("spacing", [None, (5.0, 0.8, 0.8)], ids=["native", "the scan's own spacing"])
def test_on_the_scan_s_own_spacing_no_voxel_changes(
    balls: nib.Nifti1Image, tmp_path: Path, orientation: str, spacing: Spacing
) -> None:
    assert round_trip(oriented(balls, orientation), tmp_path, spacing) == {1: 1.0, 2: 1.0}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_from_5_mm_to_1_mm_and_back(balls: nib.Nifti1Image, tmp_path: Path, orientation: str) -> None:
    assert min(round_trip(oriented(balls, orientation), tmp_path, (1.0, None, None)).values()) >= 0.97


@pytest.fixture
def kidney(real_data: Path) -> Callable[[str], nib.Nifti1Image]:
    """kidney("case_00038"): the mask around the tumour of a KiTS case, with the affine of that part."""

    def crop(case: str) -> nib.Nifti1Image:
        label = nib.load(real_data / "kits19" / "data" / case / "segmentation.nii.gz")
        low, high = (f(np.argwhere(np.asarray(label.dataobj) == 2), axis=0) for f in (np.min, np.max))
        part = [slice(max(0, a - n), b + 1 + n) for a, b, n in zip(low, high, (8, 25, 25), strict=True)]
        return label.slicer[tuple(part)]

    return crop


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("case", "orientation", "spacing", "least"),
    [
        *(("case_00038", orientation, None, 1.0) for orientation in ORIENTATIONS),
        ("case_00098", "IPL", None, 1.0),
        *(("case_00038", orientation, (1.0, None, None), 0.97) for orientation in ORIENTATIONS),
        ("case_00148", "IPL", (1.0, None, None), 0.97),
        # In the plane too: 1 mm is coarser than the scan's pixels.
        ("case_00038", "IPL", (1.0, 1.0, 1.0), 0.97),
        # The other way loses what thin slices show: the ends of a tumour, above all.
        ("case_00098", "IPL", (5.0, None, None), 0.9),
    ],
)
def test_real_kidneys(
    kidney: Callable[[str], nib.Nifti1Image],
    tmp_path: Path,
    case: str,
    orientation: str,
    spacing: Spacing,
    least: float,
) -> None:
    scores = round_trip(oriented(kidney(case), orientation), tmp_path, spacing)
    assert min(scores.values()) >= least, scores
