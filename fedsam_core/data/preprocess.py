"""Preparation: each scan once, oriented, resampled and scaled to [0, 1], and kept for the next run.

A share is what one site has prepared, in a folder or under a prefix of a bucket (`fedsam_core.store`):

    cohort.json                       manifest: cohort, configuration, geometry and SHA-256 of every file; written last
    cases/CASE.KEY.safetensors        image float16 [D, H, W] in [0, 1], label uint8 [D, H, W]

KEY covers the content of the scan and its mask and everything that decides the result. A second preparation finds the
manifest and does nothing; an interrupted one finds the finished cases; a changed one makes new files and, when its
manifest is written, deletes the old ones. Until then the old share stays readable. Shares that were prepared alike are
read together as one cohort.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedsam_core.data.cohort import Case, Cohort, Each, Progress
from fedsam_core.data.geometry import Geometry, slice_plane
from fedsam_core.data.scans import Volume, intensities, percentiles, read_image, read_label
from fedsam_core.data.sources import Modality
from fedsam_core.data.survey import Survey, take_survey
from fedsam_core.errors import DataError, StoreError
from fedsam_core.hashing import stable_hash
from fedsam_core.settings import Settings
from fedsam_core.store import Store

__all__ = ["Geometry", "PreparedCase", "PreparedCohort", "PreprocessConfig", "prepare", "prepare_image"]

SOFT_TISSUE = (-160.0, 240.0)  # Hounsfield units
MANIFEST = "cohort.json"
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
    ct_window: tuple[float, float] | Literal["auto"] = Field(
        default=SOFT_TISSUE,
        description="CT: Hounsfield units that become 0 and 1, values beyond are clipped; auto: ct_percentiles of the "
        "labelled voxels of all sites' training scans, from a secure sum of their histograms",
    )
    ct_percentiles: tuple[float, float] = Field(
        default=(0.5, 99.5), description="CT: percentiles that ct_window=auto goes by"
    )
    mri_percentiles: tuple[float, float] = Field(
        default=(0.5, 99.5),
        description="MRI: percentiles of each volume that become 0 and 1; values beyond are clipped",
    )

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if self.ct_window != "auto" and self.ct_window[0] >= self.ct_window[1]:
            raise ValueError("ct_window must be (low, high) with low < high, like [-160, 240], or auto")
        for name, (low, high) in (
            ("ct_percentiles", self.ct_percentiles),
            ("mri_percentiles", self.mri_percentiles),
        ):
            if not 0 <= low < high <= 100:
                raise ValueError(f"{name} must be (low, high) with 0 <= low < high <= 100, like [0.5, 99.5]")
        if self.spacing is not None and any(size is not None and not 0.01 <= size <= 100 for size in self.spacing):
            raise ValueError("spacing is in mm: between 0.01 and 100")
        return self

    def asks_for_histogram(self, modality: Modality) -> bool:
        """Whether the CT window is left to the cohort."""
        return modality == "ct" and self.ct_window == "auto"

    def is_resolved(self, modality: Modality) -> bool:
        """Whether nothing is left to the cohort."""
        return self.slice_axis != "auto" and not self.asks_for_histogram(modality)

    def resolve(self, survey: Survey, modality: Modality) -> Self:
        """The same with nothing left open: one plane and one window for the whole cohort.

        Thin-slice scans of a mixed cohort would otherwise be cut across another axis than their neighbours, and equal
        tissue would have another gray value at each site.

        Raises:
            DataError: see `Survey.window`.
        """
        found: dict[str, Any] = {}
        if self.slice_axis == "auto":
            found["slice_axis"] = survey.plane()
        if self.ct_window == "auto":
            found["ct_window"] = survey.window(self.ct_percentiles) if modality == "ct" else SOFT_TISSUE
        return self.model_copy(update=found)


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
    """A prepared case in a store."""

    file: str = Field(description="key within the share")
    sha256: str = Field(description="SHA-256 of the file")
    geometry: dict[str, Any] = Field(description="Geometry, as written by to_dict")


class Manifest(Settings):
    """cohort.json of a share."""

    key: str = Field(description="what the share was prepared from and how; equal keys hold equal voxels")
    made_from: str = Field(description="fingerprint of the source and the settings, to notice that nothing changed")
    config: PreprocessConfig = Field(description="configuration, nothing left open")
    cohort: Cohort = Field(description="the cases that were prepared")
    files: dict[str, PreparedFile] = Field(description="prepared file of every case")


class PreparedCohort:
    """Prepared cases of one or more shares, read one at a time and verified on the way."""

    def __init__(self, shares: Sequence[tuple[Store, Manifest]]) -> None:
        """Raises DataError if the shares were prepared differently."""
        first = shares[0][1]
        for store, manifest in shares[1:]:
            if manifest.config != first.config or manifest.cohort.classes != first.cohort.classes:
                raise DataError(
                    f"{store.url}: prepared with other settings or classes than the rest; run prepare again"
                )
        cohorts = [manifest.cohort for _, manifest in shares]
        names = Counter(case.id for cohort in cohorts for case in cohort.cases)
        if twice := [name for name, count in names.items() if count > 1]:
            raise DataError(f"{first.cohort.name}: two sites have a case {twice[0]}: rename a site or the case's files")
        self.cohort = first.cohort.model_copy(
            update={
                "cases": tuple(sorted((case for c in cohorts for case in c.cases), key=lambda case: case.id)),
                "problems": tuple(problem for c in cohorts for problem in c.problems),
            }
        )
        self.config = first.config
        self.key = first.key if len(shares) == 1 else stable_hash([manifest.key for _, manifest in shares])
        self.made_from = first.made_from
        self.url = shares[0][0].url
        self._files = {case: (store, file) for store, manifest in shares for case, file in manifest.files.items()}

    @classmethod
    def open(cls, *stores: Store) -> Self:
        """Open what `prepare` finished in each of `stores`. Raises DataError if one has no finished share."""
        shares = []
        for store in stores:
            where = f"{store.url}/{MANIFEST}"
            if not store.exists(MANIFEST):
                raise DataError(f"{store.url}: no prepared cohort here (no {MANIFEST}); run prepare first")
            try:
                shares.append((store, Manifest.model_validate_json(store.read_bytes(MANIFEST))))
            except ValidationError as error:
                raise DataError(f"{where}: not a readable manifest; delete it and run prepare again") from error
        return cls(shares)

    def load(self, case_id: str) -> PreparedCase:
        """Read a case. Raises DataError if its file is missing or its SHA-256 is not the manifest's."""
        if case_id not in self._files:
            raise DataError(f"case {case_id}: not in the prepared cohort {self.url}; it has {', '.join(self._files)}")
        store, entry = self._files[case_id]
        where, fix = f"{store.url}/{entry.file}", "run prepare again to make it anew"
        try:
            data = store.read_bytes(entry.file)
        except StoreError as error:
            raise DataError(f"{where}: cannot read the prepared case ({error}); {fix}") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise DataError(
                f"{where}: the prepared case is damaged (its SHA-256 is not the manifest's); delete it and {fix}"
            )
        tensors = load(data)
        geometry = Geometry.from_dict(entry.geometry)
        case = next(case for case in self.cohort.cases if case.id == case_id)
        return PreparedCase(case, tensors["image"].astype(np.float32), tensors["label"], geometry.spacing, geometry)

    def is_complete(self) -> bool:
        """Whether every file is there. Content is verified by `load`."""
        stores = {store.url: store for store, _ in self._files.values()}
        there = {url: set(store.list("cases/")) for url, store in stores.items()}
        return all(entry.file in there[store.url] for store, entry in self._files.values())


def prepare(
    cohort: Cohort,
    config: PreprocessConfig,
    store: Store,
    progress: Progress | None = None,
    each: Each = map,
    made_from: str = "",
) -> PreparedCohort:
    """Prepare every case of `cohort` into a store, or find it already there.

    Args:
        config: what it leaves open is settled by `cohort` alone; see `PreprocessConfig.resolve` for several sites.
        store: of the share; one share a store.
        progress: called as ("prepare", done, total) after each case.
        each: how the cases are gone through.
        made_from: kept in the manifest.

    Raises:
        DataError: for a scan that changed since the cohort was read or turned unreadable.
        StoreError: the disk is full, or the store cannot be used. What was finished is kept for the next run; nothing
            is left half-written.
    """
    if not config.is_resolved(cohort.modality):
        survey = take_survey(cohort, config.asks_for_histogram(cohort.modality), each)
        config = config.resolve(survey, cohort.modality)
    key = stable_hash({"format": FORMAT, "cohort": cohort.hash, "config": config.model_dump(mode="json")})
    if store.exists(MANIFEST):
        there = PreparedCohort.open(store)
        # Equal keys hold equal voxels, but paths and names may have changed; then only the manifest is written again.
        if (there.key, there.made_from, there.cohort) == (key, made_from, cohort) and there.is_complete():
            return there

    finished = set(store.list("cases/"))
    files: dict[str, PreparedFile] = {}
    work = partial(_prepare_case, cohort=cohort.model_copy(update={"cases": ()}), config=config, store=store)
    items = [(case, _file_of(case, cohort, config) in finished) for case in cohort.cases]
    for done, (case, file) in enumerate(zip(cohort.cases, each(work, items), strict=True), start=1):
        files[case.id] = file
        if progress is not None:
            progress("prepare", done, len(cohort.cases))
    manifest = Manifest(key=key, made_from=made_from, config=config, cohort=cohort, files=files)
    store.write_bytes(MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
    for old in finished - {file.file for file in files.values()}:
        store.delete(old)
    return PreparedCohort([(store, manifest)])


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
    voxels[:] = voxels.astype(np.float16)  # as in a prepared cohort, to the bit: the same scan gives the same mask
    return PreparedCase(case, voxels, None, geometry.spacing, geometry)


def _file_of(case: Case, cohort: Cohort, config: PreprocessConfig) -> str:
    """Key of a prepared case in its store."""
    source = {"image": case.image_sha256, "label": case.label_sha256, "modality": cohort.modality}
    how = {"format": FORMAT, "config": config.model_dump(mode="json"), "merge_labels": case.merge_labels}
    return f"cases/{case.id}.{stable_hash({**how, **source})[:16]}.safetensors"


def _prepare_case(item: tuple[Case, bool], cohort: Cohort, config: PreprocessConfig, store: Store) -> PreparedFile:
    """Make the file of one case, unless an earlier run has: files appear whole, so one that is there is finished."""
    case, finished = item
    name = _file_of(case, cohort, config)
    data = store.read_bytes(name) if finished else None
    geometry = None if data is None else _stored_geometry(data)
    if data is None or geometry is None:
        geometry, data = _encode_case(case, cohort, config)
        store.write_bytes(name, data)
    return PreparedFile(file=name, sha256=hashlib.sha256(data).hexdigest(), geometry=geometry)


def _stored_geometry(data: bytes) -> dict[str, Any] | None:
    """Geometry in the header of a finished case; None if anything in the file is not as it was written."""
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fedsam"])
        geometry: dict[str, Any] = about["geometry"]
        return geometry if about["sha256"] == _digest(tensors, geometry) else None
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None


def _digest(tensors: dict[str, npt.NDArray[Any]], geometry: dict[str, Any]) -> str:
    """SHA-256 (hex) of a prepared case, kept in its own file for whoever finds it without a manifest."""
    digest = hashlib.sha256(json.dumps(geometry, sort_keys=True).encode())
    for name in ("image", "label"):
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def _encode_case(case: Case, cohort: Cohort, config: PreprocessConfig) -> tuple[dict[str, Any], bytes]:
    if case.label is None:
        raise DataError(f"case {case.id}: no label map; a cohort is prepared from labelled scans")
    image = read_image(Path(case.image))
    label = read_label(Path(case.label), image, Path(case.image), len(cohort.classes), case.merge_labels)
    for path, now, then in (
        (case.image, image.sha256, case.image_sha256),
        (case.label, label.sha256, case.label_sha256),
    ):
        if now != then:
            raise DataError(f"{path}: changed since the cohort was read; read the cohort again")
    geometry, voxels = _to_slices(image, config, cohort.modality)
    del image  # of a long scan each of these takes up to half a gigabyte
    tensors: dict[str, npt.NDArray[Any]] = {"image": voxels.astype(np.float16)}
    del voxels
    tensors["label"] = np.ascontiguousarray(geometry.to_slices(label.voxels, order=0))
    written = geometry.to_dict()
    # One entry, because safetensors writes several in any order: two that prepare at once must write the same bytes.
    about = json.dumps({"case": case.id, "geometry": written, "sha256": _digest(tensors, written)}, sort_keys=True)
    return written, save(tensors, {"fedsam": about})


def _to_slices(image: Volume, config: PreprocessConfig, modality: Modality) -> tuple[Geometry, npt.NDArray[np.float32]]:
    """Orient, resample, scale to [0, 1]. Intensities are scaled per volume or by a fixed window, never per slice.

    Scales `image.voxels` in place: a long scan is half a gigabyte, and nobody looks at its old values again.
    """
    plane = slice_plane(image.spacing, image.orientation) if config.slice_axis == "auto" else config.slice_axis
    x, y, z = image.voxels.shape
    geometry = Geometry.plan(image.affine, (x, y, z), plane, config.spacing)
    if modality == "ct":
        if config.ct_window == "auto":
            raise DataError("preprocess.ct_window=auto is settled by a cohort: give the window in HU for a scan alone")
        low, high = config.ct_window
    else:
        low, high = percentiles(image.voxels, config.mri_percentiles)
        if low == high:  # nearly all of the volume is one value: only the extremes tell it apart
            low, high = float(image.voxels.min()), float(image.voxels.max())
    # Clip before resampling, so that metal or a padding value does not bleed into its neighbours.
    scaled = image.voxels
    scaled -= np.float32(low)
    scaled /= np.float32(high - low)
    np.clip(scaled, 0, 1, out=scaled)
    return geometry, np.ascontiguousarray(geometry.to_slices(scaled, order=1), dtype=np.float32)
