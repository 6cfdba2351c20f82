# mypy: untyped-calls-exclude=nibabel
"""Whole-volume inference: every slice is encoded once, and a long scan needs no more memory than its result.

Slices without any signal (air, padding) look the same to the segmenter: one of a volume is encoded, for all of them.

Slices go through the segmenter in batches. What comes back is resampled at once, batch by batch, so that no array of
the model's square slices is ever kept for the whole volume.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.wrapstruct import WrapStructError
from torch import Tensor, nn

from fedsam_core.data.cohort import Case
from fedsam_core.data.dicom import read_header
from fedsam_core.data.files import write_atomic
from fedsam_core.data.geometry import Geometry, resize
from fedsam_core.data.preprocess import PreparedCase
from fedsam_core.data.slices import SliceConfig, from_square, put, to_square, windows
from fedsam_core.errors import DataError
from fedsam_core.sam.casting import frozen_in
from fedsam_core.sam.segmenter import SamSegmenter

Array = np.ndarray[Any, Any]
Labels = np.ndarray[Any, np.dtype[np.uint8]]
Probabilities = np.ndarray[Any, np.dtype[np.float32]]


def predict_volume(
    segmenter: SamSegmenter,
    case: PreparedCase,
    slices: SliceConfig,
    image_size: int,
    batch_size: int,
    autocast: torch.dtype | None = None,
) -> Probabilities:
    """Class probabilities of a prepared volume: what `segment_scan` computes piece by piece, in one piece.

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
    with _evaluating(segmenter, autocast):
        for part, batch in _batches(segmenter, case, slices, image_size, batch_size, autocast):
            probabilities[:, part] = batch.cpu().numpy()
    return probabilities


def segment_scan(
    segmenter: SamSegmenter,
    case: PreparedCase,
    slices: SliceConfig,
    image_size: int,
    batch_size: int,
    autocast: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Labels:
    """Label map on the scan's own voxel grid, in its own axes.

    The argmax of what `case.geometry.to_scan` makes of `predict_volume`'s probabilities: probabilities are resampled
    (linearly), not labels, so that contours do not turn into stairs. It is computed in one run through the slices. Each
    batch is brought to the scan's rows and columns; as soon as the slices that a slice of the scan is interpolated from
    are there, it becomes labels, and what no later slice needs is dropped. Beyond the case itself and a few slices,
    only the result is held, 1 byte a voxel (3 while its axes are turned): 0.5 GiB for 512 x 512 x 548 voxels, however
    many classes there are and whatever the spacing.

    Args and effects are those of `predict_volume`, and:
        progress: called as (slices done, slices in all) after each batch, in slices of the prepared volume.

    Returns:
        uint8 [X, Y, Z] of the scan's shape.
    """
    own = Geometry.plan(case.geometry.affine, case.geometry.scan_shape, case.geometry.plane, spacing=None)
    depth, height, width = own.shape  # of the scan, its axes in the order and direction of the slices
    total = len(case.image)
    # How much of each prepared slice is in each slice of the scan, [depth, total]; its first and last one.
    weights = resize(np.eye(total, dtype=np.float32)[:, :, None], (depth, total, 1), order=1)[:, :, 0]
    first, last = (weights != 0).argmax(axis=1), total - 1 - (weights[:, ::-1] != 0).argmax(axis=1)
    labels = np.empty((depth, height * width), dtype=np.uint8)
    shares = torch.from_numpy(weights).to(segmenter.device)
    held, begin, done = shares.new_empty(segmenter.classes + 1, 0, height * width), 0, 0
    with _evaluating(segmenter, autocast):
        for part, batch in _batches(segmenter, case, slices, image_size, batch_size, autocast):
            fresh = resize(batch, (batch.shape[1], height, width), order=1)
            held = torch.cat([held, fresh.flatten(2)], dim=1)
            while done < depth and last[done] < part.stop:
                low, high = int(first[done]), int(last[done]) + 1
                mixed = shares[done, low:high] @ held[:, low - begin : high - begin]
                labels[done] = mixed.argmax(dim=0).to(torch.uint8).cpu().numpy()
                done += 1
            needed = min(int(first[done]), part.stop) if done < depth else part.stop
            held, begin = held[:, needed - begin :], needed
            if progress is not None:
                progress(part.stop, total)
    return np.ascontiguousarray(own.to_scan(labels.reshape(own.shape), order=0))


def save_segmentation(label_map: Array, case: Case, path: Path) -> None:
    """Writes a label map as NIfTI (uint8) that lies on the case's scan, whole or not at all.

    The mask of a NIfTI scan has its affine and form codes; that of a DICOM series the affine of its headers (mm,
    sform and qform "scanner"; NIfTI keeps it in float32).

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
    scan = Path(case.image)
    kind, header, shape = _series_header(scan) if scan.is_dir() else _nifti_header(scan)
    if label_map.shape != shape:
        raise ValueError(f"label map of shape {label_map.shape} for a scan of shape {shape} ({scan})")
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the display window of the scan would hide the labels
    header["descrip"] = b"fedsam segmentation"
    header.extensions.clear()  # they may hold the DICOM header, and with it the patient's name
    header["db_name"] = header["aux_file"] = b""  # so may these
    header.set_intent("none")
    data = kind(label_map.astype(np.uint8), None, header).to_bytes()
    # Level 9, the default, takes minutes for a noisy mask and saves nothing.
    write_atomic(path, gzip.compress(data, compresslevel=6, mtime=0) if path.suffix == ".gz" else data)


def _nifti_header(path: Path) -> tuple[type[nib.Nifti1Image], nib.Nifti1Header, tuple[int, ...]]:
    """Kind of NIfTI, header and shape of a scan."""
    try:
        scan = nib.load(path)
    except (OSError, EOFError, zlib.error, nib.filebasedimages.ImageFileError, WrapStructError) as error:
        raise DataError(f"{path}: cannot read the scan whose header the mask is to have; restore it") from error
    if not isinstance(scan, nib.Nifti1Image):  # NIfTI-2 is a kind of it
        raise DataError(f"{path}: neither NIfTI nor the folder of a DICOM series; prepare the cohort from such scans")
    return type(scan), scan.header.copy(), scan.shape


def _series_header(folder: Path) -> tuple[type[nib.Nifti1Image], nib.Nifti1Header, tuple[int, ...]]:
    """Kind of NIfTI, a header that says where a DICOM series lies, and its shape."""
    series = read_header(folder)
    header = nib.Nifti1Header()
    header.set_data_shape(series.shape)
    header.set_sform(series.affine, code="scanner")
    header.set_qform(series.affine, code="scanner")
    header.set_xyzt_units("mm")
    return nib.Nifti1Image, header, series.shape


def _batches(
    segmenter: SamSegmenter,
    case: PreparedCase,
    slices: SliceConfig,
    image_size: int,
    batch_size: int,
    autocast: torch.dtype | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Runs through the volume once: (which slices, their probabilities float32 [classes + 1, n, H, W]).

    All of it is done on the segmenter's device: a GPU segments slices faster than a processor resamples them.
    """
    depth, height, width = case.image.shape
    pixel = case.spacing[1:]
    device = segmenter.device
    neighbors = windows(np.arange(depth)[:, None, None], np.arange(depth), case.spacing[0], slices)[..., 0, 0]
    # Square slices are float16, as they are in training; of them only those that a later batch still looks at are kept.
    squares, first, end = torch.empty(0, image_size, image_size, dtype=torch.float16, device=device), 0, 0
    blank: Tensor | None = None  # of a slice without any signal, once there was one
    for start in range(0, depth, batch_size):
        part = slice(start, min(start + batch_size, depth))
        low, high = int(neighbors[part].min()), int(neighbors[part].max()) + 1
        image = put(torch.from_numpy(np.ascontiguousarray(case.image[end:high])), device)
        fresh = to_square(image, image_size, 1, pixel).half()
        squares, first, end = torch.cat([squares[low - first :], fresh]), low, high
        inputs = squares[torch.from_numpy(neighbors[part] - first).to(device)]
        encoded = (inputs != 0).flatten(1).any(dim=1).cpu().numpy()
        first_blank = int(encoded.argmin()) if blank is None and not encoded.all() else None
        if first_blank is not None:
            encoded[first_blank] = True
        probabilities = torch.empty(segmenter.classes + 1, len(inputs), image_size, image_size, device=device)
        which = torch.from_numpy(encoded).to(device)
        if encoded.any():
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                logits = segmenter(inputs[which].float())
            probabilities[:, which] = logits.float().softmax(dim=1).transpose(0, 1)
        if first_blank is not None:
            blank = probabilities[:, first_blank].clone()
        if blank is not None:
            probabilities[:, ~which] = blank[:, None]
        yield part, from_square(probabilities, (height, width), 1, pixel)


@contextmanager
def _evaluating(model: nn.Module, autocast: torch.dtype | None) -> Iterator[None]:
    """Evaluation mode without gradients inside, frozen weights in the dtype that they are multiplied in; afterwards
    every module is as it was."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with frozen_in(model, autocast), torch.inference_mode():
            yield
    finally:
        for module, training in before.items():
            module.training = training
