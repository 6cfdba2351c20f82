"""The step that the server sends down: quantised, coded, and the same bits for the server and every site.

Each group of tensors is scaled by its own largest magnitude and rounded to the nearest integer of `bits` bits, half to
even, so that no value moves by more than half a step; the integers are coded as in `coding`. The server must go on from
what it decodes, not from what it encoded: then all states stay equal, and what rounding took can be added to the next
step (error feedback; Seide et al. 2014, 1-Bit SGD; Karimireddy et al. 2019, arXiv 1901.09847).

Format, integers little endian:

    4 bytes "FSDN", u8 version 1, u8 bits
    8 bytes of the SHA-256 of the groups' names and sizes, which both ends know
    u32     CRC-32 of all that follows: it finds damage, not forgery, which is the signatures' and the hashes' task
    for each group, by name:
        f64 scale, 0 for a group of zeros (of which nothing follows)
        the integers in pieces of 2^20, see `coding`; value = scale * integer
"""

import math
import struct
import zlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedsam_core.errors import CheckpointError, ConfigError, TrainingError
from fedsam_core.federation.coding import Reader, decode_integers, encode_integers
from fedsam_core.hashing import stable_hash

WIDTHS = (8, 12, 16)
"""Bits of a quantised value, before it is coded."""

_HEADER = struct.Struct("<4sBB8sI")
_MAGIC, _VERSION = b"FSDN", 1
_PIECE = 1 << 20  # what is worked on at a time: coding takes some forty bytes a value
_SMALLEST = 1e-290  # a scale far from where floats lose their precision; less is zero


def encode_step(values: Mapping[str, NDArray[np.float64]], bits: int) -> bytes:
    """The message of a step: a float64 vector [n] for each group, quantised to `bits` (8, 12 or 16).

    Raises:
        ConfigError: other bits.
        TrainingError: a group holds NaN or infinity.
    """
    if bits not in WIDTHS:
        raise ConfigError(
            f"federation.broadcast_bits={bits} cannot be coded: take one of {WIDTHS}, or 32 for no coding"
        )
    body = b"".join(_encode_group(name, values[name], bits) for name in sorted(values))
    layout = _layout({name: group.size for name, group in values.items()})
    return _HEADER.pack(_MAGIC, _VERSION, bits, layout, zlib.crc32(body)) + body


def decode_step(data: bytes, sizes: Mapping[str, int]) -> dict[str, NDArray[np.float64]]:
    """The step (float64 [n] by group, in the order of `sizes`) of a message for groups of these sizes.

    Memory is bounded by `sizes` and the message's length. Raises CheckpointError for a message that is damaged, of
    another version, or for other groups.
    """
    reader = Reader(data)
    magic, version, bits, layout, crc = _HEADER.unpack(reader.take(_HEADER.size))
    if magic != _MAGIC or version != _VERSION:
        raise CheckpointError(
            f"these bytes are no broadcast step of version {_VERSION}: driver and sites must run one version"
        )
    if bits not in WIDTHS:
        raise CheckpointError(f"a broadcast step has values of {bits} bits, not one of {WIDTHS}")
    if layout != _layout(sizes):
        raise CheckpointError("a broadcast step is for other groups: driver and sites must use one selection and rule")
    if crc != zlib.crc32(memoryview(data)[_HEADER.size :]):
        raise CheckpointError("a broadcast step was damaged on its way: its checksum differs")
    groups = {name: _decode_group(reader, name, sizes[name], bits) for name in sorted(sizes)}
    reader.end()
    return {name: groups[name] for name in sizes}


def _layout(sizes: Mapping[str, int]) -> bytes:
    return bytes.fromhex(stable_hash(sorted([name, int(size)] for name, size in sizes.items())))[:8]


def _encode_group(name: str, values: NDArray[np.float64], bits: int) -> bytes:
    largest = float(np.abs(values).max(initial=0.0))
    if not math.isfinite(largest):
        raise TrainingError(f"the server's step for {name} holds NaN or infinity: lower the server's learning rate")
    scale = largest / (2 ** (bits - 1) - 1)
    if scale < _SMALLEST:
        return struct.pack("<d", 0.0)
    pieces = (
        np.rint(np.divide(values[piece], scale, dtype=np.float64)).astype(np.int32) for piece in _pieces(values.size)
    )
    return struct.pack("<d", scale) + b"".join(encode_integers(piece, bits) for piece in pieces)


def _decode_group(reader: Reader, name: str, size: int, bits: int) -> NDArray[np.float64]:
    (scale,) = struct.unpack("<d", reader.take(8))
    if scale == 0.0:
        return np.zeros(size)
    if size == 0 or not _SMALLEST <= scale <= np.finfo(np.float64).max / 2 ** (bits - 1):
        raise CheckpointError(f"a broadcast step has a scale of {scale} for {name}, which no encoder writes")
    values = np.empty(size)
    for piece in _pieces(size):
        np.multiply(decode_integers(reader, len(values[piece]), bits), scale, out=values[piece])
    return values


def _pieces(size: int) -> list[slice]:
    return [slice(start, start + _PIECE) for start in range(0, size, _PIECE)]
