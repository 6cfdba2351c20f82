"""DICOM series and enhanced (multi-frame) images made from arrays, with the headers that scanners write."""

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
PATIENT = "Mustermann^Erika"
CLASSES = {"CT": CTImageStorage, "MR": MRImageStorage}


def write_series(
    folder: Path,
    voxels: np.ndarray,
    affine: np.ndarray,
    *,
    modality: str = "CT",
    slope: float | np.ndarray = 1.0,
    intercept: float = -1024.0,
    compress: str | None = None,
    seed: int = 0,
    **tags: Any,
) -> list[Path]:
    """Writes a file a slice, named in an order that has nothing to do with the slices'.

    Args:
        voxels: [X, Y, Z] in modality units; stored as uint16 after slope and intercept are taken off.
        affine: 4x4, indices of `voxels` to mm, RAS+; X becomes the columns, Y the rows, Z the slices.
        slope: of all slices or of each.
        compress: UID of a transfer syntax.
        tags: attributes that every file gets; None takes one away.

    Returns:
        The files, in the order of Z.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(seed).permutation(voxels.shape[2])
    series = generate_uid()
    study, frame_of_reference = generate_uid(), generate_uid()
    slopes = np.broadcast_to(slope, voxels.shape[2])
    files = []
    for z in range(voxels.shape[2]):
        dataset = _header(CLASSES[modality])
        dataset.Modality = modality
        dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = study, frame_of_reference
        dataset.SeriesInstanceUID = series
        dataset.SeriesNumber, dataset.SeriesDescription = 4, "made up"
        dataset.InstanceNumber = int(names[z]) + 1
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient, dataset.PixelSpacing = place(affine, z)
        dataset.SliceThickness = f"{np.linalg.norm(affine[:3, 2]):.6g}"
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{slopes[z]:.10g}", f"{intercept:.10g}"
        _pixels(dataset, np.rint((voxels[:, :, z].T - intercept) / slopes[z]))
        for keyword, value in tags.items():
            if value is None:
                del dataset[keyword]
            else:
                setattr(dataset, keyword, value)
        if compress:
            dataset.compress(compress)
        files.append(folder / f"IM{names[z]:04d}")
        dataset.save_as(files[-1], enforce_file_format=True)
    return files


def write_enhanced(path: Path, voxels: np.ndarray, affine: np.ndarray, slopes: np.ndarray, seed: int = 0) -> None:
    """Writes a CT as one file, its frames in a random order, each with a slope of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = _header(EnhancedCTImageStorage)
    dataset.Modality = "CT"
    dataset.StudyInstanceUID, dataset.FrameOfReferenceUID = generate_uid(), generate_uid()
    dataset.SeriesInstanceUID, dataset.SeriesNumber, dataset.InstanceNumber = generate_uid(), 7, 1
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    order = np.random.default_rng(seed).permutation(voxels.shape[2])
    dataset.NumberOfFrames = len(order)
    shared, frames = Dataset(), []
    _, cosines, pixel = place(affine, 0)
    orientation, measures = Dataset(), Dataset()
    orientation.ImageOrientationPatient = cosines
    measures.PixelSpacing, measures.SliceThickness = pixel, f"{np.linalg.norm(affine[:3, 2]):.6g}"
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([orientation]), Sequence([measures])
    for z in order:
        frame, plane, units, content = Dataset(), Dataset(), Dataset(), Dataset()
        plane.ImagePositionPatient = place(affine, int(z))[0]
        units.RescaleSlope, units.RescaleIntercept, units.RescaleType = f"{slopes[z]:.10g}", "-1024", "HU"
        content.DimensionIndexValues = [int(z) + 1]
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = Sequence([plane]), Sequence([units])
        frame.FrameContentSequence = Sequence([content])
        frames.append(frame)
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    _pixels(dataset, np.stack([np.rint((voxels[:, :, z].T + 1024) / slopes[z]) for z in order]))
    dataset.save_as(path, enforce_file_format=True)


def place(affine: np.ndarray, z: int) -> tuple[list[str], list[str], list[str]]:
    """ImagePositionPatient, ImageOrientationPatient and PixelSpacing of slice z, as decimal strings."""
    lps = LPS @ affine
    columns, rows = (lps[:3, axis] / np.linalg.norm(lps[:3, axis]) for axis in (0, 1))
    spacing = np.linalg.norm(lps[:3, 1]), np.linalg.norm(lps[:3, 0])
    position = lps @ [0, 0, z, 1]
    return _decimal(position[:3]), _decimal([*columns, *rows]), _decimal(spacing)


def _decimal(values: Any) -> list[str]:
    """DICOM's decimal strings have 16 characters."""
    return [f"{value:.10g}"[:16] for value in np.asarray(values) + 0.0]


def _header(sop_class: str) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate, dataset.PatientSex = PATIENT, "4711", "", "F"
    dataset.StudyID, dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber = "1", "20200102", "101500", "A1"
    dataset.ReferringPhysicianName, dataset.Manufacturer = "", "none"
    return dataset


def _pixels(dataset: Dataset, stored: np.ndarray) -> None:
    """Rows, columns and the pixels, uint16."""
    assert stored.min() >= 0
    assert stored.max() < 1 << 16
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelData = np.ascontiguousarray(stored, "<u2").tobytes()
