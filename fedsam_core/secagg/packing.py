"""Vectors on the wire: of each value only the bits of its lane's ring, packed without gaps, little endian.

Lanes stand one after the other, each filled up to a whole byte. Two values of 20 bits share five bytes.
"""

import numpy as np
from numpy.typing import NDArray

from fedsam_core.secagg.layout import Lane, VectorLayout
from fedsam_core.secagg.masks import PIECE
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
    packed = np.empty(packed_bytes(layout), np.uint8)
    at = value_at = 0
    for lane in layout.lanes:
        length = _lane_bytes(lane)
        _pack_lane(vector[value_at : value_at + lane.size], lane.bits, packed[at : at + length])
        at, value_at = at + length, value_at + lane.size
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
    lanes = []
    at = value_at = 0
    for lane in layout.lanes:
        length = _lane_bytes(lane)
        lanes.append((lane.bits, packed[at : at + length], total[value_at : value_at + lane.size]))
        at, value_at = at + length, value_at + lane.size
        if lane.bits == 20 and lane.size % 2 and packed[at - 1] > 0x0F:
            raise MalformedMessage("a vector has bits set that belong to no value: it was damaged or forged")
    for bits, source, target in lanes:  # only now, so that a refused vector leaves no trace in the total
        _add_lane(source, bits, target)


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


def _lane_bytes(lane: Lane) -> int:
    return (lane.size * lane.bits + 7) // 8


def _pack_lane(values: Vector, bits: int, out: Bytes) -> None:
    if bits == 32:
        out[:] = np.ascontiguousarray(values, "<u4").view(np.uint8)
    elif bits == 16:
        out[:] = values.astype("<u2").view(np.uint8)
    elif bits == 24:
        out.reshape(-1, 3)[:] = np.ascontiguousarray(values, "<u4").view(np.uint8).reshape(-1, 4)[:, :3]
    else:
        for start in range(0, values.size, PIECE):  # an even number of values: a piece ends at a whole byte
            piece = values[start : start + PIECE] & np.uint32(0xFFFFF)
            if piece.size % 2:
                piece = np.append(piece, np.uint32(0))
            pairs = piece[::2].astype("<u8") | piece[1::2].astype("<u8") << np.uint64(20)
            five = pairs.view(np.uint8).reshape(-1, 8)[:, :5].reshape(-1)
            target = out[start // 2 * 5 : (start + PIECE) // 2 * 5]
            target[:] = five[: target.size]


def _add_lane(packed: Bytes, bits: int, total: Vector) -> None:
    if bits == 32:
        np.add(total, packed.view("<u4"), out=total)
    elif bits == 16:
        np.add(total, packed.view("<u2"), out=total)
    elif bits == 24:
        for start in range(0, total.size, PIECE):
            piece = total[start : start + PIECE]
            wide = np.zeros((piece.size, 4), np.uint8)
            wide[:, :3] = packed[3 * start : 3 * (start + piece.size)].reshape(-1, 3)
            np.add(piece, wide.view("<u4").reshape(-1), out=piece)
    else:
        for start in range(0, total.size, PIECE):
            piece = total[start : start + PIECE]
            source = packed[start // 2 * 5 : (start + PIECE) // 2 * 5]
            wide = np.zeros(((piece.size + 1) // 2, 8), np.uint8)
            even = source.size // 5
            wide[:even, :5] = source[: 5 * even].reshape(-1, 5)
            wide[even:, : source.size - 5 * even] = source[5 * even :]
            pairs = wide.view("<u8").reshape(-1)
            piece[::2] += (pairs & np.uint64(0xFFFFF)).astype(np.uint32)
            piece[1::2] += (pairs >> np.uint64(20)).astype(np.uint32)[: piece.size // 2]
