"""Dice in the scan's own geometry: per class and case, per site, over sites.

What is empty and what is missed decides a mean as much as the overlaps do, so both are written out here and counted
beside every score (Maier-Hein et al., "Metrics reloaded", Nature Methods 2024, on empty references):

| truth | prediction | Dice | counted as |
|---|---|---|---|
| empty | empty | nan, left out of the means | empty |
| empty | any voxel | 0 | false positive |
| present | no voxel in common | 0 | missed |
| present | overlaps | 2 |A and B| / (|A| + |B|) | |
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.metrics.meandice import compute_dice
from nibabel.wrapstruct import WrapStructError

from fedsam_core.data.cohort import Case
from fedsam_core.errors import DataError

Array = np.ndarray[Any, Any]
Labels = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class CaseScore:
    """How well one scan was segmented.

    Attributes:
        case: id of the case.
        site: site that the case belongs to.
        split: "train", "val" or "test".
        classes: names of the foreground classes; the tuples below are in their order.
        dice: Dice per class in [0, 1]; nan where truth and prediction are both empty.
        truth_voxels: voxels of the class in the truth, on the scan's own grid.
        predicted_voxels: the same for the prediction.
    """

    case: str
    site: str
    split: str
    classes: tuple[str, ...]
    dice: tuple[float, ...]
    truth_voxels: tuple[int, ...]
    predicted_voxels: tuple[int, ...]

    @property
    def mean_dice(self) -> float:
        """Mean over the classes that have a score; nan if none has."""
        return _mean(self.dice)

    @property
    def empty(self) -> tuple[bool, ...]:
        """Per class: neither truth nor prediction has a voxel of it."""
        return tuple(t == 0 and p == 0 for t, p in zip(self.truth_voxels, self.predicted_voxels, strict=True))

    @property
    def missed(self) -> tuple[bool, ...]:
        """Per class: it is there, and no voxel of it was hit."""
        return tuple(t > 0 and d == 0 for t, d in zip(self.truth_voxels, self.dice, strict=True))

    @property
    def false_positive(self) -> tuple[bool, ...]:
        """Per class: it is not there, but was predicted."""
        return tuple(t == 0 and p > 0 for t, p in zip(self.truth_voxels, self.predicted_voxels, strict=True))

    def row(self) -> dict[str, str | float | int]:
        """A flat row for a table: ids, "dice" (mean over classes), then dice_/truth_voxels_/predicted_voxels_CLASS."""
        row: dict[str, str | float | int] = {
            "case": self.case,
            "site": self.site,
            "split": self.split,
            "dice": self.mean_dice,
        }
        row |= {f"dice_{name}": value for name, value in zip(self.classes, self.dice, strict=True)}
        row |= {f"truth_voxels_{name}": count for name, count in zip(self.classes, self.truth_voxels, strict=True)}
        row |= {f"predicted_voxels_{name}": n for name, n in zip(self.classes, self.predicted_voxels, strict=True)}
        return row


def dice_per_class(prediction: Array, truth: Array, classes: int) -> Floats:
    """Dice of every foreground class, computed by MONAI from label maps.

    Args:
        prediction: integer label map, any shape; 0 is background.
        truth: integer label map of the same shape.
        classes: number of foreground classes; class k has label value k + 1.

    Returns:
        float64 [classes]; nan where both are empty, 0 for a false positive on an empty truth.

    Raises:
        ValueError: the shapes differ, a value is no integer, or a label lies outside 0..classes.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, truth {truth.shape}")
    scores = compute_dice(
        _as_labels(prediction, classes, "prediction"),
        _as_labels(truth, classes, "truth"),
        include_background=False,
        ignore_empty=False,  # MONAI would give nan to a false positive, and a nan-mean would then reward it
        num_classes=classes + 1,
    )
    dice = np.asarray(scores[0].numpy(), dtype=np.float64)
    present = _voxels(prediction, classes) + _voxels(truth, classes) > 0
    return np.where(present, dice, np.nan)


def truth_on_scan_grid(case: Case) -> Labels:
    """The case's truth from the label file itself, not from anything prepared: uint8 [X, Y, Z] in the file's axes.

    Raises:
        DataError: the case has no label file, or the file cannot be read, has another shape than the scan, or holds
            values that are no labels of the cohort.
    """
    if case.label is None:
        raise DataError(f"case {case.id}: no label map; only labelled cases can be scored")
    path = Path(case.label)
    try:
        values: Array = np.asanyarray(nib.load(path).dataobj)  # type: ignore[attr-defined]
    except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError, WrapStructError) as error:
        raise DataError(f"{path}: cannot read the mask: missing, truncated or no NIfTI file; restore it") from error
    if values.shape != case.shape:
        raise DataError(
            f"{path}: mask of shape {values.shape} for a scan of shape {case.shape}; resample the mask onto its scan"
        )
    top = max(case.label_values, default=0)
    labels = values.astype(np.uint8, copy=False) if values.min() >= 0 and values.max() <= top else None
    if labels is None or (labels is not values and not np.array_equal(labels, values)):
        raise DataError(
            f"{path}: holds values other than the integers 0 to {top} that the cohort lists for case {case.id}; "
            "restore the mask, or run prepare again"
        )
    return labels


def score_case(prediction: Array, case: Case, classes: Sequence[str]) -> CaseScore:
    """Scores a prediction against the case's label file, voxel by voxel of the scan's own grid.

    Args:
        prediction: uint8 [X, Y, Z] label map on the scan's own grid.
        case: the scan it was predicted from.
        classes: names of the foreground classes.

    Raises:
        DataError: see `truth_on_scan_grid`.
    """
    truth = truth_on_scan_grid(case)
    return CaseScore(
        case=case.id,
        site=case.site,
        split=case.split,
        classes=tuple(classes),
        dice=tuple(dice_per_class(prediction, truth, len(classes)).tolist()),
        truth_voxels=tuple(_voxels(truth, len(classes)).tolist()),
        predicted_voxels=tuple(_voxels(prediction, len(classes)).tolist()),
    )


def dice_sums(scores: Iterable[CaseScore], classes: int) -> tuple[Floats, Floats]:
    """What a site puts into the masked lanes so that only means over all sites become known.

    Returns:
        (float64 [classes] sum of Dice over the cases that have a score, float64 [classes] number of those cases). The
        sums of several sites, divided, are the pooled mean Dice per class of `summarize`.
    """
    table = np.array([score.dice for score in scores], dtype=np.float64).reshape(-1, classes)
    return np.nansum(table, axis=0), np.sum(~np.isnan(table), axis=0, dtype=np.float64)


def summarize(scores: Sequence[CaseScore], classes: Sequence[str]) -> dict[str, Any]:
    """Means and counts over cases, classes and sites; plain JSON values, None where nothing could be scored.

    Returns:
        "cases": number of cases.
        "dice": pooled: mean over classes of the class means over all cases.
        "per_class": by class name "dice" (mean over the cases that have a score), "n" (their number), "n_empty",
            "n_missed", "n_false_positive".
        "per_site": by site the same three keys, over its cases.
        "macro_dice": mean of the sites' "dice": every site counts alike, however many cases it has.
        "worst_site": {"site", "dice"} of the lowest site, None if no site has a score.

    Raises:
        ValueError: a score is of other classes.
    """
    names = tuple(classes)
    for score in scores:
        if score.classes != names:
            raise ValueError(f"case {score.case} was scored for {score.classes}, not for {names}")
    sites = sorted({score.site for score in scores})
    per_site = {site: _group([score for score in scores if score.site == site], names) for site in sites}
    known = {site: group["dice"] for site, group in per_site.items() if group["dice"] is not None}
    worst = min(known, key=lambda site: (known[site], site), default=None)
    return {
        **_group(scores, names),
        "per_site": per_site,
        "macro_dice": _json(_mean(known.values())),
        "worst_site": None if worst is None else {"site": worst, "dice": known[worst]},
    }


def _group(scores: Sequence[CaseScore], classes: tuple[str, ...]) -> dict[str, Any]:
    per_class = {
        name: {
            "dice": _json(_mean(score.dice[k] for score in scores)),
            "n": sum(not np.isnan(score.dice[k]) for score in scores),
            "n_empty": sum(score.empty[k] for score in scores),
            "n_missed": sum(score.missed[k] for score in scores),
            "n_false_positive": sum(score.false_positive[k] for score in scores),
        }
        for k, name in enumerate(classes)
    }
    means = [entry["dice"] for entry in per_class.values() if entry["dice"] is not None]
    return {"cases": len(scores), "dice": _json(_mean(means)), "per_class": per_class}


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _json(value: float) -> float | None:
    return None if np.isnan(value) else value


def _as_labels(labels: Array, classes: int, what: str) -> torch.Tensor:
    """Label map as uint8 [1, 1, ...], MONAI's layout for class indices; no one-hot copy of a whole scan is made."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{what} has dtype {labels.dtype}, a label map is of integers")
    if labels.size and (labels.min() < 0 or labels.max() > classes):
        raise ValueError(f"{what} has labels {labels.min()}..{labels.max()}, beyond the {classes} classes")
    return torch.from_numpy(np.ascontiguousarray(labels, dtype=np.uint8))[None, None]


def _voxels(labels: Array, classes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """int64 [classes]: voxels of each foreground class."""
    return np.array([np.count_nonzero(labels == value) for value in range(1, classes + 1)], dtype=np.int64)
