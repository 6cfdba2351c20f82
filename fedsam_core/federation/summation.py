"""One sum over an engine: the driver relays sites' messages, counts them, and learns the sum alone.

Stages (Bonawitz et al. 2017, eprint 2017/281, figure 4): advertise keys, share keys, masked input, consistency, unmask.
A site that does not answer a stage in time is left out of what follows; the sum of the others is still opened while
enough of them remain. Whoever is left out before its vector has come is not in the sum; whoever is lost later is.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from types import MappingProxyType
from typing import Any

import numpy as np

from fedsam_core.errors import RoundError, SecureSumError
from fedsam_core.federation.attendance import Patience
from fedsam_core.federation.engine import Engine, describe_failure
from fedsam_core.federation.ledger import Ledger
from fedsam_core.federation.tasks import Task, attempt_to_json
from fedsam_core.secagg.aggregator import AggregatorSession
from fedsam_core.secagg.attempt import Attempt
from fedsam_core.secagg.keys import Roster
from fedsam_core.secagg.layout import VectorLayout
from fedsam_core.secagg.packing import pack
from fedsam_core.secagg.plain import PlainAggregator
from fedsam_core.secagg.quantize import decode_sum
from fedsam_core.secagg.record import Chain, Received
from fedsam_core.secagg.refusals import BareLane, MalformedMessage, TooFewSites

RECORDED_BYTES = 4096
"""A sum up to this size stands in the record itself; a longer one is named there by its hash."""


@dataclass(frozen=True)
class Contribution:
    """How a site is asked for its vector.

    Attributes:
        method: the site's method.
        keyword: of what is sent beside the keys' shares; "" for nothing.
        common: that message, the same for all sites that need it.
        step: what leads from the state before to this one, for sites that hold that.
        holders: sites that hold the state already and are sent none of it.
        followers: sites that hold the state before, and are sent the step.
        left_out: sites that are not asked at all, and why.
        own: what is told one site alone, by keyword.
    """

    method: str
    keyword: str = ""
    common: bytes = b""
    step: bytes = b""
    holders: frozenset[str] = frozenset()
    followers: frozenset[str] = frozenset()
    left_out: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Total:
    """An opened sum.

    Attributes:
        lanes: float64 [size] by lane name, summed over the contributors.
        contributors: the sites whose values are in it.
        lost: why each other site is not.
        layout: of the vector.
        packed: the sum itself, as `packing` says.
        entry: number of its entry in the record.
        about: what was summed, see `Task.about`.
    """

    lanes: dict[str, np.ndarray[Any, np.dtype[np.float64]]]
    contributors: tuple[str, ...]
    lost: dict[str, str]
    layout: VectorLayout
    packed: bytes
    entry: int
    about: str


class HalfOpened(RoundError):
    """An attempt that failed after sites had been asked to open its sum.

    Some may have sent their shares, and answer the same question for no other survivors: the next attempt is for these.
    """

    def __init__(self, why: str, survivors: tuple[str, ...]) -> None:
        super().__init__(why)
        self.survivors = survivors


class Relay:
    """Asks the sites that are still present for one stage of one sum after the other.

    Attributes:
        lost: why sites are not asked any more, from `left_out` on.
        cut: those of them that were only slower than the others were to wait for.
    """

    def __init__(
        self,
        engine: Engine,
        attempt: Attempt,
        task: Task,
        ledger: Ledger,
        patience: Patience,
        left_out: Mapping[str, str] = MappingProxyType({}),
        needed: int = 0,
    ) -> None:
        """`needed`: fewest sites whose values are to be in the sum, beyond what the attempt asks for."""
        self.lost = dict(left_out)
        self.cut: set[str] = set()
        self._engine = engine
        self.attempt = attempt
        self.task = task
        self._ledger = ledger
        self._patience = patience
        self._needed = max(needed, attempt.minimum)
        self._covered: Callable[[Collection[str]], bool] = lambda sites: True

    def about(self) -> dict[str, Any]:
        """What is recorded of the sum: its attempt and its task."""
        return {"attempt": asdict(self.attempt), "task": self.task.model_dump()}

    def cover(self, layout: VectorLayout) -> None:
        """From now on, sites are enough only if every lane has enough of them."""

        def covered(sites: Collection[str]) -> bool:
            try:
                layout.require_covered(sites)
            except BareLane:
                return False
            return True

        self._covered = covered

    def announce(self, receive: Callable[[str, bytes], None]) -> None:
        """The first stage: what the sum is about."""
        message = attempt_to_json(self.attempt)
        task = self.task.model_dump()
        keywords = {"attempt": message, "task": task}
        sites = [site for site in self.attempt.sites if site not in self.lost]
        size = len(message) + len(json.dumps(task).encode())
        self._stage("advertise", dict.fromkeys(sites, keywords), dict.fromkeys(sites, size), receive, self._needed)

    def broadcast(
        self,
        method: str,
        keyword: str,
        message: bytes,
        receive: Callable[[str, bytes], None],
        vectors_came: bool,
    ) -> None:
        """A stage in which every present site gets the same message. Once the vectors came the sum is settled, and only
        so many sites are needed as can open it."""
        present = [site for site in self.attempt.sites if site not in self.lost]
        args = {site: {keyword: message} for site in present}
        needed = self.attempt.minimum if vectors_came else self._needed
        self._stage(method, args, dict.fromkeys(present, len(message)), receive, needed)

    def collect(
        self, how: Contribution, deliveries: Mapping[str, bytes], receive: Callable[[str, bytes], None]
    ) -> None:
        """The stage in which sites contribute; each gets its own delivery, and what it lacks of the global state."""
        present = [site for site in deliveries if site not in self.lost]
        args: dict[str, dict[str, Any]] = {site: {"delivered": deliveries[site]} for site in present}
        sizes = {site: len(deliveries[site]) for site in present}
        if how.keyword:
            common, step = self._engine.share(how.common), self._engine.share(how.step)
            for site in present:
                follows = site in how.followers
                sent = b"" if site in how.holders else how.step if follows else how.common
                args[site][how.keyword] = None if site in how.holders or follows else common
                if follows:
                    args[site]["step"] = step
                sizes[site] += len(sent)
        for site in present:
            if told := how.own.get(site):
                args[site] |= told
                sizes[site] += len(json.dumps(dict(told)))
        self._stage(how.method, args, sizes, receive, self._needed)

    def _stage(
        self,
        method: str,
        args: Mapping[str, Mapping[str, Any]],
        sizes: Mapping[str, int],
        receive: Callable[[str, bytes], None],
        needed: int,
    ) -> None:
        purpose, kind = f"{self.task.purpose}/{method}", self.task.kind_of_call(method)
        deadline, wait = self._patience.deadline(kind), self._patience.after_enough
        answered: dict[str, float] = {}
        closed_at = math.inf

        def on_answer(site: str, seconds: float) -> float:
            nonlocal closed_at
            answered[site] = seconds
            if wait is not None and closed_at == math.inf and len(answered) >= needed and self._covered(answered):
                closed_at = seconds + wait
            return closed_at

        replies, missing = self._engine.call(method, args, deadline, on_answer)
        if answered:
            self._patience.took(kind, max(answered.values()))
        self.lost.update(missing)
        for site in missing:
            if self._engine.silent(site):
                if closed_at < deadline:
                    self.cut.add(site)
                else:
                    self._patience.missed(site, kind, deadline)
        for site in sorted(args):
            self._ledger.add(site, "down", self.attempt.round, purpose, sizes[site])
            if site not in replies:
                continue
            try:
                if not isinstance(replies[site], bytes):
                    raise MalformedMessage(f"site {site} answered {method} with something else than a message")
                self._ledger.add(site, "up", self.attempt.round, purpose, len(replies[site]))
                receive(site, replies[site])
            except SecureSumError as error:  # a bad message excludes its sender, not the round
                self.lost[site] = describe_failure(error)
        left = len(args.keys() - self.lost.keys())
        if self.attempt.minimum <= left < needed:  # fewer are refused by the aggregator itself
            gone = ", ".join(site for site in self.attempt.sites if site in self.lost)
            raise TooFewSites(f"only {left} of the {needed} sites that it needs are left after {method} (lost: {gone})")


def secure_sum(relay: Relay, roster: Roster, layout: VectorLayout, how: Contribution, record: Chain) -> Total:
    """Opens the sum of the sites' masked vectors, and records how it came about, or why it did not.

    Raises:
        HalfOpened: too few sites are left in the last stage.
        RoundError: too few sites are left before, with the reason for each that is not.
    """
    attempt = relay.attempt
    aggregator = None
    opening = False
    try:
        aggregator = AggregatorSession(attempt, roster, layout)
        relay.cover(layout)
        relay.announce(aggregator.receive_advertise)
        relay.broadcast("share", "advertised", aggregator.advertised(), aggregator.receive_share, vectors_came=False)
        relay.collect(how, aggregator.deliveries(), aggregator.receive_masked)
        relay.broadcast("confirm", "survivors", aggregator.survivors(), aggregator.receive_confirmation, True)
        confirmations = aggregator.confirmations()
        opening = True
        relay.broadcast("unmask", "confirmations", confirmations, aggregator.receive_unmask, True)
        total, contributors = aggregator.total()
        return _opened(relay, layout, total, contributors, record, aggregator.received, aggregator.course())
    except SecureSumError as error:
        failed = _failed(relay, error, record, aggregator.received if aggregator else [])
        if aggregator is not None and opening:
            raise HalfOpened(str(failed), aggregator.survivor_names) from error
        raise failed from error


def plain_sum(relay: Relay, roster: Roster, layout: VectorLayout, how: Contribution, record: Chain) -> Total:
    """The sum of the same vectors without masks, for comparison: the driver sees each of them.

    Raises:
        RoundError: too few sites are left, with the reason for each that is not.
    """
    aggregator = PlainAggregator(relay.attempt, roster, layout)
    relay.cover(layout)
    try:
        relay.announce(lambda site, reply: None)
        relay.collect(how, dict.fromkeys(relay.attempt.sites, b""), aggregator.receive_plain)
        total, contributors = aggregator.total()
        return _opened(relay, layout, total, contributors, record, aggregator.received, None)
    except SecureSumError as error:
        raise _failed(relay, error, record, aggregator.received) from error


def _opened(
    relay: Relay,
    layout: VectorLayout,
    total: np.ndarray[Any, np.dtype[np.uint32]],
    contributors: tuple[str, ...],
    record: Chain,
    received: list[Received],
    course: dict[str, list[str] | str] | None,
) -> Total:
    lanes = decode_sum(layout, total, contributors)
    absent = [site for site in relay.attempt.sites if site not in contributors]
    lost = {site: relay.lost.get(site, "gave no contribution") for site in absent}
    packed = pack(layout, total).tobytes()
    record.add(
        "sum",
        **relay.about(),
        layout=layout.to_dict(),
        messages=received,
        course=course,
        contributors=list(contributors),
        lost=relay.lost,
        sum={
            "sha256": sha256(packed).hexdigest(),
            "bytes": len(packed),
            "values": packed.hex() if len(packed) <= RECORDED_BYTES else None,
        },
    )
    return Total(lanes, contributors, lost, layout, packed, len(record.lines) - 1, relay.task.about)


def _failed(relay: Relay, error: SecureSumError, record: Chain, received: list[Received]) -> RoundError:
    record.add("failed", **relay.about(), messages=received, lost=relay.lost, reason=describe_failure(error))
    reasons = "".join(f"; lost {site}: {reason}" for site, reason in sorted(relay.lost.items()))
    return RoundError(f"round {relay.attempt.round} failed: {error}{reasons}")
