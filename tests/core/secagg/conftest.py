"""A consortium in one process: drives the sites and the aggregator of an attempt, and loses sites as told."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from fedsam_core.secagg import (
    AggregatorSession,
    Attempt,
    Lane,
    PlainAggregator,
    SiteSession,
    VectorLayout,
    default_threshold,
    development_roster,
    plain_input,
)

STAGES = ("advertise", "share", "masked", "confirm", "unmask")


def repeatable(seed: str) -> Callable[[int], bytes]:
    """Entropy that is the same for the same seed."""

    def blocks() -> Iterator[bytes]:
        counter = 0
        while True:
            yield hashlib.sha256(f"{seed}/{counter}".encode()).digest()
            counter += 1

    source = blocks()

    def entropy(count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += next(source)
        return data[:count]

    return entropy


@dataclass
class Consortium:
    """One attempt. `lost` maps a site to (stage, "before" | "during" | "after"): when it is last heard of."""

    n: int
    threshold: int | None = None
    attempt_number: int = 0
    size: int = 64
    layout: VectorLayout | None = None
    seed: str = "x"
    lost: dict[str, tuple[str, str]] = field(default_factory=dict)
    model_hashes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites = tuple(f"site{i}" for i in range(self.n))
        self.roster, self.identities = development_roster(self.sites, repeatable("identities"))
        self.layout = self.layout or VectorLayout((Lane("a", self.size, 1.0),), self.n)
        self.attempt = self.make_attempt("model")
        self.aggregator = AggregatorSession(self.attempt, self.roster, self.layout)
        self.sessions = {site: self.make_session(site) for site in self.sites}
        generator = np.random.default_rng(7)
        self.vectors = {site: generator.integers(0, 2**32, self.layout.size, dtype=np.uint32) for site in self.sites}
        self.sent: dict[str, dict[str, bytes]] = {stage: {} for stage in STAGES}
        self.broadcast: dict[str, bytes | dict[str, bytes]] = {}

    def make_attempt(self, model_hash: str) -> Attempt:
        threshold = self.threshold or default_threshold(self.n)
        return Attempt("run", 3, self.attempt_number, "layout", "config", model_hash, self.sites, threshold)

    def make_session(self, site: str) -> SiteSession:
        attempt = self.make_attempt(self.model_hashes.get(site, "model"))
        entropy = repeatable(f"{self.seed}/{site}")
        return SiteSession(attempt, site, self.identities[site], self.roster, self.layout, entropy)

    def call(self, stage: str, site: str, incoming: bytes | dict[str, bytes] | None) -> bytes:
        session = self.sessions[site]
        if stage == "advertise":
            return session.advertise()
        if stage == "share":
            return session.share(incoming)
        if stage == "masked":
            session.deliver(incoming[site])
            return session.masked_input(self.vectors[site])
        return session.confirm(incoming) if stage == "confirm" else session.unmask(incoming)

    def receive(self, stage: str, site: str, message: bytes) -> None:
        receivers = {
            "advertise": self.aggregator.receive_advertise,
            "share": self.aggregator.receive_share,
            "masked": self.aggregator.receive_masked,
            "confirm": self.aggregator.receive_confirmation,
            "unmask": self.aggregator.receive_unmask,
        }
        receivers[stage](site, message)

    def close(self, stage: str):
        closers = {
            "advertise": self.aggregator.advertised,
            "share": self.aggregator.deliveries,
            "masked": self.aggregator.survivors,
            "confirm": self.aggregator.confirmations,
            "unmask": self.aggregator.total,
        }
        return closers[stage]()

    def hears(self, site: str, stage: str, when: str) -> bool:
        """Whether `site` is still there at that moment."""
        if site not in self.lost:
            return True
        moments = [(s, w) for s in STAGES for w in ("before", "during", "after")]
        return moments.index((stage, when)) < moments.index(self.lost[site])

    def step(self, stage: str) -> None:
        """Everything of a stage but closing it."""
        incoming = self.broadcast.get(STAGES[STAGES.index(stage) - 1]) if stage != "advertise" else None
        for site in self.aggregator.active:
            if not self.hears(site, stage, "before"):
                continue
            message = self.call(stage, site, incoming)
            self.sent[stage][site] = message
            if self.hears(site, stage, "during"):
                self.receive(stage, site, message)

    def run(self, until: str | None = None):
        """The whole protocol; with `until`, up to where that stage's messages have come and it is not closed."""
        for stage in STAGES:
            self.step(stage)
            if stage == until:
                return None
            result = self.close(stage)
            self.broadcast[stage] = result
        return result

    def plain(self, contributors: tuple[str, ...]):
        attempt = Attempt("run", 3, 0, "layout", "config", "model", self.sites, 1)
        aggregator = PlainAggregator(attempt, self.roster, self.layout)
        for site in contributors:
            message = plain_input(attempt, site, self.identities[site], self.layout, self.vectors[site])
            aggregator.receive_plain(site, message)
        return aggregator.total()


@pytest.fixture
def consortium() -> type[Consortium]:
    return Consortium


@pytest.fixture
def entropy() -> Callable[[str], Callable[[int], bytes]]:
    return repeatable
