"""How far apart two surfaces are, in mm: HD95, penalised HD95, and normalised surface Dice (NSD).

What is measured, to the letter (Maier-Hein et al., "Metrics reloaded", Nature Methods 2024; MONAI's definitions):

- *Surface* of a structure: its voxels that have one of their six face neighbours outside it. What lies outside the
  image is outside the structure, so a structure that is cut off by the image has a surface there.
- *Directed distances*: from the centre of every surface voxel of one mask to the centre of the nearest surface voxel of
  the other, in mm (Euclidean, with the scan's own voxel sizes).
- *HD95*: the 95th percentile (linear between ranks) of the directed distances, in each direction for itself; the larger
  of the two. Not the percentile of both directions thrown together, which lets a large mask drown a small one.
- *NSD* at a tolerance: surface voxels of both masks that are no further than the tolerance from the other surface,
  divided by all surface voxels of both. Voxels are counted; they are not weighed by the area of the surface in them.

| truth | prediction | HD95 | penalised HD95 | NSD |
|---|---|---|---|---|
| empty | empty | nan | nan | nan |
| empty | any voxel | nan | diagonal of the image | 0 |
| present | empty | nan | diagonal of the image | 0 |
| present | any voxel | mm | the same | 0 to 1 |

A mean of HD95 leaves out whoever missed a structure and so rewards it; the penalised one does not. The diagonal is that
of the image's box (voxel count times voxel size along each axis), which no distance between two voxels exceeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from monai.metrics.utils import get_mask_edges, get_surface_distance

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Box = tuple[slice, ...]

PERCENTILE = 95.0
ROUNDING_MM = 1e-4  # NIfTI headers hold voxel sizes in float32: five voxels of 0.4 mm are within a tolerance of 2 mm


@dataclass(frozen=True)
class SurfaceConfig:
    """How surfaces are compared.

    Attributes:
        nsd_tolerance_mm: distance up to which a surface voxel counts as right.
    """

    nsd_tolerance_mm: float = 2.0


@dataclass(frozen=True)
class SurfaceScore:
    """What the table above says of one structure of one scan.

    Attributes:
        hd95: mm, or nan.
        hd95_penalised: mm, or nan.
        nsd: 0 to 1, or nan.
    """

    hd95: float
    hd95_penalised: float
    nsd: float


def compare_surfaces(
    prediction: Mask, truth: Mask, spacing: Sequence[float], diagonal: float, config: SurfaceConfig
) -> SurfaceScore:
    """Compares the surfaces of two masks of the same scan.

    Beyond the masks it needs memory for their joint bounding box alone, and time that grows with their surfaces. Masks
    that were cut out of a scan give what the whole gives, as long as no voxel of either was cut off.

    Args:
        prediction: bool [X, Y, Z].
        truth: bool of the same shape.
        spacing: voxel size along X, Y, Z in mm.
        diagonal: of the whole scan in mm, see `image_diagonal`.
        config: the tolerance.
    """
    box = bounding_box(prediction, truth)
    if box is None:
        return SurfaceScore(float("nan"), float("nan"), float("nan"))
    # Beyond the box there is neither mask, and beyond an image there is nothing: to the masks it is the same.
    prediction, truth = prediction[box], truth[box]
    if not (prediction.any() and truth.any()):
        return SurfaceScore(float("nan"), diagonal, 0.0)
    ours, theirs = get_mask_edges(prediction, truth, crop=False)
    sizes = [float(size) for size in spacing]
    forth = np.asarray(get_surface_distance(ours, theirs, spacing=sizes), np.float64)
    back = np.asarray(get_surface_distance(theirs, ours, spacing=sizes), np.float64)
    # numpy's percentile, since MONAI's (torch.quantile) refuses more than 16 million values
    hd95 = max(float(np.percentile(distances, PERCENTILE)) for distances in (forth, back))
    near = config.nsd_tolerance_mm + ROUNDING_MM
    within = np.count_nonzero(forth <= near) + np.count_nonzero(back <= near)
    return SurfaceScore(hd95, hd95, float(within / (len(forth) + len(back))))


def image_diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Length in mm of the diagonal of an image's box."""
    return float(np.linalg.norm(np.multiply(shape, spacing)))


def bounding_box(*masks: np.ndarray[Any, Any]) -> Box | None:
    """The smallest box that holds every voxel of the masks that is not 0; None if there is no such voxel."""
    box: list[slice] = []
    for axis in range(masks[0].ndim):
        others = tuple(other for other in range(masks[0].ndim) if other != axis)
        # Each axis looks only at what the axes before it have left.
        hits = np.flatnonzero(np.any([mask[tuple(box)].any(axis=others) for mask in masks], axis=0))
        if not len(hits):
            return None
        box.append(slice(int(hits[0]), int(hits[-1]) + 1))
    return tuple(box)
