"""Whole-volume inference: every slice is encoded once, and a long scan needs no more memory than its result.

Slices go through the segmenter in batches. What comes back is resampled at once, batch by batch, so that no array of
the model's square slices is ever kept for the whole volume.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.wrapstruct import WrapStructError

from fedsam_core.data.cohort import Case
from fedsam_core.data.files import write_atomic
from fedsam_core.data.geometry import Geometry, resize
from fedsam_core.data.preprocess import PreparedCase
from fedsam_core.data.slices import SliceConfig, from_square, to_square, windows
from fedsam_core.errors import DataError
from fedsam_core.sam.segmenter import SamSegmenter

Array = np.ndarray[Any, Any]
Labels = np.ndarray[Any, np.dtype[np.uint8]]
Probabilities = np.ndarray[Any, np.dtype[np.float32]]

BLOCKS = 32  # a volume is resampled across slices in this many blocks of rows


def predict_volume(
    segmenter: SamSegmenter,
    case: PreparedCase,
    slices: SliceConfig,
    image_size: int,
    batch_size: int,
    autocast: torch.dtype | None = None,
) -> Probabilities:
    """Class probabilities of a prepared volume.

    The result is held in full, 4 bytes a voxel and class: 1.7 GB for 512 x 512 x 548 voxels and two classes. For a
    label map use `segment_scan`, which streams.

    Args:
        segmenter: left as it was found (training or not, module by module).
        case: the prepared scan; its label is not looked at.
        slices: how a slice's three channels are made.
        image_size: edge of the model's square input, px.
        batch_size: slices encoded at once; changes memory and speed only.
        autocast: dtype of the forward pass, None for fp32.

    Returns:
        float32 [classes + 1, D, H, W]; sums to 1 over the classes, 0 is background.
    """
    probabilities = np.empty((segmenter.classes + 1, *case.image.shape), dtype=np.float32)
    with _evaluating(segmenter):
        for part, batch in _batches(segmenter, case, slices, image_size, batch_size, autocast):
            probabilities[:, part] = batch
    return probabilities


def segment_scan(
    segmenter: SamSegmenter,
    case: PreparedCase,
    slices: SliceConfig,
    image_size: int,
    batch_size: int,
    autocast: torch.dtype | None = None,
) -> Labels:
    """Label map on the scan's own voxel grid, in its own axes.

    The argmax of what `case.geometry.to_scan` makes of `predict_volume`'s probabilities: probabilities are resampled
    (linearly), not labels, so that contours do not turn into stairs. It is computed batch by batch:

    - Where the prepared volume has the scan's slices, each batch is brought to the scan's rows and columns and reduced
      to labels. Beyond the case itself and a batch, only the result is held, 1 byte a voxel (3 while its axes are
      turned): 0.5 GiB for 512 x 512 x 548 voxels.
    - Where slices were resampled too, probabilities are held as float16 with the scan's rows and columns and the
      prepared slices, and resampled across slices in blocks of rows: 1.7 GiB for the same scan, two classes and 685
      slices. Two classes that are equal to within float16 (5e-4) may come out the other way round.

    Args and effects are those of `predict_volume`.

    Returns:
        uint8 [X, Y, Z] of the scan's shape.
    """
    own = Geometry.plan(case.geometry.affine, case.geometry.scan_shape, case.geometry.plane, spacing=None)
    depth, height, width = own.shape  # of the scan, its axes in the order and direction of the slices
    batches = _batches(segmenter, case, slices, image_size, batch_size, autocast)
    labels = np.empty(own.shape, dtype=np.uint8)
    with _evaluating(segmenter):
        if len(case.image) == depth:
            for part, batch in batches:
                labels[part] = resize(batch, (batch.shape[1], height, width), order=1).argmax(axis=0)
        else:
            held = np.empty((segmenter.classes + 1, len(case.image), height, width), dtype=np.float16)
            for part, batch in batches:
                held[:, part] = resize(batch, (batch.shape[1], height, width), order=1)
            for rows in np.array_split(np.arange(height), min(BLOCKS, height)):
                block = held[:, :, rows[0] : rows[-1] + 1].astype(np.float32)
                resampled = resize(block, (depth, len(rows), width), order=1)
                labels[:, rows[0] : rows[-1] + 1] = resampled.argmax(axis=0)
    return np.ascontiguousarray(own.to_scan(labels, order=0))


def save_segmentation(label_map: Array, case: Case, path: Path) -> None:
    """Writes a label map as NIfTI (uint8) with the affine and the form codes of the case's scan, whole or not at all.

    Args:
        label_map: integers 0..255, [X, Y, Z] on the scan's own grid.
        case: the scan it belongs to.
        path: file to write, .nii or .nii.gz.

    Raises:
        DataError: the scan cannot be read, the name is no NIfTI name, or the disk refuses.
        ValueError: the label map is not on the scan's grid.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        raise DataError(f"{path}: a segmentation is written as NIfTI; name it .nii.gz or .nii")
    try:
        scan = nib.load(case.image)
    except (OSError, EOFError, zlib.error, nib.filebasedimages.ImageFileError, WrapStructError) as error:
        raise DataError(f"{case.image}: cannot read the scan whose header the mask is to have; restore it") from error
    if not isinstance(scan, nib.Nifti1Image):  # NIfTI-2 is a kind of it
        raise DataError(f"{case.image}: not a NIfTI file; prepare the cohort from NIfTI scans")
    if label_map.shape != scan.shape:
        raise ValueError(f"label map of shape {label_map.shape} for a scan of shape {scan.shape} ({case.image})")
    header = scan.header.copy()  # type: ignore[no-untyped-call]
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the display window of the scan would hide the labels
    header["descrip"] = b"fedsam segmentation"
    header.extensions.clear()  # they may hold the DICOM header, and with it the patient's name
    image = type(scan)(label_map.astype(np.uint8), None, header)
    data = image.to_bytes()
    write_atomic(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _batches(
    segmenter: SamSegmenter,
    case: PreparedCase,
    slices: SliceConfig,
    image_size: int,
    batch_size: int,
    autocast: torch.dtype | None,
) -> Iterator[tuple[slice, Probabilities]]:
    """Runs through the volume once: (which slices, their probabilities float32 [classes + 1, n, H, W])."""
    depth, height, width = case.image.shape
    pixel = case.spacing[1:]
    device = next(segmenter.parameters()).device
    neighbors = windows(np.arange(depth)[:, None, None], np.arange(depth), case.spacing[0], slices)[..., 0, 0]
    # Square slices are float16, as they are in training; of them only those that a later batch still looks at are kept.
    squares, first, end = np.empty((0, image_size, image_size), dtype=np.float16), 0, 0
    for start in range(0, depth, batch_size):
        part = slice(start, min(start + batch_size, depth))
        low, high = int(neighbors[part].min()), int(neighbors[part].max()) + 1
        fresh = to_square(case.image[end:high], image_size, 1, pixel).astype(np.float16)
        squares, first, end = np.concatenate([squares[low - first :], fresh]), low, high
        images = torch.from_numpy(squares[neighbors[part] - first].astype(np.float32)).to(device)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            logits = segmenter(images)
        probabilities = logits.float().softmax(dim=1).transpose(0, 1).cpu().numpy()
        yield part, from_square(probabilities, (height, width), 1, pixel)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; afterwards every module is in the mode that it was in."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in before.items():
            module.training = training
