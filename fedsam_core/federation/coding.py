"""Small signed integers in few bytes: quantised updates are mostly small, and loud in some places, quiet in others.

An integer is split as a floating point number is (hybrid integers, as in JPEG XL, ISO/IEC 18181-1): a *bucket*, which
is its exponent and the first `mantissa` bits behind the leading one, is entropy coded; the bits below and the sign are
nearly uniform and travel as they are. Blocks of 64 neighbours are put into *classes* by their mean magnitude, and each
class has its own histogram of buckets, because layers, rows and channels differ in how far they move. How many classes
and how long a mantissa is whatever costs least, tables included. The coder is rANS (Duda 2013, arXiv 1311.2540) from
`constriction` (Bamler 2022, arXiv 2201.01741); models are made of transmitted integer counts, so that nothing that a
machine computes differently can part the decoders.

Format, integers little endian, `varint` 7 bits a byte with the highest bit set where more follow:

    u8      0: packed: then values + (2^(bits-1) - 1) in `bits` bits each, lowest bit first, zeros up to a full byte
            else the mantissa's length, 1 to 6, then
    varint  number of classes
            a table: blocks by class
            for each class a table: values by bucket
    varint  number of words, then the words (u32): the stack of the rANS coder, from which are taken, in this order,
            the class of each block; the buckets of the values of class 0, of class 1, ...; the values' bits below
            their bucket, times two, plus one if negative: those with none, with one, with two ... such bits (for values
            other than zero).

    A table is: varint the first symbol that occurs, varint how many follow up to the last that occurs (at least one),
    then their counts as varints. Where only one symbol can occur, nothing is coded for it.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from constriction import stream
from numpy.typing import NDArray

from fedsam_core.errors import CheckpointError

Ints = NDArray[np.int32]
Counts = NDArray[np.int64]

BLOCK = 64
"""Neighbours that share a class."""

_MANTISSAS = range(1, 7)
_MERGED = (1, 2, 1024)  # half octaves of loudness to a class; the last puts all blocks into one
_PACKED = 0
_MOST_CLASSES = 64


class Reader:
    """Takes fields off the front of bytes. Raises CheckpointError where they end too soon."""

    def __init__(self, data: bytes) -> None:
        self._left = memoryview(data)

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if count > len(self._left):
            raise CheckpointError(f"coded values end {count - len(self._left)} bytes too soon")
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def varint(self, most: int) -> int:
        """The next varint, at most `most`."""
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if value > most or shift > 63:
                raise CheckpointError(f"coded values hold a number over {most} where none can be")
            if byte < 0x80:
                return value

    def end(self) -> None:
        """Raises CheckpointError where bytes are left."""
        if self._left:
            raise CheckpointError(f"coded values are followed by {len(self._left)} bytes too many")


def encode_integers(values: Ints, bits: int) -> bytes:
    """The bytes of values (int32 [n], n >= 1, magnitudes below 2^(bits-1), 2 <= bits <= 16)."""
    plan = _plan(values, bits)
    packed_bytes = 1 + -(-values.size * bits // 8)
    if plan.bits >= 8 * packed_bytes:  # before the coder's words, which only add to it
        return _pack(values, bits)
    coded = _encode(values, plan)
    return coded if len(coded) < packed_bytes else _pack(values, bits)


def decode_integers(reader: Reader, size: int, bits: int) -> Ints:
    """The inverse of `encode_integers` for `size` values. Raises CheckpointError for anything else."""
    mantissa = reader.take(1)[0]
    if mantissa == _PACKED:
        return _unpack(reader, size, bits)
    if mantissa not in _MANTISSAS:
        raise CheckpointError(f"coded values have a mantissa of {mantissa} bits, which no encoder chooses")
    return _decode(reader, size, bits, mantissa)


class _Plan(NamedTuple):
    bits: float  # what all will cost but for the coder's ends
    mantissa: int
    classes: NDArray[np.uint8]  # of each block


def _plan(values: Ints, bits: int) -> _Plan:
    """The cheapest mantissa and classes. Logarithms may differ by machine: only the encoder's choice hangs on them."""
    magnitudes = np.abs(values)
    fine = _MANTISSAS[-1]
    buckets, _ = _split(magnitudes, fine)
    of_bucket = _smallest(np.arange(_bucket_count(bits, fine), dtype=np.int32), fine)
    sums = np.add.reduceat(magnitudes, np.arange(0, values.size, BLOCK), dtype=np.int64)
    loudness = np.rint(2 * np.log2(sums / BLOCK + 1 / 16) + 8).astype(np.int64)  # 0 .. 38 for up to 16 bits
    levels, level_of_block = np.unique(loudness, return_inverse=True)
    joint = _repeat(level_of_block, values.size) * of_bucket.size + buckets
    counts = np.bincount(joint, minlength=levels.size * of_bucket.size).reshape(levels.size, -1)
    plans: list[tuple[float, int, int]] = []
    for merged in _MERGED:
        rows = _starts(levels // merged)
        by_class = np.add.reduceat(counts, rows, axis=0)
        blocks = np.add.reduceat(np.bincount(level_of_block), rows)
        for mantissa in _MANTISSAS:
            coarse, spare = _split(of_bucket, mantissa)
            columns = _starts(coarse)
            rest = by_class.sum(axis=0)[1:] @ (spare[1:] + 1)
            tables = [blocks, *np.add.reduceat(by_class, columns, axis=1)]
            plans.append((float(rest) + sum(map(_cost, tables)), mantissa, merged))
    cost, mantissa, merged = min(plans)
    class_of_level = np.unique(levels // merged, return_inverse=True)[1]
    return _Plan(cost, mantissa, class_of_level[level_of_block].astype(np.uint8))


def _starts(sorted_keys: NDArray[np.integer]) -> NDArray[np.intp]:
    """Where in a sorted array each new key begins."""
    return np.flatnonzero(np.diff(sorted_keys, prepend=sorted_keys[0] - 1))


def _cost(counts: Counts) -> float:
    """Bits of symbols that occur so often, and of their table."""
    seen = counts[counts > 0]
    table = 8 * (2 + np.ptp(np.flatnonzero(counts)) + 1) + 8 * sum((seen >= 1 << (7 * k)).sum() for k in (1, 2, 3, 4))
    return float((seen * np.log2(seen.sum() / seen)).sum() + table)


def _encode(values: Ints, plan: _Plan) -> bytes:
    magnitudes = np.abs(values)
    buckets, spare = _split(magnitudes, plan.mantissa)
    rests = (magnitudes & ((1 << spare) - 1)) * 2 + (values < 0)
    parts = [plan.classes.astype(np.int32), *_by_class(buckets, plan.classes)]
    tables = [np.bincount(part).astype(np.int64) for part in parts]
    uniform = [rests[(spare == k) & (magnitudes > 0)] for k in range(int(spare.max()) + 1)]
    coder = stream.stack.AnsCoder()
    for k in reversed(range(len(uniform))):
        coder.encode_reverse(uniform[k], stream.model.Uniform(2 << k))
    for part, table in zip(reversed(parts), reversed(tables), strict=True):
        _push(coder, part, table)
    words = coder.get_compressed()
    written = [bytes([plan.mantissa]), _varint(len(tables) - 1), *map(_table, tables)]
    return b"".join([*written, _varint(words.size), words.astype("<u4").tobytes()])


def _decode(reader: Reader, size: int, bits: int, mantissa: int) -> Ints:
    classes = reader.varint(_MOST_CLASSES)
    blocks = -(-size // BLOCK)
    of_blocks = _read_table(reader, classes, blocks)
    tables = [_read_table(reader, _bucket_count(bits, mantissa), size) for _ in range(classes)]
    words = np.frombuffer(reader.take(4 * reader.varint(2**30)), dtype="<u4").astype(np.uint32)
    if words.size and words[-1] == 0:
        raise CheckpointError("coded values end in a word that no encoder writes")
    coder = stream.stack.AnsCoder(words)
    class_of_value = _repeat(_pop(coder, of_blocks, blocks).astype(np.uint8), size)
    held = np.bincount(class_of_value, minlength=classes)
    if any(held[k] != table.sum() for k, table in enumerate(tables)):
        raise CheckpointError("coded values are damaged: a class has another number of values than its table")
    buckets = np.empty(size, dtype=np.int32)
    buckets[np.argsort(class_of_value, kind="stable")] = np.concatenate(
        [_pop(coder, table, int(table.sum())) for table in tables]
    )
    magnitudes = _smallest(buckets, mantissa)
    spare = _spare(buckets, mantissa)
    rests = np.zeros(size, dtype=np.int32)
    for k in range(int(spare.max()) + 1):
        of_k = (spare == k) & (buckets > 0)
        rests[of_k] = coder.decode(stream.model.Uniform(2 << k), int(of_k.sum()))
    if not coder.is_empty():
        raise CheckpointError("coded values are damaged: the coder does not come out where it began")
    magnitudes += rests >> 1
    values: Ints = np.where(rests & 1, -magnitudes, magnitudes)
    return values


def _by_class(buckets: Ints, classes: NDArray[np.uint8]) -> Iterator[Ints]:
    of_value = _repeat(classes, buckets.size)
    ordered = buckets[np.argsort(of_value, kind="stable")]
    return iter(np.split(ordered, np.cumsum(np.bincount(of_value))[:-1]))


def _repeat(of_block: NDArray[np.integer], size: int) -> NDArray[np.integer]:
    return np.repeat(of_block, BLOCK)[:size]


def _split(magnitudes: Ints, mantissa: int) -> tuple[Ints, Ints]:
    """The bucket of each magnitude, and how many bits below the bucket it has."""
    spare = np.maximum(np.frexp(magnitudes)[1] - 1 - mantissa, 0)  # frexp's exponent is the length in bits, exactly
    return (spare << mantissa) + (magnitudes >> spare), spare


def _spare(buckets: Ints, mantissa: int) -> Ints:
    spare: Ints = np.maximum((buckets >> mantissa) - 1, 0)
    return spare


def _smallest(buckets: Ints, mantissa: int) -> Ints:
    """The smallest magnitude in each bucket."""
    spare = _spare(buckets, mantissa)
    return (buckets - (spare << mantissa)) << spare


def _bucket_count(bits: int, mantissa: int) -> int:
    return int(_split(np.array([2 ** (bits - 1) - 1], dtype=np.int32), mantissa)[0][0]) + 1


def _model(counts: Counts) -> tuple[int, Any | None]:
    """The first symbol that occurs, and the model of those from it on: None where there is just one."""
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1])
    if first == last:
        return first, None
    return first, stream.model.Categorical(counts[first : last + 1].astype(np.float64), perfect=False)


def _push(coder: Any, symbols: Ints, counts: Counts) -> None:
    first, model = _model(counts)
    if model is not None:
        coder.encode_reverse(symbols - first, model)


def _pop(coder: Any, counts: Counts, size: int) -> Ints:
    first, model = _model(counts)
    symbols: Ints = np.zeros(size, dtype=np.int32) if model is None else coder.decode(model, size)
    return symbols + np.int32(first)


def _table(counts: Counts) -> bytes:
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1])
    return _varints([first, last - first + 1, *counts[first : last + 1].tolist()])


def _read_table(reader: Reader, symbols: int, most: int) -> Counts:
    """Counts (int64 [symbols]), at least one and at most `most` in all."""
    counts = np.zeros(symbols, dtype=np.int64)
    first = reader.varint(symbols)
    for symbol in range(first, first + reader.varint(symbols - first)):
        counts[symbol] = reader.varint(most)
    if not 1 <= counts.sum() <= most:
        raise CheckpointError(f"coded values have a table that counts {counts.sum()} symbols of at most {most}")
    return counts


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varints(values: Iterable[int]) -> bytes:
    return b"".join(map(_varint, values))


def _pack(values: Ints, bits: int) -> bytes:
    shifted = (values + (2 ** (bits - 1) - 1)).astype("<u2")
    wide = np.unpackbits(shifted.view(np.uint8), bitorder="little").reshape(-1, 16)
    return bytes([_PACKED]) + np.packbits(wide[:, :bits], bitorder="little").tobytes()


def _unpack(reader: Reader, size: int, bits: int) -> Ints:
    packed = np.frombuffer(reader.take(-(-size * bits // 8)), dtype=np.uint8)
    flat = np.unpackbits(packed, bitorder="little")
    if flat[size * bits :].any():
        raise CheckpointError("packed values are damaged: bits behind the last value are set")
    wide = np.zeros((size, 16), dtype=np.uint8)
    wide[:, :bits] = flat[: size * bits].reshape(size, bits)
    values: Ints = np.packbits(wide, axis=None, bitorder="little").view("<u2").astype(np.int32)
    values -= 2 ** (bits - 1) - 1
    if values.max() > 2 ** (bits - 1) - 1:
        raise CheckpointError(f"packed values hold one that does not fit {bits} bits with a sign")
    return values
