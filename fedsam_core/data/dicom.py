# mypy: untyped-calls-exclude=SimpleITK
"""DICOM in and out: a folder with one series becomes a volume, and a mask a DICOM segmentation of that series.

SimpleITK, pydicom and highdicom are imported where they are used: together they take a second, and most commands never
meet a DICOM file.

Patients' names and numbers stay where they are: errors tell of files and geometry, never of a header's text other than
the description of a series.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import numpy.typing as npt

import fedsam_core
from fedsam_core.data.files import write_atomic
from fedsam_core.data.scans import AFFINE_TOLERANCE, Volume
from fedsam_core.errors import DataError, UnfitMask, UnfitScan, UnreadableScan

# SOP classes of CT, MR and PET: classic (a file an image), enhanced and converted (a file a volume).
VOLUMES = {
    f"1.2.840.10008.5.1.4.1.1.{end}"
    for end in ("2", "2.1", "2.2", "4", "4.1", "4.4", "128", "130", "128.1")  # CT, MR, PET
}
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
GAP_TOLERANCE = 0.01  # of the slice spacing, and at least this many mm: headers round
TILT_TOLERANCE = 0.1  # pixels by which the whole stack may lean
TURN_TOLERANCE = 1e-3  # by which direction cosines and pixel spacings (mm) of the slices may differ
ABNORMAL = ("tumo", "lesion", "cancer", "carcinoma", "metasta", "neoplas", "mass", "nodule", "cyst", "edema", "oedema")


@dataclass(frozen=True)
class Series:
    """What the headers of a folder's series say, its slices in the order of their positions.

    Attributes:
        files: of the slices, in their order; a single one if that holds all of them as frames.
        frames: index within that single file of each slice; None for a file a slice.
        shape: (columns, rows, slices), the shape of `read_series`'s voxels.
        affine: 4x4, voxel indices to mm, RAS+.
        modality: CT, MR, PT.
    """

    files: tuple[Path, ...]
    frames: tuple[int, ...] | None
    shape: tuple[int, int, int]
    affine: npt.NDArray[np.float64]
    modality: str


@dataclass(frozen=True)
class _Slice:
    """One image, or one frame, as its header describes it; mm, in DICOM's LPS."""

    file: Path
    frame: int | None
    size: tuple[int, int]  # rows, columns
    position: npt.NDArray[np.float64]  # [3], centre of the first pixel
    cosines: npt.NDArray[np.float64]  # [6], direction along a row, then down a column
    pixel: npt.NDArray[np.float64]  # [2], between rows, between columns

    @property
    def name(self) -> str:
        return self.file.name if self.frame is None else f"frame {self.frame + 1} of {self.file.name}"


def is_series(folder: Path) -> bool:
    """Whether files directly in the folder are images of CT, MR or PET in DICOM, whatever they are called.

    Looks at the first bytes of one file after the other until it meets an image. DICOM segmentations, reports and the
    like do not make a folder a series.
    """
    return folder.is_dir() and any(_storage_class(file) in VOLUMES for file in _dicom_files(folder))


def read_series(folder: Path) -> Volume:
    """Read the one series in a folder.

    Returns:
        voxels float32 [columns, rows, slices] in the modality's units (Hounsfield units for CT: rescale slope and
        intercept are applied, file by file); the affine of the headers; the SHA-256 of the files' bytes in the order
        of the slices, whatever the files are called. DICOM that is no image of the series is not looked at: reports,
        segmentations, plans, localisers.

    Raises:
        UnreadableScan: a file cannot be read or decoded.
        UnfitScan: the folder holds no series, several, or one that is no regular stack of slices.
    """
    series = read_header(folder)
    digest = hashlib.sha256()
    for file in series.files:
        digest.update(_bytes(file))
    stack = _decode_files(series) if series.frames is None else _decode_frames(series, series.frames)
    return Volume(stack.T, series.affine, digest.hexdigest())


def read_header(folder: Path) -> Series:
    """What the headers of the one series in a folder say; no pixel is read. Raises like `read_series`."""
    headers = _headers(folder)
    if not headers:
        raise UnfitScan(
            f"{folder}: no CT, MR or PET image in DICOM here; give the folder that directly holds the files of a series"
        )
    groups: dict[str, list[tuple[Path, Any]]] = {}
    for file, header in headers:
        groups.setdefault(str(header.get("SeriesInstanceUID")), []).append((file, header))
    if len(groups) > 1:
        listed = "; ".join(sorted(_describe(group[0][1], len(group)) for group in groups.values())[:6])
        raise UnfitScan(
            f"{folder}: {len(groups)} series ({listed}), but a scan is one; move the one you mean into a folder of its "
            "own"
        )
    slices = [part for file, header in headers for part in _slices(file, header)]
    order, affine = _stack(folder, slices)
    rows, columns = slices[0].size
    modality = str(headers[0][1].get("Modality", ""))
    if slices[0].frame is None:
        files, frames = tuple(slices[i].file for i in order), None
    elif len(headers) == 1:
        files, frames = (headers[0][0],), tuple(order)
    else:
        raise UnfitScan(
            f"{folder}: {len(headers)} files of many frames each; move the one you mean into a folder of its own"
        )
    return Series(files, frames, (columns, rows, len(order)), affine, modality)


def read_segmentation(path: Path, image: Volume) -> npt.NDArray[np.uint8]:
    """Read a DICOM segmentation as labels on the grid of its scan: segment k is label k.

    Fractional segments count from one half on.

    Returns:
        uint8 [X, Y, Z] of the shape of `image.voxels`.

    Raises:
        UnreadableScan: not a DICOM segmentation, or cut off.
        UnfitMask: it does not lie on the scan's grid, or its segments overlap.
    """
    to_voxels = np.linalg.inv(image.affine) @ LPS_TO_RAS
    labels = np.zeros(image.voxels.shape, np.uint8)
    for position, (cosines, pixel), segment, frame in _segment_frames(path):
        start = to_voxels @ [*position, 1.0]
        along_row, down_column = (to_voxels[:3, :3] @ step for step in (cosines[:3] * pixel[1], cosines[3:] * pixel[0]))
        corners = np.array([[i, j] for i in (0, frame.shape[0] - 1) for j in (0, frame.shape[1] - 1)])
        places = start[:3] + corners[:, :1] * down_column + corners[:, 1:] * along_row
        steps = np.stack([along_row, down_column])
        if not (
            np.abs(places - np.rint(places)).max() <= AFFINE_TOLERANCE
            and np.array_equal(np.sort(np.abs(np.rint(steps)), axis=1), [[0, 0, 1], [0, 0, 1]])
        ):
            raise UnfitMask(f"{path}: does not lie on the voxels of its scan; resample it onto the scan")
        rows, columns = np.nonzero(frame)
        voxels = np.rint(start[:3] + rows[:, None] * down_column + columns[:, None] * along_row).astype(np.int64).T
        if (voxels < 0).any() or (voxels >= np.array(labels.shape)[:, None]).any():
            raise UnfitMask(f"{path}: reaches beyond its scan; is it the segmentation of another series?")
        values = frame[rows, columns] if segment is None else np.full(len(rows), segment)
        if len(values) and values.max() > 255:
            raise UnfitMask(f"{path}: segment number {values.max()}; labels go to 255, so number the segments anew")
        taken = labels[tuple(voxels)]
        if ((taken != 0) & (taken != values)).any():
            raise UnfitMask(f"{path}: segments overlap, but a voxel has one label; write it without overlap")
        labels[tuple(voxels)] = values
    return labels


def write_segmentation(mask: npt.NDArray[np.uint8], folder: Path, classes: Sequence[str], path: Path) -> None:
    """Write labels of a series as a DICOM segmentation (binary, a segment a class), whole or not at all.

    It belongs to the patient and the study of the series, refers to its images, and says that an algorithm made it.
    A class whose name DICOM knows (kidney, prostate, hippocampus, ...) has that code, another the code of an organ or,
    if the name tells of a tumour or the like, of a lesion. A mask without foreground is written with empty frames.

    Args:
        mask: uint8 [columns, rows, slices] on the grid of `read_series(folder)`, k for class k.
        folder: of the series.
        classes: names of label values 1, 2, ...
        path: file to write, .dcm.

    Raises:
        UnreadableScan, UnfitScan: see `read_series`.
        DataError: the headers of the series lack what a segmentation must repeat, or the disk refuses.
        ValueError: the mask is not on the grid of the series.
    """
    import highdicom
    import pydicom

    series = read_header(folder)
    if mask.shape != series.shape:
        raise ValueError(f"mask of shape {mask.shape} for a series of shape {series.shape} ({folder})")
    stack = np.ascontiguousarray(mask.T, dtype=np.uint8)  # [slices, rows, columns]
    if series.frames is not None:
        stack = stack[np.argsort(series.frames)]  # back to the order in the file
    try:
        with _quiet():
            sources = [pydicom.dcmread(file, stop_before_pixels=True) for file in series.files]
            for source in sources:
                _complete(source)
            segmentation = highdicom.seg.Segmentation(
                source_images=sources,
                pixel_array=stack,
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=[_segment_of(number, name) for number, name in enumerate(classes, start=1)],
                series_instance_uid=highdicom.UID(),
                series_number=1000 + max(0, int(sources[0].get("SeriesNumber") or 0)) % 1_000_000,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="fedsam",
                manufacturer_model_name="fedsam",
                software_versions=fedsam_core.__version__,
                device_serial_number="0",
                series_description="fedsam segmentation",
                content_label="FEDSAM",
            )
            data = BytesIO()
            segmentation.save_as(data, enforce_file_format=True)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RuntimeError) as error:
        # What the library says may repeat the header, and with it the patient's name.
        raise DataError(
            f"{folder}: no DICOM segmentation can be made from the headers of this series ({type(error).__name__}); "
            "export the series again, with all its headers"
        ) from None
    write_atomic(path, data.getvalue())


# --- headers ----------------------------------------------------------------------------------------------------------


def _dicom_files(folder: Path) -> Iterator[Path]:
    """Files directly in the folder that say they are DICOM, sorted by name."""
    try:
        files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    except OSError as error:
        raise UnreadableScan(f"{folder}: cannot read the folder ({error.strerror}); check the permissions") from error
    for file in files:
        try:
            with file.open("rb") as stream:
                start = stream.read(132)
        except OSError as error:
            raise UnreadableScan(f"{file}: cannot read ({error.strerror}); check the permissions") from error
        if start[128:] == b"DICM":
            yield file


def _storage_class(file: Path) -> str:
    """SOP class of a DICOM file, empty if its start cannot be read."""
    import pydicom

    try:
        with _quiet():
            return str(pydicom.filereader.read_file_meta_info(file).get("MediaStorageSOPClassUID", ""))
    except (pydicom.errors.InvalidDicomError, OSError, EOFError, ValueError, AttributeError, NotImplementedError):
        return ""


def _headers(folder: Path) -> list[tuple[Path, Any]]:
    """Headers of the images in a folder; of localisers only where there is nothing else."""
    import pydicom

    tags = [
        *("SeriesInstanceUID", "SeriesDescription", "SeriesNumber", "Modality", "ImageType"),
        *("Rows", "Columns", "SamplesPerPixel"),
        *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
        *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    ]
    images: list[tuple[Path, Any]] = []
    localisers: list[tuple[Path, Any]] = []
    for file in _dicom_files(folder):
        if _storage_class(file) not in VOLUMES:
            continue
        try:
            with _quiet():
                header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
                kind = header.get("ImageType") or []
            if "SeriesInstanceUID" not in header:
                raise EOFError
        except (pydicom.errors.InvalidDicomError, OSError, EOFError, ValueError, NotImplementedError) as error:
            raise UnreadableScan(f"{file}: cut off or not DICOM; copy or export the series again") from error
        (localisers if "LOCALIZER" in kind else images).append((file, header))
    return images or localisers


def _describe(header: Any, images: int) -> str:
    """A series in words: its number, its description, how many images it has."""
    text = "".join(one for one in str(header.get("SeriesDescription") or "no description") if one.isprintable())
    return f"{header.get('SeriesNumber') or 'no number'}: {text[:40]}, {images} image{'s' * (images > 1)}"


def _slices(file: Path, header: Any) -> Iterator[_Slice]:
    """The image of a file, or its frames."""
    try:
        size = (int(header.Rows), int(header.Columns))
        samples = int(header.get("SamplesPerPixel", 1))
        if "PerFrameFunctionalGroupsSequence" in header:
            shared = header.SharedFunctionalGroupsSequence[0]
            for index, part in enumerate(header.PerFrameFunctionalGroupsSequence):
                yield _Slice(file, index, size, _position(part), *_plane(part, shared))
        else:
            position, cosines, pixel = (
                np.array([float(value) for value in header[keyword].value])
                for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
            )
            if (len(position), len(cosines), len(pixel)) != (3, 6, 2):
                raise ValueError
            yield _Slice(file, None, size, position, cosines, pixel)
    except (AttributeError, KeyError, IndexError, ValueError, TypeError) as error:
        raise UnfitScan(
            f"{file}: the header lacks the place of the image (ImagePositionPatient, ImageOrientationPatient or "
            "PixelSpacing); export the series again, with all its headers"
        ) from error
    if samples != 1:
        raise UnfitScan(f"{file}: a colour image, not a scan; export the original series")


def _group(part: Any, shared: Any, keyword: str) -> Any:
    """A functional group of a frame: its own, or that of all frames."""
    return (part if keyword in part else shared)[keyword].value[0]


def _position(part: Any) -> npt.NDArray[np.float64]:
    return np.array([float(value) for value in part.PlanePositionSequence[0].ImagePositionPatient])


def _plane(part: Any, shared: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Direction cosines [6] and pixel spacing [2] of a frame."""
    cosines = _group(part, shared, "PlaneOrientationSequence").ImageOrientationPatient
    pixel = _group(part, shared, "PixelMeasuresSequence").PixelSpacing
    return np.array([float(value) for value in cosines]), np.array([float(value) for value in pixel])


def _stack(folder: Path, slices: Sequence[_Slice]) -> tuple[list[int], npt.NDArray[np.float64]]:
    """Order of the slices along their normal, and the affine (RAS+) of [columns, rows, slices].

    Raises UnfitScan if they are no regular stack.
    """
    (usual, _), *_ = Counter((s.size, tuple(s.cosines), tuple(s.pixel)) for s in slices).most_common(1)
    size, cosines, pixel = usual[0], np.array(usual[1]), np.array(usual[2])
    odd = [
        one.name
        for one in slices
        if one.size != size
        or np.abs(one.cosines - cosines).max() > TURN_TOLERANCE
        or np.abs(one.pixel - pixel).max() > TURN_TOLERANCE
    ]
    if odd:
        raise UnfitScan(
            f"{folder}: {len(odd)} of {len(slices)} images have another size, pixel spacing or orientation than the "
            f"rest ({odd[0]}); move them out of the folder: often a localiser or a reformatted view"
        )
    row, column = cosines[:3], cosines[3:]
    normal = np.cross(row, column)
    if not (np.abs(np.linalg.norm([row, column, normal], axis=1) - 1) < TURN_TOLERANCE).all() or not (pixel > 0).all():
        raise UnfitScan(
            f"{folder}: directions or pixel spacing in the headers do not span an image; export the series again"
        )
    if len(slices) < 2:
        raise UnfitScan(f"{folder}: a single image, not a volume; give the folder of the whole series")
    positions = np.stack([one.position for one in slices])
    along = positions @ normal
    order = [int(i) for i in np.argsort(along, kind="stable")]
    along, positions = along[order], positions[order]
    names = [slices[i].name for i in order]
    spacing = _spacing(folder, along, names)
    lean = positions - positions[0] - np.outer(along - along[0], normal)
    offset = float(np.linalg.norm(lean, axis=1).max())
    if offset > TILT_TOLERANCE * pixel.min():
        degrees = np.degrees(np.arctan2(np.linalg.norm(lean[-1]), along[-1] - along[0]))
        raise UnfitScan(
            f"{folder}: the slices are shifted against each other within their plane, by up to {offset:.3g} mm (the "
            f"stack leans by {degrees:.3g} degrees: a tilted gantry?); resample the series to an upright stack first"
        )
    affine = np.eye(4)
    affine[:3] = np.stack([row * pixel[1], column * pixel[0], normal * spacing, positions[0]], axis=1)
    return order, LPS_TO_RAS @ affine


def _spacing(folder: Path, along: npt.NDArray[np.float64], names: Sequence[str]) -> float:
    """Distance between neighbouring slices in mm, from their sorted places along the normal."""
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    tolerance = max(GAP_TOLERANCE * usual, GAP_TOLERANCE)
    if gaps.min() < GAP_TOLERANCE:
        first = int(np.argmin(gaps))
        raise UnfitScan(
            f"{folder}: {int((gaps < GAP_TOLERANCE).sum())} images lie where another one does ({names[first]} and "
            f"{names[first + 1]}): several time points, echoes or copies in one series? move all but one of them out"
        )
    worst = int(np.argmax(np.abs(gaps - usual)))
    if abs(gaps[worst] - usual) > tolerance:
        missing = round(float(gaps[worst]) / usual) - 1
        whole = abs(gaps[worst] - (missing + 1) * usual) <= (missing + 1) * tolerance
        found = f"{missing} missing" if missing and whole else "the slices are spaced unevenly"
        raise UnfitScan(
            f"{folder}: {gaps[worst]:.4g} mm between {names[worst]} and {names[worst + 1]}, elsewhere {usual:.4g} mm "
            f"({found}); export the whole series again, or resample it to even slices"
        )
    return float(along[-1] - along[0]) / len(gaps)


# --- pixels -----------------------------------------------------------------------------------------------------------


def _decode_files(series: Series) -> npt.NDArray[np.float32]:
    """float32 [slices, rows, columns] of a file a slice, one after the other: each with its own slope and intercept."""
    import SimpleITK as sitk

    columns, rows, depth = series.shape
    stack = np.empty((depth, rows, columns), np.float32)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetOutputPixelType(sitk.sitkFloat32)
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        for index, file in enumerate(series.files):
            reader.SetFileName(str(file))
            image = reader.Execute()  # has a name: the view below does not keep it alive
            stack[index] = sitk.GetArrayViewFromImage(image)
    except (RuntimeError, ValueError) as error:
        raise UnreadableScan(
            f"{file}: the pixels cannot be decoded (cut off, or packed in an unknown way); copy the file again, or "
            "export the series uncompressed"
        ) from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
    return stack


def _decode_frames(series: Series, frames: Sequence[int]) -> npt.NDArray[np.float32]:
    """float32 [slices, rows, columns] of one file with many frames, each with its own slope and intercept."""
    import highdicom

    (file,) = series.files
    try:
        with _quiet():
            image = highdicom.imread(file)
            stack = image.get_frames(
                frames, as_indices=True, dtype=np.float32, apply_real_world_transform=False, apply_voi_transform=False
            )
    except (ValueError, AttributeError, KeyError, IndexError, TypeError, RuntimeError, OSError, EOFError) as error:
        raise UnreadableScan(
            f"{file}: the frames cannot be decoded (cut off, or packed in an unknown way); copy the file again, or "
            "export the series uncompressed, a file a slice"
        ) from error
    return np.ascontiguousarray(stack, dtype=np.float32)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UnreadableScan(f"{file}: cannot read ({error.strerror}); check the permissions") from error


# --- segments ---------------------------------------------------------------------------------------------------------


def _segment(part: Any) -> int:
    return int(part.SegmentIdentificationSequence[0].ReferencedSegmentNumber)


def _segment_frames(
    path: Path,
) -> Iterator[tuple[npt.NDArray[Any], tuple[npt.NDArray[Any], npt.NDArray[Any]], int | None, npt.NDArray[Any]]]:
    """Frames of a DICOM segmentation: position, (cosines, pixel spacing), segment, what is not 0 where the segment is.

    A label map has no segment a frame: its pixels are the numbers of the segments.
    """
    import highdicom
    import pydicom

    try:
        with _quiet():
            segmentation = highdicom.seg.segread(path)
        shared = segmentation.SharedFunctionalGroupsSequence[0]
        half = segmentation.get("MaximumFractionalValue", 1) / 2
        for index, part in enumerate(segmentation.PerFrameFunctionalGroupsSequence):
            with _quiet():
                frame = segmentation.get_stored_frame(index, as_index=True)
            if "SegmentIdentificationSequence" in part:
                yield _position(part), _plane(part, shared), _segment(part), frame >= half
            else:
                yield _position(part), _plane(part, shared), None, frame
    except (OSError, EOFError) as error:
        raise UnreadableScan(f"{path}: cannot read ({getattr(error, 'strerror', None) or 'cut off'})") from None
    except (pydicom.errors.InvalidDicomError, AttributeError, KeyError, IndexError, ValueError, TypeError) as error:
        raise UnreadableScan(f"{path}: not a readable DICOM segmentation ({type(error).__name__})") from error


def _segment_of(number: int, name: str) -> Any:
    """Description of a class as a segment."""
    import highdicom
    from pydicom.sr.codedict import codes

    abnormal = any(part in name.lower() for part in ABNORMAL)
    if abnormal:
        category, known, code = codes.SCT.MorphologicallyAbnormalStructure, codes.cid7194, codes.SCT.Lesion
    else:
        category, known, code = codes.SCT.AnatomicalStructure, codes.cid7192, codes.SCT.Organ
    word = "".join(part.capitalize() for part in name.replace("_", " ").replace("-", " ").split())
    if word in known.dir():
        code = getattr(known, word)
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=category,
        segmented_property_type=code,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="fedsam", version=fedsam_core.__version__, family=codes.DCM.ArtificialIntelligence
        ),
    )


def _complete(header: Any) -> None:
    """Adds, empty, what an anonymiser may have taken out and a segmentation must have, empty or not."""
    for keyword in (
        *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
        *("StudyID", "StudyDate", "StudyTime", "AccessionNumber"),
    ):
        if keyword not in header:
            setattr(header, keyword, "")
    if header.PatientSex not in ("M", "F", "O"):
        header.PatientSex = ""


_ONE_READER = RLock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings: they repeat odd values of a header, and with them what may be a patient's."""
    with _ONE_READER, warnings.catch_warnings():  # which is the whole process's: threads take turns
        warnings.simplefilter("ignore")
        yield
