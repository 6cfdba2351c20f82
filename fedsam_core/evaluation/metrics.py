"""Scores in the scan's own geometry: per class and case, per site, over sites. Dice here, surfaces in `surfaces`.

What is empty and what is missed decides a mean as much as the overlaps do, so both are written out here and counted
beside every score (Maier-Hein et al., "Metrics reloaded", Nature Methods 2024, on empty references):

| truth | prediction | Dice | counted as |
|---|---|---|---|
| empty | empty | nan, left out of the means | empty |
| empty | any voxel | 0 | false positive |
| present | no voxel in common | 0 | missed |
| present | overlaps | 2 |A and B| / (|A| + |B|) | |

A class is scored as a *structure*: the label values that count as it. Mostly that is its own value; the kidney of KiTS
is everything that is labelled, its tumour included. Dice comes from exact counts of voxels: MONAI's `compute_dice`
(2.5 GB and 47 s for 512 x 512 x 548 voxels) gives the same in float32.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.wrapstruct import WrapStructError

from fedsam_core.data.cohort import Case
from fedsam_core.data.scans import Volume, read_image
from fedsam_core.errors import DataError
from fedsam_core.evaluation.bootstrap import mean_interval, mean_of_means
from fedsam_core.evaluation.surfaces import (
    Mask,
    SurfaceConfig,
    SurfaceScore,
    bounding_box,
    compare_surfaces,
    image_diagonal,
)

Array = np.ndarray[Any, Any]
Labels = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Structures = Sequence[Sequence[int]]
Metric = Literal["dice", "hd95", "hd95_penalised", "nsd"]

METRICS: tuple[Metric, ...] = ("dice", "hd95", "hd95_penalised", "nsd")
BETTER: Mapping[Metric, Literal["higher", "lower"]] = {
    "dice": "higher",
    "hd95": "lower",
    "hd95_penalised": "lower",
    "nsd": "higher",
}
_NAN = float("nan")


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
        hd95, hd95_penalised, nsd: per class, see `surfaces`; nan also where surfaces were not compared.
        nsd_tolerance_mm: tolerance of `nsd`; None where surfaces were not compared.
        voxel_ml: volume of a voxel.
    """

    case: str
    site: str
    split: str
    classes: tuple[str, ...]
    dice: tuple[float, ...]
    truth_voxels: tuple[int, ...]
    predicted_voxels: tuple[int, ...]
    hd95: tuple[float, ...] = ()
    hd95_penalised: tuple[float, ...] = ()
    nsd: tuple[float, ...] = ()
    nsd_tolerance_mm: float | None = None
    voxel_ml: float = _NAN

    def __post_init__(self) -> None:
        for metric in METRICS[1:]:
            if not getattr(self, metric):
                object.__setattr__(self, metric, (_NAN,) * len(self.classes))

    @property
    def mean_dice(self) -> float:
        """Mean over the classes that have a score; nan if none has."""
        return float(mean_of_means(np.array([self.dice])))

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

    @property
    def truth_ml(self) -> tuple[float, ...]:
        """Per class: its volume in the truth."""
        return tuple(count * self.voxel_ml for count in self.truth_voxels)

    @property
    def predicted_ml(self) -> tuple[float, ...]:
        """Per class: its predicted volume."""
        return tuple(count * self.voxel_ml for count in self.predicted_voxels)

    def row(self) -> dict[str, str | float | int]:
        """A flat row for a table: ids, "dice" (mean over classes), then dice_CLASS, hd95_mm_CLASS and so on."""
        row: dict[str, str | float | int] = {
            "case": self.case,
            "site": self.site,
            "split": self.split,
            "dice": self.mean_dice,
        }
        columns: dict[str, tuple[float, ...] | tuple[int, ...]] = {"dice": self.dice}
        if self.nsd_tolerance_mm is not None:
            columns |= {"hd95_mm": self.hd95, "hd95_penalised_mm": self.hd95_penalised, "nsd": self.nsd}
        columns |= {"truth_voxels": self.truth_voxels, "predicted_voxels": self.predicted_voxels}
        columns |= {"truth_ml": self.truth_ml, "predicted_ml": self.predicted_ml}
        for column, values in columns.items():
            row |= {f"{column}_{name}": value for name, value in zip(self.classes, values, strict=True)}
        return row

    def class_rows(self) -> list[dict[str, str | float | bool | None]]:
        """The same as a row a class, every row with the same columns; None for what has no score."""
        return [
            {
                "case": self.case,
                "site": self.site,
                "split": self.split,
                "class": name,
                "dice": _json(self.dice[k]),
                "hd95_mm": _json(self.hd95[k]),
                "hd95_penalised_mm": _json(self.hd95_penalised[k]),
                "nsd": _json(self.nsd[k]),
                "truth_ml": _json(self.truth_ml[k]),
                "predicted_ml": _json(self.predicted_ml[k]),
                "empty": self.empty[k],
                "missed": self.missed[k],
                "false_positive": self.false_positive[k],
            }
            for k, name in enumerate(self.classes)
        ]


def dice_per_class(prediction: Array, truth: Array, classes: int, structures: Structures | None = None) -> Floats:
    """Dice of every foreground class.

    Args:
        prediction: integer label map, any shape; 0 is background.
        truth: integer label map of the same shape.
        classes: number of foreground classes.
        structures: per class the label values that count as it; by default class k is label value k + 1.

    Returns:
        float64 [classes]; nan where both are empty, 0 for a false positive on an empty truth.

    Raises:
        ValueError: the shapes differ, a value is no integer, or a label lies outside 0..classes.
    """
    _require_labels(prediction, truth, classes)
    masks = ((_mask(prediction, s), _mask(truth, s)) for s in structures or _own_values(classes))
    return np.array([_dice(*_count(predicted, true)) for predicted, true in masks])


def truth_on_scan_grid(case: Case) -> Labels:
    """The case's truth from the label file itself, not from anything prepared: uint8 [X, Y, Z] in the scan's axes.

    Raises:
        DataError: the case has no label file, or the file cannot be read, has another shape than the scan, or holds
            values that are no labels of the cohort.
    """
    if case.label is None:
        raise DataError(f"case {case.id}: no label map; only labelled cases can be scored")
    path = Path(case.label)
    values = _read_dicom(path, Path(case.image)) if path.suffix == ".dcm" else _read_nifti(path)
    if values.shape != case.shape:
        raise DataError(
            f"{path}: mask of shape {values.shape} for a scan of shape {case.shape}; resample the mask onto its scan"
        )
    top = np.inf if case.merge_labels else max(case.label_values, default=0)
    unfit = not (values.min() >= 0 and values.max() <= top)  # NaN is neither
    if unfit or (values.dtype.kind == "f" and not np.array_equal(values, np.rint(values))):
        if case.merge_labels:
            raise DataError(f"{path}: holds values that are no labels; restore the mask, or run prepare again")
        raise DataError(
            f"{path}: holds values other than the integers 0 to {top} that the cohort lists for case {case.id}; "
            "restore the mask, or run prepare again"
        )
    return (values > 0 if case.merge_labels else values).astype(np.uint8, copy=False)


def score_case(
    prediction: Array,
    case: Case,
    classes: Sequence[str],
    structures: Structures | None = None,
    surfaces: SurfaceConfig | None = None,
) -> CaseScore:
    """Scores a prediction against the case's label file, on the scan's own grid.

    Args:
        prediction: uint8 [X, Y, Z] label map on the scan's own grid.
        case: the scan it was predicted from.
        classes: names of the foreground classes.
        structures: per class the label values that count as it (`Cohort.structures`); by default its own.
        surfaces: how surfaces are compared; by default they are not, which takes a fraction of the time.

    Raises:
        DataError: see `truth_on_scan_grid`.
        ValueError: the prediction is no label map of the scan's grid and these classes.
    """
    truth = truth_on_scan_grid(case)
    _require_labels(prediction, truth, len(classes))
    diagonal = image_diagonal(truth.shape, case.spacing)
    box = bounding_box(prediction, truth) or (slice(0),) * 3
    prediction, truth = np.ascontiguousarray(prediction[box]), np.ascontiguousarray(truth[box])
    counts: list[tuple[int, int, int]] = []
    compared: list[SurfaceScore] = []
    for values in structures or _own_values(len(classes)):
        predicted, true = _mask(prediction, values), _mask(truth, values)
        counts.append(_count(predicted, true))
        if surfaces is not None:
            compared.append(compare_surfaces(predicted, true, case.spacing, diagonal, surfaces))
    return CaseScore(
        case=case.id,
        site=case.site,
        split=case.split,
        classes=tuple(classes),
        dice=tuple(_dice(*count) for count in counts),
        truth_voxels=tuple(true for _, true, _ in counts),
        predicted_voxels=tuple(predicted for predicted, _, _ in counts),
        hd95=tuple(score.hd95 for score in compared),
        hd95_penalised=tuple(score.hd95_penalised for score in compared),
        nsd=tuple(score.nsd for score in compared),
        nsd_tolerance_mm=None if surfaces is None else surfaces.nsd_tolerance_mm,
        voxel_ml=float(np.prod(case.spacing)) / 1000,
    )


def dice_sums(scores: Iterable[CaseScore], classes: int) -> tuple[Floats, Floats]:
    """What a site puts into the masked lanes so that only means over all sites become known.

    Returns:
        (float64 [classes] sum of Dice over the cases that have a score, float64 [classes] number of those cases). The
        sums of several sites, divided, are the pooled mean Dice per class of `summarize`.
    """
    table = np.array([score.dice for score in scores], dtype=np.float64).reshape(-1, classes)
    return np.nansum(table, axis=0), np.sum(~np.isnan(table), axis=0, dtype=np.float64)


def summarize(
    scores: Sequence[CaseScore], classes: Sequence[str], intervals: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Means and counts over cases, classes and sites; plain JSON values, None where nothing could be scored.

    A METRIC is "dice" and, where surfaces were compared, "hd95" and "hd95_penalised" (mm) and "nsd". A mean over
    classes is the mean of the class means, so that a rare class weighs as much as one that every case has.

    Args:
        scores: of all cases.
        classes: names of the foreground classes, as they were scored.
        intervals: add "ci95": by metric [low, high], the 95% bootstrap interval of the value beside it, None where
            fewer than two cases have a score (see `bootstrap`). Takes seconds.
        seed: equal seeds give equal intervals.

    Returns:
        "cases": number of cases.
        METRIC: pooled: mean over classes of the class means over all cases.
        "per_class": by class name METRIC (mean over the cases that have a score), "n" (cases with a Dice), "n_hd95"
            (cases with an HD95; with surfaces), "n_empty", "n_missed", "n_false_positive".
        "per_site": by site the same keys, over its cases.
        "macro": METRIC as mean over the sites, "per_class" by class name METRIC: every site counts alike, however many
            cases it has.
        "macro_dice": "dice" of "macro".
        "worst_site": {"site", "dice"} of the site with the lowest Dice, None if no site has a score.
        "worst": by METRIC {"site", "value"} of the site with the worst mean; or None.
        "nsd_tolerance_mm": with surfaces.

    Raises:
        ValueError: a score is of other classes, or NSD is of several tolerances.
    """
    names = tuple(classes)
    for score in scores:
        if score.classes != names:
            raise ValueError(f"case {score.case} was scored for {score.classes}, not for {names}")
    tolerances = {score.nsd_tolerance_mm for score in scores}
    if len(tolerances) > 1:
        raise ValueError(f"scores of several NSD tolerances cannot be averaged: {tolerances}")
    tolerance = next(iter(tolerances), None)
    metrics = METRICS if tolerance is not None else METRICS[:1]
    sites = {site: [score for score in scores if score.site == site] for site in sorted({s.site for s in scores})}
    asked = seed if intervals else None
    per_site = {site: _group(own, names, metrics, asked) for site, own in sites.items()}
    worst = {metric: _worst(per_site, metric) for metric in metrics}
    macro = _means({metric: [_table(own, metric) for own in sites.values()] for metric in metrics}, asked)
    macro["per_class"] = {
        name: _means({metric: [_table(own, metric)[:, [k]] for own in sites.values()] for metric in metrics}, asked)
        for k, name in enumerate(names)
    }
    lowest = worst["dice"]
    return {
        **_group(scores, names, metrics, asked),
        "per_site": per_site,
        "macro": macro,
        "macro_dice": macro["dice"],
        "worst_site": lowest and {"site": lowest["site"], "dice": lowest["value"]},
        "worst": worst,
        **({} if tolerance is None else {"nsd_tolerance_mm": tolerance}),
    }


def _group(
    scores: Sequence[CaseScore], classes: tuple[str, ...], metrics: Sequence[Metric], seed: int | None
) -> dict[str, Any]:
    """Means and counts over some cases, without regard to their sites."""
    tables = {metric: _table(scores, metric, len(classes)) for metric in metrics}
    per_class = {}
    for k, name in enumerate(classes):
        counts = {"n": int(np.sum(~np.isnan(tables["dice"][:, k])))}
        if "hd95" in tables:
            counts["n_hd95"] = int(np.sum(~np.isnan(tables["hd95"][:, k])))
        counts |= {
            "n_empty": sum(score.empty[k] for score in scores),
            "n_missed": sum(score.missed[k] for score in scores),
            "n_false_positive": sum(score.false_positive[k] for score in scores),
        }
        per_class[name] = _means({metric: [table[:, [k]]] for metric, table in tables.items()}, seed) | counts
    means = _means({metric: [table] for metric, table in tables.items()}, seed)
    return {"cases": len(scores), **means, "per_class": per_class}


def _means(groups: Mapping[Metric, Sequence[Floats]], seed: int | None) -> dict[str, Any]:
    """By metric the mean over groups (sites, or one) of `mean_of_means` of their tables [cases, classes]; with a seed
    "ci95", too."""
    found: dict[str, Any] = {}
    for metric, tables in groups.items():
        means = np.array([mean_of_means(table) for table in tables])
        found[metric] = _json(float(np.mean(means[~np.isnan(means)]))) if not np.isnan(means).all() else None
    if seed is not None:
        intervals = {metric: mean_interval(tables, seed) for metric, tables in groups.items()}
        found["ci95"] = {metric: None if ends is None else list(ends) for metric, ends in intervals.items()}
    return found


def _worst(per_site: Mapping[str, Mapping[str, Any]], metric: Metric) -> dict[str, Any] | None:
    known = {site: group[metric] for site, group in per_site.items() if group[metric] is not None}
    sign = 1 if BETTER[metric] == "higher" else -1
    site = min(known, key=lambda site: (sign * known[site], site), default=None)
    return None if site is None else {"site": site, "value": known[site]}


def _table(scores: Sequence[CaseScore], metric: Metric, classes: int = 0) -> Floats:
    """float64 [cases, classes]; the number of classes is needed only where there may be no case."""
    table = np.array([getattr(score, metric) for score in scores], dtype=np.float64)
    return table if len(scores) else np.empty((0, classes))


def _json(value: float) -> float | None:
    return None if np.isnan(value) else value


def _read_nifti(path: Path) -> Array:
    try:
        values: Array = np.asanyarray(nib.load(path).dataobj)  # type: ignore[attr-defined]
    except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError, WrapStructError) as error:
        raise DataError(f"{path}: cannot read the mask: missing, truncated or no NIfTI file; restore it") from error
    return values


def _read_dicom(path: Path, image: Path) -> Array:
    """A DICOM segmentation on the grid of its scan; of a series only the headers are read."""
    from fedsam_core.data.dicom import read_header, read_segmentation  # its libraries take seconds to import

    if not image.is_dir():
        return read_segmentation(path, read_image(image))
    series = read_header(image)
    return read_segmentation(path, Volume(np.broadcast_to(np.uint8(0), series.shape), series.affine, ""))


def _require_labels(prediction: Array, truth: Array, classes: int) -> None:
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, truth {truth.shape}")
    for what, labels in (("prediction", prediction), ("truth", truth)):
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{what} has dtype {labels.dtype}, a label map is of integers")
        if labels.size and (labels.min() < 0 or labels.max() > classes):
            raise ValueError(f"{what} has labels {labels.min()}..{labels.max()}, beyond the {classes} classes")


def _own_values(classes: int) -> Structures:
    return [(value,) for value in range(1, classes + 1)]


def _mask(labels: Array, values: Sequence[int]) -> Mask:
    """bool of the shape of `labels`: where it has one of the values."""
    mask: Mask = labels == values[0]
    for value in values[1:]:
        mask |= labels == value
    return mask


def _count(predicted: Mask, true: Mask) -> tuple[int, int, int]:
    """Voxels of the prediction, of the truth, and in common."""
    return int(np.count_nonzero(predicted)), int(np.count_nonzero(true)), int(np.count_nonzero(predicted & true))


def _dice(predicted: int, true: int, both: int) -> float:
    return 2 * both / (predicted + true) if predicted + true else _NAN
