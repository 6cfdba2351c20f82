"""Real values to integers that can be summed, and the sum of them back.

A lane's values lie within its clip. They are scaled to `levels` steps a side (see `layout`, which leaves one step free)
and rounded up or down by chance, which is unbiased (stochastic rounding; Gupta et al. 2015, arXiv 1502.02551, section
3.1). A value beyond the clip is refused, never saturated: whoever wants to clip does so before, and counts it.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsam_core.secagg.keys import Secret, fingerprint
from fedsam_core.secagg.layout import Lane, VectorLayout
from fedsam_core.secagg.masks import PIECE, Keystream, new_scratch
from fedsam_core.secagg.refusals import UnfitValues

Values = NDArray[np.floating] | float


@dataclass(frozen=True)
class Rounding:
    """How far rounding moved the values of a lane, in the lane's unit.

    Attributes:
        largest: the largest magnitude of a value's error.
        mean_square: mean of the squared errors.
    """

    largest: float
    mean_square: float


class Encoder:
    """Fills a vector (uint32 [size]) lane by lane. Equal seeds round equally, in whatever order lanes are put."""

    def __init__(self, layout: VectorLayout, seed: int) -> None:
        self._layout = layout
        self._seed = str(seed).encode()
        self._vector = np.zeros(layout.size, dtype=np.uint32)
        self._due = {lane.name for lane in layout.lanes}

    def put(self, name: str, values: Values) -> Rounding:
        """The values of a lane: an array of its size, or a float for one value. Negative ones in two's complement.

        Raises UnfitValues that names the lane: unknown or put before, a wrong size, NaN, an infinity, or a magnitude
        over the lane's clip.
        """
        layout, lane = self._layout, self._layout.lane(name)
        if name not in self._due:
            raise UnfitValues(f"lane {name!r} was given twice")
        flat = np.asarray(values).reshape(-1)
        if flat.size != lane.size or flat.dtype.kind not in "fiu":
            raise UnfitValues(f"lane {name!r} takes {lane.size} real numbers, not {flat.size} of {flat.dtype}")
        out = self._vector[layout.place(name)].view(np.int32)
        chances = Keystream(Secret(fingerprint(b"stochastic rounding", self._seed, name.encode())))
        scratch = new_scratch()
        # Work is done in place, in pieces that stay in the processor's cache.
        buffers = np.empty((3, min(PIECE, lane.size)))
        scale = layout.levels(lane) / lane.limit
        largest = squares = 0.0
        for start in range(0, lane.size, PIECE):
            piece = flat[start : start + PIECE]
            _check(lane, piece)
            x, floor, chance = buffers[:, : piece.size]
            np.multiply(piece, scale, out=x, dtype=np.float64)
            np.floor(x, out=floor)
            x -= floor  # exact, so a value on the grid is never moved
            np.multiply(chances.fill(scratch, piece.size), 2.0**-32, out=chance)
            up = chance < x
            np.add(floor, up, out=out[start : start + piece.size], casting="unsafe")
            x -= up
            largest = max(largest, float(x.max()), -float(x.min()))
            squares += float(np.square(x, out=floor).sum())  # not np.dot: it starts threads, and may sum in any order
        self._due.remove(name)
        return Rounding(largest / scale, squares / lane.size / scale**2)

    def put_all(self, values: Mapping[str, Values]) -> None:
        """The values of several lanes; raises as `put`."""
        for name, lane_values in values.items():
            self.put(name, lane_values)

    def vector(self) -> NDArray[np.uint32]:
        """The vector. Raises UnfitValues where a lane was not given its values."""
        if self._due:
            raise UnfitValues(f"no values for lane {min(self._due)!r}: every lane of the layout must be given")
        return self._vector


def encode(layout: VectorLayout, values: Mapping[str, Values], seed: int) -> NDArray[np.uint32]:
    """The vector of all lanes at once; see `Encoder`."""
    encoder = Encoder(layout, seed)
    encoder.put_all(values)
    return encoder.vector()


def decode_sum(
    layout: VectorLayout, total: NDArray[np.uint32], contributors: Collection[str]
) -> dict[str, NDArray[np.float64]]:
    """The lanes (float64 [size] each) of the sum of the encoded vectors of `contributors`.

    Raises UnfitValues for another size or dtype, for more contributors than the layout has room for, and for a sum
    that so many sites cannot reach: then masks did not cancel, or a site sent what `Encoder` would refuse.
    """
    if total.dtype != np.uint32 or total.shape != (layout.size,):
        raise UnfitValues(f"a sum must be {layout.size} values of uint32, not {total.shape} of {total.dtype}")
    if not 1 <= len(contributors) <= layout.max_sites:
        raise UnfitValues(f"{len(contributors)} contributors do not fit a layout for up to {layout.max_sites} sites")
    lanes: dict[str, NDArray[np.float64]] = {}
    for lane in layout.lanes:
        spare = np.uint32(32 - lane.bits)
        # Up and down again: the ring's highest bit becomes the sign.
        signed = (total[layout.place(lane.name)] << spare).view(np.int32) >> np.int32(spare)
        count = layout.contributors(lane, contributors)
        reach = count * (layout.levels(lane) + 1)
        if int(signed.max()) > reach or int(signed.min()) < -reach:
            raise UnfitValues(
                f"lane {lane.name!r} holds a sum that {count} sites cannot reach: a site sent a wrong vector"
            )
        lanes[lane.name] = signed.astype(np.float64) * layout.step(lane)
    return lanes


def _check(lane: Lane, x: NDArray[Any]) -> None:
    largest = max(float(x.max()), -float(x.min()))  # NaN wins both, so one comparison refuses all
    if not math.isfinite(largest):
        raise UnfitValues(f"lane {lane.name!r} holds NaN or infinity: this site's training has diverged")
    if largest > lane.limit:
        raise UnfitValues(f"lane {lane.name!r} holds {largest:.6g}, over its clip of {lane.clip:.6g}: clip it first")
