"""The aggregator's side of the secure sum (Bonawitz et al. 2017, eprint 2017/281, figure 4).

A pure state machine: it takes each site's message of the stage that is open, and closing a stage gives what to send
next. When to close is the caller's decision, by its own deadline. It learns the sum over the sites whose vectors came,
and nothing else. Masked vectors are added to a running sum as they come and are not kept.
"""

from collections.abc import Sequence
from enum import Enum
from itertools import chain, combinations, islice

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
    require_agreement,
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
    B,
    Confirmation,
    Confirmations,
    Delivery,
    MaskedInput,
    Message,
    Shares,
    Survivors,
    Unmask,
    encode_broadcast,
    expect_signed,
)
from fedsam_core.secagg.packing import add_packed, reduce
from fedsam_core.secagg.record import Received, received
from fedsam_core.secagg.refusals import BadSignature, BareLane, ForgedShares, ForgedSurvivors, OutOfTurn, TooFewSites
from fedsam_core.secagg.site import statement

_TRIES = 100  # groups of helpers that are tried where some of them sent wrong shares


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

    def __init__(self, attempt: Attempt, roster: Roster, layout: VectorLayout) -> None:
        attempt.require_private()
        layout.require_covered(attempt.sites)
        for site in attempt.sites:
            roster.key(site)
        self._attempt = attempt
        self._roster = roster
        self._layout = layout
        self._context = attempt.digest()
        self.received: list[Received] = []
        """Every message that was taken, in order, for the record."""
        self._stage = Stage.ADVERTISE
        self._active = set(range(len(attempt.sites)))
        self._arrived: set[int] = set()

        self._keys: dict[int, Advertise] = {}
        self._key_messages: dict[int, bytes] = {}
        self._ciphertexts: dict[int, dict[int, bytes]] = {}  # sender -> recipient -> ciphertext
        self._sum: NDArray[np.uint32] = np.zeros(layout.size, dtype=np.uint32)
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
        sender, body, message = self._expect(Stage.ADVERTISE, site, data, Advertise)
        require_agreement(body.mask_key, body.channel_key)  # all its peers would leave the attempt
        self._keys[sender] = body
        self._key_messages[sender] = data
        self._take(sender, data, message, keep=True)

    def advertised(self) -> bytes:
        """Close stage 1; for every active site."""
        self._close(Stage.ADVERTISE, Stage.SHARE)
        message = encode_broadcast(Advertised(_in_order(self._key_messages)), self._context)
        self._transcript = fingerprint(b"advertised", message)
        return message

    def receive_share(self, site: str, data: bytes) -> None:
        """Stage 2: a site's encrypted shares."""
        sender, body, message = self._expect(Stage.SHARE, site, data, Shares)
        ciphertexts = dict(body.ciphertexts)
        if set(ciphertexts) != set(self._keys) - {sender}:
            raise ForgedShares(f"site {site!r} did not send shares for exactly its peers: it is left out")
        self._ciphertexts[sender] = ciphertexts
        self._take(sender, data, message)

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
        sender, body, message = self._expect(Stage.MASKED, site, data, MaskedInput)
        add_packed(self._layout, self._sum, body.packed)
        self._take(sender, data, message)

    def survivors(self) -> bytes:
        """Close stage 3; for every active site. From here on the sum is that of these sites, even if some are lost."""
        self._close(Stage.MASKED, Stage.CONFIRM)
        self._survivors = set(self._active)
        try:
            self._layout.require_covered(self._attempt.names(self._survivors))
        except BareLane:
            self._stage = Stage.FAILED
            raise
        body = Survivors(tuple(sorted(self._survivors)))
        self._statement = statement(self._transcript, self._partners, body.sites)
        return encode_broadcast(body, self._context)

    def receive_confirmation(self, site: str, data: bytes) -> None:
        """Stage 4: a site's signature of the survivors."""
        sender, body, message = self._expect(Stage.CONFIRM, site, data, Confirmation)
        if body.statement != self._statement:
            raise ForgedSurvivors(f"site {site!r} confirms another course of this attempt: it is left out")
        self._confirmations[sender] = data
        self._take(sender, data, message, keep=True)

    def confirmations(self) -> bytes:
        """Close stage 4; for every active site."""
        self._close(Stage.CONFIRM, Stage.UNMASK)
        return encode_broadcast(Confirmations(_in_order(self._confirmations)), self._context)

    def receive_unmask(self, site: str, data: bytes) -> None:
        """Stage 5: a site's shares."""
        sender, body, message = self._expect(Stage.UNMASK, site, data, Unmask)
        due = [(peer, SEED_SHARE if peer in self._survivors else KEY_SHARE) for peer in sorted(self._partners)]
        if [(peer, kind) for peer, kind, _ in body.shares] != due:
            raise ForgedShares(f"site {site!r} did not send exactly the shares that are due: it is left out")
        self._unmask[sender] = {peer: share for peer, _, share in body.shares}
        self._take(sender, data, message)

    def total(self) -> tuple[NDArray[np.uint32], tuple[str, ...]]:
        """Close stage 5: the sum (uint32 [size], modulo 2^32) and the sites whose vectors are in it.

        Raises ForgedShares where no group of helpers' shares gives back what their owner committed to.
        """
        self._close(Stage.UNMASK, Stage.DONE)
        plus: list[Secret] = []
        minus: list[Secret] = []
        try:
            self._recover_masks(plus, minus)
            apply_masks(self._sum, plus, minus)
            reduce(self._layout, self._sum)
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

    @property
    def survivor_names(self) -> tuple[str, ...]:
        """The sites whose vectors came."""
        return self._attempt.names(self._survivors)

    def course(self) -> dict[str, list[str] | str]:
        """Whom the sites masked with, whose vectors came, and the statement (hex) of it that they signed."""
        return {
            "partners": list(self._attempt.names(self._partners)),
            "survivors": list(self.survivor_names),
            "statement": self._statement.hex(),
        }

    def _expect(self, stage: Stage, site: str, data: bytes, body_type: type[B]) -> tuple[int, B, Message]:
        index = self._attempt.index(site)
        if self._stage is not stage:
            raise OutOfTurn(f"{body_type.__name__} of site {site!r} came in stage {self._stage.value!r}: refused")
        if index not in self._active:
            raise OutOfTurn(f"site {site!r} was lost before stage {stage.value!r}: it can join the next attempt")
        if index in self._arrived:
            raise OutOfTurn(f"site {site!r} sent {body_type.__name__} twice: the second is refused")
        sender, body, message = expect_signed(data, body_type, self._context, self._attempt.sites, self._roster)
        if sender != index:
            raise BadSignature(f"site {site!r} sent a message in the name of {self._attempt.sites[sender]!r}: refused")
        return sender, body, message

    def _take(self, sender: int, data: bytes, message: Message, keep: bool = False) -> None:
        self._arrived.add(sender)
        self.received.append(received(self._attempt.sites[sender], data, message, keep))

    def _close(self, stage: Stage, following: Stage) -> None:
        if self._stage is not stage:
            raise OutOfTurn(f"stage {stage.value!r} cannot be closed: the open one is {self._stage.value!r}")
        if len(self._arrived) < self._attempt.minimum:
            self._stage = Stage.FAILED
            lost = ", ".join(self._attempt.names(set(range(len(self._attempt.sites))) - self._arrived))
            raise TooFewSites(
                f"only {len(self._arrived)} of the {self._attempt.minimum} sites that are needed are left after stage "
                f"{stage.value!r} (lost: {lost}): start a new attempt"
            )
        self._active, self._arrived = self._arrived, set()
        self._stage = following

    def _recover_masks(self, plus: list[Secret], minus: list[Secret]) -> None:
        """Keys of the streams to add to the running sum and to take from it."""
        helpers = self._honest_helpers()
        lagrange = shamir.weights([helper + 1 for helper in helpers])
        for owner in sorted(self._partners):
            secret = self._recover(owner, helpers, lagrange)
            if secret is None:
                senders = ", ".join(self._attempt.names(helpers))
                raise ForgedShares(
                    f"the shares of site {self._attempt.sites[owner]!r} from {senders} do not fit what it committed "
                    "to: it or one of them is faulty; start a new attempt without it"
                )
            if owner in self._survivors:
                minus.append(self_mask_key(secret, owner, self._context))
            else:
                for survivor in sorted(self._survivors):
                    key = pair_mask_key(secret, owner, survivor, self._keys[survivor].mask_key, self._context)
                    # The survivor added the common mask if it comes first.
                    (minus if survivor < owner else plus).append(key)
            secret.wipe()

    def _honest_helpers(self) -> tuple[int, ...]:
        """`threshold` sites whose shares give back what every owner committed to: one site that sends wrong shares
        spoils nothing while enough others are there, of several it depends on who they are. Where no such group is
        found, the first."""
        there, size = sorted(self._unmask), self._attempt.threshold
        # Neighbours first: whoever it is that sends wrong shares, some of these groups are without it.
        neighbours = (tuple(sorted((there + there)[start : start + size])) for start in range(len(there)))
        groups = list(dict.fromkeys(islice(chain(neighbours, combinations(there, size)), _TRIES)))
        for group in groups if len(groups) > 1 else ():
            lagrange = shamir.weights([helper + 1 for helper in group])
            found = [self._recover(owner, group, lagrange) for owner in sorted(self._partners)]
            fitting = all(found)
            for secret in filter(None, found):
                secret.wipe()
            if fitting:
                return group
        return groups[0]

    def _recover(self, owner: int, helpers: Sequence[int], lagrange: Sequence[int]) -> Secret | None:
        """The owner's secret, None where the helpers' shares do not give back what it committed to."""
        try:
            secret = shamir.combine([self._unmask[helper][owner] for helper in helpers], lagrange)
        except ForgedShares:
            return None
        if owner in self._survivors:
            fits = seed_commitment(secret, owner, self._context) == self._keys[owner].seed_commitment
        else:
            fits = public_key(secret) == self._keys[owner].mask_key
        return secret if fits else None


def _in_order(messages: dict[int, bytes]) -> tuple[bytes, ...]:
    return tuple(messages[index] for index in sorted(messages))
