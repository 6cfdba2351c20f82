"""Readers, one a layout: each says which files make up which case of which site, and reads no voxel.

What a reader returns is a `Listing`; `fedsam_core.data.cohort` then opens every scan once and checks it. A fault of one
case is a `Problem` in the listing and does not stop the others; only a layout that makes no sense as a whole raises.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from fedsam_core.settings import Settings

Modality = Literal["ct", "mri"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

# layout: files and table do not fit together. unreadable, scan, mask: of the files themselves. duplicate, leakage: the
# same scan twice, within a split or across splits. release: of the data set, such as clipped prostates.
ProblemKind = Literal["layout", "unreadable", "scan", "mask", "duplicate", "leakage", "release"]


class Problem(Settings):
    """Something that is wrong with a case or a cohort, and what to do about it."""

    kind: ProblemKind = Field(description="what sort of problem")
    case: str = Field(default="", description="case it is about; empty: the cohort as a whole")
    site: str = Field(default="", description="site it is about; empty: unknown or all")
    reason: str = Field(description="one line that names the file or row, what is wrong, and the fix")
    quarantined: bool = Field(description="true: the case is left out; false: a warning, the case is used")


@dataclass(frozen=True)
class CaseFiles:
    """The files of one case. `split` is None where the layout does not say and the cohort's seed decides.

    Attributes:
        image: a NIfTI file, or the folder of a DICOM series.
        label: a NIfTI file, or a DICOM segmentation (.dcm).
    """

    id: str
    site: str
    split: Split | None
    image: Path
    label: Path


@dataclass(frozen=True)
class Listing:
    """What a layout tells about itself. `classes` and `modality` are None where only the configuration can know.

    Attributes:
        scored_as: classes whose scored structure is a union, by name: {"kidney": ("kidney", "tumour")} for KiTS, whose
            kidney is everything but background.
        merge_labels: label values over 1 count as 1 (the prostate data set writes zones apart at some sites).
        problems: cases that could not be listed, and what else is to be known.
    """

    cases: tuple[CaseFiles, ...]
    classes: tuple[str, ...] | None = None
    modality: Modality | None = None
    synthetic: bool = False
    scored_as: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    merge_labels: bool = False
    problems: tuple[Problem, ...] = ()
