# mypy: untyped-calls-exclude=nibabel
"""One scan from disk, checked: whatever is wrong with a file is said here, in one line, before anything is computed.

A scan is a NIfTI file, or the folder of a DICOM series (`dicom`).
"""

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from nibabel.volumeutils import apply_read_scaling
from nibabel.wrapstruct import WrapStructError

from fedsam_core.data.geometry import slice_axis
from fedsam_core.errors import UnfitMask, UnfitScan, UnreadableScan

AFFINE_TOLERANCE = 0.1  # voxels by which a mask may lie off its scan: headers round to float32 and mix sform and qform


@dataclass(frozen=True)
class Volume:
    """A file's voxels [X, Y, Z], the affine of its grid (voxel indices to mm, RAS+), and the file's SHA-256."""

    voxels: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]
    sha256: str

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along X, Y, Z in mm."""
        x, y, z = (float(size) for size in nib.affines.voxel_sizes(self.affine))
        return x, y, z

    @property
    def orientation(self) -> str:
        """Axis codes, like RAS."""
        return "".join(nib.aff2axcodes(self.affine))


@dataclass(frozen=True)
class ScanFacts:
    """What a cohort's manifest keeps of a scan and its label map; see `cohort.Case`."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    orientation: str
    label_values: tuple[int, ...]
    labelled_slices: tuple[int, int]
    intensity: dict[str, float]
    image_sha256: str
    label_sha256: str
    content: str
    label_content: str


def read_image(path: Path) -> Volume:
    """Read a scan as float32 [X, Y, Z]. Raises UnreadableScan or UnfitScan for anything that cannot be trained on."""
    if path.is_dir():
        from fedsam_core.data.dicom import read_series  # its libraries take seconds to import

        volume = read_series(path)
    else:
        volume = _read_nifti(path)
    voxels = volume.voxels.astype(np.float32, copy=False)
    if not np.isfinite(voxels).all():
        raise UnfitScan(f"{path}: {_count(~np.isfinite(voxels))} NaN or infinite; export the scan again or fill them")
    if voxels.size == 0 or voxels.min() == voxels.max():
        raise UnfitScan(f"{path}: the scan is empty (one value everywhere); export it again or leave the case out")
    return Volume(voxels, volume.affine, volume.sha256)


def read_label(path: Path, image: Volume, image_path: Path, classes: int, merge: bool = False) -> Volume:
    """Read the label map of a scan as uint8 [X, Y, Z] with values 0..classes.

    Args:
        path: NIfTI, or a DICOM segmentation (.dcm).
        image: the scan whose grid it must lie on; `image_path` names it in errors.
        classes: foreground classes.
        merge: values over 1 become 1.

    Raises UnreadableScan, and UnfitMask if it does not lie on the scan's grid or holds another value.
    """
    if path.suffix == ".dcm":
        from fedsam_core.data.dicom import read_segmentation

        label = Volume(read_segmentation(path, image), image.affine, hashlib.sha256(path.read_bytes()).hexdigest())
    else:
        label = _read_nifti(path)
    if label.voxels.shape != image.voxels.shape:
        raise UnfitMask(
            f"{path}: mask of shape {label.voxels.shape} for a scan of shape {image.voxels.shape} ({image_path.name}); "
            "resample the mask onto its scan"
        )
    offset = _largest_offset(image, label.affine)
    if not offset <= AFFINE_TOLERANCE * min(image.spacing):
        raise UnfitMask(
            f"{path}: mask lies up to {offset:.3g} mm off its scan ({image_path.name}), by their affines; resample the "
            "mask onto its scan, or copy the scan's affine if only the header is wrong"
        )
    voxels = label.voxels
    if voxels.dtype.kind == "f":
        odd = voxels[~(voxels == np.rint(voxels))]  # NaN equals nothing; infinity falls to the next test
        if odd.size:
            raise UnfitMask(f"{path}: label value {odd[0]:g} is not an integer; resample masks with nearest neighbour")
    low, high = voxels.min(), voxels.max()
    if low < 0 or (high > classes and not merge):
        raise UnfitMask(
            f"{path}: label value {high if high > classes else low:g}, but the cohort has {classes} "
            f"class{'es' * (classes > 1)} (values 0 to {classes}); name the class in cohort.classes or mend the mask"
        )
    if merge:
        voxels = voxels > 0
    return Volume(voxels.astype(np.uint8, copy=False), label.affine, label.sha256)


def inspect_scan(image_path: Path, label_path: Path, classes: int, merge: bool = False) -> ScanFacts:
    """Open a scan and its label map once and keep what a manifest needs. Raises DataError like the readers above."""
    image = read_image(image_path)
    label = read_label(label_path, image, image_path, classes, merge)
    x, y, z = image.voxels.shape
    across = slice_axis(image.spacing, image.orientation)
    shown = np.asarray(label.voxels.any(axis=tuple(axis for axis in range(3) if axis != across)))
    return ScanFacts(
        shape=(x, y, z),
        spacing=image.spacing,
        orientation=image.orientation,
        label_values=tuple(np.flatnonzero(sum(np.bincount(p.ravel(), minlength=256) for p in label.voxels)).tolist()),
        labelled_slices=(int(shown.sum()), len(shown)),
        intensity=intensities(image.voxels),
        image_sha256=image.sha256,
        label_sha256=label.sha256,
        content=content_hash(image),
        label_content=content_hash(label) if shown.any() else "",
    )


def content_hash(volume: Volume) -> str:
    """SHA-256 (hex) of the voxels in their dtype and in RAS+ order, with the shape: the same scan stored with other
    axes, another compression or another header has the same."""
    turn = ornt_transform(io_orientation(volume.affine), axcodes2ornt("RAS"))
    voxels = apply_orientation(volume.voxels, turn)
    digest = hashlib.sha256(str(voxels.shape).encode())
    for z in range(voxels.shape[2]):
        digest.update((voxels[:, :, z] + 0).tobytes(order="F"))  # -0.0 becomes 0.0
    return digest.hexdigest()


def percentiles(voxels: npt.NDArray[np.float32], ranks: tuple[float, float]) -> tuple[float, float]:
    """Two percentiles of all voxels, read in the order in which they lie in memory (NIfTI's is not numpy's)."""
    low, high = np.percentile(voxels.ravel(order="K"), ranks)
    return float(low), float(high)


def intensities(voxels: npt.NDArray[np.float32]) -> dict[str, float]:
    """min, max, 1st and 99th percentile, mean and standard deviation of a scan."""
    low, high = percentiles(voxels, (1, 99))
    mean = float(voxels.mean(dtype=np.float64))
    # Plane by plane: a float64 copy of a long scan takes more than a gigabyte.
    squares = sum(float(np.square(plane, dtype=np.float64).sum()) for plane in (np.float64(p) - mean for p in voxels))
    return {
        "min": float(voxels.min()),
        "max": float(voxels.max()),
        "p01": low,
        "p99": high,
        "mean": mean,
        "std": float(np.sqrt(squares / voxels.size)),
    }


def _read_nifti(path: Path) -> Volume:
    """Read, hash, unpack and decode in one pass over the file's bytes."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise UnreadableScan(f"{path}: not a file; put the scan's or mask's own file there")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableScan(
            f"{path}: cannot read ({error.strerror or error}); check the path and the permissions"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        header = nib.Nifti2Image if data[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") else nib.Nifti1Image
        nifti = header.from_bytes(data)
        shape, affine = tuple(int(n) for n in nifti.shape), np.asarray(nifti.affine, np.float64)
        if len(shape) != 3:
            raise UnfitScan(
                f"{path}: {len(shape)} dimensions {shape}, but a scan has 3; write one 3D file for the channel or time "
                "point that you mean"
            )
        stored: Any = nifti.dataobj
        wanted = int(stored.offset) + prod(shape) * stored.dtype.itemsize
        if wanted > len(data):  # a broken header may ask for more memory than there is
            raise UnreadableScan(
                f"{path}: truncated, or its header is broken: it says {' x '.join(map(str, shape))} voxels, more than "
                "the file holds; copy or download it again"
            )
        voxels, slope, inter = stored.get_unscaled(), stored.slope, stored.inter
        if (slope, inter) != (1, 0):
            voxels = apply_read_scaling(voxels, np.float32(slope), np.float32(inter))
    except (
        EOFError,
        OSError,
        zlib.error,
        ValueError,
        OverflowError,
        KeyError,
        nib.filebasedimages.ImageFileError,
        nib.spatialimages.HeaderDataError,
        WrapStructError,
    ) as error:
        raise UnreadableScan(f"{path}: truncated or not a NIfTI file; copy or download it again") from error
    if voxels.dtype.kind not in "biuf":
        raise UnfitScan(f"{path}: voxels of type {voxels.dtype}, not numbers; write the scan as integers or floats")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UnfitScan(
            f"{path}: the affine does not span a volume; write the header again with the scan's real spacing"
        )
    return Volume(voxels, affine, digest)


def _largest_offset(image: Volume, affine: npt.NDArray[np.float64]) -> float:
    """Largest distance in mm between where two affines put a corner of the scan: bounds it for every voxel."""
    corners = np.stack(np.meshgrid(*((0, n - 1) for n in image.voxels.shape), indexing="ij"), -1).reshape(-1, 3)
    ours = nib.affines.apply_affine(image.affine, corners)
    return float(np.linalg.norm(ours - nib.affines.apply_affine(affine, corners), axis=1).max())


def _count(mask: npt.NDArray[np.bool_]) -> str:
    n = int(mask.sum())
    return f"{n} voxel{'s are' if n > 1 else ' is'}"
