"""Preparation: each scan once, oriented, resampled and scaled to [0, 1], and kept for the next run.

A prepared cohort is a folder:

    cohort.json                       manifest: cohort, configuration, geometry and SHA-256 of every file; written last
    cases/CASE.KEY.safetensors        image float16 [D, H, W] in [0, 1], label uint8 [D, H, W]

KEY covers the content of the scan and its mask and everything that decides the result. A second preparation finds the
manifest and does nothing; an interrupted one finds the finished cases; a changed one makes new files and, when its
manifest is written, deletes the old ones. Until then the old cohort stays readable.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedsam_core.data.cohort import Case, Cohort
from fedsam_core.data.files import write_atomic
from fedsam_core.data.geometry import Geometry, Plane, slice_plane
from fedsam_core.data.scans import Volume, intensities, percentiles, read_image, read_label
from fedsam_core.data.sources import Modality
from fedsam_core.errors import DataError
from fedsam_core.hashing import file_sha256, stable_hash
from fedsam_core.settings import Settings

__all__ = ["Geometry", "PreparedCase", "PreparedCohort", "PreprocessConfig", "prepare", "prepare_image"]

FORMAT = 1  # raise it when the same scan and configuration would give other voxels: old files are then made anew


class PreprocessConfig(Settings):
    """How scans become slices in [0, 1]."""

    slice_axis: Literal["auto", "axial", "coronal", "sagittal"] = Field(
        default="auto",
        description="plane of the slices; auto: the plane in which most scans of the cohort were acquired (across "
        "their coarsest spacing; cubic voxels count as axial)",
    )
    spacing: tuple[float | None, float | None, float | None] | None = Field(
        default=None,
        description="voxel size in mm to resample to along (slice, row, column); null: native, for all or for one axis",
    )
    ct_window: tuple[float, float] = Field(
        default=(-160.0, 240.0), description="CT: Hounsfield units that become 0 and 1; values beyond are clipped"
    )
    mri_percentiles: tuple[float, float] = Field(
        default=(0.5, 99.5),
        description="MRI: percentiles of each volume that become 0 and 1; values beyond are clipped",
    )

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if self.ct_window[0] >= self.ct_window[1]:
            raise ValueError("ct_window must be (low, high) with low < high, like [-160, 240]")
        if not 0 <= self.mri_percentiles[0] < self.mri_percentiles[1] <= 100:
            raise ValueError("mri_percentiles must be (low, high) with 0 <= low < high <= 100, like [0.5, 99.5]")
        if self.spacing is not None and any(size is not None and not 0.01 <= size <= 100 for size in self.spacing):
            raise ValueError("spacing is in mm: between 0.01 and 100")
        return self

    def resolve(self, cohort: Cohort) -> Self:
        """The same with `auto` replaced by the plane of most cases (axial on a tie): one plane for a whole cohort.

        Thin-slice scans of a mixed cohort would otherwise be cut across another axis than their neighbours.
        """
        if self.slice_axis != "auto":
            return self
        planes = [slice_plane(case.spacing, case.orientation) for case in cohort.cases]
        order: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
        return self.model_copy(update={"slice_axis": max(order, key=planes.count)})


@dataclass(frozen=True)
class PreparedCase:
    """A scan ready to be cut into slices.

    Attributes:
        image: float32 [D, H, W] in [0, 1], slices first (axes: `fedsam_core.data.geometry`).
        label: uint8 [D, H, W], 0 background, k for class k; None for a scan that is only predicted on.
        spacing: (slice, row, column) in mm.
        geometry: the way back to the scan's own voxel grid.
    """

    case: Case
    image: npt.NDArray[np.float32]
    label: npt.NDArray[np.uint8] | None
    spacing: tuple[float, float, float]
    geometry: Geometry


class PreparedFile(Settings):
    """A prepared case on disk."""

    file: str = Field(description="path within the prepared cohort")
    sha256: str = Field(description="SHA-256 of the file")
    size: int = Field(description="bytes")
    geometry: dict[str, Any] = Field(description="Geometry, as written by to_dict")


class Manifest(Settings):
    """cohort.json of a prepared cohort."""

    key: str = Field(description="what the cohort was prepared from and how; equal keys hold equal voxels")
    config: PreprocessConfig = Field(description="configuration, slice axis resolved")
    cohort: Cohort = Field(description="the cohort that was prepared")
    files: dict[str, PreparedFile] = Field(description="prepared file of every case")


class PreparedCohort:
    """Prepared cases in a folder, read one at a time and verified on the way."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.cohort = manifest.cohort
        self.config = manifest.config
        self.key = manifest.key
        self._files = manifest.files

    @classmethod
    def open(cls, root: Path) -> Self:
        """Open what `prepare` finished in `root`. Raises DataError if there is no finished cohort."""
        path = root / "cohort.json"
        try:
            return cls(root, Manifest.model_validate_json(path.read_bytes()))
        except FileNotFoundError as error:
            raise DataError(f"{root}: no prepared cohort here (no cohort.json); run prepare first") from error
        except (OSError, ValidationError) as error:
            raise DataError(f"{path}: not a readable manifest; delete it and run prepare again") from error

    def load(self, case_id: str) -> PreparedCase:
        """Read a case. Raises DataError if its file is missing or its SHA-256 is not the manifest's."""
        entry = self._files.get(case_id)
        if entry is None:
            raise DataError(f"case {case_id}: not in the prepared cohort {self.root}; it has {', '.join(self._files)}")
        path = self.root / entry.file
        fix = "run prepare again to make it anew"
        try:
            intact = file_sha256(path) == entry.sha256
        except OSError as error:
            raise DataError(f"{path}: cannot read the prepared case ({error.strerror}); {fix}") from error
        if not intact:
            raise DataError(
                f"{path}: the prepared case is damaged (its SHA-256 is not the manifest's); delete it and {fix}"
            )
        with safe_open(path, framework="numpy") as tensors:
            image, label = tensors.get_tensor("image").astype(np.float32), tensors.get_tensor("label")
        geometry = Geometry.from_dict(entry.geometry)
        case = next(case for case in self.cohort.cases if case.id == case_id)
        return PreparedCase(case, image, label, geometry.spacing, geometry)

    def is_complete(self) -> bool:
        """Whether every file is there in its size. Content is verified by `load`."""
        paths = ((self.root / entry.file, entry.size) for entry in self._files.values())
        return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def prepare(
    cohort: Cohort, config: PreprocessConfig, out: Path, progress: Callable[[str, int, int], None] | None = None
) -> PreparedCohort:
    """Prepare every case of `cohort` into the folder `out`, or find it already there.

    Args:
        out: folder of the prepared cohort; one cohort a folder.
        progress: called as ("prepare", done, total) after each case.

    Raises:
        DataError: for a scan that changed since the cohort was read or turned unreadable, or a disk that is full. What
            was finished is kept for the next run; nothing is left half-written.
    """
    config = config.resolve(cohort)
    key = stable_hash({"format": FORMAT, "cohort": cohort.hash, "config": config.model_dump(mode="json")})
    manifest_path = out / "cohort.json"
    if manifest_path.is_file():
        there = PreparedCohort.open(out)
        # Equal keys hold equal voxels, but paths and names may have changed; then only the manifest is written again.
        if there.key == key and there.cohort == cohort and there.is_complete():
            return there

    files: dict[str, PreparedFile] = {}
    for done, case in enumerate(cohort.cases, start=1):
        files[case.id] = _prepare_case(case, cohort, config, out)
        if progress is not None:
            progress("prepare", done, len(cohort.cases))
    manifest = Manifest(key=key, config=config, cohort=cohort, files=files)
    write_atomic(manifest_path, (manifest.model_dump_json(indent=1) + "\n").encode())
    kept = {out / entry.file for entry in files.values()}
    for path in (out / "cases").glob("*.safetensors"):
        if path not in kept:
            path.unlink(missing_ok=True)
    return PreparedCohort(out, manifest)


def prepare_image(path: Path, config: PreprocessConfig, modality: Modality) -> PreparedCase:
    """Prepare one scan without label, as `prepare` would: `slice_axis: auto` then goes by this scan alone.

    Raises DataError if the scan cannot be read.
    """
    image = read_image(path)
    x, y, z = image.voxels.shape
    case = Case(
        id=path.name.removesuffix(".gz").removesuffix(".nii"),
        site="",
        split="test",
        image=str(path),
        label=None,
        shape=(x, y, z),
        spacing=image.spacing,
        orientation=image.orientation,
        label_values=(),
        intensity=intensities(image.voxels),
        image_sha256=image.sha256,
        label_sha256=None,
    )
    geometry, voxels = _to_slices(image, config, modality)
    return PreparedCase(case, voxels, None, geometry.spacing, geometry)


def _prepare_case(case: Case, cohort: Cohort, config: PreprocessConfig, out: Path) -> PreparedFile:
    """Make the file of one case, unless an earlier run has."""
    source = {"image": case.image_sha256, "label": case.label_sha256, "modality": cohort.modality}
    key = stable_hash({"format": FORMAT, "config": config.model_dump(mode="json"), **source})
    name = f"cases/{case.id}.{key[:16]}.safetensors"
    path = out / name
    geometry = _stored_geometry(path, key)
    if geometry is None:
        geometry, data = _encode_case(case, cohort, config, key)
        write_atomic(path, data)
    return PreparedFile(file=name, sha256=file_sha256(path), size=path.stat().st_size, geometry=geometry)


def _stored_geometry(path: Path, key: str) -> dict[str, Any] | None:
    """Geometry of a finished case with this key; None if there is none (files appear by rename, so never half)."""
    try:
        with safe_open(path, framework="numpy") as tensors:
            metadata: dict[str, str] = tensors.metadata() or {}
    except (OSError, SafetensorError):
        return None
    about = json.loads(metadata.get("fedsam", "{}"))
    if about.get("key") != key:
        return None
    geometry: dict[str, Any] = about["geometry"]
    return geometry


def _encode_case(case: Case, cohort: Cohort, config: PreprocessConfig, key: str) -> tuple[dict[str, Any], bytes]:
    if case.label is None:
        raise DataError(f"case {case.id}: no label map; a cohort is prepared from labelled scans")
    image = read_image(Path(case.image))
    label = read_label(Path(case.label), image, Path(case.image), len(cohort.classes))
    for path, now, then in (
        (case.image, image.sha256, case.image_sha256),
        (case.label, label.sha256, case.label_sha256),
    ):
        if now != then:
            raise DataError(f"{path}: changed since the cohort was read; read the cohort again")
    geometry, voxels = _to_slices(image, config, cohort.modality)
    tensors = {
        "image": voxels.astype(np.float16),
        "label": np.ascontiguousarray(geometry.to_slices(label.voxels, order=0)),
    }
    written = geometry.to_dict()
    # One entry, because safetensors writes several in any order: two that prepare at once must write the same bytes.
    about = json.dumps({"key": key, "case": case.id, "geometry": written}, sort_keys=True)
    return written, save(tensors, {"fedsam": about})


def _to_slices(image: Volume, config: PreprocessConfig, modality: Modality) -> tuple[Geometry, npt.NDArray[np.float32]]:
    """Orient, resample, scale to [0, 1]. Intensities are scaled per volume or by a fixed window, never per slice."""
    plane = slice_plane(image.spacing, image.orientation) if config.slice_axis == "auto" else config.slice_axis
    x, y, z = image.voxels.shape
    geometry = Geometry.plan(image.affine, (x, y, z), plane, config.spacing)
    if modality == "ct":
        low, high = config.ct_window
    else:
        low, high = percentiles(image.voxels, config.mri_percentiles)
        if low == high:  # nearly all of the volume is one value: only the extremes tell it apart
            low, high = float(image.voxels.min()), float(image.voxels.max())
    # Clip before resampling, so that metal or a padding value does not bleed into its neighbours.
    scaled = np.clip((image.voxels - np.float32(low)) / np.float32(high - low), 0, 1)
    return geometry, np.ascontiguousarray(geometry.to_slices(scaled, order=1), dtype=np.float32)
