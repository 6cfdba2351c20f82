"""What the trials of a study say together: means with intervals over seeds, paired differences, the Pareto front and
the contribution atlas. Pure functions of `TrialResult`; nothing is read or drawn here.

Seeds are the sample: an interval says how far another set of seeds could move a mean on this cohort. It says nothing of
other patients, which the intervals of `fedsam evaluate` are for.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import t

from pipelines.parts import by_place, columns
from pipelines.results import Kind, TrialResult

LEVEL = 0.95
MEGABYTE = 1e6
PAPER_GB = 800 / 2**30  # of FLAP-SAM's Fig. 1, for a trainable value: 25 rounds of 32 bits, in gibibits


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: over seeds.
        low, high: 95% interval of the mean (Student's t); None with fewer than two seeds.
        least, most: over seeds.
        seeds: how many; 0 for a difference of means whose trials share no seed.
    """

    mean: float
    low: float | None
    high: float | None
    least: float
    most: float
    seeds: int

    @property
    def holds_zero(self) -> bool:
        """Whether zero is within the interval; without one that cannot be said, and is False."""
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high


@dataclass(frozen=True)
class Fairness:
    """How alike the sites fare, by their mean Dice over seeds."""

    worst_site: str
    worst: float
    best_site: str
    best: float

    @property
    def spread(self) -> float:
        """From the worst site to the best."""
        return self.best - self.worst


@dataclass(frozen=True)
class Row:
    """All finished trials of a group, which differ in their seed only."""

    trials: tuple[TrialResult, ...]

    @property
    def group(self) -> str:
        return self.trials[0].group

    @property
    def kind(self) -> Kind:
        return self.trials[0].kind

    @property
    def selection(self) -> str:
        return self.trials[0].selection

    @cached_property
    def dice_by_seed(self) -> dict[int, float]:
        """Test Dice over all cases."""
        return _by_seed(self.trials, lambda trial: trial.test.get("dice"))

    @cached_property
    def dice(self) -> Estimate | None:
        """Test Dice over all cases; None where no trial has one."""
        return estimate(self.dice_by_seed.values())

    @cached_property
    def per_class(self) -> dict[str, Estimate]:
        """Test Dice by class."""
        return self._split("per_class")

    @cached_property
    def per_site(self) -> dict[str, Estimate]:
        """Test Dice by site."""
        return self._split("per_site")

    @cached_property
    def fairness(self) -> Fairness | None:
        """None with fewer than two sites."""
        means = sorted((one.mean, site) for site, one in self.per_site.items())
        if len(means) < 2:
            return None
        (worst, worst_site), (best, best_site) = means[0], means[-1]
        return Fairness(worst_site, worst, best_site, best)

    @property
    def trainable(self) -> int:
        return self.trials[0].trainable

    @property
    def paper_gb(self) -> float:
        """FLAP-SAM's convention: trainable x 800 / 2^30."""
        return self.trainable * PAPER_GB

    @property
    def bytes_up(self) -> float:
        """Mean over trials, as are the other two."""
        return float(np.mean([trial.bytes_up for trial in self.trials]))

    @property
    def bytes_down(self) -> float:
        return float(np.mean([trial.bytes_down for trial in self.trials]))

    @property
    def bytes_total(self) -> float:
        return self.bytes_up + self.bytes_down

    def curve(self) -> dict[int, Estimate]:
        """Validation Dice by round."""
        scored = [
            (round_, trial.seed, dice) for trial in self.trials for round_, dice in trial.curve if dice is not None
        ]
        rounds = sorted({round_ for round_, _, _ in scored})
        found = {round_: _mean_by_seed((seed, dice) for r, seed, dice in scored if r == round_) for round_ in rounds}
        return {round_: one for round_, values in found.items() if (one := estimate(values.values())) is not None}

    def cross(self) -> dict[str, dict[str, float]]:
        """Kind local: mean Dice of each site's model (outer key) on each site's test cases."""
        models = dict.fromkeys(site for trial in self.trials for site in trial.cross)
        cases = dict.fromkeys(site for trial in self.trials for row in trial.cross.values() for site in row)
        means = {
            model: {site: _mean(trial.cross.get(model, {}).get(site) for trial in self.trials) for site in cases}
            for model in models
        }
        return {model: {site: dice for site, dice in row.items() if dice is not None} for model, row in means.items()}

    def _split(self, by: str) -> dict[str, Estimate]:
        names = dict.fromkeys(name for trial in self.trials for name in trial.test.get(by, {}))
        values = {
            name: _by_seed(self.trials, lambda trial: trial.test.get(by, {}).get(name, {}).get("dice"))  # noqa: B023
            for name in names
        }
        return {name: one for name, found in values.items() if (one := estimate(found.values())) is not None}


@dataclass(frozen=True)
class Versus:
    """A row beside a baseline.

    Attributes:
        baseline: group of the baseline.
        difference: Dice of the row less that of the baseline, as `difference` says.
    """

    baseline: str
    difference: Estimate


@dataclass(frozen=True)
class Advice:
    """Which row to take.

    Attributes:
        best: the federated row with the highest mean Dice.
        take: the cheapest row of the Pareto front whose paired difference to `best` has an interval that holds zero;
            else `best` itself.
        difference: `take` less `best`, paired by seed; None where they are the same.
    """

    best: Row
    take: Row
    difference: Estimate | None


@dataclass(frozen=True)
class Contribution:
    """What a selection gains over the untrained model, and for how many bytes.

    Attributes:
        row: its trials.
        gain: Dice gained, over seeds.
        per_megabyte: gain over bytes of both directions (10^6), over seeds.
        places: what it trains at each place, in the order of the atlas's columns.
        component: what it trains, where that is the same at every place and the places follow one another: the
            selection is then one cell of the atlas. Otherwise "".
    """

    row: Row
    gain: Estimate
    per_megabyte: Estimate
    places: Mapping[str, tuple[str, ...]]
    component: str


def estimate(values: Iterable[float]) -> Estimate | None:
    """Mean of a value a seed, with the 95% interval of Student's t; None of nothing."""
    sample = np.array(list(values), dtype=np.float64)
    if not len(sample):
        return None
    mean, low, high = float(sample.mean()), None, None
    if len(sample) > 1:
        reach = float(t.ppf((1 + LEVEL) / 2, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample)))
        low, high = mean - reach, mean + reach
    return Estimate(mean, low, high, float(sample.min()), float(sample.max()), len(sample))


def difference(of: Mapping[int, float], to: Mapping[int, float]) -> Estimate | None:
    """`of` less `to`, values by seed, over the seeds that both have.

    Without a common seed it is the difference of the means, and nothing is known of its interval. None where one of the
    two is empty.
    """
    if common := sorted(of.keys() & to.keys()):
        return estimate(of[seed] - to[seed] for seed in common)
    if not of or not to:
        return None
    mean = float(np.mean(list(of.values())) - np.mean(list(to.values())))
    return Estimate(mean, None, None, mean, mean, seeds=0)


def rows_of(trials: Sequence[TrialResult]) -> list[Row]:
    """The finished trials by group, in the order in which the groups first appear."""
    groups: dict[str, list[TrialResult]] = {}
    for trial in trials:
        if trial.status == "finished":
            groups.setdefault(trial.group, []).append(trial)
    return [Row(tuple(sorted(members, key=lambda trial: (trial.seed, trial.id)))) for members in groups.values()]


def unfinished(trials: Sequence[TrialResult]) -> list[TrialResult]:
    """Trials that failed or were stopped: they are in no mean, so that they have to be named."""
    return [trial for trial in trials if trial.status != "finished"]


def versus(row: Row, rows: Sequence[Row], kind: Kind) -> Versus | None:
    """A federated row beside the baseline of that kind: collaborative gain (local), gap to pooled data (centralized).

    The baseline is the one of the same selection and rank; else the only one that there is; else none.
    """
    known = [one for one in rows if one.kind == kind and one.dice is not None]
    alike = [one for one in known if (one.selection, one.trials[0].rank) == (row.selection, row.trials[0].rank)]
    found = alike if len(alike) == 1 else known
    if row.kind != "federated" or len(found) != 1:
        return None
    apart = difference(row.dice_by_seed, found[0].dice_by_seed)
    return None if apart is None else Versus(found[0].group, apart)


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The federated rows that no other beats, cheapest first: none has their mean Dice or more for their bytes or less.

    Of rows with equal Dice and equal bytes all are kept. A row whose bytes are not known is not on the front.
    """
    federated = [row for row in rows if row.kind == "federated" and row.bytes_total]
    scored = [(row.bytes_total, row.dice.mean, row) for row in federated if row.dice is not None]
    front = [
        (size, dice, row)
        for size, dice, row in scored
        if not any(s <= size and d >= dice and (s, d) != (size, dice) for s, d, _ in scored)
    ]
    return [row for _, _, row in sorted(front, key=lambda one: one[:2])]


def advise(rows: Sequence[Row]) -> Advice | None:
    """Which row to take, as `Advice` says; None where no federated trial has a score."""
    front = pareto(rows)
    if not front:
        return None
    best = front[-1]  # the front's Dice grows with its bytes
    for row in front[:-1]:
        apart = difference(row.dice_by_seed, best.dice_by_seed)
        if apart is not None and apart.holds_zero:
            return Advice(best, row, apart)
    return Advice(best, best, None)


def atlas(rows: Sequence[Row]) -> list[Contribution]:
    """What each federated selection gains, in the order of the rows; rows without Dice, bytes or parts are left out.

    The gain is counted from the zero-shot trial of the same seed (from the mean of them, where that seed has none), or,
    in a study without zero-shot trials, from the same trial's Dice before its first round.
    """
    untrained = _mean_by_seed(
        (seed, dice) for row in rows if row.kind == "zero-shot" for seed, dice in row.dice_by_seed.items()
    )
    federated = [row for row in rows if row.kind == "federated" and row.trials[0].parts and row.bytes_total]
    order = columns(place for row in federated for place in by_place(row.trials[0].parts))
    found = []
    for row in federated:
        gains = _by_seed(row.trials, lambda trial: _gain(trial, untrained))
        each = _by_seed(row.trials, lambda trial: _per_megabyte(trial, untrained))
        gain, per_megabyte = estimate(gains.values()), estimate(each.values())
        if gain is not None and per_megabyte is not None:
            places = by_place(row.trials[0].parts)
            found.append(Contribution(row, gain, per_megabyte, places, _component(places, order)))
    return found


def _component(places: Mapping[str, tuple[str, ...]], order: Sequence[str]) -> str:
    at = [order.index(place) for place in places]
    alike = len(set(places.values())) == 1 and at == list(range(at[0], at[0] + len(at)))
    return ", ".join(next(iter(places.values()))) if alike else ""


def _gain(trial: TrialResult, untrained: Mapping[int, float]) -> float | None:
    after, before = trial.test.get("dice"), trial.before.get("dice")
    if untrained:
        before = untrained.get(trial.seed, float(np.mean(list(untrained.values()))))
    return None if after is None or before is None else float(after - before)


def _per_megabyte(trial: TrialResult, untrained: Mapping[int, float]) -> float | None:
    gain = _gain(trial, untrained)
    return None if gain is None or not trial.bytes_total else gain / (trial.bytes_total / MEGABYTE)


def _by_seed(trials: Iterable[TrialResult], read: Callable[[TrialResult], float | None]) -> dict[int, float]:
    found = ((trial.seed, read(trial)) for trial in trials)
    return _mean_by_seed((seed, value) for seed, value in found if value is not None)


def _mean_by_seed(values: Iterable[tuple[int, float]]) -> dict[int, float]:
    """One value a seed: the same seed run twice is no second draw."""
    found: dict[int, list[float]] = {}
    for seed, value in values:
        found.setdefault(seed, []).append(value)
    return {seed: float(np.mean(same)) for seed, same in found.items()}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
