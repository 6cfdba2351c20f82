"""What rides in the masked vector of each sum, and what is read from the sum.

A site scales its update by w = slices / total, where the total comes from a first secure sum over the slice counts.
The sum of w * update over the contributing sites, divided by the sum of w, is the weighted mean (FedAvg, McMahan et al.
2017, arXiv 1602.05629, Algorithm 1), and no weight is ever seen in the open.

Each tensor group has its own clip, so that narrow rings resolve small changes as well as large ones. A clip comes from
the round before: beside their updates sites sum histograms of the magnitudes in them, and a quantile of all sites'
changes together is read from the sum. What is beyond a clip is cut, and how much that was is summed too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from fedsam_core.errors import SecureSumError
from fedsam_core.federation.config import FederationConfig
from fedsam_core.hashing import stable_hash
from fedsam_core.learning.learner import Fit
from fedsam_core.secagg.attempt import Attempt
from fedsam_core.secagg.layout import Lane, VectorLayout
from fedsam_core.secagg.quantize import Encoder
from fedsam_core.secagg.refusals import MalformedMessage, UnfitValues
from fedsam_core.selection import ParameterManifest
from fedsam_core.settings import Settings

Purpose = Literal["weights", "update", "scores", "survey"]  # the last before a run, see `preparation`
Lanes = Mapping[str, NDArray[np.float64]]


class Task(Settings):
    """What a sum asks of every site; the same for all."""

    purpose: Purpose
    total_slices: float | None = Field(None, gt=0, description="for updates: training slices of all sites together")
    clips: dict[str, float] | None = Field(
        None, description="for updates: clip by tensor group; None in the first round, when no magnitude is known"
    )
    split: Literal["val", "test"] | None = Field(None, description="for scores: which cases")

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        # What a site has answered is known by purpose and split: the same question has no second name.
        if (self.split is not None) != (self.purpose == "scores"):
            raise ValueError("a split is given for scores, and for nothing else")
        if (self.total_slices is not None) != (self.purpose == "update"):
            raise ValueError("the total of slices is given for updates, and for nothing else")
        if self.clips is not None and self.purpose != "update":
            raise ValueError("clips are for updates")
        return self


# A lane's clip is the largest value of one site; the quantiser refuses what is beyond, so that nothing saturates.
MAX_SLICES = 2.0**20
MAX_WEIGHT = 64.0  # over 1 where a large site was lost when the slices were counted
MAX_LOSS = 64.0
MAX_CASES = 4096.0

MAGNITUDES = 48
"""Bins of a histogram of magnitudes, two an octave: from `update_clip` down to 2^-24 of it."""


def tensor_groups(manifest: ParameterManifest) -> dict[str, list[slice]]:
    """Where in the flat vector each group of like tensors lies: LoRA's A and B apart, as B starts from zero."""
    groups: dict[str, list[slice]] = {}
    start = 0
    for entry in manifest.shared:
        stop = start + int(np.prod(entry.shape))
        name = entry.group if entry.kind == "whole" else f"{entry.group}.{entry.kind[-1]}"
        places = groups.setdefault(name, [])
        if places and places[-1].stop == start:
            start = places.pop().start
        places.append(slice(start, stop))
        start = stop
    return groups


def layout_of(
    task: Task, sites: int, manifest: ParameterManifest, classes: int, config: FederationConfig
) -> VectorLayout:
    """The lanes of a sum.

    "weights", the first sum of a run: how many training slices all sites have together.
    "update", a round's sum: weighted updates by tensor group; weights; weighted losses; per class the numerator and
    denominator of the Dice on training slices; and per group, to choose and judge the clips: a histogram of magnitudes,
    how many values were cut, and largest and mean square error of rounding, in steps of the ring.
    "scores": per class the Dice summed over cases (a numerator), and how many cases had one (the denominator).

    Raises:
        UnfitValues: the task has clips for other groups, or the ring has no room for so many sites.
    """
    if task.purpose == "survey":
        raise UnfitValues("a survey of the cohort is summed before a run, not in it")
    lanes: tuple[Lane, ...]
    if task.purpose == "weights":
        lanes = (Lane("slices", 1, MAX_SLICES),)
    elif task.purpose == "scores":
        lanes = (Lane("dice", classes, MAX_CASES), Lane("cases", classes, MAX_CASES))
    else:
        sizes = {name: sum(place.stop - place.start for place in p) for name, p in tensor_groups(manifest).items()}
        clips = dict.fromkeys(sizes, config.update_clip) if task.clips is None else task.clips
        if set(clips) != set(sizes):
            raise UnfitValues(f"clips are for {', '.join(sorted(clips))}, the tensor groups are {', '.join(sizes)}")
        bits = 32 if task.clips is None else config.bits
        count = len(sizes)
        lanes = (
            *(Lane(f"update/{name}", size, clips[name], bits) for name, size in sizes.items()),
            Lane("weight", 1, MAX_WEIGHT),
            Lane("loss", 1, MAX_LOSS * MAX_WEIGHT),
            Lane("dice_numerator", classes, 2.0),
            Lane("dice_denominator", classes, 2.0),
            Lane("magnitudes", count * MAGNITUDES, float(max(sizes.values()))),
            Lane("cut", count, float(max(sizes.values()))),
            Lane("largest_error", count, 1.0),
            Lane("square_error", count, 1.0),
        )
    return VectorLayout(lanes, max_sites=sites, min_contributors=config.min_contributors)


def put_update(
    encoder: Encoder,
    layout: VectorLayout,
    manifest: ParameterManifest,
    config: FederationConfig,
    fit: Fit,
    total_slices: float,
) -> None:
    """Fills the lanes of an update with what a site's training gave.

    Raises:
        UnfitValues: a change is not finite, or larger than `update_clip`: this site's training has diverged.
    """
    largest = float(np.abs(fit.update).max())
    if not largest <= config.update_clip:  # NaN fails this too
        what = "NaN or infinity" if not np.isfinite(largest) else f"a change of {largest:.6g}"
        raise UnfitValues(f"the update holds {what}, over federation.update_clip ({config.update_clip:g})")
    weight = fit.slices / total_slices
    magnitudes, cut, largest_error, square_error = [], [], [], []
    for name, places in tensor_groups(manifest).items():
        lane = layout.lane(f"update/{name}")
        values = np.concatenate([fit.update[place] for place in places]) * np.float32(weight)
        kept = np.clip(values, -lane.limit, lane.limit)
        rounding = encoder.put(lane.name, kept)
        step = layout.step(lane)
        magnitudes.append(_histogram(values, config.update_clip))
        cut.append(np.count_nonzero(kept != values))
        largest_error.append(rounding.largest / step)
        square_error.append(rounding.mean_square / step**2)
    encoder.put("weight", weight)
    encoder.put("loss", fit.loss * weight)
    encoder.put("dice_numerator", fit.dice_numerator)
    encoder.put("dice_denominator", fit.dice_denominator)
    encoder.put("magnitudes", np.concatenate(magnitudes))
    encoder.put("cut", np.array(cut, dtype=np.float64))
    encoder.put("largest_error", np.array(largest_error))
    encoder.put("square_error", np.array(square_error))


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
    """What a round's sum says.

    Attributes:
        mean: float64 [manifest.shared_size], the weighted mean of the sites' updates.
        loss: mean training loss, weighted as the updates are.
        dice: by class, Dice on the training slices of all sites pooled; nan where no pixel was or should be the class.
        clips: of the next round, by tensor group.
        precision: of the mean.
    """

    mean: NDArray[np.float64]
    loss: float
    dice: tuple[float, ...]
    clips: dict[str, float]
    precision: Precision


def read_update(
    layout: VectorLayout,
    lanes: Lanes,
    contributors: Sequence[str],
    manifest: ParameterManifest,
    config: FederationConfig,
) -> Update:
    """What the opened lanes of an update say.

    Raises:
        UnfitValues: no weight came together.
    """
    weight = float(lanes["weight"][0])
    if not weight > 0:
        raise UnfitValues("the weights of a round's updates add up to nothing: the sites' slice counts do not fit")
    groups = tensor_groups(manifest)
    mean = np.empty(manifest.shared_size)
    bounds, squares = [], 0.0
    clips = {}
    histograms = lanes["magnitudes"].reshape(len(groups), MAGNITUDES)
    for at, (name, places) in enumerate(groups.items()):
        lane = layout.lane(f"update/{name}")
        start = 0
        for place in places:
            stop = start + place.stop - place.start
            mean[place] = lanes[lane.name][start:stop] / weight
            start = stop
        bounds.append(layout.error_bound(lane.name, layout.contributors(lane, contributors)))
        # Errors of different sites are independent: their squares add up.
        squares += lane.size * float(lanes["square_error"][at]) * layout.step(lane) ** 2
        clips[name] = _next_clip(histograms[at], config)
    steps = np.array([layout.step(layout.lane(f"update/{name}")) for name in groups])
    denominator = np.round(lanes["dice_denominator"], 6)  # what the ring resolves: an empty class stays empty
    with np.errstate(invalid="ignore", divide="ignore"):
        dice = np.where(denominator > 0, lanes["dice_numerator"] / denominator, np.nan)
    return Update(
        mean=mean,
        loss=float(lanes["loss"][0]) / weight,
        dice=tuple(float(one) for one in dice),
        clips=clips,
        precision=Precision(
            bound=max(bounds) / weight,
            largest=float((lanes["largest_error"] * steps).max()) / weight,
            rms=float(np.sqrt(squares / manifest.shared_size)) / weight,
            cut=max(0.0, float(lanes["cut"].sum()) / (manifest.shared_size * len(contributors))),
        ),
    )


def sum_hash(manifest: ParameterManifest, layout: VectorLayout, task: Task) -> str:
    """Hash (hex) that binds a sum to the parameters it is about, to its lanes and to the task.

    It is part of what every site signs: sites that were told different tasks refuse each other, so nobody can have one
    site's update counted fully and the others' not at all.
    """
    return stable_hash([manifest.layout_hash, layout.hash, task.model_dump()])


def attempt_to_json(attempt: Attempt) -> bytes:
    """An attempt as the driver announces it."""
    return json.dumps(asdict(attempt), sort_keys=True).encode()


def attempt_from_json(data: bytes) -> Attempt:
    """The inverse of `attempt_to_json`. Raises MalformedMessage for anything else."""
    try:
        attempt = _ATTEMPT.validate_json(data, strict=True)
        if set(json.loads(data)) != set(asdict(attempt)):
            raise ValueError("it has other fields than an attempt")
    except (ValueError, SecureSumError, RecursionError) as error:  # pydantic's are ValueErrors
        raise MalformedMessage(f"the announcement of a sum is malformed ({' '.join(str(error).split())})") from error
    return attempt


def attempt_from_dict(fields: Mapping[str, Any]) -> Attempt:
    """An attempt from its fields. Raises MalformedMessage where one is missing, unknown or of another type."""
    return attempt_from_json(json.dumps(fields).encode())


def task_from_dict(fields: Mapping[str, Any]) -> Task:
    """A task from its fields. Raises MalformedMessage where one is missing, unknown or of another type."""
    try:
        return Task.model_validate(fields)
    except ValidationError as error:
        raise MalformedMessage(f"the task of a sum is malformed ({' '.join(str(error).split())})") from error


_ATTEMPT = TypeAdapter(Attempt)


def _bin(magnitude: NDArray[np.float32]) -> NDArray[np.int64]:
    """Half octaves: the exponent and the first bit of the mantissa of a float32."""
    return (magnitude.view(np.int32) >> 22).astype(np.int64)


def _top(update_clip: float) -> int:
    return int(_bin(np.array([update_clip], np.float32))[0])


def _histogram(values: NDArray[np.float32], update_clip: float) -> NDArray[np.float64]:
    """How many values (float32) lie in each half octave below `update_clip`, the largest first; the last bin holds all
    that is smaller."""
    bins = np.clip(_top(update_clip) - _bin(np.abs(values.astype(np.float32))), 0, MAGNITUDES - 1)
    return np.bincount(bins, minlength=MAGNITUDES).astype(np.float64)


def _next_clip(histogram: NDArray[np.float64], config: FederationConfig) -> float:
    """The upper edge of the bin that the quantile lies in, with headroom."""
    above = np.cumsum(histogram)
    beyond = (1 - config.clip_quantile) * above[-1]
    at = int(np.argmax(above > max(0.5, beyond)))
    edge = np.array([(_top(config.update_clip) - at + 1) << 22], np.int32).view(np.float32)[0]
    return float(min(config.update_clip, config.clip_headroom * float(edge)))
