"""What rides in the masked vector of each sum, and what is read from the sum.

A site scales its update by w = amount / total, where the total (of slices, cases or sites) comes from a first secure
sum. The sum of w * update over the contributing sites, divided by the sum of w, is the weighted mean (FedAvg, McMahan
et al. 2017, arXiv 1602.05629, Algorithm 1), and no weight is ever seen in the open.

An update consists of parts (see `parts_of`), each a lane with a clip of its own, so that narrow rings resolve small
changes as well as large ones. A clip comes from the sum before: beside their updates sites sum histograms of the
magnitudes in them (see `clips`). In a ring of 16 bits or less each part is rotated first (see `rotation`), so that one
step suits all its values. What is beyond a clip is cut, and how much that was is summed too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedsam_core.federation import privacy
from fedsam_core.federation.clips import MAGNITUDES, histogram, next_clip
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.groups import Group, tensor_groups
from fedsam_core.federation.lora_rules import meter_size, product_sizes, summed_kinds
from fedsam_core.federation.rotation import Rotation, block_of, padded_size
from fedsam_core.federation.tasks import Task
from fedsam_core.learning.learner import Fit
from fedsam_core.secagg.attempt import SMALLEST_PRIVATE_SUM, default_threshold
from fedsam_core.secagg.layout import Lane, VectorLayout
from fedsam_core.secagg.quantize import Encoder
from fedsam_core.secagg.refusals import UnfitValues
from fedsam_core.selection import ParameterManifest

Lanes = Mapping[str, NDArray[np.float64]]
Values = NDArray[np.floating]

# A lane's clip is the largest value of one site; the quantiser refuses what is beyond, so that nothing saturates.
MAX_AMOUNT = 2.0**20
MAX_WEIGHT = 64.0  # over 1 where a large site was lost when the amounts were summed
MAX_LOSS = 64.0
MAX_CASES = 4096.0
MAX_STEPS = 2.0**14  # times the weight
MAX_PROBE = 64.0  # a change of a layer's product by so much has other troubles

_SPARE = 4.0  # of control variates' clips: gradients change more from round to round, and what is cut stays lost
CONTROL = "control/"
"""Before a group's name: the change of its control variates (SCAFFOLD)."""


@dataclass(frozen=True)
class Round:
    """What decides the lanes of a round's sums, the same at the driver and at every site.

    Attributes:
        number: of the round, 1 for the first.
        seed: of the run: rotations, sketches and probes are drawn from it.
        sites: all of the run, sorted.
    """

    number: int
    seed: int
    sites: tuple[str, ...]
    manifest: ParameterManifest
    classes: int
    config: FederationConfig

    @cached_property
    def groups(self) -> dict[str, Group]:
        """The values that are summed one by one."""
        kinds = summed_kinds(self.config, self.number)
        return tensor_groups(self.manifest, kinds, self.sites, self.config.site_ranks)

    @property
    def minimum(self) -> int:
        """Fewest sites that a sum is opened for."""
        return max(default_threshold(len(self.sites)), self.config.min_contributors, SMALLEST_PRIVATE_SUM)

    def rotation(self, part: str, size: int, stage: int) -> Rotation:
        """Of a part in this round."""
        return Rotation(size, self.seed, self.number, stage, part)


@dataclass(frozen=True)
class Part:
    """One lane of an update: how many values, and who has them (None for all sites)."""

    size: int
    sites: tuple[str, ...] | None = None


def parts_of(about: Round, stage: int) -> dict[str, Part]:
    """The parts of an update in a stage: groups of shared values, their control variates, LoRA's products.

    With differential privacy all values are one part, because one clip and one noise hold for all.
    """
    config = about.config
    products = {name: Part(size) for name, size in product_sizes(config, about.manifest, stage).items()}
    if stage:
        return products
    groups = {name: Part(group.index.size, group.sites) for name, group in about.groups.items()}
    if config.privacy is not None:
        return {"all": Part(sum(part.size for part in groups.values()))}
    controls = {CONTROL + name: part for name, part in groups.items()} if config.scaffold else {}
    return groups | controls | products


def layout_of(task: Task, about: Round) -> VectorLayout:
    """The lanes of a sum.

    "weights", the first sum of a run: what all sites' updates weigh together.
    "magnitudes": the histograms that clips are chosen by, where none is known and the ring is narrow.
    "update", a round's sum: the weighted parts; weights; and per part, to choose and judge the clips: a histogram of
    magnitudes, how many values were cut, and largest and mean square error of rounding, in steps of the ring. In the
    first stage also weighted losses, per class the numerator and denominator of the Dice on training slices, what the
    meter reads, and the sites' steps where they count.
    "scores": per class the Dice summed over cases (a numerator), and how many cases had one (the denominator).

    Raises:
        UnfitValues: the task has clips for other parts, or the ring has no room for so many sites.
    """
    config, sites = about.config, len(about.sites)
    lanes: tuple[Lane, ...]
    if task.purpose == "survey":
        raise UnfitValues("a survey of the cohort is summed before a run, not in it")
    if task.purpose == "weights":
        lanes = (Lane("amount", 1, MAX_AMOUNT),)
    elif task.purpose == "scores":
        lanes = (Lane("dice", about.classes, MAX_CASES), Lane("cases", about.classes, MAX_CASES))
    elif config.privacy is not None:
        lanes = (_private_lane(about),)
    else:
        parts = parts_of(about, task.stage)
        largest = float(max(_on_the_wire(about, part.size) for part in parts.values()))
        lanes = (Lane("magnitudes", len(parts) * MAGNITUDES, largest),)
        if task.purpose == "update":
            lanes = (*_update_lanes(task, about, parts), *lanes, *_checks(about, task, parts, largest))
    return VectorLayout(lanes, max_sites=sites, min_contributors=config.min_contributors)


def _update_lanes(task: Task, about: Round, parts: Mapping[str, Part]) -> list[Lane]:
    config = about.config
    clips = dict.fromkeys(parts, config.update_clip) if task.clips is None else task.clips
    if set(clips) != set(parts):
        raise UnfitValues(f"clips are for {', '.join(sorted(clips))}, the parts of the update are {', '.join(parts)}")
    if task.clips is None and config.bits != 32:
        raise UnfitValues(f"a ring of {config.bits} bits needs clips, and the task has none")
    return [
        Lane(f"update/{name}", _on_the_wire(about, part.size), clips[name], config.bits, part.sites)
        for name, part in parts.items()
    ]


def _checks(about: Round, task: Task, parts: Mapping[str, Part], largest: float) -> list[Lane]:
    config, classes = about.config, about.classes
    bands = {part.sites for part in parts.values()} - {None}
    lanes = [Lane("weight", 1, MAX_WEIGHT)]
    lanes += [Lane(f"weight/{_band(sites)}", 1, MAX_WEIGHT, sites=sites) for sites in sorted(filter(None, bands))]
    lanes += [Lane("cut", len(parts), largest), Lane("largest_error", len(parts), 1.0)]
    lanes += [Lane("square_error", len(parts), 1.0)]
    if config.normalize_steps:
        lanes += [Lane("steps", 1, MAX_STEPS)]
    if task.stage == 0:
        lanes += [Lane("loss", 1, MAX_LOSS * MAX_WEIGHT)]
        lanes += [Lane("dice_numerator", classes, 2.0), Lane("dice_denominator", classes, 2.0)]
        if size := meter_size(config, about.manifest):
            lanes += [Lane("probes", size, MAX_PROBE)]
    return lanes


def _private_lane(about: Round) -> Lane:
    size = _on_the_wire(about, parts_of(about, 0)["all"].size)
    # Integers go in as they are: the clip is the ring's number of levels, so that a step is one.
    levels = privacy.ring_levels(about.config.bits, len(about.sites))
    return Lane("update/all", size, float(levels), about.config.bits)


def private_step(about: Round) -> float:
    """What one level of the ring stands for under differential privacy, in the parameters' unit."""
    config = about.config
    assert config.privacy is not None
    size = parts_of(about, 0)["all"].size
    sites, padded = len(about.sites), padded_size(size)
    return privacy.suggest_step(config.privacy, config.bits, sites, about.minimum, padded, block_of(size))


def accountant(about: Round) -> privacy.Accountant:
    """Counts the rounds of a run with differential privacy, each as the one with most values: `rolora` has two kinds,
    and the more values, the coarser the steps of the ring and the more rounding lengthens an update."""
    assert about.config.privacy is not None
    kinds = (replace(about, number=number) for number in (1, 2))
    largest = max(kinds, key=lambda one: parts_of(one, 0)["all"].size)
    size = padded_size(parts_of(largest, 0)["all"].size)
    return privacy.Accountant(about.config.privacy, about.minimum, size, private_step(largest))


def _on_the_wire(about: Round, size: int) -> int:
    return padded_size(size) if about.config.rotates else size


def _band(sites: tuple[str, ...] | None) -> str:
    return ",".join(sites or ())


def put_private(encoder: Encoder, about: Round, update: NDArray[np.float32], rng: np.random.Generator) -> None:
    """The update (float32 [shared size]) as integers with this site's share of the noise. Raises UnfitValues for NaN.

    Clipped, rotated, rounded and noised as `privacy` says. Whatever else a site knows of its training stays with it.
    """
    config = about.config
    assert config.privacy is not None
    values = np.concatenate([update[group.index] for group in about.groups.values()])
    clipped, _ = privacy.clip_l2(values, config.privacy.clip)
    rotated = about.rotation("all", values.size, 0).forward(clipped)
    whole = privacy.integers(rotated, private_step(about), config.privacy, about.minimum, rng)
    levels = privacy.ring_levels(config.bits, len(about.sites))
    encoder.put("update/all", np.clip(whole, -levels, levels).astype(np.float64))


@dataclass(frozen=True)
class SiteUpdate:
    """What a site's training gave, as it goes into a round's sums.

    Attributes:
        parts: float [size] by part, neither weighted nor rotated; zeros where this site does not have it.
        weight: of this site, its amount over the total of all.
        probes: what the meter reads, float64, not weighted; empty without one.
    """

    parts: Mapping[str, Values]
    weight: float
    probes: NDArray[np.float64]


def check_update(update: Values, config: FederationConfig) -> None:
    """Raises UnfitValues where a change is not finite or beyond `update_clip`: this site's training has diverged."""
    largest = float(np.abs(update).max())
    if not largest <= config.update_clip:  # NaN fails this too
        what = "NaN or infinity" if not np.isfinite(largest) else f"a change of {largest:.6g}"
        raise UnfitValues(f"the update holds {what}, over federation.update_clip ({config.update_clip:g})")


def put_magnitudes(encoder: Encoder, about: Round, task: Task, site: str, given: SiteUpdate, steps: int) -> None:
    """Fills the histograms of what a site will contribute."""
    counts = []
    for name, part in parts_of(about, task.stage).items():
        values = _weighted(about, task, name, given, steps)
        counts.append(_counts(values, part, site, about.config))
    encoder.put("magnitudes", np.concatenate(counts))


def put_update(
    encoder: Encoder, layout: VectorLayout, about: Round, task: Task, site: str, given: SiteUpdate, fit: Fit
) -> None:
    """Fills the lanes of an update with what a site's training gave."""
    magnitudes, cut, largest_error, square_error = [], [], [], []
    for name, part in parts_of(about, task.stage).items():
        lane = layout.lane(f"update/{name}")
        values = _weighted(about, task, name, given, fit.steps)
        kept = np.clip(values, -lane.limit, lane.limit)
        rounding = encoder.put(lane.name, kept)
        step = layout.step(lane)
        magnitudes.append(_counts(values, part, site, about.config))
        cut.append(np.count_nonzero(kept != values))
        largest_error.append(rounding.largest / step)
        square_error.append(rounding.mean_square / step**2)
    weight = given.weight
    encoder.put("magnitudes", np.concatenate(magnitudes))
    encoder.put("cut", np.array(cut, dtype=np.float64))
    encoder.put("largest_error", np.array(largest_error))
    encoder.put("square_error", np.array(square_error))
    encoder.put("weight", weight)
    for lane in layout.lanes:
        if lane.name.startswith("weight/"):
            encoder.put(lane.name, weight if site in (lane.sites or ()) else 0.0)
    if about.config.normalize_steps:
        encoder.put("steps", fit.steps * weight)
    if task.stage == 0:
        encoder.put("loss", fit.loss * weight)
        encoder.put("dice_numerator", fit.dice_numerator)
        encoder.put("dice_denominator", fit.dice_denominator)
        if given.probes.size:
            factor = _factor(about, given, fit.steps)
            encoder.put("probes", np.clip(given.probes * factor, -MAX_PROBE, MAX_PROBE))


def _weighted(about: Round, task: Task, name: str, given: SiteUpdate, steps: int) -> Values:
    factor = given.weight if name.startswith(CONTROL) else _factor(about, given, steps)
    values = given.parts[name]
    if not about.config.rotates:
        return values * np.float32(factor)
    return about.rotation(name, values.size, task.stage).forward(values) * factor


def _factor(about: Round, given: SiteUpdate, steps: int) -> float:
    """What a site's update is multiplied by in the sum."""
    return given.weight / steps if about.config.normalize_steps else given.weight


def _counts(values: Values, part: Part, site: str, config: FederationConfig) -> NDArray[np.float64]:
    if part.sites is not None and site not in part.sites:
        return np.zeros(MAGNITUDES)
    return histogram(values.astype(np.float32), config.update_clip)


@dataclass(frozen=True)
class Precision:
    """How exact a round's mean update is, in the parameters' unit, over all its values.

    Attributes:
        bound: no value can be further off than this by rounding: proven from sites, bits and clip.
        largest: no value was further off: the sum of each site's largest error.
        rms: root of the mean square error, from each site's.
        cut: share of the sites' values that were beyond their clip and were cut to it.
    """

    bound: float
    largest: float
    rms: float
    cut: float


@dataclass(frozen=True)
class Update:
    """What the sum of an update says.

    Attributes:
        means: float64 [size] by part, the weighted mean over the sites that have it; control variates as a sum that
            counts absent sites as unchanged.
        loss: mean training loss, weighted as the updates are; nan in later stages and with differential privacy.
        dice: by class, Dice on the training slices of all sites pooled; nan where no pixel was or should be the class.
        clips: of the parts in their next sum.
        precision: of the means.
        probes: mean of what the meter read at the sites; empty without one.
    """

    means: dict[str, NDArray[np.float64]]
    loss: float
    dice: tuple[float, ...]
    clips: dict[str, float]
    precision: Precision
    probes: NDArray[np.float64]


def read_magnitudes(lanes: Lanes, about: Round, stage: int) -> dict[str, float]:
    """The clip of every part, from the histograms of all sites."""
    parts = parts_of(about, stage)
    counts = lanes["magnitudes"].reshape(len(parts), MAGNITUDES)
    clips = {name: next_clip(counts[at], about.config) for at, name in enumerate(parts)}
    most = about.config.update_clip
    return {name: min(most, clip * _SPARE) if name.startswith(CONTROL) else clip for name, clip in clips.items()}


def read_update(layout: VectorLayout, lanes: Lanes, contributors: Sequence[str], about: Round, stage: int) -> Update:
    """What the opened lanes of an update say.

    Raises:
        UnfitValues: no weight came together.
    """
    if about.config.privacy is not None:
        return _read_private(lanes, contributors, about)
    weights: dict[tuple[str, ...] | None, float] = {None: float(lanes["weight"][0])}
    parts = parts_of(about, stage)
    weights |= {p.sites: float(lanes[f"weight/{_band(p.sites)}"][0]) for p in parts.values() if p.sites is not None}
    if not min(weights.values()) > 0:
        raise UnfitValues("the weights of a round's updates add up to nothing: the sites' amounts do not fit")
    steps = float(lanes["steps"][0]) / weights[None] if about.config.normalize_steps else 1.0
    means = {}
    squares = bound = largest = 0.0
    for at, (name, part) in enumerate(parts.items()):
        lane = layout.lane(f"update/{name}")
        mean, factor = lanes[lane.name], 1.0
        if about.config.rotates:
            rotation = about.rotation(name, part.size, stage)
            mean, factor = rotation.inverse(mean), rotation.largest_error_factor
        scale = 1.0 if name.startswith(CONTROL) else steps / weights[part.sites]
        means[name] = mean * scale
        # Errors of different sites are independent: their squares add up.
        step = layout.step(lane) * scale
        squares += lane.size * float(lanes["square_error"][at]) * step**2
        bound = max(bound, factor * scale * layout.error_bound(lane.name, layout.contributors(lane, contributors)))
        largest = max(largest, factor * step * float(lanes["largest_error"][at]))
    sizes = sum(layout.lane(f"update/{name}").size for name in parts)
    first = stage == 0
    return Update(
        means=means,
        loss=float(lanes["loss"][0]) / weights[None] if first else float("nan"),
        dice=_dice(lanes) if first else (),
        clips=read_magnitudes(lanes, about, stage),
        precision=Precision(
            bound=bound,
            largest=largest,
            rms=float(np.sqrt(squares / sizes)),
            cut=max(0.0, float(lanes["cut"].sum()) / (sizes * len(contributors))),
        ),
        probes=lanes["probes"] * (steps / weights[None]) if first and "probes" in lanes else np.empty(0),
    )


def _read_private(lanes: Lanes, contributors: Sequence[str], about: Round) -> Update:
    size, step = parts_of(about, 0)["all"].size, private_step(about)
    rotation = about.rotation("all", size, 0)
    flat = rotation.inverse(lanes["update/all"]) * (step / len(contributors))
    means, start = {}, 0
    for name, group in about.groups.items():
        means[name] = flat[start : start + group.index.size]
        start += group.index.size
    off = step * rotation.largest_error_factor
    rms = step / 2  # at most, by rounding; the noise comes on top
    nothing = (float("nan"),) * about.classes
    return Update(means, float("nan"), nothing, {}, Precision(off, off, rms, 0.0), np.empty(0))


def _dice(lanes: Lanes) -> tuple[float, ...]:
    denominator = np.round(lanes["dice_denominator"], 6)  # what the ring resolves: an empty class stays empty
    with np.errstate(invalid="ignore", divide="ignore"):
        dice = np.where(denominator > 0, lanes["dice_numerator"] / denominator, np.nan)
    return tuple(float(one) for one in dice)
