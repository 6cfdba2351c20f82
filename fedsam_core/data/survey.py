"""What a whole cohort must know of itself before it is prepared, as sums that sites can give without showing a scan.

Two settings may be left to the cohort: the plane of the slices, and the CT window. Both follow from counts: how many
scans were acquired in which plane, and how many labelled voxels of the training scans have which value in Hounsfield
units. Counts of several sites add up, so a secure sum over them gives exactly what pooled scans would.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from fedsam_core.data.cohort import Case, Cohort, Each, Progress
from fedsam_core.data.geometry import Plane, slice_plane
from fedsam_core.data.scans import read_image, read_label
from fedsam_core.errors import DataError

Counts = npt.NDArray[np.int64]

PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
LOWEST_HU = -1024
BINS = 4096
"""One a Hounsfield unit, from LOWEST_HU up: the 12 bits of a scanner. What is beyond counts in the outermost bins."""


@dataclass(frozen=True)
class Survey:
    """Counts of a cohort, or of a site's share.

    Attributes:
        planes: int64 [3], scans acquired in each plane, in the order of PLANES.
        histogram: int64 [BINS], labelled voxels of training scans by Hounsfield unit; zeros where not asked for.
    """

    planes: Counts
    histogram: Counts

    def __add__(self, other: Self) -> Self:
        return type(self)(self.planes + other.planes, self.histogram + other.histogram)

    def plane(self) -> Plane:
        """The plane of most scans; the first of PLANES on a tie."""
        return PLANES[int(np.argmax(self.planes))]

    def window(self, ranks: tuple[float, float]) -> tuple[float, float]:
        """Two percentiles (nearest rank) of the labelled voxels, in Hounsfield units.

        Raises:
            DataError: nothing is labelled, or all of it has one value.
        """
        total = int(self.histogram.sum())
        if total == 0:
            raise DataError("preprocess.ct_window=auto: no training case has a labelled voxel; give a window in HU")
        reached = np.cumsum(self.histogram)
        low, high = (
            float(LOWEST_HU + int(np.searchsorted(reached, max(1.0, np.ceil(rank / 100 * total))))) for rank in ranks
        )
        if low >= high:
            raise DataError(f"preprocess.ct_window=auto: all labelled voxels are at {low:g} HU; give a window in HU")
        return low, high


def take_survey(cohort: Cohort, histogram: bool, each: Each = map, progress: Progress | None = None) -> Survey:
    """Count a cohort's cases; with `histogram` its training scans and masks are read for it.

    Args:
        each: how they are gone through.
        progress: called as ("survey", done, total) after each of them.

    Raises DataError for a scan that cannot be read any more.
    """
    found = [slice_plane(case.spacing, case.orientation) for case in cohort.cases]
    planes = np.array([found.count(plane) for plane in PLANES], np.int64)
    counts = np.zeros(BINS, np.int64)
    if histogram:
        work = [(case, len(cohort.classes)) for case in cohort.select(split="train")]
        for done, one in enumerate(each(_labelled_units, work), start=1):
            counts += one
            if progress is not None:
                progress("survey", done, len(work))
    return Survey(planes, counts)


def _labelled_units(work: tuple[Case, int]) -> Counts:
    """Histogram of one case."""
    case, classes = work
    assert case.label is not None  # a cohort is read with its masks
    image = read_image(Path(case.image))
    label = read_label(Path(case.label), image, Path(case.image), classes, case.merge_labels)
    units = np.rint(image.voxels[label.voxels > 0]).astype(np.int64) - LOWEST_HU
    return np.bincount(units.clip(0, BINS - 1), minlength=BINS)
