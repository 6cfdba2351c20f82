"""The closed set of messages of a secure sum, and their binary form.

Every message starts with a header of 48 bytes: magic, version, kind, sender (a site's index, or 65535 for the
aggregator), the attempt's digest and the length of the body, all big endian. What a site sends ends with its Ed25519
signature over the header and the SHA-256 of the body: a record of these two is enough to check who sent what. What the
aggregator broadcasts is not signed: it holds the sites' own signed messages, or is checked against them later. Vectors
are packed as `packing` says. `decode` raises MalformedMessage and nothing else, whatever the bytes.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from typing import ClassVar, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedsam_core.secagg.keys import KEY_BYTES, SIGNATURE_BYTES, Identity, Roster
from fedsam_core.secagg.refusals import MalformedMessage, OtherAttempt, UnknownSite
from fedsam_core.secagg.shamir import SHARE_BYTES

MAGIC = b"FSUM"
VERSION = 1
AGGREGATOR = 0xFFFF
CIPHERTEXT_BYTES = 2 * SHARE_BYTES + 16
"""Two shares and the tag of AES-GCM."""
SEED_SHARE, KEY_SHARE = 1, 2

_HEADER = struct.Struct(">4sBBH32sQ")

Parts = Sequence[bytes | memoryview]
"""Pieces of a message, joined once, so that a large vector is copied once."""


class Body(Protocol):
    """What is between header and signature."""

    KIND: ClassVar[int]
    FROM_SITE: ClassVar[bool]

    def pack(self) -> Parts: ...

    @classmethod
    def unpack(cls, reader: "_Reader") -> Self: ...


B = TypeVar("B", bound=Body)


@dataclass(frozen=True)
class Message:
    """A decoded message. Its signature, if it has one, is not checked yet: `expect` does that."""

    context: bytes
    sender: int
    body: Body
    signature: bytes
    header: bytes = field(repr=False)
    digest: bytes = field(repr=False)
    """SHA-256 of the body; empty in a message that is not signed."""

    @property
    def sealed(self) -> bytes:
        """The bytes that the signature is made over."""
        return seal(self.header, self.digest)


@dataclass(frozen=True)
class Advertise:
    """Stage 1, site to aggregator: fresh public keys, and a commitment to the self-mask seed."""

    KIND: ClassVar[int] = 1
    FROM_SITE: ClassVar[bool] = True
    mask_key: bytes
    channel_key: bytes
    seed_commitment: bytes

    def pack(self) -> Parts:
        return [self.mask_key, self.channel_key, self.seed_commitment]

    @classmethod
    def unpack(cls, reader: "_Reader") -> Self:
        return cls(reader.take(KEY_BYTES), reader.take(KEY_BYTES), reader.take(KEY_BYTES))


@dataclass(frozen=True)
class Shares:
    """Stage 2, site to aggregator: for each peer an encrypted share of the seed and one of the mask key."""

    KIND: ClassVar[int] = 2
    FROM_SITE: ClassVar[bool] = True
    ciphertexts: tuple[tuple[int, bytes], ...]

    def pack(self) -> Parts:
        return _pack_ciphertexts(self.ciphertexts)

    @classmethod
    def unpack(cls, reader: "_Reader") -> Self:
        return cls(_unpack_ciphertexts(reader))


@dataclass(frozen=True, eq=False)
class MaskedInput:
    """Stage 3, site to aggregator: the masked vector, packed."""

    KIND: ClassVar[int] = 3
    FROM_SITE: ClassVar[bool] = True
    packed: NDArray[np.uint8]

    def pack(self) -> Parts:
        return [self.packed.data]

    @classmethod
    def unpack(cls, reader: "_Reader") -> Self:
        return cls(reader.rest())


@dataclass(frozen=True)
class Confirmation:
    """Stage 4, site to aggregator: by its signature, the site's word on whom it saw in each stage."""

    KIND: ClassVar[int] = 4
    FROM_SITE: ClassVar[bool] = True
    statement: bytes

    def pack(self) -> Parts:
        return [self.statement]

    @classmethod
    def unpack(cls, reader: "_Reader") -> Self:
        return cls(reader.take(32))


@dataclass(frozen=True, repr=False)
class Unmask:
    """Stage 5, site to aggregator: one share for each peer, of its seed if it survived, else of its mask key."""

    KIND: ClassVar[int] = 5
    FROM_SITE: ClassVar[bool] = True
    shares: tuple[tuple[int, int, bytes], ...]
    """(peer, SEED_SHARE or KEY_SHARE, share), one for a peer, in the peers' order."""

    def pack(self) -> Parts:
        return [struct.pack(">H", len(self.shares))] + [struct.pack(">HB", p, kind) + s for p, kind, s in self.shares]

    @classmethod
    def unpack(cls, reader: "_Reader") -> Self:
        shares = tuple((reader.u16(), reader.u8(), reader.take(SHARE_BYTES)) for _ in range(reader.u16()))
        _increasing([peer for peer, _, _ in shares])
        if any(kind not in (SEED_SHARE, KEY_SHARE) for _, kind, _ in shares):
            raise MalformedMessage("a message holds a share of an unknown kind: it was damaged or forged")
        return cls(shares)


@dataclass(frozen=True, eq=False)
class PlainInput:
    """Site to aggregator in the plain sum: the same vector without a mask."""

    KIND: ClassVar[int] = 6
    FROM_SITE: ClassVar[bool] = True
    packed: NDArray[np.uint8]

    def pack(self) -> Parts:
        return [self.packed.data]

    @classmethod
    def unpack(cls, reader: "_Reader") -> Self:
        return cls(reader.rest())


@dataclass(frozen=True)
class Advertised:
    """Aggregator to all: the signed Advertise messages, in the sites' order, as they came."""

    KIND: ClassVar[int] = 16
    FROM_SITE: ClassVar[bool] = False
    parts: tuple[bytes, ...]

    def pack(self) -> Parts:
        return _pack_parts(self.parts)

    @classmethod
    def unpack(cls, reader: "_Reader") -> Self:
        return cls(_unpack_parts(reader))


@dataclass(frozen=True)
class Delivery:
    """Aggregator to one site: what its peers encrypted for it. Its senders are all the peers that are still there."""

    KIND: ClassVar[int] = 17
    FROM_SITE: ClassVar[bool] = False
    recipient: int
    ciphertexts: tuple[tuple[int, bytes], ...]

    def pack(self) -> Parts:
        return [struct.pack(">H", self.recipient), *_pack_ciphertexts(self.ciphertexts)]

    @classmethod
    def unpack(cls, reader: "_Reader") -> Self:
        return cls(reader.u16(), _unpack_ciphertexts(reader))


@dataclass(frozen=True)
class Survivors:
    """Aggregator to all: the sites whose masked vectors came."""

    KIND: ClassVar[int] = 18
    FROM_SITE: ClassVar[bool] = False
    sites: tuple[int, ...]

    def pack(self) -> Parts:
        return [struct.pack(f">H{len(self.sites)}H", len(self.sites), *self.sites)]

    @classmethod
    def unpack(cls, reader: "_Reader") -> Self:
        sites = tuple(reader.u16() for _ in range(reader.u16()))
        _increasing(sites)
        return cls(sites)


@dataclass(frozen=True)
class Confirmations:
    """Aggregator to all: the signed Confirmation messages, in the sites' order, as they came."""

    KIND: ClassVar[int] = 19
    FROM_SITE: ClassVar[bool] = False
    parts: tuple[bytes, ...]

    def pack(self) -> Parts:
        return _pack_parts(self.parts)

    @classmethod
    def unpack(cls, reader: "_Reader") -> Self:
        return cls(_unpack_parts(reader))


_SET: tuple[type[Body], ...] = (
    Advertise,
    Shares,
    MaskedInput,
    Confirmation,
    Unmask,
    PlainInput,
    Advertised,
    Delivery,
    Survivors,
    Confirmations,
)
BODIES: dict[int, type[Body]] = {body.KIND: body for body in _SET}


def encode_signed(body: Body, context: bytes, sender: int, identity: Identity) -> bytes:
    """A site's message."""
    parts = _frame(body, context, sender)
    digest = sha256()
    for part in parts[1:]:
        digest.update(part)
    return b"".join([*parts, identity.sign(seal(bytes(parts[0]), digest.digest()))])


def encode_broadcast(body: Body, context: bytes) -> bytes:
    """A message of the aggregator."""
    return b"".join(_frame(body, context, AGGREGATOR))


def decode(data: bytes) -> Message:
    """The message in `data`, of any kind. Raises MalformedMessage for anything but exactly one well-formed message.

    The values of a large message are a read-only view into `data`, not a copy.
    """
    if not isinstance(data, bytes):
        raise MalformedMessage(f"a message must be bytes, not {type(data).__name__}")
    body_type, sender, context, length = read_header(data[: _HEADER.size])
    if length != len(data):
        raise MalformedMessage(
            f"a message of {len(data)} bytes has another length than it says: it was cut off or forged"
        )
    view = memoryview(data)
    end = len(data) - _trailer(body_type)
    reader = _Reader(view[_HEADER.size : end])
    body = body_type.unpack(reader)
    reader.finish()
    digest = sha256(view[_HEADER.size : end]).digest() if body_type.FROM_SITE else b""
    return Message(context, sender, body, bytes(view[end:]), bytes(view[: _HEADER.size]), digest)


def expect(data: bytes, body_type: type[B], context: bytes) -> tuple[int, B, Message]:
    """Sender, body and message of the kind and attempt that is due. Raises SecureSumError for any other."""
    message = decode(data)
    if not isinstance(message.body, body_type):
        raise MalformedMessage(f"a {type(message.body).__name__} message came where {body_type.__name__} was due")
    if message.context != context:
        raise OtherAttempt(
            f"a {body_type.__name__} message is of another run, round, attempt, layout, configuration or model: refused"
        )
    return message.sender, message.body, message


def expect_signed(
    data: bytes, body_type: type[B], context: bytes, sites: Sequence[str], roster: Roster
) -> tuple[int, B, Message]:
    """As `expect`, for a site's message, with its signature checked against the roster."""
    sender, body, message = expect(data, body_type, context)
    if sender >= len(sites):
        raise UnknownSite(f"a {body_type.__name__} message is of site number {sender}, of {len(sites)}: it was forged")
    roster.verify(sites[sender], message.signature, message.sealed)
    return sender, body, message


def seal(header: bytes, digest: bytes) -> bytes:
    """What a site signs for a message with this header, whose body has this SHA-256."""
    return b"fedsam secure-sum message\x00" + header + digest


def read_header(header: bytes) -> tuple[type[Body], int, bytes, int]:
    """What a header says: type of the body, sender, attempt's digest, length of the whole message.

    Raises:
        MalformedMessage: it is none of this protocol's version.
    """
    if len(header) != _HEADER.size:
        raise MalformedMessage(f"a message of {len(header)} bytes is too short: it was cut off")
    magic, version, kind, sender, context, length = _HEADER.unpack(header)
    if magic != MAGIC:
        raise MalformedMessage("a message does not start as a secure-sum message does: it was damaged or is none")
    if version != VERSION:
        raise MalformedMessage(
            f"a message has version {version}, this program speaks {VERSION}: use one release everywhere"
        )
    if kind not in BODIES:
        raise MalformedMessage(f"a message has the unknown kind {kind}: it was damaged or forged")
    body_type = BODIES[kind]
    if (sender == AGGREGATOR) == body_type.FROM_SITE:
        raise MalformedMessage(f"a {body_type.__name__} message cannot come from sender {sender}: it was forged")
    return body_type, sender, context, _HEADER.size + length + _trailer(body_type)


def _trailer(body_type: type[Body]) -> int:
    return SIGNATURE_BYTES if body_type.FROM_SITE else 0


def _frame(body: Body, context: bytes, sender: int) -> Parts:
    packed = body.pack()
    length = sum(len(part) for part in packed)
    return [_HEADER.pack(MAGIC, VERSION, body.KIND, sender, context, length), *packed]


def _pack_ciphertexts(ciphertexts: tuple[tuple[int, bytes], ...]) -> Parts:
    return [struct.pack(">H", len(ciphertexts))] + [struct.pack(">H", peer) + text for peer, text in ciphertexts]


def _unpack_ciphertexts(reader: "_Reader") -> tuple[tuple[int, bytes], ...]:
    ciphertexts = tuple((reader.u16(), reader.take(CIPHERTEXT_BYTES)) for _ in range(reader.u16()))
    _increasing([peer for peer, _ in ciphertexts])
    return ciphertexts


def _pack_parts(parts: tuple[bytes, ...]) -> Parts:
    packed: list[bytes | memoryview] = [struct.pack(">H", len(parts))]
    for part in parts:
        packed += [struct.pack(">I", len(part)), part]
    return packed


def _unpack_parts(reader: "_Reader") -> tuple[bytes, ...]:
    return tuple(reader.take(reader.u32()) for _ in range(reader.u16()))


def _increasing(numbers: Sequence[int]) -> None:
    if any(b <= a for a, b in pairwise(numbers)):
        raise MalformedMessage("a message lists a site twice or out of order: it was damaged or forged")


class _Reader:
    """Takes a body apart from the front; running over its end is an error."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def take(self, count: int) -> bytes:
        if count > len(self._view) - self._at:
            raise MalformedMessage("a message ends in the middle of a field: it was damaged or forged")
        self._at += count
        return bytes(self._view[self._at - count : self._at])

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def rest(self) -> NDArray[np.uint8]:
        if self._at == len(self._view):
            raise MalformedMessage("a vector is empty: it was cut off or forged")
        start, self._at = self._at, len(self._view)
        return np.frombuffer(self._view[start:], np.uint8)

    def finish(self) -> None:
        if self._at != len(self._view):
            raise MalformedMessage("a message has bytes left over: it was damaged or forged")
