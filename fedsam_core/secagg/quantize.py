"""Real values to integers that can be summed modulo 2^32, and the sum of them back.

A lane's values lie within its clip. They are scaled to `levels` = (2^(bits-1) - 1) // max_sites - 1 steps a side and
rounded up or down by chance, which is unbiased (stochastic rounding; Gupta et al. 2015, arXiv 1502.02551, section 3.1).
No overflow is possible: rounding moves a value by less than one step and `levels` leaves one step free, hence
max_sites * (levels + 1) <= 2^(bits-1) - 1. A value beyond the clip is refused, never saturated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsam_core.errors import SecureSumError
from fedsam_core.hashing import stable_hash
from fedsam_core.secagg.keys import Secret, fingerprint
from fedsam_core.secagg.masks import PIECE, Keystream, new_scratch


@dataclass(frozen=True)
class Lane:
    """One slice of the vector: `size` values, each within [-clip, clip]."""

    name: str
    size: int
    clip: float

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SecureSumError(f"lane {self.name!r} has size {self.size}: leave it out, or give it a value")
        if not (math.isfinite(self.clip) and 1e-30 <= self.clip <= 1e30):
            raise SecureSumError(f"lane {self.name!r} has clip {self.clip}: it must be positive and finite")

    @property
    def limit(self) -> float:
        """The largest magnitude taken: the clip, or its float32 where that is larger, because values that were clipped
        as float32 lie on that."""
        return max(self.clip, float(np.float32(self.clip)))


@dataclass(frozen=True)
class VectorLayout:
    """The lanes of a vector, in order, and the ring they are summed in. Equal layouts have equal hashes."""

    lanes: tuple[Lane, ...]
    max_sites: int
    ring_bits: int = 32

    def __post_init__(self) -> None:
        names = [lane.name for lane in self.lanes]
        if not names or len(set(names)) != len(names):
            raise SecureSumError(f"a vector needs lanes with distinct names, not {names}")
        if self.ring_bits != 32:
            raise SecureSumError(f"a ring of {self.ring_bits} bits is not supported: take 32")
        if self.max_sites < 1 or self.levels < 1:
            raise SecureSumError(f"a ring of {self.ring_bits} bits has no room for the sum of {self.max_sites} sites")

    @property
    def levels(self) -> int:
        """Steps between 0 and a lane's limit."""
        return int((2 ** (self.ring_bits - 1) - 1) // self.max_sites - 1)

    @property
    def size(self) -> int:
        """Values in the vector."""
        return sum(lane.size for lane in self.lanes)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of lanes and ring."""
        lanes = [[lane.name, lane.size, lane.clip] for lane in self.lanes]
        return stable_hash({"lanes": lanes, "max_sites": self.max_sites, "ring_bits": self.ring_bits})

    def lane(self, name: str) -> Lane:
        """The lane of that name. Raises SecureSumError where there is none."""
        for lane in self.lanes:
            if lane.name == name:
                return lane
        raise SecureSumError(f"there is no lane {name!r} among {', '.join(lane.name for lane in self.lanes)}")

    def error_bound(self, lane: str, contributors: int) -> float:
        """Largest possible |decoded sum - true sum| of one value of the lane, in the lane's unit.

        Each contributor is off by less than one step; the small factor covers the float64 arithmetic on both sides.
        """
        return contributors * (self.lane(lane).limit / self.levels) * (1 + 2.0**-20)


def encode(layout: VectorLayout, values: Mapping[str, NDArray[np.floating] | float], seed: int) -> NDArray[np.uint32]:
    """The vector (uint32 [size]) of `values`: for each lane an array of its size, or a float for one value.

    Equal seeds round equally. Negative values are in two's complement. Raises SecureSumError that names the lane for a
    missing or unknown lane, a wrong size, NaN, an infinity, or a magnitude over the lane's clip.
    """
    names = {lane.name for lane in layout.lanes}
    if missing := sorted(names - set(values)):
        raise SecureSumError(f"no values for lane {missing[0]!r}: every lane of the layout must be given")
    if unknown := sorted(set(values) - names):
        raise SecureSumError(f"lane {unknown[0]!r} is not in the layout, which has {', '.join(sorted(names))}")
    vector = np.empty(layout.size, dtype=np.uint32)
    chances = Keystream(Secret(fingerprint(b"stochastic rounding", str(seed).encode())))
    scratch = new_scratch()
    offset = 0
    for lane in layout.lanes:
        flat = np.asarray(values[lane.name]).reshape(-1)
        if flat.size != lane.size or flat.dtype.kind not in "fiu":
            raise SecureSumError(f"lane {lane.name!r} takes {lane.size} real numbers, not {flat.size} of {flat.dtype}")
        scale = layout.levels / lane.limit
        for start in range(0, lane.size, PIECE):
            x = flat[start : start + PIECE].astype(np.float64)
            _check(lane, x)
            x *= scale
            floor = np.floor(x)
            x -= floor  # exact, so a value on the grid is never moved
            x *= 2.0**32
            rounded = floor.astype(np.int32)
            rounded += chances.fill(scratch, x.size) < x
            vector[offset + start : offset + start + x.size] = rounded.view(np.uint32)
        offset += lane.size
    return vector


def decode_sum(layout: VectorLayout, total: NDArray[np.uint32], contributors: int) -> dict[str, NDArray[np.float64]]:
    """The lanes (float64 [size] each) of the sum modulo 2^32 of `contributors` encoded vectors.

    Raises SecureSumError for another size or dtype, for more contributors than the layout has room for, and for a sum
    that so many sites cannot reach: then masks did not cancel, or a site sent what `encode` would refuse.
    """
    if total.dtype != np.uint32 or total.shape != (layout.size,):
        raise SecureSumError(f"a sum must be {layout.size} values of uint32, not {total.shape} of {total.dtype}")
    if not 1 <= contributors <= layout.max_sites:
        raise SecureSumError(f"{contributors} contributors do not fit a layout for up to {layout.max_sites} sites")
    reach = contributors * (layout.levels + 1)
    lanes: dict[str, NDArray[np.float64]] = {}
    offset = 0
    for lane in layout.lanes:
        signed = total[offset : offset + lane.size].view(np.int32)
        if int(signed.max()) > reach or int(signed.min()) < -reach:
            raise SecureSumError(
                f"lane {lane.name!r} holds a sum that {contributors} sites cannot reach: a site sent a wrong vector"
            )
        lanes[lane.name] = signed.astype(np.float64) * (lane.limit / layout.levels)
        offset += lane.size
    return lanes


def _check(lane: Lane, x: NDArray[np.float64]) -> None:
    largest = max(float(x.max()), -float(x.min()))  # NaN wins both, so one comparison refuses all
    if not math.isfinite(largest):
        raise SecureSumError(f"lane {lane.name!r} holds NaN or infinity: this site's training has diverged")
    if largest > lane.limit:
        raise SecureSumError(f"lane {lane.name!r} holds {largest:.6g}, over its clip of {lane.clip:.6g}: clip it first")
