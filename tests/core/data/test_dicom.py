from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import (
    ComprehensiveSRStorage,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    generate_uid,
)
from support.dicom import LPS, PATIENT, write_enhanced, write_series

from fedsam_core.data.dicom import is_series, read_header, read_segmentation, read_series, write_segmentation
from fedsam_core.data.scans import Volume, read_image, read_label
from fedsam_core.errors import DataError, UnfitMask, UnfitScan, UnreadableScan

SHAPE = (12, 10, 6)  # columns, rows, slices; ITK unpacks the bits of a frame only if they fill whole bytes
CLASSES = ("kidney", "renal tumour", "outer zone")


def turned(degrees: float, axis: int) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.eye(3)
    i, j = [k for k in range(3) if k != axis]
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def affine_of(axes: np.ndarray, spacing: tuple[float, float, float] = (0.7, 0.9, 2.5)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = axes @ np.diag(spacing)
    affine[:3, 3] = -123.4567, 50.25, 7.125
    return affine


AXIAL = np.diag([-1.0, -1.0, 1.0])  # columns to the left, rows to the back, slices to the head
CORONAL = np.array([[-1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]])
OBLIQUE = turned(17, 2) @ turned(-11, 0) @ AXIAL
GEOMETRIES = {
    "axial": AXIAL,
    "from head to feet": AXIAL @ np.diag([1, 1, -1.0]),
    "coronal": CORONAL,
    "oblique": OBLIQUE,
    "oblique, the other way round": OBLIQUE @ np.diag([1, 1, -1.0]),
}


@pytest.fixture
def scan() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 2000, SHAPE).astype(np.float64)


@pytest.fixture
def labels() -> np.ndarray:
    """Every slice another; the middle one empty."""
    found = np.random.default_rng(1).integers(0, 4, SHAPE).astype(np.uint8)
    found[:, :, 3] = 0
    return found


def at(volume: np.ndarray, affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Values of a volume at points [n, 3] in mm (RAS+), which must be voxels of it."""
    indices = (np.linalg.inv(affine) @ np.c_[points, np.ones(len(points))].T)[:3]
    assert np.abs(indices - np.rint(indices)).max() < 1e-4
    return volume[tuple(np.rint(indices).astype(int))]


def everywhere(affine: np.ndarray) -> np.ndarray:
    """All voxel centres of a volume of SHAPE, in mm."""
    indices = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), -1).reshape(-1, 3)
    return indices @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize("axes", GEOMETRIES.values(), ids=GEOMETRIES)
def test_every_voxel_lies_where_it_was(tmp_path: Path, scan: np.ndarray, axes: np.ndarray) -> None:
    affine = affine_of(axes)
    write_series(tmp_path / "CT", scan, affine)

    volume = read_series(tmp_path / "CT")

    points = everywhere(affine)
    assert volume.voxels.dtype == np.float32
    assert volume.voxels.shape == SHAPE
    np.testing.assert_array_equal(at(volume.voxels, volume.affine, points), scan.ravel())
    np.testing.assert_allclose(np.linalg.det(volume.affine), abs(np.linalg.det(affine)), rtol=1e-6)
    np.testing.assert_allclose(volume.spacing, (0.7, 0.9, 2.5), atol=1e-6)


@pytest.mark.parametrize("axes", GEOMETRIES.values(), ids=GEOMETRIES)
def test_simpleitk_says_the_same_of_the_series(tmp_path: Path, scan: np.ndarray, axes: np.ndarray) -> None:
    write_series(tmp_path / "CT", scan, affine_of(axes))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "CT")))
    image = reader.Execute()

    volume = read_series(tmp_path / "CT")

    theirs = np.eye(4)
    theirs[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
    theirs[:3, 3] = image.GetOrigin()
    np.testing.assert_allclose(volume.affine, LPS @ theirs, atol=1e-6)
    np.testing.assert_array_equal(volume.voxels, sitk.GetArrayFromImage(image).T)


@pytest.mark.parametrize("compress", [None, RLELossless, JPEGLSLossless], ids=["plain", "RLE", "JPEG-LS"])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_each_slice_has_its_own_scale(tmp_path: Path, scan: np.ndarray, compress: str | None, modality: str) -> None:
    slopes = np.array([0.5, 1, 2, 0.25, 1, 0.125])
    scan = np.rint((scan + np.pi) / slopes) * slopes  # whole steps of each slope, and fractions
    write_series(tmp_path / "S", scan, affine_of(AXIAL), modality=modality, slope=slopes, compress=compress)

    np.testing.assert_array_equal(read_series(tmp_path / "S").voxels, scan)
    assert read_header(tmp_path / "S").modality == modality


@pytest.mark.parametrize("axes", [AXIAL, GEOMETRIES["oblique, the other way round"]])
def test_a_file_with_many_frames(tmp_path: Path, scan: np.ndarray, axes: np.ndarray) -> None:
    affine, slopes = affine_of(axes), np.array([0.5, 1, 2, 0.5, 1, 0.25])
    scan = np.rint((scan + np.pi) / slopes) * slopes
    write_enhanced(tmp_path / "CT" / "all.dcm", scan, affine, slopes)

    volume = read_series(tmp_path / "CT")

    assert is_series(tmp_path / "CT")
    np.testing.assert_array_equal(at(volume.voxels, volume.affine, everywhere(affine)), scan.ravel())


def test_names_of_the_files_say_nothing(tmp_path: Path, scan: np.ndarray) -> None:
    files = write_series(tmp_path / "A", scan, affine_of(AXIAL))
    first = read_series(tmp_path / "A")
    for index, file in enumerate(files):
        file.rename(file.with_name(f"{'zyxwvu'[index]}.dcm"))
    again = read_series(tmp_path / "A")
    assert again.sha256 == first.sha256
    np.testing.assert_array_equal(again.voxels, first.voxels)

    write_series(tmp_path / "B", scan, affine_of(AXIAL))  # other UIDs
    assert read_series(tmp_path / "B").sha256 != first.sha256
    np.testing.assert_array_equal(read_image(tmp_path / "A").voxels, first.voxels)


def spoil(file: Path, **tags: Any) -> None:
    dataset = pydicom.dcmread(file)
    for keyword, value in tags.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    if "SOPClassUID" in tags:
        dataset.file_meta.MediaStorageSOPClassUID = tags["SOPClassUID"]
    dataset.save_as(file)


def test_what_is_no_image_of_the_series_is_not_looked_at(tmp_path: Path, scan: np.ndarray, labels: np.ndarray) -> None:
    folder = tmp_path / "CT"
    write_series(folder, scan, affine_of(AXIAL))
    alone = read_series(folder)
    write_segmentation(labels, folder, CLASSES, folder / "a_seg.dcm")
    for index, changes in enumerate(
        (
            {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "SeriesInstanceUID": generate_uid()},
            {"SOPClassUID": ComprehensiveSRStorage, "SeriesInstanceUID": generate_uid()},
            {"SOPClassUID": SecondaryCaptureImageStorage, "SeriesInstanceUID": generate_uid()},
        )
    ):
        other = write_series(tmp_path / "other", scan[..., :1], affine_of(CORONAL))[0]
        spoil(other, **changes)
        other.rename(folder / f"b{index}")
    (folder / "notes.txt").write_text("DICM")
    (folder / "._IM0000").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "older").mkdir()

    assert read_series(folder).sha256 == alone.sha256


def test_what_is_a_series(tmp_path: Path, scan: np.ndarray, labels: np.ndarray) -> None:
    files = write_series(tmp_path / "CT", scan, affine_of(AXIAL))
    assert is_series(tmp_path / "CT")
    assert not is_series(files[0])
    assert not is_series(tmp_path / "missing")
    assert not is_series(tmp_path)
    write_segmentation(labels, tmp_path / "CT", CLASSES, tmp_path / "CT_seg.dcm")
    (tmp_path / "cut.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\2\0")
    assert not is_series(tmp_path)  # no image in it
    for file in files[1:]:
        file.unlink()
    files[0].rename(tmp_path / "CT" / "IM.dcm")
    assert is_series(tmp_path / "CT")


Spoil = Callable[[list[Path]], Any]
FAULTS: dict[str, tuple[Spoil, type[DataError], str]] = {
    "a slice is missing": (
        lambda files: files[2].unlink(),
        UnfitScan,
        r"5 mm between IM\d+ and IM\d+, elsewhere 2.5 mm \(1 missing\).*export",
    ),
    "slices are uneven": (
        lambda files: spoil(files[-1], ImagePositionPatient=["123.4567", "-50.25", "20"]),
        UnfitScan,
        r"2.875 mm between .*unevenly",
    ),
    "a slice lies twice": (
        lambda files: spoil(files[3], ImagePositionPatient=["123.4567", "-50.25", "7.125"]),
        UnfitScan,
        r"1 images lie where another one does \(IM\d+ and IM\d+\).*echoes.*move",
    ),
    "the gantry is tilted": (
        lambda files: [
            spoil(file, ImagePositionPatient=["123.4567", f"{-50.25 + 0.5 * z}", f"{7.125 + 2.5 * z}"])
            for z, file in enumerate(files)
        ],
        UnfitScan,
        r"by up to 2.5 mm .*11.3 degrees.*resample",
    ),
    "a slice has another size": (
        lambda files: spoil(files[1], Rows=11, PixelData=bytes(2 * 11 * 12)),
        UnfitScan,
        r"1 of 6 images have another size.*IM\d+.*move them",
    ),
    "a slice looks another way": (
        lambda files: spoil(files[1], ImageOrientationPatient=["1", "0", "0", "0", "0", "-1"]),
        UnfitScan,
        r"1 of 6 images have another size, pixel spacing or orientation",
    ),
    "two series": (
        lambda files: [
            spoil(file, SeriesInstanceUID="1.2.3", SeriesNumber=9, SeriesDescription="bone") for file in files[:2]
        ],
        UnfitScan,
        r"2 series \(4: made up, 4 images; 9: bone, 2 images\).*folder of its own",
    ),
    "a slice lies nowhere": (
        lambda files: spoil(files[4], ImagePositionPatient=None),
        UnfitScan,
        r"IM\d+: the header lacks.*export",
    ),
    "directions are no directions": (
        lambda files: [spoil(file, ImageOrientationPatient=["1", "0", "0", "1", "0", "0"]) for file in files],
        UnfitScan,
        r"directions .* do not span",
    ),
    "colours": (
        lambda files: spoil(files[0], SamplesPerPixel=3),
        UnfitScan,
        r"a colour image",
    ),
    "one image": (lambda files: [file.unlink() for file in files[1:]], UnfitScan, r"a single image.*whole series"),
    "no image": (
        lambda files: [spoil(file, SOPClassUID=SegmentationStorage) for file in files],
        UnfitScan,
        r"no CT, MR or PET image",
    ),
    "a file is cut within its pixels": (
        lambda files: files[2].write_bytes(files[2].read_bytes()[:-20]),
        UnreadableScan,
        r"IM\d+: the pixels cannot be decoded.*copy the file again",
    ),
    "a file is cut within its header": (
        lambda files: files[2].write_bytes(files[2].read_bytes()[:600]),
        DataError,
        r"IM\d+: .*(copy|export)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_fix_and_without_the_patient(tmp_path: Path, scan: np.ndarray, fault: str) -> None:
    change, kind, words = FAULTS[fault]
    change(write_series(tmp_path / "CT", scan, affine_of(AXIAL)))

    with pytest.raises(kind, match=words) as raised:
        read_series(tmp_path / "CT")

    assert str(tmp_path / "CT") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert PATIENT.split("^")[0] not in str(raised.value)
    assert "4711" not in str(raised.value)


def test_headers_that_round_are_no_fault(tmp_path: Path, scan: np.ndarray) -> None:
    files = write_series(tmp_path / "CT", scan, affine_of(AXIAL))
    for z, file in enumerate(files):
        place = [f"{123.4567 + 0.004 * (z % 2)}", "-50.25", f"{7.125 + 2.5 * z + 0.01 * (z % 2):.3f}"]
        spoil(file, ImagePositionPatient=place)
    np.testing.assert_allclose(read_series(tmp_path / "CT").spacing, (0.7, 0.9, 2.502), atol=1e-6)


@pytest.mark.parametrize("axes", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("enhanced", [False, True], ids=["slices", "frames"])
def test_a_segmentation_lies_on_the_images_that_it_refers_to(
    tmp_path: Path, scan: np.ndarray, labels: np.ndarray, axes: np.ndarray, enhanced: bool
) -> None:
    affine, folder, path = affine_of(axes), tmp_path / "CT", tmp_path / "out" / "seg.dcm"
    if enhanced:
        write_enhanced(folder / "all.dcm", scan, affine, np.ones(SHAPE[2]))
        files = [folder / "all.dcm"]
    else:
        files = write_series(folder, scan, affine)
    volume = read_series(folder)

    write_segmentation(labels, folder, CLASSES, path)

    np.testing.assert_array_equal(read_segmentation(path, volume), labels)
    assert [file.name for file in path.parent.iterdir()] == ["seg.dcm"]
    dataset = pydicom.dcmread(path)
    decoded = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))  # ITK knows nothing of a segment's place, only its bits
    written = dataset.PerFrameFunctionalGroupsSequence
    assert len(written) == 3 * 5  # the empty slice is left out
    expected = at(labels, volume.affine, everywhere(affine)).reshape(SHAPE)  # in the order that was written
    places = {str(pydicom.dcmread(file).get("ImagePositionPatient")): file for file in files}
    for frame, bits, itk in zip(written, dataset.pixel_array, decoded, strict=True):
        position = np.array([float(v) for v in frame.PlanePositionSequence[0].ImagePositionPatient])
        z = round(float((np.linalg.inv(LPS @ affine) @ [*position, 1])[2]))
        segment = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        np.testing.assert_array_equal(bits, segment == expected[:, :, z].T)
        np.testing.assert_array_equal(itk > 0, bits)
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        if enhanced:
            image = pydicom.dcmread(files[0])
            shown = image.PerFrameFunctionalGroupsSequence[int(source.ReferencedFrameNumber) - 1]
            assert shown.PlanePositionSequence[0].ImagePositionPatient == list(position)
        else:
            image = pydicom.dcmread(places[str(frame.PlanePositionSequence[0].ImagePositionPatient)])
            np.testing.assert_array_equal(image.pixel_array, scan[:, :, z].T + 1024)
        assert source.ReferencedSOPInstanceUID == image.SOPInstanceUID
    theirs = highdicom.seg.segread(path).get_volume(combine_segments=True)
    points = everywhere(theirs.affine)[: theirs.array.size]
    indices = np.argwhere(theirs.array >= 0)
    points = (indices @ theirs.affine[:3, :3].T + theirs.affine[:3, 3]) * [-1, -1, 1]
    np.testing.assert_array_equal(theirs.array.ravel(), at(labels, volume.affine, points))


def test_a_segmentation_says_what_it_is(tmp_path: Path, scan: np.ndarray, labels: np.ndarray) -> None:
    (source, *_) = write_series(tmp_path / "CT", scan, affine_of(AXIAL))
    write_segmentation(labels, tmp_path / "CT", CLASSES, tmp_path / "seg.dcm")

    seg, image = highdicom.seg.segread(tmp_path / "seg.dcm"), pydicom.dcmread(source)

    assert seg.segmentation_type == highdicom.seg.SegmentationTypeValues.BINARY
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "AccessionNumber"):
        assert seg[keyword].value == image[keyword].value
    assert seg.SeriesInstanceUID != image.SeriesInstanceUID
    assert [part.segment_label for part in seg.SegmentSequence] == list(CLASSES)
    assert {part.algorithm_type.value for part in seg.SegmentSequence} == {"AUTOMATIC"}
    assert [part.segmented_property_type.meaning for part in seg.SegmentSequence] == ["Kidney", "Lesion", "Organ"]
    assert [part.segmented_property_category.meaning for part in seg.SegmentSequence] == [
        "Anatomical Structure",
        "Morphologically Abnormal Structure",
        "Anatomical Structure",
    ]


def test_masks_with_little_or_nothing_in_them(tmp_path: Path, scan: np.ndarray) -> None:
    write_series(tmp_path / "CT", scan, affine_of(OBLIQUE))
    volume, path = read_series(tmp_path / "CT"), tmp_path / "seg.dcm"
    nothing = np.zeros(SHAPE, np.uint8)
    write_segmentation(nothing, tmp_path / "CT", CLASSES, path)
    np.testing.assert_array_equal(read_segmentation(path, volume), nothing)
    little = nothing.copy()
    little[4, 5, 2] = 3
    write_segmentation(little, tmp_path / "CT", CLASSES, path)
    np.testing.assert_array_equal(read_segmentation(path, volume), little)
    with pytest.raises(ValueError, match="series of shape"):
        write_segmentation(nothing[1:], tmp_path / "CT", CLASSES, path)


def test_a_series_that_was_made_anonymous_gets_its_segmentation(
    tmp_path: Path, scan: np.ndarray, labels: np.ndarray
) -> None:
    gone = ("PatientName", "PatientID", "PatientBirthDate", "StudyID", "StudyDate", "StudyTime", "AccessionNumber")
    tags = {**dict.fromkeys(gone), "PatientSex": "UNKNOWN"}
    write_series(tmp_path / "CT", scan, affine_of(AXIAL), **tags)
    write_segmentation(labels, tmp_path / "CT", CLASSES, tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read_segmentation(tmp_path / "seg.dcm", read_series(tmp_path / "CT")), labels)

    write_series(tmp_path / "bad", scan, affine_of(AXIAL), StudyInstanceUID=None)
    with pytest.raises(DataError, match=r"bad: no DICOM segmentation.*export") as raised:
        write_segmentation(labels, tmp_path / "bad", CLASSES, tmp_path / "none.dcm")
    assert PATIENT.split("^")[0] not in str(raised.value)
    assert not (tmp_path / "none.dcm").exists()


def test_a_segmentation_serves_as_a_label(tmp_path: Path, scan: np.ndarray, labels: np.ndarray) -> None:
    """On the same scan in NIfTI too, whose axes run another way and whose affine is float32."""
    write_series(tmp_path / "CT", scan, affine_of(OBLIQUE))
    volume, path = read_series(tmp_path / "CT"), tmp_path / "seg.dcm"
    write_segmentation(labels, tmp_path / "CT", CLASSES, path)
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = SHAPE[0] - 1
    turned_round = Volume(
        volume.voxels[::-1].transpose(2, 0, 1),
        (volume.affine @ flip).astype(np.float32).astype(np.float64)[:, [2, 0, 1, 3]],
        "",
    )

    np.testing.assert_array_equal(read_segmentation(path, turned_round), labels[::-1].transpose(2, 0, 1))
    label = read_label(path, volume, tmp_path / "CT", classes=3)
    np.testing.assert_array_equal(label.voxels, labels)


def test_a_segmentation_of_something_else_is_refused(tmp_path: Path, scan: np.ndarray, labels: np.ndarray) -> None:
    write_series(tmp_path / "CT", scan, affine_of(AXIAL))
    volume, path = read_series(tmp_path / "CT"), tmp_path / "seg.dcm"
    write_segmentation(labels, tmp_path / "CT", CLASSES, path)

    def moved(mm: tuple[float, float, float]) -> Volume:
        affine = volume.affine.copy()
        affine[:3, 3] += mm
        return Volume(volume.voxels, affine, "")

    with pytest.raises(UnfitMask, match=r"seg\.dcm: does not lie on the voxels"):
        read_segmentation(path, moved((0, 0, 1.0)))
    with pytest.raises(UnfitMask, match=r"seg\.dcm: reaches beyond"):
        read_segmentation(path, moved((0, 0, 2.5)))
    with pytest.raises(UnfitMask, match="does not lie on"):
        read_segmentation(path, Volume(volume.voxels, affine_of(OBLIQUE), ""))
    np.testing.assert_array_equal(read_segmentation(path, moved((0.01, 0, 0.1))), labels)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnreadableScan, match=r"seg\.dcm: "):
        read_segmentation(path, volume)
    with pytest.raises(UnreadableScan, match=r"IM\d+: not a readable DICOM segmentation"):
        read_segmentation(next((tmp_path / "CT").iterdir()), volume)
    with pytest.raises(UnreadableScan, match=r"gone\.dcm: cannot read"):
        read_segmentation(tmp_path / "gone.dcm", volume)


def other_kind(folder: Path, path: Path, kind: str, pixels: np.ndarray) -> None:
    """A segmentation as another program writes it: fractional, as a label map, or with overlap."""
    files = sorted(folder.iterdir(), key=lambda file: float(pydicom.dcmread(file).ImagePositionPatient[2]))
    write_segmentation(np.zeros(SHAPE, np.uint8), folder, CLASSES, path)
    segments = highdicom.seg.segread(path).SegmentSequence
    highdicom.seg.Segmentation(
        [pydicom.dcmread(file) for file in files],
        pixels,
        kind,
        segments,
        *(highdicom.UID(), 5, highdicom.UID(), 1),
        *("other", "other", "1", "1"),
    ).save_as(path)


def test_segmentations_of_other_programs(tmp_path: Path, scan: np.ndarray, labels: np.ndarray) -> None:
    folder, path = tmp_path / "CT", tmp_path / "other.dcm"
    write_series(folder, scan, affine_of(AXIAL))
    volume, stack = read_series(folder), labels.T

    other_kind(folder, path, "LABELMAP", stack)
    np.testing.assert_array_equal(read_segmentation(path, volume), labels)

    each = np.stack([stack == value for value in (1, 2, 3)], axis=-1)
    other_kind(folder, path, "FRACTIONAL", np.where(each, 0.8, 0.3))
    np.testing.assert_array_equal(read_segmentation(path, volume), labels)

    each[2, 4, 4] = True
    other_kind(folder, path, "BINARY", each.astype(np.uint8))
    with pytest.raises(UnfitMask, match="segments overlap"):
        read_segmentation(path, volume)
