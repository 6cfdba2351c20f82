"""Who is asked in a round and for how long: what keeps one site from holding up or ending everybody's run.

Bookkeeping alone, without a clock and without calls: the driver says what happened and asks what to do next.

A site is *away* from the moment that a call to it fails until it has opened again; whoever is away is not waited for.
A site that is there again and fails in round after round is *parked*: it is not asked for 1, 2, 4, ... rounds. One that
trains well, and only fails whenever it is to validate, is parked from validations alone.
"""

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from fedsam_core.errors import RoundError

HISTORY = 8
"""Calls of a kind that a deadline looks back on."""

LONGEST_REST = 64
"""Rounds, at most, for which a parked site is not asked."""


def deadline_after(times: Sequence[float], factor: float | None, floor: float, ceiling: float) -> float:
    """Seconds that a call may take.

    Args:
        times: seconds of the slowest site that answered, by earlier call of the kind.
        factor: times the largest of them is what sites have; None for always the ceiling.
        floor: least, as a site that took a second may well take ten.
        ceiling: most, and what sites have as long as nothing is known.
    """
    if factor is None or not times:
        return ceiling
    return min(ceiling, max(floor, factor * max(times)))


class Patience:
    """How long sites have for each kind of call, learnt from how long they took."""

    def __init__(
        self, ceiling: float, factor: float | None = None, floor: float = 0.0, after_enough: float | None = None
    ) -> None:
        """See `deadline_after`; `after_enough`: seconds that the rest has once enough have answered, None for as long
        as all."""
        self._ceiling, self._factor, self._floor = ceiling, factor, floor
        self.after_enough = after_enough
        self._times: dict[str, deque[float]] = {}
        self._missed: dict[str, tuple[str, float]] = {}  # by site: the kind of call whose deadline it missed, and that

    def deadline(self, kind: str) -> float:
        """Seconds that a call of this kind may take now."""
        return deadline_after(tuple(self._times.get(kind, ())), self._factor, self._floor, self._ceiling)

    def took(self, kind: str, seconds: float) -> None:
        """The slowest site that answered a call took so long."""
        self._times.setdefault(kind, deque(maxlen=HISTORY)).append(seconds)

    def missed(self, site: str, kind: str, seconds: float) -> None:
        """A site did not answer in so long."""
        self._missed[site] = (kind, seconds)

    def overdue(self, site: str) -> float:
        """Seconds of the deadline that a site missed since it was there last; infinity for one lost otherwise."""
        return self._missed[site][1] if site in self._missed else math.inf

    def returned(self, site: str) -> None:
        """A site is there again. If it missed a deadline, it may need twice that: sites have it from now on."""
        if (missed := self._missed.pop(site, None)) and self._factor is not None:
            kind, seconds = missed
            self.took(kind, 2 * seconds / self._factor)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON, for a checkpoint."""
        return {kind: list(times) for kind, times in self._times.items()}

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Goes on from what `to_dict` gave."""
        self._times = {str(kind): deque(map(float, times), maxlen=HISTORY) for kind, times in tree.items()}


Kind = Literal["training", "validation"]
"""What a site may fail in again and again, and is then parked from."""


@dataclass
class Parking:
    """How a site does in one kind of work. Turns are the rounds, or the validations.

    Attributes:
        failed: whether it failed in the present turn.
        failures: turns in a row in which it failed.
        rests: how often it was parked since it last took part.
        until: first turn in which it is asked again.
        why: it failed last.
    """

    failed: bool = False
    failures: int = 0
    rests: int = 0
    until: int = 0
    why: str = ""

    def close(self, turn: int, took_part: bool, park_after: int) -> None:
        """A turn is over."""
        if self.failed:
            self.failures += 1
            if self.failures >= park_after:
                self.rests += 1
                self.until = turn + 1 + min(LONGEST_REST, 2 ** (self.rests - 1))
        elif took_part:
            self.failures = self.rests = 0
        self.failed = False

    def told(self, turn: str) -> str:
        """Why it is not asked."""
        return f"parked until {turn} {self.until}: it failed {self.failures} {turn}s in a row ({self.why})"


@dataclass
class Standing:
    """How a site stands.

    Attributes:
        away: why it cannot be asked at present; "" if it can.
        absent: rounds without its update, in all.
        counted: last round whose sum has its update; 0 for none, None where that is not known.
        training, validation: how it does in them.
    """

    away: str = ""
    absent: int = 0
    counted: int | None = None
    training: Parking = field(default_factory=Parking)
    validation: Parking = field(default_factory=Parking)


class Attendance:
    """The standing of every site of a run."""

    def __init__(self, sites: Collection[str], park_after: int) -> None:
        """A site rests after `park_after` rounds in a row in which it failed, and so from validations."""
        self._park_after = park_after
        self._standing = {site: Standing() for site in sorted(sites)}

    @property
    def away(self) -> tuple[str, ...]:
        """Sites that have to open again before they can be asked."""
        return tuple(site for site, one in self._standing.items() if one.away)

    @property
    def absent(self) -> dict[str, int]:
        """By site, the rounds without its update; sites that were in all of them are left out."""
        return {site: one.absent for site, one in self._standing.items() if one.absent}

    @property
    def counted(self) -> dict[str, int]:
        """By site, the last round whose sum has its update, as far as that is known."""
        return {site: one.counted for site, one in self._standing.items() if one.counted is not None}

    def resting(self, round_number: int) -> tuple[str, ...]:
        """Sites that are parked in a round."""
        return tuple(site for site, one in self._standing.items() if one.training.until > round_number)

    def left_out(self, round_number: int) -> dict[str, str]:
        """Sites that are not asked at present, and why."""
        reasons = {}
        for site, one in self._standing.items():
            if one.training.until > round_number:
                reasons[site] = one.training.told("round")
            elif one.away:
                reasons[site] = f"is not back since it was lost ({one.away})"
        return reasons

    def present(self, round_number: int) -> tuple[str, ...]:
        """Sites that are asked at present."""
        left_out = self.left_out(round_number)
        return tuple(site for site in self._standing if site not in left_out)

    def unfit_to_validate(self, validation: int) -> dict[str, str]:
        """Sites that are parked from a validation, and why."""
        parked = {site: one.validation for site, one in self._standing.items() if one.validation.until > validation}
        return {site: parking.told("validation") for site, parking in parked.items()}

    def lose(self, site: str, why: str, failed: Kind | None = "training") -> None:
        """A call to a site came to nothing. `failed`: what this counts against, towards parking it."""
        one = self._standing[site]
        one.away = why
        for kind, parking in (("training", one.training), ("validation", one.validation)):
            if kind == failed:
                parking.failed, parking.why = True, why

    def take_back(self, site: str) -> None:
        """A site has opened again."""
        self._standing[site].away = ""

    def wake(self) -> None:
        """Nobody rests any longer: the others are too few."""
        for one in self._standing.values():
            one.training.until = 0

    def begin(self) -> None:
        """No update has been summed: the run is at its first round."""
        for one in self._standing.values():
            one.counted = 0

    def close(self, round_number: int, contributors: Collection[str]) -> None:
        """A round of training is over; its sum has the updates of these sites."""
        for site, one in self._standing.items():
            if site in contributors:
                one.counted = round_number
            else:
                one.absent += 1
            one.training.close(round_number, site in contributors, self._park_after)

    def close_validation(self, validation: int, contributors: Collection[str]) -> None:
        """A validation is over; its sum has the scores of these sites."""
        for site, one in self._standing.items():
            one.validation.close(validation, site in contributors, self._park_after)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """As plain JSON, for a checkpoint."""
        return {site: asdict(one) for site, one in self._standing.items()}

    def restore(self, tree: Mapping[str, Mapping[str, Any]]) -> None:
        """Goes on from what `to_dict` gave.

        Raises:
            RoundError: it is of other sites, or has other fields.
        """
        known = {one.name for one in fields(Standing)}
        if set(tree) != set(self._standing) or any(set(one) != known for one in tree.values()):
            raise RoundError("the attendance in the checkpoint is of other sites or another version: start a new run")
        kinds = ("training", "validation")
        self._standing = {
            site: Standing(**{**tree[site], **{kind: Parking(**tree[site][kind]) for kind in kinds}})
            for site in sorted(tree)
        }
