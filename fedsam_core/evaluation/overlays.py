"""Pictures: contours of truth and prediction over slices of a scan, and Dice by site and class as bars.

All figures are drawn on an Agg canvas of their own (no pyplot, no global state), so they can be made in any thread and
on machines without a display, and come out byte-equal for equal input. Pictures of synthetic data say so.
"""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

from fedsam_core.data.cohort import Case, Cohort
from fedsam_core.data.files import write_atomic
from fedsam_core.data.geometry import Geometry, Plane, slice_plane
from fedsam_core.data.scans import read_image
from fedsam_core.evaluation.metrics import CaseScore, truth_on_scan_grid

Array = np.ndarray[Any, Any]

# Okabe and Ito's palette, told apart with any color vision, in the order that stands out best on gray tissue.
COLORS = ("#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#F0E442", "#D55E00")
TRUTH: dict[str, Any] = {"linestyle": "solid"}
PREDICTION: dict[str, Any] = {"linestyle": (0, (2.2, 1.4))}
SOFT_TISSUE_HU = (-160.0, 240.0)
MARGIN_MM = 20.0
PANEL_INCHES = 3.2  # edge of a square panel; others have about its area
DPI = 120

# What lies at the left, right, top and bottom edge of a slice, as `data.geometry` turns it: radiological convention.
SIDES: dict[Plane, str] = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
ACROSS: dict[Plane, str] = {"axial": "SI", "coronal": "AP", "sagittal": "RL"}


def pick_slices(labels: Array, count: int) -> list[int]:
    """Up to `count` slices of a label map [D, H, W] that show the structures best, in order.

    The slices that hold foreground are split into `count` runs and the fullest slice of each is taken, so that the
    picture covers the structures from end to end. Every class weighs alike, a small tumor as much as a kidney. Without
    any foreground the slices are spread over the volume.
    """
    weight = np.zeros(len(labels))
    for value in range(1, int(labels.max(initial=0)) + 1):
        area = np.count_nonzero(labels == value, axis=(1, 2))
        weight += area / max(area.sum(), 1)
    candidates = np.flatnonzero(weight) if weight.any() else np.arange(len(labels))
    runs = np.array_split(candidates, min(count, len(candidates)))
    return [int(run[np.argmax(weight[run])] if weight.any() else run[len(run) // 2]) for run in runs]


def pick_cases(scores: Sequence[CaseScore]) -> dict[str, dict[str, CaseScore]]:
    """The cases of every site that are worth a look: by site "best", "median" and "worst", by their mean Dice.

    Each case is named once: a site of two has no median, one of a single case nothing else. Cases in which there was
    nothing to find, and nothing was found, are passed over unless a site has no others.
    """
    picked = {}
    for site in sorted({score.site for score in scores}):
        own = [score for score in scores if score.site == site]
        known = [score for score in own if not np.isnan(score.mean_dice)] or own[:1]
        ranked = sorted(known, key=lambda score: (score.mean_dice, score.case))
        picks = {"best": ranked[-1], "median": ranked[(len(ranked) - 1) // 2], "worst": ranked[0]}
        wanted = {1: ("median",), 2: ("best", "worst")}.get(len(ranked), tuple(picks))
        picked[site] = {name: picks[name] for name in wanted}
    return picked


def overlay(
    cohort: Cohort, score: CaseScore, prediction: Array, path: Path, panels: int = 6, caption: str | None = None
) -> None:
    """Writes a PNG, atomically: slices of a scored scan with the outlines of truth (solid) and prediction (dashed).

    Scan and truth are read from their own files. Outlines are those of the structures as they are scored. Radiological
    convention, with the letters of the body's sides on every panel; slices are numbered as in the file, from 0; pixels
    keep the scan's proportions.

    Args:
        cohort: holds the case, names classes and cohort, and says whether it is synthetic.
        score: score of the prediction; names the case.
        prediction: uint8 [X, Y, Z] on the scan's own grid.
        path: the PNG to write.
        panels: at most this many slices.
        caption: what stands in the title; by default the site and the name of the case.

    Raises:
        DataError: scan or label file cannot be read, or the disk refuses.
        ValueError: the cohort has no such case, or the prediction is not on the scan's grid.
    """
    case = next((case for case in cohort.cases if case.id == score.case), None)
    if case is None or prediction.shape != case.shape:
        raise ValueError(
            f"a prediction of shape {prediction.shape} does not belong to a case {score.case} of the cohort"
        )
    scan = read_image(Path(case.image))
    plane = slice_plane(case.spacing, case.orientation)
    geometry = Geometry.plan(scan.affine, case.shape, plane, spacing=None)  # native: only turns the axes
    image = geometry.to_slices(scan.voxels, order=1)
    truth = geometry.to_slices(truth_on_scan_grid(case), order=0)
    drawn = geometry.to_slices(prediction, order=0)
    numbers = _slice_numbers(geometry, case)

    chosen = pick_slices(truth if truth.any() else drawn, panels)
    _, row_mm, column_mm = geometry.spacing
    rows, columns = _window((truth[chosen] > 0) | (drawn[chosen] > 0), (row_mm, column_mm))
    down = math.ceil(len(chosen) / 3)
    across = math.ceil(len(chosen) / down)
    tallness = min(max(_size(rows) * row_mm / (_size(columns) * column_mm), 0.4), 2.5)
    width = PANEL_INCHES / math.sqrt(tallness)
    figure = _figure(width=max((width + 0.1) * across, 6.5), height=(width * tallness + 0.3) * down + 1.3)
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    for axes, index in zip(grid.flat, chosen, strict=False):
        gray = _gray(image[index, rows, columns], case, cohort)
        axes.imshow(gray, cmap="gray", vmin=0, vmax=1, aspect=row_mm / column_mm, interpolation="bilinear")
        for values, color in zip(cohort.structures, _colors(cohort), strict=True):
            _contour(axes, np.isin(truth[index, rows, columns], values), color, TRUTH)
            _contour(axes, np.isin(drawn[index, rows, columns], values), color, PREDICTION)
        axes.set_title(f"{plane} slice {numbers[index]}", fontsize=9)
        axes.set(xticks=[], yticks=[], xlim=(-0.5, gray.shape[1] - 0.5), ylim=(gray.shape[0] - 0.5, -0.5))
        _sides(axes, SIDES[plane])
        if cohort.synthetic:
            _stamp(axes)

    told = "Dice: " + ", ".join(
        f"{name} {_number(value)}" for name, value in zip(cohort.classes, score.dice, strict=True)
    )
    if score.nsd_tolerance_mm is not None:
        told += " · HD95, mm: " + ", ".join(
            f"{name} {_number(value, 1)}" for name, value in zip(cohort.classes, score.hd95, strict=True)
        )
    _title(figure, cohort, f"{caption or f'{case.site} · {case.id}'}\n{told}")
    handles = [
        Line2D([], [], color=color, linewidth=1.6, label=f"{name}, {what}", **style)
        for name, color in zip(cohort.classes, _colors(cohort), strict=True)
        for what, style in (("truth", TRUTH), ("prediction", PREDICTION))
    ]
    _legend(figure, cohort, handles, "Radiological convention: the patient's right is on the left of the picture.")
    _write(figure, path)


def dice_bars(
    summary: Mapping[str, Any],
    cohort: Cohort,
    path: Path,
    before: Mapping[str, Any] | None = None,
    scores: Sequence[CaseScore] = (),
) -> None:
    """Draws Dice by site and class as bars, and over all cases at the end; a PNG, written atomically.

    Args:
        summary: what `metrics.summarize` returned; confidence intervals that it holds are drawn as error bars.
        cohort: names the classes and the cohort, and says whether it is synthetic.
        path: the PNG to write.
        before: a summary of the same sites from before training, drawn as hatched bars beside the others.
        scores: of the cases behind `summary`; drawn as dots, one a case.
    """
    sites = sorted(summary["per_site"])
    groups = [*sites, "all cases"]
    stages = [("before", before), ("after", summary)] if before is not None else [("", summary)]
    series = [
        (f"{name}, {stage}" if stage else name, color, stage == "before", source, k)
        for k, (name, color) in enumerate(zip(cohort.classes, _colors(cohort), strict=True))
        for stage, source in stages
    ]
    width = 0.84 / len(series)
    figure = _figure(width=max(6.0, 1.2 + len(groups) * max(1.1, 0.42 * len(series))), height=4.2)
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="0.9")
    handles: list[Artist] = []
    for position, (label, color, hatched, source, k) in enumerate(series):
        entries = [_class_entry(source, site, cohort.classes[k]) for site in (*sites, None)]
        values = [entry.get("dice") for entry in entries]
        style: dict[str, Any] = {"facecolor": "white" if hatched else color, "edgecolor": color}
        style |= {"hatch": "////" if hatched else None, "linewidth": 1}
        middles = np.arange(len(groups)) - 0.42 + width * (position + 0.5)
        heights = [0.0 if value is None else value for value in values]
        bars = axes.bar(middles, heights, width=width * 0.88, **style)
        if scores and source is summary:
            _dots(
                axes, middles, width, [[s.dice[k] for s in scores if site in (None, s.site)] for site in (*sites, None)]
            )
        _error_bars(axes, middles, values, [entry.get("ci95", {}).get("dice") for entry in entries])
        texts = ["none" if value is None else f"{value:.2f}" for value in values]
        if "ci95" in summary or scores:  # what is above the bar is taken
            for middle, text in zip(middles, texts, strict=True):
                _haloed(axes.text(middle, 0.03, text, ha="center", va="bottom", fontsize=7))
        else:
            axes.bar_label(bars, labels=texts, fontsize=7, padding=2, color="0.3")
        handles.append(Patch(label=label, **style))
    axes.axvline(len(sites) - 0.5, color="0.7", linewidth=1, linestyle=":")
    axes.set_xticks(np.arange(len(groups)), labels=[_group_label(summary, group) for group in groups])
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("Dice, mean over cases")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    mean = _number(summary["dice"]) if before is None else f"{_number(before['dice'])} → {_number(summary['dice'])}"
    _title(figure, cohort, f"Dice by site and class\nmean over classes, all cases: {mean}")
    note = "Scored on each scan's own voxels; where truth and prediction lack a class, it is left out."
    extras = ["Dots: cases."] if scores else []
    extras += ["Lines: 95% bootstrap interval of the mean."] if "ci95" in summary else []
    _legend(figure, cohort, handles, "\n".join([note, *([" ".join(extras)] if extras else [])]))
    _write(figure, path)


def _dots(axes: Axes, middles: Array, width: float, groups: Sequence[Sequence[float]]) -> None:
    """A dot a case, spread over the middle of its bar in the order of the cases; the more there are the paler."""
    for middle, values in zip(middles, groups, strict=True):
        known = np.array([value for value in values if not np.isnan(value)])
        # Multiples of the golden ratio spread evenly, however many there are.
        spread = (np.arange(len(known)) * 0.618034 + 0.5) % 1 - 0.5
        alpha = float(np.clip(6 / max(len(known), 1), 0.25, 0.8))
        places = middle + spread * width * 0.6
        axes.scatter(places, known, s=9, color="0.15", alpha=alpha, linewidths=0, zorder=3, clip_on=False)


def _error_bars(
    axes: Axes, middles: Array, values: Sequence[float | None], intervals: Sequence[Sequence[float] | None]
) -> None:
    known = [
        (middle, value, ends)
        for middle, value, ends in zip(middles, values, intervals, strict=True)
        if value is not None and ends is not None
    ]
    if known:
        x, y = [middle for middle, _, _ in known], [value for _, value, _ in known]
        reach = np.array([(value - ends[0], ends[1] - value) for _, value, ends in known]).T
        axes.errorbar(x, y, np.maximum(reach, 0), fmt="none", ecolor="0.15", elinewidth=1.2, capsize=3, zorder=4)


def _group_label(summary: Mapping[str, Any], group: str) -> str:
    cases = summary["per_site"].get(group, summary)["cases"]
    return f"{group}\n{cases} case{'s' * (cases != 1)}"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Figure, path: Path) -> None:
    stream = BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": "fedsam"})
    write_atomic(path, stream.getvalue())


def _title(figure: Figure, cohort: Cohort, text: str) -> None:
    if cohort.synthetic:
        figure.suptitle(f"SYNTHETIC PHANTOM DATA\n{cohort.name} · {text}", fontsize=11, color="#A03C00")
    else:
        figure.suptitle(f"{cohort.name} · {text}", fontsize=11)


def _legend(figure: Figure, cohort: Cohort, handles: Sequence[Artist], note: str) -> None:
    """Below everything; entries of a class, which follow one another in `handles`, stand in one column."""
    classes = len(cohort.classes)
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=classes if classes <= 4 else math.ceil(classes / 2),
        frameon=False,
        fontsize=9,
        title=note,
        title_fontproperties={"size": 8},
        alignment="center",
    )
    legend.get_title().set_multialignment("center")


def _colors(cohort: Cohort) -> list[str]:
    return [COLORS[k % len(COLORS)] for k in range(len(cohort.classes))]


def _gray(voxels: Array, case: Case, cohort: Cohort) -> Array:
    """Intensities as gray values in [0, 1]: the soft-tissue window for CT, 1st to 99th percentile for MRI."""
    low, high = SOFT_TISSUE_HU if cohort.modality == "ct" else (case.intensity["p01"], case.intensity["p99"])
    return np.clip((voxels - low) / max(high - low, 1e-6), 0, 1)


def _slice_numbers(geometry: Geometry, case: Case) -> Array:
    """Number of each slice along the scan's own axis, which may run the other way."""
    thick = next(axis for axis, code in enumerate(case.orientation) if code in ACROSS[geometry.plane])
    numbers = np.arange(case.shape[thick], dtype=np.int32)
    others = [axis for axis in range(3) if axis != thick]
    along = np.broadcast_to(np.expand_dims(numbers, others), case.shape)  # takes no memory
    return geometry.to_slices(along, order=0)[:, 0, 0]


def _contour(axes: Axes, mask: Array, color: str, style: Mapping[str, Any]) -> None:
    """Outline of a mask; padded by a pixel so that it closes where the mask touches the edge of the picture."""
    if mask.any():
        x, y = np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1)
        padded = np.pad(mask, 1).astype(np.float32)
        axes.contour(x, y, padded, levels=[0.5], colors=[color], linestyles=[style["linestyle"]], linewidths=1.6)


def _sides(axes: Axes, letters: str) -> None:
    """Letters of the body's sides at the left, right, top and bottom edge."""
    places = [(0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center")]
    places += [(0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom")]
    for letter, (x, y, ha, va) in zip(letters, places, strict=True):
        _outlined(axes.text(x, y, letter, transform=axes.transAxes, ha=ha, va=va, fontsize=9, weight="bold"))


def _stamp(axes: Axes) -> None:
    _outlined(axes.text(0.02, 0.02, "synthetic", transform=axes.transAxes, ha="left", va="bottom", fontsize=8))


def _outlined(text: Text) -> None:
    text.set_color("white")
    text.set_path_effects([withStroke(linewidth=2, foreground="black")])


def _haloed(text: Text) -> None:
    """Dark on a light seam: legible on a bar of any color."""
    text.set_color("black")
    text.set_path_effects([withStroke(linewidth=2, foreground="white", alpha=0.8)])


def _window(foreground: Array, spacing: tuple[float, float]) -> tuple[slice, slice]:
    """Rows and columns around the foreground [n, H, W] of the chosen slices, with a margin; all if there is none."""
    union = np.max(foreground, axis=0)
    window = []
    for axis, size in enumerate(spacing):
        hits = np.flatnonzero(np.any(union, axis=1 - axis))
        margin = round(MARGIN_MM / size)
        low, high = (int(hits[0]) - margin, int(hits[-1]) + margin + 1) if len(hits) else (0, union.shape[axis])
        window.append(slice(max(low, 0), min(high, union.shape[axis])))
    return window[0], window[1]


def _size(part: slice) -> int:
    return int(part.stop) - int(part.start)


def _class_entry(summary: Mapping[str, Any], site: str | None, name: str) -> Mapping[str, Any]:
    """What a summary holds of a class: at a site, or over all cases; empty if it does not know the site."""
    source = summary if site is None else summary["per_site"].get(site)
    entry: Mapping[str, Any] = {} if source is None else source["per_class"][name]
    return entry


def _number(value: float | None, digits: int = 3) -> str:
    return "none" if value is None or np.isnan(value) else f"{value:.{digits}f}"
