"""A site's side of the secure sum: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine
Learning" (CCS; eprint 2017/281), figure 4 with the steps for a malicious server.

A pure state machine: message in, message out, no I/O, no clock, no log. Each stage is entered once. The first message
that is refused ends the attempt for this site and wipes its secrets: a server that sent one bad message gets no second
try. Masks depend on keys alone, so `deliver` makes them ahead, in another thread while the site trains. Beyond the
paper, a site signs *all* its messages, and what it confirms is not only who survived but also the keys it was shown and
the peers it masked with, so that a server that told sites different stories gets no signatures that fit together.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NoReturn

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from fedsam_core.errors import SecureSumError
from fedsam_core.secagg import shamir
from fedsam_core.secagg.attempt import Attempt
from fedsam_core.secagg.keys import (
    KEY_BYTES,
    Entropy,
    Identity,
    Roster,
    Secret,
    channel_key,
    fingerprint,
    pair_mask_key,
    public_key,
    seed_commitment,
    self_mask_key,
)
from fedsam_core.secagg.layout import VectorLayout
from fedsam_core.secagg.masks import apply_masks
from fedsam_core.secagg.messages import (
    KEY_SHARE,
    SEED_SHARE,
    Advertise,
    Advertised,
    Confirmation,
    Confirmations,
    Delivery,
    MaskedInput,
    Shares,
    Survivors,
    Unmask,
    encode_signed,
    expect,
    expect_signed,
)
from fedsam_core.secagg.packing import pack
from fedsam_core.secagg.refusals import (
    ForgedKeys,
    ForgedShares,
    ForgedSurvivors,
    OutOfTurn,
    TooFewSites,
    UnfitValues,
    UnknownSite,
)
from fedsam_core.secagg.shamir import SHARE_BYTES

_NONCE = bytes(12)
"""Fixed, because each channel key encrypts one message in its life."""


class SiteState(Enum):
    """What a site has done so far."""

    NEW = "new"
    ADVERTISED = "keys advertised"
    SHARED = "shares sent"
    READY = "mask made"
    MASKED = "masked vector sent"
    CONFIRMED = "survivors confirmed"
    DONE = "done"
    CLOSED = "closed"


class SiteSession:
    """One site in one attempt. Every method takes what the aggregator sent and gives the bytes of the answer.

    Raises OutOfTurn for a method out of order, and another of `refusals` for a message that an honest aggregator and
    honest peers would not send; the latter closes the session.
    """

    def __init__(
        self,
        attempt: Attempt,
        site_id: str,
        identity: Identity,
        roster: Roster,
        layout: VectorLayout,
        entropy: Entropy = os.urandom,
    ) -> None:
        attempt.require_private()
        layout.require_covered(attempt.sites)
        self._index = attempt.index(site_id)
        for site in attempt.sites:
            roster.key(site)
        if roster.key(site_id) != identity.public:
            raise UnknownSite(f"the roster pins another key for site {site_id!r} than its own: exchange keys again")
        self._attempt = attempt
        self._site = site_id
        self._identity = identity
        self._roster = roster
        self._layout = layout
        self._entropy = entropy
        self._context = attempt.digest()
        self._state = SiteState.NEW

        self._mask_secret = Secret(entropy(KEY_BYTES))
        self._channel_secret = Secret(entropy(KEY_BYTES))
        self._seed = Secret(entropy(KEY_BYTES))
        self._own_advertise = b""
        self._peers: dict[int, Advertise] = {}
        self._received: dict[int, dict[int, Secret]] = {}  # owner -> kind of share -> share
        self._mask = np.empty(0, np.uint32)
        self._transcript = b""
        self._partners: set[int] = set()
        self._survivors: tuple[int, ...] = ()
        self._statement = b""

    @property
    def state(self) -> SiteState:
        """What this site has done so far."""
        return self._state

    @property
    def survivors(self) -> tuple[str, ...]:
        """The sites that this one was told survived, once it has confirmed them."""
        return self._attempt.names(self._survivors)

    def advertise(self) -> bytes:
        """Stage 1: this site's fresh public keys, signed."""
        with self._stage("advertise", SiteState.NEW, SiteState.ADVERTISED):
            body = Advertise(
                public_key(self._mask_secret),
                public_key(self._channel_secret),
                seed_commitment(self._seed, self._index, self._context),
            )
            self._own_advertise = self._signed(body)
            return self._own_advertise

    def share(self, advertised: bytes) -> bytes:
        """Stage 2: shares of this site's secrets, encrypted to each peer that advertised."""
        with self._stage("share", SiteState.ADVERTISED, SiteState.SHARED):
            everyone = self._read_advertised(advertised)
            self._transcript = fingerprint(b"advertised", advertised)
            points = [index + 1 for index in everyone]
            threshold = self._attempt.threshold
            seed_shares = shamir.split(self._seed, threshold, points, self._entropy)
            key_shares = shamir.split(self._mask_secret, threshold, points, self._entropy)
            try:
                ciphertexts = [
                    (peer, self._encrypt(peer, body, seed_shares[peer + 1], key_shares[peer + 1]))
                    for peer, body in everyone.items()
                    if peer != self._index
                ]
                # Nobody asks a site for a share of its own mask key.
                self._received[self._index] = {SEED_SHARE: seed_shares.pop(self._index + 1)}
            finally:
                for share in (*seed_shares.values(), *key_shares.values()):
                    share.wipe()
            self._peers = {peer: body for peer, body in everyone.items() if peer != self._index}
            return self._signed(Shares(tuple(ciphertexts)))

    def _encrypt(self, peer: int, body: Advertise, *shares: Secret) -> bytes:
        key = channel_key(self._channel_secret, body.channel_key, self._index, peer, self._context)
        try:
            plaintext = b"".join(share.reveal() for share in shares)
            return AESGCM(key.reveal()).encrypt(_NONCE, plaintext, self._context)
        finally:
            key.wipe()

    def deliver(self, delivered: bytes) -> None:
        """Stage 3, ahead of the vector: the peers' shares; makes the sum of all masks. Takes as long as the vector is
        long, and nothing in it depends on the vector."""
        with self._stage("deliver", SiteState.SHARED, SiteState.READY):
            self._read_delivery(delivered)
            keys: dict[int, Secret] = {}
            try:
                for peer in sorted(self._partners - {self._index}):
                    public = self._peers[peer].mask_key
                    keys[peer] = pair_mask_key(self._mask_secret, self._index, peer, public, self._context)
                keys[self._index] = self_mask_key(self._seed, self._index, self._context)
                self._mask = np.zeros(self._layout.size, np.uint32)
                # Of two sites the one that comes first adds their common mask and the other takes it away.
                apply_masks(
                    self._mask,
                    plus=[key for peer, key in keys.items() if self._index <= peer],
                    minus=[key for peer, key in keys.items() if self._index > peer],
                )
            finally:
                for secret in (*keys.values(), self._seed, self._mask_secret, self._channel_secret):
                    secret.wipe()

    def masked_input(self, vector: NDArray[np.uint32]) -> bytes:
        """Stage 3: `vector` (uint32 [size], not changed) under the masks."""
        with self._stage("masked_input", SiteState.READY, SiteState.MASKED):
            if vector.dtype != np.uint32 or vector.shape != self._mask.shape:
                raise UnfitValues(
                    f"a vector to mask must be {self._mask.size} values of uint32, not {vector.dtype} {vector.shape}"
                )
            self._mask += vector
            message = self._signed(MaskedInput(pack(self._layout, self._mask)))
            self._mask = np.empty(0, np.uint32)
            return message

    def confirm(self, survivors: bytes) -> bytes:
        """Stage 4: this site's signature of the survivors and of all it was told before."""
        with self._stage("confirm", SiteState.MASKED, SiteState.CONFIRMED):
            _, body, _ = expect(survivors, Survivors, self._context)
            self._require(
                self._index in body.sites, ForgedSurvivors, "is not among the survivors, though it sent its vector"
            )
            strangers = set(body.sites) - self._partners
            self._require(
                not strangers, ForgedSurvivors, f"was told of {len(strangers)} survivors that it shares no mask with"
            )
            self._require_enough(len(body.sites), "survivors")
            self._layout.require_covered(self._attempt.names(body.sites))
            self._survivors = body.sites
            self._statement = statement(self._transcript, self._partners, body.sites)
            return self._signed(Confirmation(self._statement))

    def unmask(self, confirmations: bytes) -> bytes:
        """Stage 5: a share of each survivor's self-mask seed, and of each lost site's mask key; never both."""
        with self._stage("unmask", SiteState.CONFIRMED, SiteState.DONE):
            self._read_confirmations(confirmations)
            shares = []
            for peer in sorted(self._partners):
                kind = SEED_SHARE if peer in self._survivors else KEY_SHARE
                shares.append((peer, kind, bytes(self._received[peer][kind].reveal())))
            answer = self._signed(Unmask(tuple(shares)))
            self._wipe()
            return answer

    def close(self) -> None:
        """End the attempt: wipe all secrets and answer nothing more."""
        self._wipe()
        self._state = SiteState.CLOSED

    def __repr__(self) -> str:
        return f"SiteSession({self._site!r}, round {self._attempt.round}, {self._state.value})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SecureSumError(
            "a site's session is never serialized or copied: its keys are for one attempt in one place"
        )

    @contextmanager
    def _stage(self, method: str, due: SiteState, after: SiteState) -> Iterator[None]:
        if self._state is not due:
            raise OutOfTurn(f"site {self._site!r} refuses {method}: its state is {self._state.value!r}")
        self._state = SiteState.CLOSED  # whatever happens inside, the stage is not entered twice
        try:
            yield
        except BaseException:
            self.close()
            raise
        self._state = after

    def _signed(self, body: Advertise | Shares | MaskedInput | Confirmation | Unmask) -> bytes:
        return encode_signed(body, self._context, self._index, self._identity)

    def _read_advertised(self, data: bytes) -> dict[int, Advertise]:
        """Everyone's keys by index, this site's own among them."""
        _, advertised, _ = expect(data, Advertised, self._context)
        everyone: dict[int, Advertise] = {}
        for part in advertised.parts:
            sender, body, _ = expect_signed(part, Advertise, self._context, self._attempt.sites, self._roster)
            self._require(
                not everyone or sender > max(everyone), ForgedKeys, "was sent a site's keys twice or out of order"
            )
            everyone[sender] = body
        self._require(self._own_advertise in advertised.parts, ForgedKeys, "was sent a list of keys that lacks its own")
        self._require_enough(len(everyone), "sites with keys")
        public = [key for body in everyone.values() for key in (body.mask_key, body.channel_key)]
        self._require(len(set(public)) == len(public), ForgedKeys, "was sent the same public key twice")
        return everyone

    def _read_delivery(self, data: bytes) -> None:
        _, delivery, _ = expect(data, Delivery, self._context)
        self._require(delivery.recipient == self._index, ForgedShares, "was sent the shares of another site")
        self._require_enough(len(delivery.ciphertexts) + 1, "sites with shares")
        for peer, ciphertext in delivery.ciphertexts:
            self._require(
                peer in self._peers, ForgedShares, f"was sent shares of site number {peer}, which showed it no keys"
            )
            key = channel_key(self._channel_secret, self._peers[peer].channel_key, peer, self._index, self._context)
            try:
                plaintext = AESGCM(key.reveal()).decrypt(_NONCE, ciphertext, self._context)
            except InvalidTag:
                name = self._attempt.sites[peer]
                raise ForgedShares(f"site {self._site!r} cannot decrypt the shares of {name!r}: forged") from None
            finally:
                key.wipe()
            self._received[peer] = {
                SEED_SHARE: Secret(plaintext[:SHARE_BYTES]),
                KEY_SHARE: Secret(plaintext[SHARE_BYTES:]),
            }
        self._partners = {self._index} | {peer for peer, _ in delivery.ciphertexts}

    def _read_confirmations(self, data: bytes) -> None:
        _, confirmations, _ = expect(data, Confirmations, self._context)
        signers: set[int] = set()
        for part in confirmations.parts:
            sender, body, _ = expect_signed(part, Confirmation, self._context, self._attempt.sites, self._roster)
            self._require(
                sender in self._survivors, ForgedSurvivors, "was sent a confirmation of a site that is no survivor"
            )
            self._require(sender not in signers, ForgedSurvivors, "was sent a site's confirmation twice")
            self._require(
                body.statement == self._statement,
                ForgedSurvivors,
                f"was told another story of this attempt than {self._attempt.sites[sender]!r}",
            )
            signers.add(sender)
        self._require_enough(len(signers), "signatures of the survivors")

    def _require_enough(self, count: int, what: str) -> None:
        self._require(
            count >= self._attempt.minimum, TooFewSites, f"sees {count} {what}, fewer than {self._attempt.minimum}"
        )

    def _require(self, holds: bool, refusal: type[SecureSumError], complaint: str) -> None:
        if not holds:
            raise refusal(f"site {self._site!r} {complaint}: it leaves this attempt")

    def _wipe(self) -> None:
        self._mask.fill(0)
        for secret in (self._mask_secret, self._channel_secret, self._seed):
            secret.wipe()
        for kinds in self._received.values():
            for secret in kinds.values():
                secret.wipe()
        self._received.clear()


def statement(transcript: bytes, partners: set[int], survivors: tuple[int, ...]) -> bytes:
    """32 bytes that sites sign: the keys they were shown, who shared, whose vectors came."""
    return fingerprint(transcript, repr(sorted(partners)).encode(), repr(list(survivors)).encode())
