"""Cohort, site, case: which scans there are, whose they are, what they serve for, and what they contain.

The manifest lists every case with its geometry, intensities and content hashes, so that later steps need not open the
scans again to know them, and two people can tell whether they hold the same cohort.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from fedsam_core.data.files import write_atomic
from fedsam_core.data.scans import inspect_scan
from fedsam_core.data.sources import CaseFiles, Listing, Modality, Split
from fedsam_core.data.sources.nifti import list_nifti
from fedsam_core.data.sources.phantom import PhantomConfig, list_phantom
from fedsam_core.errors import DataError
from fedsam_core.hashing import derive_seed, stable_hash
from fedsam_core.settings import Settings

Progress = Callable[[str, int, int], None]  # stage, done, total


class Case(Settings):
    """One scan with its label map. A case belongs to one site."""

    id: str = Field(description="name of the case, unique in the cohort")
    site: str = Field(description="hospital that holds the case")
    split: Split = Field(description="what the case serves for: train, val or test")
    image: str = Field(description="path of the scan (.nii or .nii.gz)")
    label: str | None = Field(description="path of the label map; null for a scan that is only predicted on")
    shape: tuple[int, int, int] = Field(description="voxels of the scan's own grid (X, Y, Z)")
    spacing: tuple[float, float, float] = Field(description="voxel size along X, Y, Z in mm")
    orientation: str = Field(description="axis codes of X, Y, Z: the directions in which the indices grow, like RAS")
    label_values: tuple[int, ...] = Field(description="values that occur in the label map, 0 included")
    intensity: dict[str, float] = Field(description="min, max, p01, p99, mean, std of the scan's voxels")
    image_sha256: str = Field(description="SHA-256 of the scan's file")
    label_sha256: str | None = Field(description="SHA-256 of the label map's file")


class Cohort(Settings):
    """All cases of a study. Label value k means `classes[k - 1]`; 0 is background."""

    name: str = Field(description="name of the cohort")
    source: Literal["nifti", "phantom"] = Field(description="reader that listed it")
    modality: Modality = Field(description="ct (Hounsfield units) or mri (arbitrary units)")
    classes: tuple[str, ...] = Field(description="foreground classes in the order of their label values 1, 2, ...")
    synthetic: bool = Field(description="true if the scans were made by a program and belong to no patient")
    cases: tuple[Case, ...] = Field(description="the cases, in the order of their names")

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, sorted."""
        return tuple(sorted({case.site for case in self.cases}))

    def select(self, site: str | None = None, split: Split | None = None) -> tuple[Case, ...]:
        """Cases of a site and/or a split, in the manifest's order."""
        return tuple(c for c in self.cases if site in (None, c.site) and split in (None, c.split))

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the content: files by their hashes, sites, splits and classes, but no path and no name."""
        cases = sorted((c.id, c.site, c.split, c.image_sha256, c.label_sha256 or "") for c in self.cases)
        return stable_hash({"modality": self.modality, "classes": self.classes, "cases": cases})

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all. Raises DataError if the disk refuses."""
        write_atomic(path, (self.model_dump_json(indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises DataError if the file is missing or is no cohort manifest."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path}: cannot read the cohort manifest ({error.strerror}); run prepare first") from error
        except ValidationError as error:
            raise DataError(f"{path}: not a cohort manifest; run prepare again to write it anew") from error


class CohortConfig(Settings):
    """Where the scans are and how they are shared out."""

    name: str = Field(description="name of the cohort, used in titles and folders", pattern=r"^[\w][\w.-]*$")
    source: Literal["nifti", "phantom"] = Field(
        description="nifti: Decathlon, nnU-Net or folder per site, at `path`; phantom: synthetic CT made on the spot"
    )
    path: Path | None = Field(default=None, description="folder of a nifti cohort")
    sites_csv: Path | None = Field(
        default=None, description="table with the columns case,site,split; default: sites.csv in `path` if it is there"
    )
    modality: Modality | None = Field(default=None, description="ct or mri; default: what dataset.json says")
    classes: tuple[str, ...] | None = Field(
        default=None, description="names of label values 1, 2, ...; default: what dataset.json says"
    )
    val_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="share of each site's training cases used for validation; 0: none"
    )
    test_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="share of each site's cases used for testing where no split is given"
    )
    split_seed: int = Field(default=0, description="seed of the splits that are drawn")
    phantom: PhantomConfig = Field(default=PhantomConfig(), description="what the phantom source makes")

    @model_validator(mode="after")
    def _path_of_nifti(self) -> Self:
        if self.source == "nifti" and self.path is None:
            raise ValueError("source nifti needs `path`, the folder that holds the scans")
        return self


def read_cohort(config: CohortConfig, work_dir: Path, progress: Progress | None = None) -> Cohort:
    """List the cases of `config` and open every scan once: geometry, intensities, hashes, faults.

    Args:
        work_dir: where the phantom source writes its scans; a nifti cohort writes nothing.
        progress: called as (stage, done, total) after each case.

    Raises:
        DataError: naming the file, site or row that is wrong, and the fix. The first fault ends the reading.
    """
    if config.source == "phantom":
        listing = list_phantom(config.phantom, work_dir, progress)
    else:
        assert config.path is not None  # checked by CohortConfig
        listing = list_nifti(config.path, config.sites_csv)
    where = config.path or config.name
    classes = config.classes or listing.classes
    if not classes:
        raise DataError(f"{where}: no dataset.json names the classes; set cohort.classes, like [kidney, tumour]")
    modality = config.modality or listing.modality
    if modality is None:
        raise DataError(f"{where}: no dataset.json names the modality; set cohort.modality to ct or mri")
    splits = _splits(listing, config)

    cases = []
    for done, files in enumerate(sorted(listing.cases, key=lambda files: files.id), start=1):
        cases.append(_read_case(files, splits[files.id], len(classes)))
        if progress is not None:
            progress("read", done, len(listing.cases))
    return Cohort(
        name=config.name,
        source=config.source,
        modality=modality,
        classes=classes,
        synthetic=listing.synthetic,
        cases=tuple(cases),
    )


def _read_case(files: CaseFiles, split: Split, classes: int) -> Case:
    scan = inspect_scan(files.image, files.label, classes)
    return Case(
        id=files.id,
        site=files.site,
        split=split,
        image=str(files.image),
        label=str(files.label),
        shape=scan.shape,
        spacing=scan.spacing,
        orientation=scan.orientation,
        label_values=scan.label_values,
        intensity=scan.intensity,
        image_sha256=scan.image_sha256,
        label_sha256=scan.label_sha256,
    )


def _splits(listing: Listing, config: CohortConfig) -> dict[str, Split]:
    """The split of every case: as given, else test drawn from all of a site; validation drawn from what trains."""
    splits: dict[str, Split] = {}
    for site in sorted({files.site for files in listing.cases}):
        members = [files for files in listing.cases if files.site == site]
        undecided = [files.id for files in members if files.split is None]
        n_test = min(max(1, round(config.test_fraction * len(undecided))), len(undecided) - 1) if undecided else 0
        test = _draw(undecided, n_test, config.split_seed, "test")
        splits |= {files.id: files.split or ("test" if files.id in test else "train") for files in members}

        train = [files.id for files in members if splits[files.id] == "train"]
        if not train:
            raise DataError(
                f"site {site}: no training case; give it at least one row with split train in sites.csv, or leave the "
                "site out"
            )
        if any(splits[files.id] == "val" for files in members):
            continue  # the site chose its validation cases itself
        n_val = round(config.val_fraction * len(train))
        if config.val_fraction > 0 and len(train) >= 4:
            n_val = max(1, n_val)
        splits |= dict.fromkeys(_draw(train, min(n_val, len(train) - 1), config.split_seed, "val"), "val")
    return splits


def _draw(ids: Iterable[str], count: int, seed: int, purpose: str) -> set[str]:
    """`count` of `ids`, by the rank of a seeded hash: a case's luck does not depend on which other cases there are."""
    return set(sorted(ids, key=lambda case: derive_seed(seed, purpose, case))[:count])
