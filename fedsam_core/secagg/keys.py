"""Identities that are pinned, keys that live for one attempt, and how each key is derived from the others.

Every derived key is HKDF-SHA256 (RFC 5869) with the attempt's digest as salt and its purpose, direction and public keys
as info, so that no key serves two purposes, two pairs or two attempts. Key agreement is X25519 (RFC 7748), signatures
are Ed25519 (RFC 8032). Python cannot promise that no copy of a secret stays in memory: what this code holds itself is
overwritten, what the libraries copied is only released.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsam_core.errors import SecureSumError
from fedsam_core.hashing import stable_hash
from fedsam_core.secagg.attempt import PROTOCOL
from fedsam_core.secagg.refusals import BadSignature, ForgedKeys, UnknownSite

Entropy = Callable[[int], bytes]
"""Gives that many random bytes. Anything but `os.urandom` is for tests."""

KEY_BYTES = 32
SIGNATURE_BYTES = 64


# The y coordinates, little-endian, of Ed25519's points of small order. The library takes them for keys, and signatures
# that nobody made then verify: under 0100..00 one and the same signature fits every message.
_SMALL_ORDER = frozenset(
    bytes.fromhex(y)
    for y in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)


def of_small_order(key: bytes) -> bool:
    """Whether an Ed25519 public key (32 bytes) is one that anybody could sign for."""
    return bytes([*key[:-1], key[-1] & 0x7F]) in _SMALL_ORDER  # the last bit is the sign of x


class Secret:
    """Secret bytes that are overwritten when done with, and that are never shown, copied or serialized."""

    __slots__ = ("_raw",)

    def __init__(self, raw: bytes | bytearray) -> None:
        self._raw = bytearray(raw)

    def reveal(self) -> bytearray:
        """The bytes themselves, not a copy. Raises SecureSumError once they are wiped."""
        if not self._raw:
            raise SecureSumError("a secret was asked for after it was wiped: start a new attempt")
        return self._raw

    def wipe(self) -> None:
        """Overwrite the bytes with zeros and forget them."""
        self._raw[:] = bytes(len(self._raw))
        self._raw = bytearray()

    def __repr__(self) -> str:
        return "Secret(hidden)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SecureSumError("a secret is never serialized or copied")


class Identity:
    """A site's long-lived Ed25519 signing key."""

    __slots__ = ("_key",)

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls, entropy: Entropy = os.urandom) -> "Identity":
        """A new identity."""
        return cls(Ed25519PrivateKey.from_private_bytes(entropy(KEY_BYTES)))

    @property
    def public(self) -> bytes:
        """The 32-byte public key that a roster pins."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """A 64-byte signature of `data`."""
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"Identity(public={self.public.hex()})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SecureSumError("an identity is never serialized or copied: each site keeps its own")


@dataclass(frozen=True)
class Roster:
    """The public identity keys of a consortium, by site name. The site trusts these and no others."""

    keys: Mapping[str, bytes] = field(repr=False)

    def __post_init__(self) -> None:
        owners: dict[bytes, str] = {}
        for site, key in self.keys.items():
            if not isinstance(key, bytes) or len(key) != KEY_BYTES:
                raise SecureSumError(f"the roster's key of site {site!r} is not {KEY_BYTES} bytes: export it again")
            if of_small_order(key):
                raise SecureSumError(
                    f"the roster's key of site {site!r} is of small order: have the site make a new one"
                )
            if key in owners:
                raise SecureSumError(
                    f"sites {owners[key]!r} and {site!r} have the same identity key: make one for each"
                )
            owners[key] = site

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of names and keys."""
        return stable_hash({site: key.hex() for site, key in self.keys.items()})

    def key(self, site: str) -> bytes:
        """A site's public key. Raises UnknownSite where the roster does not list it."""
        if site not in self.keys:
            raise UnknownSite(f"site {site!r} is not in the roster: pin its public key there, or leave it out")
        return self.keys[site]

    def verify(self, site: str, signature: bytes, data: bytes) -> None:
        """Raises BadSignature unless `site` signed `data`."""
        try:
            Ed25519PublicKey.from_public_bytes(self.key(site)).verify(signature, data)
        except (InvalidSignature, ValueError):
            raise BadSignature(f"a message is not signed by the key that the roster pins for site {site!r}") from None

    def __repr__(self) -> str:
        return f"Roster({', '.join(sorted(self.keys))})"


def development_roster(sites: Sequence[str], entropy: Entropy = os.urandom) -> tuple[Roster, dict[str, Identity]]:
    """Identities made on the spot, for runs on one's own machine: nobody vouches for them."""
    identities = {site: Identity.generate(entropy) for site in sites}
    return Roster({site: identity.public for site, identity in identities.items()}), identities


def public_key(secret: Secret) -> bytes:
    """The X25519 public key (32 bytes) of 32 secret bytes."""
    return X25519PrivateKey.from_private_bytes(secret.reveal()).public_key().public_bytes_raw()


def pair_mask_key(secret: Secret, own_index: int, peer_index: int, peer_public: bytes, context: bytes) -> Secret:
    """AES-256 key of the mask that two sites share; both ends derive the same one."""
    ends = sorted([(own_index, public_key(secret)), (peer_index, peer_public)])
    info = _info("pair mask", *(part for index, key in ends for part in (_number(index), key)))
    return _derive(_agree(secret, peer_public), context, info)


def channel_key(secret: Secret, peer_public: bytes, sender: int, recipient: int, context: bytes) -> Secret:
    """AES-256-GCM key of the one message that `sender` sends to `recipient` in an attempt."""
    info = _info("share channel", _number(sender), _number(recipient))
    return _derive(_agree(secret, peer_public), context, info)


def self_mask_key(seed: Secret, index: int, context: bytes) -> Secret:
    """AES-256 key of a site's own mask."""
    return _derive(seed.reveal(), context, _info("self mask", _number(index)))


def seed_commitment(seed: Secret, index: int, context: bytes) -> bytes:
    """32 bytes that fix a site's self-mask seed without showing it, so that wrong shares of it are noticed."""
    return bytes(_derive(seed.reveal(), context, _info("self mask commitment", _number(index))).reveal())


def require_agreement(*peer_publics: bytes) -> None:
    """Raises ForgedKeys where an X25519 public key makes a secret that anybody knows (RFC 7748, section 6.1)."""
    probe = Secret(bytes(range(KEY_BYTES)))
    for peer_public in peer_publics:
        _agree(probe, peer_public)


def _agree(secret: Secret, peer_public: bytes) -> bytes:
    try:
        return X25519PrivateKey.from_private_bytes(secret.reveal()).exchange(
            X25519PublicKey.from_public_bytes(peer_public)
        )
    except ValueError:  # the library refuses public keys of small order, which would make the result public
        raise ForgedKeys("a peer's X25519 public key is degenerate: that site must make new keys") from None


def _derive(material: bytes | bytearray, context: bytes, info: bytes) -> Secret:
    return Secret(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=context, info=info).derive(material))


def _info(purpose: str, *parts: bytes) -> bytes:
    return b"\x00".join([PROTOCOL.encode(), purpose.encode()]) + b"\x00" + b"".join(parts)


def _number(index: int) -> bytes:
    return index.to_bytes(2, "big")


def fingerprint(*parts: bytes) -> bytes:
    """SHA-256 of parts with their lengths, so that no two lists of parts collide by being joined."""
    digest = sha256(PROTOCOL.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
