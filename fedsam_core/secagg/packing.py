"""Vectors on the wire: of each value only the bits of its lane's ring, packed without gaps into words of 32 bits.

A lane is cut into g blocks of equal length, the last filled up with zeros, such that g values fill w words exactly: 2
values of 16 bits one word, 8 of 20 bits five, 4 of 24 bits three. Word j of each of w rows holds the bits of the j-th
value of all blocks, the first block lowest. So every step works on whole rows, which is what processors are fast at.
Words are little endian; lanes stand one after the other.
"""

from math import lcm

import numpy as np
from numpy.typing import NDArray

from fedsam_core.secagg.layout import Lane, VectorLayout
from fedsam_core.secagg.refusals import MalformedMessage, UnfitValues

Bytes = NDArray[np.uint8]
Vector = NDArray[np.uint32]


def packed_bytes(layout: VectorLayout) -> int:
    """Length of a packed vector."""
    return sum(_lane_bytes(lane) for lane in layout.lanes)


def pack(layout: VectorLayout, vector: Vector) -> Bytes:
    """The low bits of `vector` (uint32 [size]). Raises UnfitValues for another size or dtype."""
    if vector.dtype != np.uint32 or vector.shape != (layout.size,):
        raise UnfitValues(f"a vector to send must be {layout.size} values of uint32, not {vector.dtype} {vector.shape}")
    packed = np.zeros(packed_bytes(layout), np.uint8)
    at = 0
    for lane in layout.lanes:
        words = packed[at : at + _lane_bytes(lane)].view("<u4").reshape(_group(lane)[1], -1)
        at += _lane_bytes(lane)
        _pack_lane(lane, vector[layout.place(lane.name)], words)
    return packed


def add_packed(layout: VectorLayout, total: Vector, data: bytes | memoryview | Bytes) -> None:
    """Adds a packed vector to `total` (uint32 [size]) in place, modulo 2^32.

    Raises MalformedMessage for another length, and where bits that belong to no value are set.
    """
    packed = np.frombuffer(data, np.uint8)
    if packed.size != packed_bytes(layout):
        raise MalformedMessage(
            f"a vector of {packed.size} bytes came where {packed_bytes(layout)} bytes ({layout.size} values) were due"
        )
    parts = []
    at = 0
    for lane in layout.lanes:
        words = packed[at : at + _lane_bytes(lane)].view("<u4").reshape(_group(lane)[1], -1)
        at += _lane_bytes(lane)
        parts.append((lane, words))
        if any(block[-spare:].any() for block, spare in _spare(lane, words)):
            raise MalformedMessage("a vector has bits set that belong to no value: it was damaged or forged")
    for lane, words in parts:  # only now, so that a refused vector leaves no trace in the total
        _add_lane(lane, words, total[layout.place(lane.name)])


def reduce(layout: VectorLayout, total: Vector) -> None:
    """Takes each value of `total` modulo its lane's ring, in place."""
    for lane in layout.lanes:
        if lane.bits < 32:
            total[layout.place(lane.name)] &= np.uint32(2**lane.bits - 1)


def unpack(layout: VectorLayout, data: bytes | memoryview | Bytes) -> Vector:
    """The vector (uint32 [size]); each value lies in its lane's ring. Raises as `add_packed`."""
    vector = np.zeros(layout.size, np.uint32)
    add_packed(layout, vector, data)
    return vector


def _group(lane: Lane) -> tuple[int, int]:
    """How many values fill how many words."""
    bits = lcm(lane.bits, 32)
    return bits // lane.bits, bits // 32


def _lane_bytes(lane: Lane) -> int:
    values, words = _group(lane)
    return 4 * words * -(-lane.size // values)


def _pack_lane(lane: Lane, values: Vector, out: NDArray[np.uint32]) -> None:
    """`out`: zeros, uint32 [words, length of a block]."""
    length = out.shape[1]
    mask = np.uint32(2**lane.bits - 1)
    for index in range(_group(lane)[0]):
        block = values[index * length : (index + 1) * length] & mask
        row, shift = divmod(index * lane.bits, 32)
        out[row, : block.size] |= block << np.uint32(shift)
        if shift + lane.bits > 32:
            out[row + 1, : block.size] |= block >> np.uint32(32 - shift)


def _add_lane(lane: Lane, words: NDArray[np.uint32], total: Vector) -> None:
    length = words.shape[1]
    for index in range(_group(lane)[0]):
        target = total[index * length : (index + 1) * length]
        np.add(target, _block(lane, words, index)[: target.size], out=target)


def _block(lane: Lane, words: NDArray[np.uint32], index: int) -> NDArray[np.uint32]:
    row, shift = divmod(index * lane.bits, 32)
    block: NDArray[np.uint32] = words[row] >> np.uint32(shift)
    if shift + lane.bits > 32:
        block |= words[row + 1] << np.uint32(32 - shift)
    block &= np.uint32(2**lane.bits - 1)
    return block


def _spare(lane: Lane, words: NDArray[np.uint32]) -> list[tuple[NDArray[np.uint32], int]]:
    """The blocks that are filled up, and by how many values."""
    length = words.shape[1]
    filled = []
    for index in range(_group(lane)[0]):
        spare = min(length, max(0, (index + 1) * length - lane.size))
        if spare:
            filled.append((_block(lane, words, index), spare))
    return filled
