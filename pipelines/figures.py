"""Pictures of a study: Dice and gain against bytes, the atlas, curves, site fairness, local models on all sites' cases.

Every function gives a PNG, or None where there is nothing to draw. All are drawn on an Agg canvas of their own (no
pyplot, no global state) and come out byte-equal for equal input. A selection has one color and marker in all of them.
Pictures of synthetic data say so.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox, blended_transform_factory

from pipelines.analysis import MEGABYTE, Contribution, Estimate, Row, Versus, pareto
from pipelines.parts import columns

# Okabe and Ito's palette without its yellow, which is lost on white; markers tell the same apart once more.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
OTHER = "#8A8A8A"  # of rows beyond the palette
BASELINES = {"centralized": "solid", "local": (0, (5, 2)), "zero-shot": (0, (1, 1.5))}
SITE_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH = 9.0
DPI = 200


@dataclass(frozen=True)
class Style:
    """How a row is drawn in every picture."""

    color: str
    marker: str


@dataclass(frozen=True)
class Look:
    """What all pictures of a study share.

    Attributes:
        cohort: its name, for the titles.
        synthetic: whether the titles must say so.
        styles: by group.
        take: group of the recommended row, which gets a ring; "" for none.
    """

    cohort: str
    synthetic: bool
    styles: Mapping[str, Style]
    take: str = ""


def styles_of(rows: Sequence[Row]) -> dict[str, Style]:
    """A color and marker for each federated row, those of the Pareto front first where there are more than colors."""
    federated = [row for row in rows if row.kind == "federated"]
    front = {row.group for row in pareto(rows)}
    if len(federated) > len(COLORS):
        federated.sort(key=lambda row: row.group not in front)
    told = {row.group: Style(*one) for row, one in zip(federated, zip(COLORS, MARKERS, strict=True), strict=False)}
    return {row.group: told.get(row.group, Style(OTHER, ".")) for row in rows}


def dice_against_bytes(rows: Sequence[Row], look: Look) -> bytes | None:
    """The paper's Figure 1: Dice against measured bytes and against its own GB; baselines are lines with bands."""
    points = [(row, row.dice) for row in rows if row.kind == "federated" and row.dice is not None]
    lines = [(row, row.dice) for row in rows if row.kind != "federated" and row.dice is not None]
    return _against_bytes(points, lines, pareto(rows), look, "test Dice", "Dice against bytes")


def gain_against_bytes(gains: Sequence[tuple[Row, Versus]], look: Look) -> bytes | None:
    """Collaborative gain (Dice less that of sites alone) against measured bytes and against the paper's GB."""
    points = [(row, versus.difference) for row, versus in gains]
    return _against_bytes(points, [], [], look, "Dice gained over sites alone", "Collaborative gain against bytes")


def curves(rows: Sequence[Row], look: Look) -> bytes | None:
    """Validation Dice by round: the mean over seeds, and a band from the least to the most."""
    shown = [(row, curve) for row in rows if row.kind != "zero-shot" and (curve := row.curve())]
    if not shown:
        return None
    figure = _figure(4.4, look, "Validation Dice by round")
    axes = figure.subplots()
    ends: list[tuple[float, str, str]] = []
    for row, curve in shown:
        rounds, points = list(curve), list(curve.values())
        color = look.styles[row.group].color
        style = {"color": color, "linewidth": 1.6} if row.kind == "federated" else _baseline(row)
        if row.kind == "federated" and color == OTHER:  # one of many: pale, and without a name
            axes.plot(rounds, [point.mean for point in points], color="0.75", linewidth=0.9, zorder=1)
            continue
        axes.plot(rounds, [point.mean for point in points], **style)
        least, most = [point.least for point in points], [point.most for point in points]
        axes.fill_between(rounds, least, most, color=style["color"], alpha=0.13, linewidth=0)
        ends.append((points[-1].mean, row.group, str(style["color"])))
    axes.set_xlabel("round")
    axes.set_ylabel("validation Dice")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    _plain(axes)
    _edge_labels(figure, axes, ends)
    return _png(figure)


def fairness(rows: Sequence[Row], look: Look) -> bytes | None:
    """Dice by site for each row: a mark a site, a line from the worst, which is named, to the best."""
    shown = [(row, fair) for row in rows if (fair := row.fairness) is not None]
    if not shown:
        return None
    sites = list(dict.fromkeys(site for row, _ in shown for site in row.per_site))
    figure = _figure(1.5 + 0.34 * len(shown), look, "Dice by site")
    axes = figure.subplots()
    for y, (row, fair) in enumerate(shown):
        color = look.styles[row.group].color if row.kind == "federated" else "0.35"
        axes.plot([fair.worst, fair.best], [y, y], color=color, linewidth=2, alpha=0.45, zorder=1)
        for site, one in row.per_site.items():
            marker = SITE_MARKERS[sites.index(site) % len(SITE_MARKERS)]
            axes.scatter(one.mean, y, marker=marker, s=30, color=color, edgecolor="white", linewidth=0.6, zorder=2)
        axes.annotate(
            fair.worst_site,
            (fair.worst, y),
            (-7, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
            color="0.3",
        )
        spread = f"{fair.spread:.3f}"
        axes.text(1.01, y, spread, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="0.2")
    axes.text(1.01, -0.9, "spread", transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="0.2")
    axes.set_yticks(range(len(shown)), [row.group for row, _ in shown], fontsize=9)
    axes.set_ylim(len(shown) - 0.4, -0.7)
    axes.margins(x=0.09)
    axes.set_xlabel("test Dice, mean over seeds; the worst site is named")
    _plain(axes, grid="x")
    handles = [
        Line2D([], [], linestyle="", marker=SITE_MARKERS[i % len(SITE_MARKERS)], color="0.35", label=site)
        for i, site in enumerate(sites)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(sites), 8), frameon=False, fontsize=8)
    return _png(figure)


def cross_matrix(local: Row, federated: Row | None, look: Look) -> bytes | None:
    """Dice of each site's own model on each site's cases, and beneath it that of a federated model."""
    cross = {model: row for model, row in local.cross().items() if row}
    if not cross:
        return None
    sites = list(dict.fromkeys(site for row in cross.values() for site in row))
    names = [f"model of {site}" for site in cross]
    table = [[row.get(site, math.nan) for site in sites] for row in cross.values()]
    if federated is not None:
        names.append(f"federated: {federated.group}")
        table.append([federated.per_site[site].mean if site in federated.per_site else math.nan for site in sites])
    values = np.array(table)
    figure = _figure(1.3 + 0.42 * len(names), look, f"Who learns for whom ({local.group})")
    axes = figure.subplots()
    known = values[~np.isnan(values)]
    norm = Normalize(float(known.min()), max(float(known.max()), float(known.min()) + 1e-6))
    cmap = matplotlib.colormaps["cividis"]
    for y, row in enumerate(values):
        drop = 0.25 if federated is not None and y == len(values) - 1 else 0.0
        for x, value in enumerate(row):
            face = "0.92" if math.isnan(value) else cmap(norm(value))
            own = y < len(cross) and list(cross)[y] == sites[x]
            axes.add_patch(Rectangle((x - 0.5, y - 0.5 + drop), 1, 1, facecolor=face, edgecolor="white"))
            text = "none" if math.isnan(value) else f"{value:.3f}"
            weight = "bold" if own else "normal"
            axes.text(x, y + drop, text, ha="center", va="center", fontsize=9, color=_on(face), weight=weight, zorder=3)
    bottom = len(names) - 0.5 + (0.25 if federated is not None else 0)
    axes.set(xlim=(-0.5, len(sites) - 0.5), ylim=(bottom, -0.5))
    places = [float(y) for y in range(len(names))]
    if federated is not None:
        places[-1] += 0.25
    axes.set_xticks(range(len(sites)), [f"cases of {site}" for site in sites], fontsize=9)
    axes.set_yticks(places, names, fontsize=9)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return _png(figure)


def atlas_map(contributions: Sequence[Contribution], look: Look) -> bytes | None:
    """Dice gained per megabyte by component (rows) and place in the model (columns).

    Above the line: selections that train the same thing at places that follow one another; each is one cell. Below: the
    others, one a row; the color is the whole selection's, and shows at all places that it trains.
    """
    if not contributions:
        return None
    places = columns(place for one in contributions for place in one.places)
    unit, factor = unit_of(contributions)
    single = [one for one in contributions if one.component]
    several = [one for one in contributions if not one.component]
    lanes = _lanes(single, places)
    height = len(lanes) + len(several) + (0.5 if single and several else 0)
    figure = _figure(1.7 + 0.44 * height, look, f"Contribution atlas: {unit} gained per megabyte")
    axes = figure.subplots()
    gains = [one.per_megabyte.mean * factor for one in contributions if one.per_megabyte.mean > 0]
    low, high = (min(gains), max(gains)) if gains else (0.1, 1.0)
    norm, cmap = LogNorm(low * 0.999, high * 1.001), matplotlib.colormaps["viridis"]

    def face(one: Contribution) -> Any:
        value = one.per_megabyte.mean * factor
        return cmap(norm(value)) if value > 0 else "0.9"

    ticks: list[tuple[float, str]] = []
    y = 0.0
    before = ""
    for component, lane in lanes:
        for one in lane:
            at = [places.index(place) for place in one.places]
            color = face(one)
            axes.add_patch(
                Rectangle((at[0] - 0.5, y - 0.46), len(at), 0.92, facecolor=color, edgecolor="white", linewidth=1.5)
            )
            room = len(at) * 430 / len(places)  # points, of which a letter takes about 4.7
            text = value_text(one.per_megabyte, factor)
            if 4.7 * (len(one.row.group) + len(text) + 3) < room:
                text = f"{one.row.group}:  {text}"
            elif len(at) > 1 and 4.7 * max(len(one.row.group), len(text)) < room:
                text = f"{one.row.group}\n{text}"
            elif 4.7 * len(text) > room:
                text = value_text(one.per_megabyte, factor, "\n")
            axes.text((at[0] + at[-1]) / 2, y, text, ha="center", va="center", fontsize=7.5, color=_on(color))
        ticks.append((y, "" if component == before else component_text(component)))
        before = component
        y += 1
    if single and several:
        axes.axhline(y - 0.25, color="0.4", linewidth=0.8)
        y += 0.5
    for one in several:
        color = face(one)
        for place in one.places:
            axes.add_patch(
                Rectangle((places.index(place) - 0.5, y - 0.36), 1, 0.72, facecolor=color, edgecolor="white")
            )
        text = value_text(one.per_megabyte, factor)
        axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="0.15")
        ticks.append((y, one.row.group))
        y += 1
    axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks], fontsize=9)
    axes.set(xlim=(-0.5, len(places) - 0.5), ylim=(y - 0.45, -0.55))
    axes.set_xticks(range(len(places)), [place_text(place) for place in places], fontsize=8)
    axes.set_xlabel("encoder blocks 0, 1, ...; decoder layers d0, d1 and its last attention; mask head", fontsize=9)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return _png(figure)


def unit_of(contributions: Sequence[Contribution]) -> tuple[str, float]:
    """A unit in which gains per megabyte have few zeros, and what to multiply with: "thousandths of Dice", 1000."""
    largest = max((abs(one.per_megabyte.mean) for one in contributions), default=1.0)
    if largest >= 10:
        return "Dice", 1.0
    return ("thousandths of Dice", 1e3) if largest >= 1e-3 else ("millionths of Dice", 1e6)


def value_text(one: Estimate, factor: float, between: str = " ") -> str:
    """Mean and half the interval, as 12.3 ± 3.2; the mean alone of one seed."""
    mean = one.mean * factor
    digits = 2 if mean == 0 else min(max(0, 2 - math.floor(math.log10(abs(mean)))), 4)
    reach = "" if one.high is None else f"{between}± {(one.high - one.mean) * factor:,.{digits}f}"
    return f"{mean:,.{digits}f}{reach}"


def component_text(component: str) -> str:
    """`lora_q, lora_v` as a person writes it: LoRA q, v."""
    names = component.split(", ")
    if set(names) == {"hypernetworks", "mask_tokens", "upscaling"}:
        return "mask head"
    lora = [name.removeprefix("lora_") for name in names if name.startswith("lora_")]
    whole = [name.replace("_", " ") for name in names if not name.startswith("lora_")]
    return ", ".join([*([f"LoRA {', '.join(lora)}"] if lora else []), *whole])


def place_text(place: str) -> str:
    """A column's short name: 3, d0, last, head."""
    if place == "decoder.final":
        return "last"
    floor, _, name = place.partition(".")
    return f"d{name}" if floor == "decoder" and name.isdigit() else name or floor


def _against_bytes(
    points: Sequence[tuple[Row, Estimate]],
    lines: Sequence[tuple[Row, Estimate]],
    front: Sequence[Row],
    look: Look,
    what: str,
    title: str,
) -> bytes | None:
    points = [(row, one) for row, one in points if row.bytes_total and row.trainable]  # the axes are logarithmic
    if not points:
        return None
    figure = _figure(4.6, look, title)
    measured, paper = figure.subplots(1, 2, sharey=True)
    panels: list[tuple[Axes, Callable[[Row], float], str]] = [
        (measured, lambda row: row.bytes_total / MEGABYTE, "measured: MB of the whole run, all sites, up and down"),
        (paper, lambda row: row.paper_gb, "FLAP-SAM's convention: trainable × 800 / 2³⁰, called GB"),
    ]
    at_front = {row.group for row in front}
    low, high = _span([one for _, one in points])
    margin = 0.6 * (high - low)  # a baseline further away would squeeze the points
    near = [(row, one) for row, one in lines if low - margin <= one.mean <= high + margin]
    for axes, size, label in panels:
        for row, one in near:
            axes.axhline(one.mean, **_baseline(row), zorder=1)
            if one.low is not None and one.high is not None:
                axes.axhspan(one.low, one.high, color="0.5", alpha=0.12, linewidth=0, zorder=0)
        for row, one in points:
            style = look.styles[row.group]
            filled = not front or row.group in at_front
            reach = None if one.low is None or one.high is None else [[one.mean - one.low], [one.high - one.mean]]
            axes.errorbar(
                size(row),
                one.mean,
                yerr=reach,
                fmt=style.marker,
                color=style.color,
                markerfacecolor=style.color if filled else "white",
                markersize=7,
                elinewidth=1.1,
                capsize=2.5,
                zorder=3,
            )
            if row.group == look.take:
                axes.scatter(size(row), one.mean, s=190, facecolor="none", edgecolor="0.2", linewidth=1.2, zorder=2)
        axes.set_xscale("log")
        axes.set_xlabel(label, fontsize=9)
        sizes = [size(row) for row, _ in points]
        middle, half = math.sqrt(min(sizes) * max(sizes)), math.sqrt(max(sizes) / min(sizes))
        half = max(half * (max(sizes) / min(sizes)) ** 0.14, 1.8)  # room for the labels at both ends
        axes.set_xlim(middle / half, middle * half)
        decades = math.log10(half) * 2
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        _plain(axes)
    measured.set_ylabel(what)
    if low < 0 < high:  # gains, of which some are losses
        for axes, _, _ in panels:
            axes.axhline(0, color="0.4", linewidth=0.9, zorder=1)
    if len(front) > 1:
        measured.step(
            [row.bytes_total / MEGABYTE for row in front],
            [row.dice.mean for row in front if row.dice is not None],
            where="post",
            color="0.55",
            linewidth=1,
            linestyle=(0, (3, 2)),
            zorder=1,
        )
    _edge_labels(figure, paper, [(one.mean, row.group, "0.25") for row, one in near])
    far = [f"{row.group} {one.mean:.3f}" for row, one in lines if (row, one) not in near]
    if far:
        measured.text(
            0.01, 0.01, f"off the scale: {', '.join(far)}", transform=measured.transAxes, fontsize=8, color="0.35"
        )
    for axes, size, _ in panels:
        named = [(row, one) for row, one in points if look.styles[row.group].color != OTHER]
        _point_labels(figure, axes, [(size(row), one, row.group, look.styles[row.group].color) for row, one in named])
    return _png(figure)


def _point_labels(figure: Figure, axes: Axes, points: Sequence[tuple[float, Estimate, str, str]]) -> None:
    """A name beside each point, where it covers least of other names, points and error bars."""
    figure.draw_without_rendering()  # places are known after the layout only
    frame = axes.get_window_extent()
    taken: list[Bbox] = []
    for x, one, _, _ in points:
        left, middle = axes.transData.transform((x, one.mean))
        ends = (one.low if one.low is not None else one.mean, one.high if one.high is not None else one.mean)
        bottom, top = (axes.transData.transform((x, end))[1] for end in ends)
        taken.append(Bbox.from_extents(left - 16, middle - 16, left + 16, middle + 16))
        taken.append(Bbox.from_extents(left - 5, bottom, left + 5, top))
    offsets = [
        (dx, dy, ha, va)
        for reach in (9, 16, 26)
        for dx, dy, ha, va in (
            (reach, 0, "left", "center"),
            (-reach, 0, "right", "center"),
            (reach * 0.8, reach * 0.8, "left", "bottom"),
            (-reach * 0.8, reach * 0.8, "right", "bottom"),
            (reach * 0.8, -reach * 0.8, "left", "top"),
            (-reach * 0.8, -reach * 0.8, "right", "top"),
        )
    ]
    for x, one, name, color in points:
        tried = []
        for dx, dy, ha, va in offsets:
            text = axes.annotate(
                name,
                (x, one.mean),
                (dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=8.5,
                color=color,
                zorder=5,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )
            text.set_in_layout(False)
            box = text.get_window_extent()
            covered = sum(_shared(box, other) for other in taken)
            outside = box.width * box.height - _shared(box, frame)
            tried.append((covered + 3 * outside, text, box))
        _, best, box = min(tried, key=lambda one: one[0])
        for _, text, _ in tried:
            if text is not best:
                text.remove()
        taken.append(box)


def _edge_labels(figure: Figure, axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Names right of the axes at the height of what they name, moved apart where they would touch."""
    if not labels:
        return
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    gap = (high - low) * 12 / (axes.get_window_extent().height / DPI * 72)
    ordered = sorted(labels)
    heights = _apart([y for y, _, _ in ordered], gap)
    across = blended_transform_factory(axes.transAxes, axes.transData)
    for height, (y, text, color) in zip(heights, ordered, strict=True):
        axes.plot([1.0, 1.02], [y, height], transform=across, color=color, linewidth=0.7, clip_on=False)
        axes.text(1.025, height, text, transform=across, va="center", fontsize=8.5, color=color)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in rising order, at least `gap` apart, each run of them as near to where it was as can be."""
    runs: list[list[float]] = []
    for height in heights:
        runs.append([height])
        while len(runs) > 1 and _bottom(runs[-1], gap) - _bottom(runs[-2], gap) < len(runs[-2]) * gap:
            last = runs.pop()
            runs[-1] += last
    return [_bottom(run, gap) + i * gap for run in runs for i in range(len(run))]


def _bottom(run: Sequence[float], gap: float) -> float:
    return sum(run) / len(run) - (len(run) - 1) * gap / 2


def _lanes(single: Sequence[Contribution], places: Sequence[str]) -> list[tuple[str, list[Contribution]]]:
    """Cells by component, in lanes in which none covers another: narrow ones first."""
    lanes: list[tuple[str, list[Contribution]]] = []
    for component in dict.fromkeys(one.component for one in single):
        own: list[tuple[str, list[Contribution]]] = []
        for one in sorted((c for c in single if c.component == component), key=lambda c: len(c.places)):
            free = (
                lane
                for _, lane in own
                if not any(set(one.places) & set(c.places) for c in lane)
                and (len(lane[0].places) == 1) == (len(one.places) == 1)
            )
            lane = next(free, None)
            if lane is None:
                own.append((component, [one]))
            else:
                lane.append(one)
        lanes += own
    return lanes


def _span(points: Sequence[Estimate]) -> tuple[float, float]:
    low = min(one.mean if one.low is None else one.low for one in points)
    high = max(one.mean if one.high is None else one.high for one in points)
    return low, max(high, low + 0.01)


def _baseline(row: Row) -> dict[str, Any]:
    return {"color": "0.35", "linestyle": BASELINES[row.kind], "linewidth": 1.2}


def _shared(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else float(both.width * both.height)


def _on(face: Any) -> str:
    """Black or white, whichever is legible on that color."""
    red, green, blue, _ = matplotlib.colors.to_rgba(face)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _plain(axes: Axes, grid: Any = "y") -> None:
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color="0.92", linewidth=0.8)
    axes.tick_params(labelsize=8.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _figure(height: float, look: Look, title: str) -> Figure:
    figure = Figure(figsize=(WIDTH, max(height, 2.0)), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    if look.synthetic:
        figure.suptitle(f"SYNTHETIC DATA · {look.cohort} · {title}", fontsize=11, color="#A03C00", parse_math=False)
    else:
        figure.suptitle(f"{look.cohort} · {title}", fontsize=11, parse_math=False)
    return figure


def _png(figure: Figure) -> bytes:
    stream = BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": "fedsam"})
    return stream.getvalue()
