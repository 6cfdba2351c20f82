"""The lanes of a masked vector, and the ring that each of them is summed in.

A lane is summed modulo 2^bits. A vector is nevertheless held as uint32 throughout: 2^bits divides 2^32, so sums and
masks modulo 2^32 are right in every narrower ring, and only the low bits travel (see `packing`).

No sum overflows: n sites send integers of magnitude at most levels + 1, where levels = (2^(bits-1) - 1) // n - 1, hence
|sum| <= n * (levels + 1) <= 2^(bits-1) - 1, the largest number that the ring tells from a negative one. A layout whose
ring has no room for that cannot be made.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from fedsam_core.hashing import stable_hash
from fedsam_core.secagg.attempt import SMALLEST_PRIVATE_SUM
from fedsam_core.secagg.refusals import BareLane, UnfitValues

RINGS = (8, 12, 16, 20, 24, 32)
"""Bits of a value on the wire."""


@dataclass(frozen=True)
class Lane:
    """One slice of the vector: `size` values, each within [-clip, clip], summed modulo 2^bits.

    `sites` names those that contribute, where not all do; the others put zeros there.
    """

    name: str
    size: int
    clip: float
    bits: int = 32
    sites: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UnfitValues(f"lane {self.name!r} has size {self.size}: leave it out, or give it a value")
        if not (math.isfinite(self.clip) and 1e-30 <= self.clip <= 1e30):
            raise UnfitValues(f"lane {self.name!r} has clip {self.clip}: it must be positive and finite")
        if self.bits not in RINGS:
            raise UnfitValues(f"lane {self.name!r} asks for a ring of {self.bits} bits: take one of {RINGS}")
        if self.sites is not None and list(self.sites) != sorted(set(self.sites)):
            raise UnfitValues(f"the sites of lane {self.name!r} must be sorted and distinct, not {self.sites}")

    @property
    def limit(self) -> float:
        """The largest magnitude taken: the clip, or its float32 where that is larger, because values that were clipped
        as float32 lie on that."""
        return max(self.clip, float(np.float32(self.clip)))


@dataclass(frozen=True)
class VectorLayout:
    """The lanes of a vector, in order. Equal layouts have equal hashes.

    `max_sites` is the largest number of contributors to a lane; no lane is opened with fewer than `min_contributors`.
    """

    lanes: tuple[Lane, ...]
    max_sites: int
    min_contributors: int = SMALLEST_PRIVATE_SUM

    def __post_init__(self) -> None:
        names = [lane.name for lane in self.lanes]
        if not names or len(set(names)) != len(names):
            raise UnfitValues(f"a vector needs lanes with distinct names, not {names}")
        if self.max_sites < 1:
            raise UnfitValues(f"a sum of {self.max_sites} sites is none")
        for lane in self.lanes:
            if self.room(lane) > self.max_sites:
                raise UnfitValues(f"lane {lane.name!r} has {self.room(lane)} sites, the vector {self.max_sites}")
            if (2 ** (lane.bits - 1) - 1) // self.room(lane) < 2:
                raise UnfitValues(
                    f"a ring of {lane.bits} bits has no room for the sum of {self.room(lane)} sites in lane "
                    f"{lane.name!r}: take a wider one"
                )

    @property
    def size(self) -> int:
        """Values in the vector."""
        return sum(lane.size for lane in self.lanes)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of lanes and rings."""
        return stable_hash(self.to_dict())

    def to_dict(self) -> dict[str, object]:
        """As JSON values; `from_dict` reads it."""
        lanes = [[lane.name, lane.size, lane.clip, lane.bits, lane.sites and list(lane.sites)] for lane in self.lanes]
        return {"lanes": lanes, "max_sites": self.max_sites, "min_contributors": self.min_contributors}

    @classmethod
    def from_dict(cls, tree: Mapping[str, object]) -> "VectorLayout":
        """The inverse of `to_dict`. Raises UnfitValues for anything else."""
        try:
            rows: list[tuple[str, int, float, int, list[str] | None]] = tree["lanes"]  # type: ignore[assignment]
            lanes = tuple(
                Lane(str(name), int(size), float(clip), int(bits), None if sites is None else tuple(sites))
                for name, size, clip, bits, sites in rows
            )
            return cls(lanes, int(tree["max_sites"]), int(tree["min_contributors"]))  # type: ignore[call-overload]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UnfitValues(f"a layout of lanes is malformed ({error})") from error

    def lane(self, name: str) -> Lane:
        """The lane of that name. Raises UnfitValues where there is none."""
        for lane in self.lanes:
            if lane.name == name:
                return lane
        raise UnfitValues(f"there is no lane {name!r} among {', '.join(lane.name for lane in self.lanes)}")

    def place(self, name: str) -> slice:
        """Where a lane lies in the vector."""
        start = sum(lane.size for lane in self.lanes[: self.lanes.index(self.lane(name))])
        return slice(start, start + self.lane(name).size)

    def room(self, lane: Lane) -> int:
        """How many sites the lane's ring must have room for."""
        return self.max_sites if lane.sites is None else max(1, len(lane.sites))

    def levels(self, lane: Lane) -> int:
        """Steps between 0 and the lane's limit."""
        return int((2 ** (lane.bits - 1) - 1) // self.room(lane) - 1)

    def step(self, lane: Lane) -> float:
        """What one level stands for, in the lane's unit."""
        return lane.limit / self.levels(lane)

    def contributors(self, lane: Lane, sites: Collection[str]) -> int:
        """How many of `sites` contribute to the lane."""
        return len(sites) if lane.sites is None else len(set(lane.sites) & set(sites))

    def require_covered(self, sites: Collection[str]) -> None:
        """Raises BareLane where a sum over `sites` would lay a lane bare."""
        for lane in self.lanes:
            if (count := self.contributors(lane, sites)) < self.min_contributors:
                raise BareLane(
                    f"lane {lane.name!r} would be the sum of {count} sites, fewer than {self.min_contributors}: "
                    "give its parameters to more sites, or leave them out of the selection"
                )

    def error_bound(self, lane: str, contributors: int) -> float:
        """Largest possible |decoded sum - true sum| of one value of the lane, in the lane's unit.

        Each contributor is off by less than one step; the small factor covers the float64 arithmetic on both sides.
        """
        return contributors * self.step(self.lane(lane)) * (1 + 2.0**-20)
