"""Sites and aggregator under arbitrary orders of good, damaged, repeated, old, crossed and made-up messages.

Hypothesis plays the driver and the network. What has to hold is checked after every step: a refusal has a name, nobody
answers twice, who refused is out and holds nothing, no two sites open different sums, and a total is exact.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as explore

from fedsam_core.errors import SecureSumError
from fedsam_core.secagg import Lane, VectorLayout, refusals
from fedsam_core.secagg.aggregator import Stage
from fedsam_core.secagg.keys import Secret, channel_key
from fedsam_core.secagg.layout import RINGS
from fedsam_core.secagg.messages import (
    CIPHERTEXT_BYTES,
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
    decode,
    encode_broadcast,
    encode_signed,
)
from fedsam_core.secagg.packing import reduce, unpack
from fedsam_core.secagg.refusals import ForgedKeys, ForgedShares, OutOfTurn, TooFewSites
from fedsam_core.secagg.site import SiteState

STAGES = ("advertise", "share", "masked", "confirm", "unmask")
METHODS = ("advertise", "share", "deliver", "masked_input", "confirm", "unmask")
STAGE_OF = {"advertise": "advertise", "share": "share", "masked_input": "masked", "confirm": "confirm"}
NAMED = tuple(
    one for one in vars(refusals).values() if isinstance(one, type) and one.__module__ == refusals.__name__
)  # not SecureSumError itself: whoever refuses a message says why by name
DUE = {
    SiteState.NEW: "advertise",
    SiteState.ADVERTISED: "share",
    SiteState.SHARED: "deliver",
    SiteState.READY: "masked_input",
    SiteState.MASKED: "confirm",
    SiteState.CONFIRMED: "unmask",
}
OPEN_STAGE = {Stage(stage if stage != "masked" else "masked input"): stage for stage in STAGES}
REPEATABLE = settings(
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Secret]:
    """Every secret that is made from here on, in order."""
    secrets: list[Secret] = []
    original = Secret.__init__

    def remember(self: Secret, raw: bytes | bytearray) -> None:
        original(self, raw)
        secrets.append(self)

    monkeypatch.setattr(Secret, "__init__", remember)
    return secrets


@st.composite
def layouts(draw: st.DrawFn, n: int) -> VectorLayout:
    """One to four lanes, some of which not all sites have a part in."""
    sites = tuple(f"site{i}" for i in range(n))
    fewest = draw(st.sampled_from([3, 3, 3, n]))
    parts = st.sets(st.sampled_from(sites), min_size=fewest).map(lambda chosen: tuple(sorted(chosen)))
    lanes = st.tuples(st.integers(1, 9), st.sampled_from(RINGS), st.one_of(st.none(), parts))
    drawn = draw(st.lists(lanes, min_size=1, max_size=4))
    return VectorLayout(
        tuple(Lane(f"{i}", size, 1.0, bits, part) for i, (size, bits, part) in enumerate(drawn)), n, fewest
    )


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The message with another byte, cut off, or with more at its end."""
    at = draw(st.integers(0, len(data) - 1))
    how = draw(st.sampled_from(["flip", "flip", "flip", "cut", "grow"]))
    if how == "flip":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    return data[:at] if how == "cut" else data + data[: at + 1]


def expected_sum(parties: Any, contributors: tuple[str, ...]) -> np.ndarray:
    """What the ring makes of the plain sum, in Python's integers."""
    layout = parties.layout
    modulus = [2**lane.bits for lane in layout.lanes for _ in range(lane.size)]
    rows = [[int(value) for value in parties.vectors[site]] for site in contributors]
    return np.array([sum(column) % m for column, m in zip(zip(*rows, strict=True), modulus, strict=True)], np.uint32)


def outcome(call: Callable[..., Any], *args: Any) -> tuple[Any, SecureSumError | None]:
    """What the call gives, or by what name it was refused; anything else that is raised fails the test."""
    try:
        return call(*args), None
    except NAMED as refusal:
        return None, refusal


def kept(secrets: list[Secret], public: bytes = b"") -> list[Secret]:
    """Those that were not wiped; a commitment to a seed is made as a secret, but is part of a `public` message."""
    return [secret for secret in secrets if secret._raw and bytes(secret._raw) not in public]


class UnsoundNetwork(RuleBasedStateMachine):
    """An attempt of an honest aggregator and honest sites: messages are lost, damaged, repeated, crossed and old, and
    methods are called whether due or not."""

    def __init__(self, consortium: Callable[..., Any], made: list[Secret], ends: Counter[str]) -> None:
        super().__init__()
        self._consortium, self._made, self._ends = consortium, made, ends

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(3, 6), "n")
        threshold = data.draw(st.integers(n // 2 + 1, n), "threshold")
        layout = data.draw(layouts(n), "layout")
        self.old = self._consortium(n, threshold=threshold, layout=layout, attempt_number=4, seed="old")
        self.old.run()
        self.parties = self._consortium(n, threshold=threshold, layout=layout, attempt_number=5, seed="new")
        self.sites, self.context = self.parties.sites, self.parties.attempt.digest()
        self.minimum = max(threshold, 3)
        self._made.clear()
        self.secrets: dict[str, list[Secret]] = {}
        for site in self.sites:  # anew, now that it is seen which secrets are whose
            self.parties.sessions[site] = self.parties.make_session(site)
            self.secrets[site] = self._made[:]
            self._made.clear()
        self.answers: Counter[tuple[str, str]] = Counter()
        self.said: dict[tuple[str, str], bytes] = {}  # (stage, site) -> message, of this attempt
        self.taken: set[tuple[str, str]] = set()
        self.refused: set[str] = set()
        self.lost: set[str] = set()
        self.partners: dict[str, set[int]] = {}  # with whom a site masks
        self.misled: set[str] = set()  # accepted another delivery than the aggregator's
        self.told: dict[str, tuple[int, ...]] = {}  # the survivors that a site confirmed
        self.opened: dict[str, dict[int, int]] = {}  # a site's Unmask: peer -> kind of share
        self.split = False
        # Some of the attempt has gone well by the time that things happen; or but for one site, which was lost.
        leaves = data.draw(st.sampled_from([*STAGES[1:3], None]), "leaves")
        if leaves is not None and n > 3:
            self.go_on_until(leaves)
            self.lost.add(self.sites[data.draw(st.integers(0, n - 1), "left")])
        self.go_on_until(data.draw(st.sampled_from(STAGES), "begun"))

    # What sites and aggregator are given, and what must hold of what they make of it

    def ask(self, site: str, method: str, payload: Any) -> bytes | None:
        session = self.parties.sessions[site]
        state = session.state
        answer, refusal = outcome(getattr(session, method), *([] if method == "advertise" else [payload]))
        self.secrets[site] += self._made
        self._made.clear()
        assert isinstance(refusal, OutOfTurn) == (DUE.get(state) != method)
        if isinstance(refusal, OutOfTurn):
            assert session.state is state  # being asked out of turn harms nobody
            return None
        if refusal is not None:
            self.refused.add(site)
            return None
        assert site not in self.refused
        self.answers[site, method] += 1
        self.check_accepted(site, method, decode(payload).body if isinstance(payload, bytes) else None)
        if method == "deliver" and payload != self.broadcast_for(site, method):
            self.misled.add(site)
        elif method == "unmask":
            self.check_opened(site, answer)
        if answer is not None:
            self.said[STAGE_OF.get(method, method), site] = answer
        return answer

    def check_accepted(self, site: str, method: str, body: Any) -> None:
        """What the broadcast must be, when a site goes on with it: nothing that would let the server or the network
        have it mask or open with fewer peers than protect it, or with others than said so themselves."""
        index = self.sites.index(site)
        if method in ("share", "unmask"):
            stage = {"share": "advertise", "unmask": "confirm"}[method]
            peers = {peer: self.said.get((stage, peer)) for peer in self.sites}
            assert set(body.parts) <= set(peers.values())
            assert len(body.parts) == len(set(body.parts)) >= self.minimum
            if method == "share":
                assert peers[site] in body.parts
                return
            signed = [peer for peer in self.sites if peers[peer] in body.parts]
            assert {self.story(peer) for peer in signed} == {self.story(site)}
        elif method == "deliver":
            senders = [peer for peer, _ in body.ciphertexts]
            assert body.recipient == index
            assert len({index, *senders}) == len(senders) + 1 >= self.minimum
            self.partners[site] = {index, *senders}
        elif method == "confirm":
            assert {index} <= set(body.sites) <= self.partners[site]
            assert len(body.sites) >= self.minimum
            self.check_covered(self.parties.attempt.names(body.sites))
            self.told[site] = body.sites

    def story(self, site: str) -> tuple[Any, ...]:
        """What a site signed: with whom it masked, and who survived."""
        return tuple(sorted(self.partners[site])), self.told[site]

    def check_covered(self, survivors: tuple[str, ...]) -> None:
        for lane in self.parties.layout.lanes:
            assert len(set(survivors) & set(lane.sites or self.sites)) >= self.parties.layout.min_contributors

    def check_opened(self, site: str, answer: bytes) -> None:
        """One share of each partner's, of the kind that the survivors say that the site itself confirmed."""
        shares = decode(answer).body.shares
        partners = sorted(self.partners[site])
        assert [peer for peer, _, _ in shares] == partners
        self.opened[site] = {peer: kind for peer, kind, _ in shares}
        assert self.opened[site] == {p: SEED_SHARE if p in self.told[site] else KEY_SHARE for p in partners}

    def hand_in(self, stage: str, site: str, data: bytes) -> None:
        aggregator = self.parties.aggregator
        before = footprint(aggregator)
        _, refusal = outcome(self.parties.receive, stage, site, data)
        self._made.clear()
        if refusal is not None:
            assert footprint(aggregator) == before  # as if it had never come
            return
        assert OPEN_STAGE.get(aggregator.stage) == stage
        assert site in before[2]  # it was waited for
        assert self.said.get((stage, site)) == data  # nobody spoke in another's name, or from another attempt
        assert (stage, site) not in self.taken
        self.taken.add((stage, site))
        if stage == "confirm":  # only of those that were told what the aggregator saw
            assert self.told[site] == decode(self.parties.broadcast["masked"]).body.sites
            assert site not in self.misled

    def close_stage(self, stage: str) -> None:
        aggregator = self.parties.aggregator
        due = OPEN_STAGE.get(aggregator.stage)
        result, refusal = outcome(self.parties.close, stage)
        self._made.clear()
        assert isinstance(refusal, OutOfTurn) == (stage != due)
        if refusal is not None:
            assert not isinstance(refusal, ForgedShares)  # all sites are honest
            assert stage != due or aggregator.stage is Stage.FAILED
            return
        assert len([site for site in self.sites if (stage, site) in self.taken]) >= self.minimum
        if stage == "masked":
            self.check_covered(self.parties.attempt.names(decode(result).body.sites))
        if stage != "unmask":
            self.parties.broadcast[stage] = result
            return
        total, contributors = result
        assert contributors == tuple(site for site in self.sites if ("masked", site) in self.taken)
        assert len(contributors) >= self.minimum
        self.check_covered(contributors)
        # A site that accepted shares of fewer peers than the others masked with other peers than they did. It signs
        # so, and is left out of the rest, but its vector was added by then.
        if not self.misled & set(contributors):
            np.testing.assert_array_equal(total, expected_sum(self.parties, contributors))
            self._ends["exact"] += 1

    def broadcast_for(self, site: str, method: str) -> Any:
        """What the aggregator has for the site at that stage; its vector where that is asked for."""
        if method == "masked_input":
            return self.parties.vectors[site]
        earlier = {"share": "advertise", "deliver": "share", "confirm": "masked", "unmask": "confirm"}.get(method)
        sent = self.parties.broadcast.get(earlier)
        return sent.get(site) if isinstance(sent, dict) else sent

    def play(self, stage: str, site: str) -> bytes | None:
        """An honest turn of a site, as far as it can still take it."""
        answer = None
        for method in ("deliver", "masked_input") if stage == "masked" else (stage,):
            given = self.broadcast_for(site, method)
            if DUE.get(self.parties.sessions[site].state) == method and (given is not None or method == "advertise"):
                answer = self.ask(site, method, given)
        return answer

    def broadcasts(self) -> list[bytes]:
        """Of this attempt and of the one before: any stage's, any site's."""
        casts: list[bytes] = []
        for parties in (self.parties, self.old):
            for sent in (parties.broadcast[stage] for stage in STAGES[:-1] if stage in parties.broadcast):
                casts += sent.values() if isinstance(sent, dict) else [sent]
        return casts

    def due_at(self, data: st.DataObject) -> tuple[str, str | None]:
        """Some site at some stage, and the method that is due of it."""
        self.go_on_until(data.draw(st.sampled_from(STAGES), "when"))
        site = data.draw(st.sampled_from(self.sites), "site")
        if site not in self.lost and data.draw(st.sampled_from([False, False, True]), "ahead"):
            self.play("masked", site)  # no stage ends between a site's mask and its vector
        return site, DUE.get(self.parties.sessions[site].state)

    def go_on(self, stage: str) -> None:
        """Every site that is there answers, all messages arrive, the stage is closed."""
        for site in self.sites:  # those too that the aggregator has given up
            message = self.said.get((stage, site)) if site in self.lost else self.play(stage, site)
            if message is not None:
                self.hand_in(stage, site, message)
        self.close_stage(stage)

    def go_on_until(self, stage: str) -> None:
        """To where that stage is open, if it is still to come."""
        while (at := OPEN_STAGE.get(self.parties.aggregator.stage, stage)) in STAGES[: STAGES.index(stage)]:
            self.go_on(at)

    # What happens

    @precondition(lambda self: self.parties.aggregator.stage in OPEN_STAGE)
    @rule(data=st.data())
    def next_stage(self, data: st.DataObject) -> None:
        """All sites answer in some order, but for the one to which something happens; the stage is closed."""
        stage = OPEN_STAGE[self.parties.aggregator.stage]
        order = data.draw(st.permutations(self.sites), "order")
        struck = data.draw(st.sampled_from([None, None, *order]), "struck")
        fate = data.draw(st.sampled_from(["lost", "unheard", "twice", "damaged", "swapped"]), "fate")
        for site in order:
            if site in self.lost or (site == struck and fate == "lost"):
                self.lost.add(site)
                continue
            message = self.play(stage, site) or self.said.get((stage, site))
            if message is None or (site == struck and fate == "unheard"):
                continue
            if site == struck and fate == "damaged":
                self.hand_in(stage, site, data.draw(damaged(message), "damaged"))
            if site == struck and fate == "swapped":
                self.hand_in(stage, data.draw(st.sampled_from(self.sites), "as"), message)
            self.hand_in(stage, site, message)
            if site == struck and fate == "twice":
                self.hand_in(stage, site, message)
        self.close_stage(stage)

    @precondition(lambda self: self.parties.aggregator.stage in OPEN_STAGE)
    @rule(data=st.data())
    def some_answer(self, data: st.DataObject) -> None:
        """Some sites answer, some of their messages arrive; the stage stays open."""
        stage = OPEN_STAGE[self.parties.aggregator.stage]
        for site in data.draw(st.lists(st.sampled_from(self.sites), unique=True, max_size=3), "who"):
            message = self.play(stage, site) if site not in self.lost else None
            if message is not None and data.draw(st.booleans(), "arrives"):
                self.hand_in(stage, site, message)

    @rule(data=st.data())
    def close_any_stage(self, data: st.DataObject) -> None:
        """Too early, too late, again; rarely on time, since that may end the attempt."""
        due = OPEN_STAGE.get(self.parties.aggregator.stage)
        stage = data.draw(st.sampled_from(STAGES), "stage")
        if stage != due or data.draw(st.sampled_from([False] * 5 + [True]), "on time"):
            self.close_stage(stage)

    @rule(data=st.data())
    def hand_in_anything(self, data: st.DataObject) -> None:
        """A message of any site, stage and attempt, whole or damaged, under any site's name, at any stage."""
        sent = [((stage, site), m) for stage in STAGES for site, m in self.old.sent[stage].items()]
        known = [*self.said.items(), *sent]
        (stage, sender), message = data.draw(st.sampled_from(known), "message")
        if data.draw(st.booleans(), "whole"):
            stage = data.draw(st.sampled_from([stage, *STAGES]), "as")
            sender = data.draw(st.sampled_from([sender, *self.sites]), "of")
        else:
            message = data.draw(damaged(message), "damaged")
        self.hand_in(stage, sender, message)

    @rule(data=st.data())
    def ask_anything(self, data: st.DataObject) -> None:
        """Any method with any broadcast. Mostly one that is not due, so that some sites are left for what follows."""
        site = data.draw(st.sampled_from(self.sites), "site")
        method = data.draw(st.sampled_from(METHODS), "method")
        if DUE.get(self.parties.sessions[site].state) == method and data.draw(st.booleans(), "other site"):
            return
        payload = self.broadcast_for(site, method)
        if method not in ("advertise", "masked_input") and (payload is None or data.draw(st.booleans(), "other")):
            payload = data.draw(st.sampled_from(self.broadcasts()), "broadcast")
        self.ask(site, method, payload)

    @rule(data=st.data())
    def spoil_a_broadcast(self, data: st.DataObject) -> None:
        """What is due, with a broadcast that is damaged, old, or meant for another site."""
        site, method = self.due_at(data)
        if method in (None, "advertise"):
            return
        honest, size = self.broadcast_for(site, method), self.parties.layout.size
        if method == "masked_input":
            wrong = [np.zeros(size), np.zeros(size, np.int32), np.zeros(size + 1, np.uint32), np.zeros(0, np.uint32)]
            payload = data.draw(st.sampled_from(wrong), "vector")
        elif honest is not None and data.draw(st.booleans(), "damaged"):
            payload = data.draw(damaged(honest), "broadcast")
        else:
            payload = data.draw(st.sampled_from([cast for cast in self.broadcasts() if cast != honest]), "broadcast")
        self.ask(site, method, payload)
        assert site in self.refused

    @rule(data=st.data())
    def lose_a_site(self, data: st.DataObject) -> None:
        if data.draw(st.sampled_from([False, False, True]), "really"):
            site = data.draw(st.sampled_from(self.sites), "site")
            self.lost.add(site)
            if data.draw(st.booleans(), "closed"):
                self.parties.sessions[site].close()

    # What must hold after every step

    @invariant()
    def nobody_answers_twice(self) -> None:
        assert all(count == 1 for count in self.answers.values())

    @invariant()
    def who_refused_or_ended_is_out_and_holds_nothing(self) -> None:
        for site, session in self.parties.sessions.items():
            if site in self.refused:
                assert session.state is SiteState.CLOSED
            if session.state in (SiteState.CLOSED, SiteState.DONE):
                assert not kept(self.secrets[site], self.said.get(("advertise", site), b""))
                assert not session._received
                assert not session._mask.any()

    @invariant()
    def a_masked_vector_leaves_no_key_behind(self) -> None:
        """From then on a site holds shares alone: its own seed's, and two of each peer."""
        for site, session in self.parties.sessions.items():
            if session.state in (SiteState.READY, SiteState.MASKED, SiteState.CONFIRMED):
                shares = 2 * len(self.partners[site]) - 1
                assert len(kept(self.secrets[site], self.said["advertise", site])) == shares

    @invariant()
    def one_sum_is_opened(self) -> None:
        """The same shares by every site that opened: no peer's seed here and its mask key there."""
        assert len({tuple(sorted(kinds.items())) for kinds in self.opened.values()}) <= 1

    def teardown(self) -> None:
        """Whatever is left of the attempt goes on undisturbed; at its end, however it ended, all secrets are wiped."""
        while (stage := OPEN_STAGE.get(self.parties.aggregator.stage)) is not None:
            self.go_on(stage)
            self.one_sum_is_opened()
        self._ends[self.parties.aggregator.stage.value] += 1
        for site, session in self.parties.sessions.items():
            session.close()
            assert not kept(self.secrets[site], self.said.get(("advertise", site), b""))


class HostileServer(UnsoundNetwork):
    """As before, and sites are sent what the server makes up of all that it has seen."""

    @rule(data=st.data())
    def make_up_a_broadcast(self, data: st.DataObject) -> None:
        site, method = self.due_at(data)
        if method in (None, "advertise", "masked_input"):
            return
        body = data.draw(self.made_up(site, method), "made up")
        answer = self.ask(site, method, encode_broadcast(body, self.context))
        if answer is not None and data.draw(st.booleans(), "arrives"):
            self.hand_in(method, site, answer)

    @rule(data=st.data())
    def hide_peers_from_a_site(self, data: st.DataObject) -> None:
        """It masks with some of the peers that mask with it."""
        self.go_on_until("masked")
        site = data.draw(st.sampled_from(self.sites), "site")
        whole = self.broadcast_for(site, "deliver")
        if whole is None:
            return
        texts = decode(whole).body.ciphertexts
        hidden = data.draw(st.sets(st.sampled_from(texts), min_size=1, max_size=2), "hidden")
        body = Delivery(self.sites.index(site), tuple(pair for pair in texts if pair not in hidden))
        self.ask(site, "deliver", encode_broadcast(body, self.context))
        message = self.ask(site, "masked_input", self.parties.vectors[site])
        if message is not None:
            self.hand_in("masked", site, message)

    @precondition(lambda self: not self.split)
    @rule(data=st.data())
    def tell_two_stories(self, data: st.DataObject) -> None:
        """Each site is told one of two sets of survivors, and given whatever signatures fit its own."""
        self.split = True
        self.go_on_until("confirm")
        indices = range(len(self.sites))
        without = st.sets(st.sampled_from(indices), max_size=2).map(lambda out: sorted(set(indices) - out))
        stories = [data.draw(without, "survivors") for _ in range(2)]
        others = data.draw(st.sets(st.sampled_from(self.sites), max_size=2), "others")
        for site in self.sites:
            story = Survivors(tuple(stories[site in others]))
            self.ask(site, "confirm", encode_broadcast(story, self.context))
        for site in self.sites:
            signed = [self.said.get(("confirm", peer)) for peer in self.sites if (peer in others) == (site in others)]
            parts = [part for part in signed if part is not None]
            parts += parts[: data.draw(st.integers(0, 1), "repeated")]
            self.ask(site, "unmask", encode_broadcast(Confirmations(tuple(parts)), self.context))

    def made_up(self, site: str, method: str) -> st.SearchStrategy[Any]:
        """A well-formed body of the kind that is due."""
        index, n = self.sites.index(site), len(self.sites)
        if method == "confirm":
            return st.sets(st.integers(0, n)).map(lambda indices: Survivors(tuple(sorted(indices))))
        if method == "deliver":
            own = decode(self.broadcast_for(site, method) or self.old.broadcast["share"][site]).body.ciphertexts
            sent = [*self.parties.broadcast.get("share", {}).values(), *self.old.broadcast["share"].values()]
            texts = st.sampled_from([text for cast in sent for _, text in decode(cast).body.ciphertexts])
            some = st.sets(st.sampled_from(own)).map(sorted)
            other = st.dictionaries(st.integers(0, n), texts).map(lambda pairs: sorted(pairs.items()))
            to = st.sampled_from([index, index, *range(n)])
            return st.builds(lambda recipient, pairs: Delivery(recipient, tuple(pairs)), to, st.one_of(some, other))
        stage, kind = ("advertise", Advertised) if method == "share" else ("confirm", Confirmations)
        old = [*self.old.sent[stage].values()]
        now = [message for (at, _), message in self.said.items() if at == stage]
        ordered = st.lists(st.sampled_from(now or old), unique=True).map(
            lambda parts: sorted(parts, key=(now or old).index)
        )
        return st.one_of(ordered, st.lists(st.sampled_from(now + old))).map(lambda parts: kind(tuple(parts)))


def footprint(aggregator: Any) -> tuple[Any, ...]:
    """All that a message changes in an aggregator that takes it."""
    return aggregator.stage, aggregator.active, aggregator.waiting, len(aggregator.received), aggregator._sum.tobytes()


@pytest.mark.parametrize("machine", [UnsoundNetwork, HostileServer])
def test_whatever_happens_in_an_attempt_its_promises_hold(consortium, made, machine) -> None:
    ends: Counter[str] = Counter()
    steps = settings(REPEATABLE, max_examples=90, stateful_step_count=15)
    explore(lambda: machine(consortium, made, ends), settings=steps)
    print(ends)


# The aggregator alone


def signed_by_a_liar(parties: Any, liar: str, now: str) -> st.SearchStrategy[tuple[str, bytes]]:
    """(stage, message), mostly of stage `now`: well formed and well signed, by a site that keeps to nothing else."""
    index, n = parties.sites.index(liar), len(parties.sites)
    key, share = st.binary(min_size=32, max_size=32), st.binary(min_size=66, max_size=66)
    honest = (
        dict(decode(parties.sent["share"][liar]).body.ciphertexts)
        if liar in parties.sent["share"]
        else {0: bytes(CIPHERTEXT_BYTES)}
    )
    due = decode(parties.sent["unmask"][liar]).body.shares if liar in parties.sent["unmask"] else ()
    length = decode(parties.sent["masked"][liar]).body.packed.size if liar in parties.sent["masked"] else 1

    def array(data: bytes) -> MaskedInput:
        return MaskedInput(np.frombuffer(data, np.uint8))

    def spoilt(places: dict[int, tuple[int, bytes]]) -> Unmask:
        wrong = {peer: (peer, kind, value) for peer, kind, value in due}
        return Unmask(tuple(v for _, v in sorted({**wrong, **{p: (p, *v) for p, v in places.items()}}.items())))

    true_kinds = {peer: kind for peer, kind, _ in due}
    peers, kinds = st.integers(0, n), st.sampled_from([SEED_SHARE, KEY_SHARE])
    wrong_values = st.dictionaries(st.sampled_from(sorted(true_kinds) or [0]), share).map(
        lambda values: {peer: (true_kinds.get(peer, SEED_SHARE), value) for peer, value in values.items()}
    )
    bodies = {
        "advertise": st.builds(Advertise, key, key, key),
        "share": st.one_of(
            st.builds(
                lambda keep: Shares(tuple((p, honest[p]) for p in sorted(keep))), st.sets(st.sampled_from([*honest]))
            ),
            st.just(Shares(tuple((p, bytes(len(text))) for p, text in sorted(honest.items())))),
        ),
        "masked": st.one_of(
            st.binary(min_size=length, max_size=length).map(array), st.binary(min_size=1, max_size=40).map(array)
        ),
        "confirm": st.builds(Confirmation, key),
        "unmask": st.one_of(wrong_values, wrong_values, st.dictionaries(peers, st.tuples(kinds, share))).map(spoilt),
    }
    return st.sampled_from([now] * len(STAGES) + [*STAGES]).flatmap(
        lambda stage: bodies[stage].map(
            lambda body: (stage, encode_signed(body, parties.attempt.digest(), index, parties.identities[liar]))
        )
    )


@pytest.mark.parametrize("lies", [False, True], ids=["all keep to the rules", "one lies"])
@settings(REPEATABLE, max_examples=30)
@given(data=st.data())
def test_an_aggregator_that_is_sent_anything_gives_the_exact_sum_or_none(consortium, lies, data) -> None:
    """The messages of an honest attempt, between them repeated, crossed, damaged and old ones, those that one site
    signed against the rules, and stages closed out of turn."""
    n = data.draw(st.integers(3, 5), "n")
    threshold = data.draw(st.integers(n // 2 + 1, n), "threshold")
    layout = data.draw(layouts(n), "layout")
    vanishing = st.tuples(st.sampled_from(STAGES), st.sampled_from(["before", "during", "after"]))
    lost = data.draw(st.dictionaries(st.just(f"site{n - 1}"), vanishing), "lost")
    size = {"n": n, "threshold": threshold, "layout": layout}
    past = consortium(**size, attempt_number=1, seed="past")
    past.run()
    model = consortium(**size, attempt_number=2, lost=lost)
    _, refusal = outcome(model.run)
    assert lost or refusal is None  # with one lost, too few may be left, or they would lay a lane bare
    parties = consortium(**size, attempt_number=2)
    aggregator, liar = parties.aggregator, data.draw(st.sampled_from(parties.sites[:-1]), "liar")
    sent = [(stage, site, m) for p in (model, past) for stage in STAGES for site, m in p.sent[stage].items()]
    genuine = {(stage, site): m for stage in STAGES for site, m in model.sent[stage].items()}
    taken: dict[tuple[str, str], bytes] = {}

    def hand_in(stage: str, site: str, message: bytes) -> None:
        before = footprint(aggregator)
        if outcome(parties.receive, stage, site, message)[1] is not None:
            assert footprint(aggregator) == before
            return
        assert (stage, site) not in taken
        assert genuine.get((stage, site)) == message or (lies and site == liar)
        assert footprint(aggregator)[3] == before[3] + 1
        taken[stage, site] = message

    def disturb(stage: str) -> None:
        kinds = ["known", "crossed", "damaged", "close"] + ["lie"] * 2 * lies
        for kind in data.draw(st.lists(st.sampled_from(kinds), max_size=3), "disturbances"):
            other, site, message = data.draw(st.sampled_from(sent), "message")
            if kind == "known":
                hand_in(other, site, message)
            elif kind == "crossed":
                hand_in(data.draw(st.sampled_from(STAGES)), data.draw(st.sampled_from(parties.sites)), message)
            elif kind == "damaged":
                hand_in(stage, site, data.draw(damaged(message)))
            elif kind == "lie":
                made_for, message = data.draw(signed_by_a_liar(model, liar, stage), "lie")
                hand_in(made_for, liar, message)
            elif (wrong := data.draw(st.sampled_from(STAGES), "closed")) != stage:
                before = footprint(aggregator)
                assert isinstance(outcome(parties.close, wrong)[1], OutOfTurn)
                assert footprint(aggregator) == before

    for stage in STAGES:
        for site in data.draw(st.permutations([*model.sent[stage]]), "order"):
            disturb(stage)
            if model.hears(site, stage, "during"):
                hand_in(stage, site, model.sent[stage][site])
        disturb(stage)
        result, refusal = outcome(parties.close, stage)
        if refusal is not None:
            assert aggregator.stage is Stage.FAILED
            assert lies or lost  # disturbances alone stop nothing
            return
    total, contributors = result
    assert contributors == tuple(site for site in parties.sites if ("masked", site) in taken)
    assert len(contributors) >= max(threshold, 3)
    expected = expected_sum(model, contributors)
    if liar in contributors:
        # A site may lie about its own vector, and about nothing else: that is all that a total can be off by.
        told, true = (unpack(layout, decode(m).body.packed) for m in (taken["masked", liar], genuine["masked", liar]))
        expected += told - true
        reduce(layout, expected)
    np.testing.assert_array_equal(total, expected)


# A peer that signs what it likes

DEGENERATE = tuple(
    bytes.fromhex(point)
    for point in (
        "00" * 32,
        "01" + "00" * 31,
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
    )
)
"""X25519 public keys that make every agreement with them the same."""


class LyingPeer:
    """A consortium in which one site says something else than it should, once, and the others are honest."""

    def __init__(
        self, consortium: Callable[..., Any], made: list[Secret], n: int, liar: int, layout: VectorLayout
    ) -> None:
        self.parties = consortium(n, layout=layout)
        made.clear()
        self._made = made
        self.secrets: dict[str, list[Secret]] = {}
        for site in self.parties.sites:
            self.parties.sessions[site] = self.parties.make_session(site)
            self.secrets[site] = made[:]
            made.clear()
        self.liar = self.parties.sites[liar]
        self.refused: dict[str, SecureSumError] = {}
        self.failure: SecureSumError | None = None
        self.adverts: dict[str, bytes] = {}

    def signed(self, body: Any) -> bytes:
        parties = self.parties
        return encode_signed(
            body, parties.attempt.digest(), parties.sites.index(self.liar), parties.identities[self.liar]
        )

    def turn(self, stage: str, lie: Callable[[Any], Any] | None) -> None:
        """All answer; the liar's answer becomes `lie` of it."""
        parties = self.parties
        incoming = parties.broadcast.get(STAGES[STAGES.index(stage) - 1]) if stage != "advertise" else None
        for site in parties.aggregator.active:
            if site in self.refused:
                continue
            message, refusal = outcome(parties.call, stage, site, incoming)
            self.secrets[site] += self._made
            self._made.clear()
            if refusal is not None:
                self.refused[site] = refusal
                continue
            if site == self.liar and lie is not None:
                message = self.signed(lie(decode(message).body))
                if stage == "advertise":
                    parties.sessions[site]._own_advertise = message  # it stands by its lie
            if stage == "advertise":
                self.adverts[site] = message
            if stage == "unmask":
                parties.sent["unmask"][site] = message
            _, refusal = outcome(parties.receive, stage, site, message)
            assert refusal is None or site == self.liar or self.refused
        parties.broadcast[stage], self.failure = outcome(parties.close, stage)

    def run(self, stage: str, lie: Callable[[Any], Any]) -> tuple[np.ndarray, tuple[str, ...]] | None:
        """All stages, with the lie in one of them; total and contributors, None where the attempt failed."""
        for at in STAGES:
            self.turn(at, lie if at == stage else None)
            if self.failure is not None:
                return None
        return self.parties.broadcast["unmask"]


def wrongly_encrypted(lying: LyingPeer, peers: set[int]) -> Callable[[Shares], Shares]:
    """Shares that their recipients can decrypt, and that fit nothing, for some of the peers."""
    parties = lying.parties
    session, own = parties.sessions[lying.liar], parties.sites.index(lying.liar)

    def lie(body: Shares) -> Shares:
        texts = dict(body.ciphertexts)
        for peer in peers & set(texts):
            key = channel_key(session._channel_secret, session._peers[peer].channel_key, own, peer, session._context)
            texts[peer] = AESGCM(key.reveal()).encrypt(bytes(12), bytes(range(132)), session._context)
        return Shares(tuple(sorted(texts.items())))

    return lie


@pytest.mark.parametrize("stage", STAGES)
@settings(REPEATABLE, max_examples=25)
@given(data=st.data())
def test_whatever_a_peer_signs_the_others_sum_is_exact_or_refused_by_name(consortium, made, stage, data) -> None:
    n = data.draw(st.integers(3, 5), "n")
    lying = LyingPeer(consortium, made, n, data.draw(st.integers(0, n - 1), "liar"), data.draw(layouts(n), "layout"))
    parties, liar = lying.parties, lying.liar
    number = st.integers(0, n - 1)
    some = st.sets(number, min_size=1)
    point = st.one_of(st.sampled_from(DEGENERATE), st.binary(min_size=32, max_size=32))
    fields = data.draw(st.dictionaries(st.sampled_from(["mask_key", "channel_key", "seed_commitment"]), point), "keys")
    peers = data.draw(some, "peers")
    junk = data.draw(st.binary(min_size=CIPHERTEXT_BYTES, max_size=CIPHERTEXT_BYTES), "junk")
    vector = data.draw(st.integers(0, 255), "vector")
    lies = {
        "advertise": [lambda body: replace(body, **fields)],
        "share": [
            wrongly_encrypted(lying, peers),
            lambda body: Shares(tuple((p, junk if p in peers else text) for p, text in body.ciphertexts)),
            lambda body: Shares(tuple((p, text) for p, text in body.ciphertexts if p not in peers)),
        ],
        "masked": [lambda body: MaskedInput(np.full(body.packed.size + (vector % 2), vector, np.uint8))],
        "confirm": [lambda body: Confirmation(junk[:32])],
        "unmask": [
            lambda body: Unmask(tuple((p, kind, junk[:66] if p in peers else s) for p, kind, s in body.shares)),
            lambda body: Unmask(tuple((p, 3 - kind if p in peers else kind, s) for p, kind, s in body.shares)),
        ],
    }
    lie = data.draw(st.sampled_from(lies[stage]), "lie")
    result = lying.run(stage, lie)
    assert result is not None or parties.aggregator.stage is Stage.FAILED
    # The wiping of keys when a peer's key is degenerate has a test of its own, below.
    for site in set(lying.refused) - {liar} if not set(fields.values()) & set(DEGENERATE) else ():
        assert parties.sessions[site].state is SiteState.CLOSED
        assert not kept(lying.secrets[site], lying.adverts[site])
    stories = {tuple((p, kind) for p, kind, _ in decode(m).body.shares) for m in parties.sent["unmask"].values()}
    assert len(stories) <= 1 or stage == "unmask"
    if result is not None:
        total, contributors = result
        assert len(contributors) >= parties.attempt.minimum
        if liar not in contributors or (stage != "masked" and not (stage == "advertise" and "mask_key" in fields)):
            np.testing.assert_array_equal(total, expected_sum(parties, contributors))


@pytest.mark.parametrize("liar", [0, 1, 3])
@pytest.mark.parametrize("field", ["mask_key", "channel_key"])
@pytest.mark.parametrize("point", DEGENERATE[:3], ids=["zero", "one", "order 8"])
def test_a_degenerate_key_is_refused_by_name_and_the_refusing_sites_keep_no_secret(
    consortium, made, point, field, liar
) -> None:
    lying = LyingPeer(consortium, made, 4, liar, VectorLayout((Lane("a", 4, 1.0),), 4))
    assert lying.run("advertise", lambda body: replace(body, **{field: point})) is None
    assert isinstance(lying.failure, TooFewSites)
    honest = [site for site in lying.parties.sites if site != lying.liar]
    for site in honest:
        assert isinstance(lying.refused[site], ForgedKeys)
        assert lying.parties.sessions[site].state is SiteState.CLOSED
        assert not kept(lying.secrets[site], lying.adverts[site]), site
