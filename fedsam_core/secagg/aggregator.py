"""The aggregator's side of the secure sum (Bonawitz et al. 2017, eprint 2017/281, figure 4).

A pure state machine: it takes each site's message of the stage that is open, and closing a stage gives what to send
next. When to close is the caller's decision, by its own deadline. It learns the sum over the sites whose vectors came,
and nothing else. Masked vectors are added to a running sum as they come and are not kept.
"""

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from fedsam_core.errors import SecureSumError
from fedsam_core.secagg import shamir
from fedsam_core.secagg.attempt import Attempt
from fedsam_core.secagg.keys import (
    Roster,
    Secret,
    fingerprint,
    pair_mask_key,
    public_key,
    seed_commitment,
    self_mask_key,
)
from fedsam_core.secagg.masks import apply_masks
from fedsam_core.secagg.messages import (
    KEY_SHARE,
    SEED_SHARE,
    Advertise,
    Advertised,
    B,
    Confirmation,
    Confirmations,
    Delivery,
    MaskedInput,
    Shares,
    Survivors,
    Unmask,
    encode_broadcast,
    expect_signed,
)
from fedsam_core.secagg.site import statement


class Stage(Enum):
    """The messages that the aggregator takes at present."""

    ADVERTISE = "advertise"
    SHARE = "share"
    MASKED = "masked input"
    CONFIRM = "confirm"
    UNMASK = "unmask"
    DONE = "done"
    FAILED = "failed"


class AggregatorSession:
    """The aggregator in one attempt.

    `receive_*` raise SecureSumError for a message that is damaged, forged, late, a repeat, or of another attempt; the
    session goes on without it, and its sender counts as lost unless it has sent a good one. The methods that close a
    stage raise SecureSumError when too few sites are left; then the attempt has failed.
    """

    def __init__(self, attempt: Attempt, roster: Roster, vector_size: int) -> None:
        attempt.require_private()
        for site in attempt.sites:
            roster.key(site)
        if vector_size < 1:
            raise SecureSumError(f"a vector of size {vector_size} cannot be summed")
        self._attempt = attempt
        self._roster = roster
        self._context = attempt.digest()
        self._stage = Stage.ADVERTISE
        self._active = set(range(len(attempt.sites)))
        self._arrived: set[int] = set()

        self._keys: dict[int, Advertise] = {}
        self._key_messages: dict[int, bytes] = {}
        self._ciphertexts: dict[int, dict[int, bytes]] = {}  # sender -> recipient -> ciphertext
        self._sum: NDArray[np.uint32] = np.zeros(vector_size, dtype=np.uint32)
        self._partners: set[int] = set()
        self._survivors: set[int] = set()
        self._transcript = b""
        self._statement = b""
        self._confirmations: dict[int, bytes] = {}
        self._unmask: dict[int, dict[int, bytes]] = {}  # sender -> owner -> share

    @property
    def stage(self) -> Stage:
        """The stage that is open."""
        return self._stage

    @property
    def active(self) -> tuple[str, ...]:
        """The sites whose messages of the open stage are taken: those to ask."""
        return self._attempt.names(self._active)

    @property
    def waiting(self) -> tuple[str, ...]:
        """The active sites whose message of the open stage has not come."""
        return self._attempt.names(self._active - self._arrived)

    def receive_advertise(self, site: str, data: bytes) -> None:
        """Stage 1: a site's public keys."""
        sender, body = self._receive(Stage.ADVERTISE, site, data, Advertise)
        self._keys[sender] = body
        self._key_messages[sender] = data
        self._arrived.add(sender)

    def advertised(self) -> bytes:
        """Close stage 1; for every active site."""
        self._close(Stage.ADVERTISE, Stage.SHARE)
        message = encode_broadcast(Advertised(_in_order(self._key_messages)), self._context)
        self._transcript = fingerprint(b"advertised", message)
        return message

    def receive_share(self, site: str, data: bytes) -> None:
        """Stage 2: a site's encrypted shares."""
        sender, body = self._receive(Stage.SHARE, site, data, Shares)
        ciphertexts = dict(body.ciphertexts)
        if set(ciphertexts) != set(self._keys) - {sender}:
            raise SecureSumError(f"site {site!r} did not send shares for exactly its peers: it is left out")
        self._ciphertexts[sender] = ciphertexts
        self._arrived.add(sender)

    def deliveries(self) -> dict[str, bytes]:
        """Close stage 2; what to send to each active site."""
        self._close(Stage.SHARE, Stage.MASKED)
        self._partners = set(self._active)
        messages = {}
        for recipient in sorted(self._partners):
            senders = sorted(self._partners - {recipient})
            body = Delivery(recipient, tuple((sender, self._ciphertexts[sender][recipient]) for sender in senders))
            messages[self._attempt.sites[recipient]] = encode_broadcast(body, self._context)
        self._ciphertexts.clear()
        return messages

    def receive_masked(self, site: str, data: bytes) -> None:
        """Stage 3: a site's masked vector, added to the running sum."""
        sender, body = self._receive(Stage.MASKED, site, data, MaskedInput)
        if body.values.size != self._sum.size:
            raise SecureSumError(f"site {site!r} sent {body.values.size} values where {self._sum.size} were due")
        np.add(self._sum, body.values, out=self._sum)
        self._arrived.add(sender)

    def survivors(self) -> bytes:
        """Close stage 3; for every active site. From here on the sum is that of these sites, even if some are lost."""
        self._close(Stage.MASKED, Stage.CONFIRM)
        self._survivors = set(self._active)
        body = Survivors(tuple(sorted(self._survivors)))
        self._statement = statement(self._transcript, self._partners, body.sites)
        return encode_broadcast(body, self._context)

    def receive_confirmation(self, site: str, data: bytes) -> None:
        """Stage 4: a site's signature of the survivors."""
        sender, body = self._receive(Stage.CONFIRM, site, data, Confirmation)
        if body.statement != self._statement:
            raise SecureSumError(f"site {site!r} confirms another course of this attempt: it is left out")
        self._confirmations[sender] = data
        self._arrived.add(sender)

    def confirmations(self) -> bytes:
        """Close stage 4; for every active site."""
        self._close(Stage.CONFIRM, Stage.UNMASK)
        return encode_broadcast(Confirmations(_in_order(self._confirmations)), self._context)

    def receive_unmask(self, site: str, data: bytes) -> None:
        """Stage 5: a site's shares."""
        sender, body = self._receive(Stage.UNMASK, site, data, Unmask)
        due = [(peer, SEED_SHARE if peer in self._survivors else KEY_SHARE) for peer in sorted(self._partners)]
        if [(peer, kind) for peer, kind, _ in body.shares] != due:
            raise SecureSumError(f"site {site!r} did not send exactly the shares that are due: it is left out")
        self._unmask[sender] = {peer: share for peer, _, share in body.shares}
        self._arrived.add(sender)

    def total(self) -> tuple[NDArray[np.uint32], tuple[str, ...]]:
        """Close stage 5: the sum (uint32 [size], modulo 2^32) and the sites whose vectors are in it.

        Raises SecureSumError where shares do not give back what their owner committed to: a site sent a wrong share.
        """
        self._close(Stage.UNMASK, Stage.DONE)
        plus: list[Secret] = []
        minus: list[Secret] = []
        try:
            self._recover_masks(plus, minus)
            apply_masks(self._sum, plus, minus)
        except SecureSumError:
            self._stage = Stage.FAILED
            raise
        finally:
            for key in plus + minus:
                key.wipe()
            self._unmask.clear()
        return self._sum, self._attempt.names(self._survivors)

    def __repr__(self) -> str:
        return f"AggregatorSession(round {self._attempt.round}, {self._stage.value}, active {list(self.active)})"

    def _receive(self, stage: Stage, site: str, data: bytes, body_type: type[B]) -> tuple[int, B]:
        index = self._attempt.index(site)
        if self._stage is not stage:
            raise SecureSumError(f"{body_type.__name__} of site {site!r} came in stage {self._stage.value!r}: refused")
        if index not in self._active:
            raise SecureSumError(f"site {site!r} was lost before stage {stage.value!r}: it can join the next attempt")
        if index in self._arrived:
            raise SecureSumError(f"site {site!r} sent {body_type.__name__} twice: the second is refused")
        sender, body, _ = expect_signed(data, body_type, self._context, self._attempt.sites, self._roster)
        if sender != index:
            raise SecureSumError(
                f"site {site!r} sent a message in the name of {self._attempt.sites[sender]!r}: refused"
            )
        return sender, body

    def _close(self, stage: Stage, following: Stage) -> None:
        if self._stage is not stage:
            raise SecureSumError(f"stage {stage.value!r} cannot be closed: the open one is {self._stage.value!r}")
        if len(self._arrived) < self._attempt.minimum:
            self._stage = Stage.FAILED
            lost = ", ".join(self._attempt.names(set(range(len(self._attempt.sites))) - self._arrived))
            raise SecureSumError(
                f"only {len(self._arrived)} of the {self._attempt.minimum} sites that are needed are left after stage "
                f"{stage.value!r} (lost: {lost}): start a new attempt"
            )
        self._active, self._arrived = self._arrived, set()
        self._stage = following

    def _recover_masks(self, plus: list[Secret], minus: list[Secret]) -> None:
        """Keys of the streams to add to the running sum and to take from it."""
        helpers = sorted(self._unmask)[: self._attempt.threshold]
        lagrange = shamir.weights([helper + 1 for helper in helpers])
        for owner in sorted(self._partners):
            name = self._attempt.sites[owner]
            try:
                secret = shamir.combine([self._unmask[helper][owner] for helper in helpers], lagrange)
            except SecureSumError:
                raise self._wrong_shares(name, helpers) from None
            if owner in self._survivors:
                if seed_commitment(secret, owner, self._context) != self._keys[owner].seed_commitment:
                    raise self._wrong_shares(name, helpers)
                minus.append(self_mask_key(secret, owner, self._context))
            else:
                if public_key(secret) != self._keys[owner].mask_key:
                    raise self._wrong_shares(name, helpers)
                for survivor in sorted(self._survivors):
                    key = pair_mask_key(secret, owner, survivor, self._keys[survivor].mask_key, self._context)
                    # The survivor added the common mask if it comes first.
                    (minus if survivor < owner else plus).append(key)
            secret.wipe()

    def _wrong_shares(self, owner: str, helpers: list[int]) -> SecureSumError:
        senders = ", ".join(self._attempt.names(helpers))
        return SecureSumError(
            f"the shares of site {owner!r} from {senders} do not fit what it committed to: {owner!r} or one of them is "
            "faulty; start a new attempt without it"
        )


def _in_order(messages: dict[int, bytes]) -> tuple[bytes, ...]:
    return tuple(messages[index] for index in sorted(messages))
