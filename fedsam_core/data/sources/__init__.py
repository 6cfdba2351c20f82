"""Readers, one a layout: each says which files make up which case of which site, and reads no voxel.

What a reader returns is a `Listing`; `fedsam_core.data.cohort.read_cohort` then opens every scan once and checks it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Modality = Literal["ct", "mri"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class CaseFiles:
    """The files of one case. `split` is None where the layout does not say and the cohort's seed decides."""

    id: str
    site: str
    split: Split | None
    image: Path
    label: Path


@dataclass(frozen=True)
class Listing:
    """What a layout tells about itself. `classes` and `modality` are None where only the configuration can know."""

    cases: tuple[CaseFiles, ...]
    classes: tuple[str, ...] | None = None
    modality: Modality | None = None
    synthetic: bool = False
