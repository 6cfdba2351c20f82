# mypy: untyped-calls-exclude=nibabel
"""From a scan's own voxel grid to slices and back: orientation and spacing are undone on output.

Array axes of a prepared volume are [D, H, W]: slices first, each as radiology looks at it.

| slices   | D grows to | H (rows) grows to | W (columns) grows to |
|----------|------------|-------------------|----------------------|
| axial    | superior   | posterior         | left                 |
| coronal  | posterior  | inferior          | left                 |
| sagittal | left       | inferior          | posterior            |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from torch import Tensor
from torch.nn import functional as F

Voxels = TypeVar("Voxels", npt.NDArray[Any], Tensor)
Plane = Literal["axial", "coronal", "sagittal"]
AXES: dict[Plane, str] = {"axial": "SPL", "coronal": "PIL", "sagittal": "LIP"}
_PLANE_ACROSS: dict[str, Plane] = {
    "S": "axial",
    "I": "axial",
    "A": "coronal",
    "P": "coronal",
    "R": "sagittal",
    "L": "sagittal",
}


def slice_plane(spacing: Sequence[float], orientation: str) -> Plane:
    """Plane of the slices as they were acquired: across the one axis of the coarsest spacing.

    Where no single axis is coarser than both others by 1 % (cubic voxels, or slices thinner than the pixels), axial.

    Args:
        spacing: voxel size along the scan's axes, mm.
        orientation: axis codes of the scan, like "RAS".
    """
    coarsest = int(np.argmax(spacing))
    others = [size for axis, size in enumerate(spacing) if axis != coarsest]
    return _PLANE_ACROSS[orientation[coarsest]] if spacing[coarsest] > 1.01 * max(others) else "axial"


def slice_axis(spacing: Sequence[float], orientation: str) -> int:
    """The scan's axis that runs across the slices of `slice_plane`: 0, 1 or 2."""
    plane = slice_plane(spacing, orientation)
    return next(axis for axis, code in enumerate(orientation) if _PLANE_ACROSS[code] == plane)


@dataclass(frozen=True)
class Geometry:
    """The way from a scan's grid [X, Y, Z] to prepared slices [D, H, W] and back.

    Attributes:
        affine: 4x4, voxel indices of the scan to mm in RAS+ (nibabel's convention).
        scan_shape: (X, Y, Z).
        plane: how the volume is sliced.
        shape: (D, H, W) of the prepared volume.
    """

    affine: npt.NDArray[np.float64]
    scan_shape: tuple[int, int, int]
    plane: Plane
    shape: tuple[int, int, int]

    @classmethod
    def plan(
        cls,
        affine: npt.NDArray[np.float64],
        scan_shape: tuple[int, int, int],
        plane: Plane,
        spacing: Sequence[float | None] | None,
    ) -> Self:
        """Choose the prepared grid: the scan's field of view at `spacing` (slice, row, column in mm; None: native)."""
        native = cls(np.asarray(affine, np.float64), scan_shape, plane, scan_shape)
        sizes = zip(native._oriented_shape, native._oriented_spacing, spacing or (None, None, None), strict=True)
        slices, rows, columns = (n if new is None else max(1, round(n * old / new)) for n, old, new in sizes)
        return cls(native.affine, scan_shape, plane, (slices, rows, columns))

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size of the prepared volume along (slice, row, column), mm: the field of view over the voxel count."""
        sizes = zip(self._oriented_spacing, self._oriented_shape, self.shape, strict=True)
        slices, rows, columns = (old * n / m for old, n, m in sizes)
        return slices, rows, columns

    def to_slices(self, array: npt.NDArray[Any], order: Literal[0, 1]) -> npt.NDArray[Any]:
        """[X, Y, Z] on the scan's grid -> [D, H, W] prepared (order 0: nearest, dtype kept; 1: linear, float32)."""
        return resize(apply_orientation(array, self._transform), self.shape, order)

    def to_scan(self, array: npt.NDArray[Any], order: Literal[0, 1]) -> npt.NDArray[Any]:
        """[..., D, H, W] prepared -> [..., X, Y, Z] on the scan's own voxel grid, shape and voxel centres exactly.

        Order 0 takes the nearest voxel and keeps the dtype (label maps), order 1 interpolates linearly into float32
        (probabilities). At native spacing nothing is interpolated and order 0 and 1 return the values themselves.
        """
        if array.shape[-3:] != self.shape:
            raise ValueError(f"to_scan: array ends in {array.shape[-3:]}, the prepared volume is {self.shape}")
        array = resize(array, self._oriented_shape, order)
        volumes = array.reshape(-1, *array.shape[-3:])
        scans = np.stack([apply_orientation(volume, self._inverse) for volume in volumes])
        return scans.reshape(*array.shape[:-3], *self.scan_shape)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form. Python writes float64 with 17 digits, so the affine comes back bit-equal."""
        return {
            "affine": self.affine.tolist(),
            "scan_shape": list(self.scan_shape),
            "plane": self.plane,
            "shape": list(self.shape),
        }

    @classmethod
    def from_dict(cls, written: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        scan, shape = written["scan_shape"], written["shape"]
        affine = np.asarray(written["affine"], np.float64)
        return cls(affine, (scan[0], scan[1], scan[2]), written["plane"], (shape[0], shape[1], shape[2]))

    # nibabel's orientation arrays: row i of `_transform` says which output axis scan axis i becomes, and its sign.
    @property
    def _transform(self) -> npt.NDArray[np.float64]:
        transform: npt.NDArray[np.float64] = ornt_transform(io_orientation(self.affine), axcodes2ornt(AXES[self.plane]))
        return transform

    @property
    def _inverse(self) -> npt.NDArray[np.float64]:
        inverse: npt.NDArray[np.float64] = ornt_transform(axcodes2ornt(AXES[self.plane]), io_orientation(self.affine))
        return inverse

    @property
    def _oriented_shape(self) -> tuple[int, int, int]:
        first, second, third = (self.scan_shape[int(axis)] for axis in np.argsort(self._transform[:, 0]))
        return first, second, third

    @property
    def _oriented_spacing(self) -> tuple[float, float, float]:
        spacing = nib.affines.voxel_sizes(self.affine)
        first, second, third = (float(spacing[int(axis)]) for axis in np.argsort(self._transform[:, 0]))
        return first, second, third


def resize(array: Voxels, shape: Sequence[int], order: Literal[0, 1]) -> Voxels:
    """Resample the last three axes to `shape` over the same field of view.

    Voxel centres are aligned as in `(i + 0.5) * old / new - 0.5`, so nothing shifts. Order 0: nearest, dtype kept.
    Order 1: separable linear interpolation, float32, with an anti-aliasing filter where it shrinks (so thin structures
    fade instead of vanishing between the samples). Equal shapes return the values untouched.

    Args:
        array: [..., D, H, W]; a tensor (order 1 alone) is resampled on its own device.
        shape: (D', H', W').

    Raises:
        ValueError: order 0 of a tensor.
    """
    old, new = tuple(array.shape[-3:]), tuple(shape)
    if isinstance(array, Tensor):
        if order == 0:
            raise ValueError("a tensor is resampled linearly only: give the labels as a numpy array")
        return _interpolate(array.float(), new)
    if old == new:
        return array if order == 0 else array.astype(np.float32, copy=False)
    if order == 0:
        for axis, (n, m) in enumerate(zip(old, new, strict=True), start=-3):
            if n != m:
                nearest = np.minimum((np.arange(m) + 0.5) * n / m, n - 1).astype(np.int64)
                array = array.take(nearest, axis=axis)
        return array
    return _interpolate(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)), new).numpy()


def _interpolate(array: Tensor, new: tuple[int, ...]) -> Tensor:
    """`resize` of order 1, of float32."""
    leading, old = array.shape[:-3], tuple(array.shape[-3:])
    if array.numel() == 0:
        return array.new_empty(*leading, *new)
    volumes = array.reshape(-1, *old)
    if old[1:] != new[1:]:
        volumes = F.interpolate(volumes, size=new[1:], mode="bilinear", align_corners=False, antialias=True)
    if old[0] != new[0]:
        columns = volumes.reshape(len(volumes), 1, old[0], new[1] * new[2])
        columns = F.interpolate(
            columns, size=(new[0], new[1] * new[2]), mode="bilinear", align_corners=False, antialias=True
        )
        volumes = columns
    return volumes.reshape(*leading, *new)
