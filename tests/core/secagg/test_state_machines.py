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
from fedsam_core.secagg import Lane, VectorLayout, refusals, shamir
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
    phases=[Phase.generate],  # to shrink a failure takes minutes: add Phase.shrink when there is one
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
def layouts(draw: st.DrawFn, n: int, most: int | None = None) -> VectorLayout:
    """One to four lanes, some of which not all sites have a part in, and `most` of them need not."""
    sites = tuple(f"site{i}" for i in range(n))
    fewest = draw(st.sampled_from([3, most or n]))
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


def footprint(aggregator: Any) -> tuple[Any, ...]:
    """All that a message changes in an aggregator that takes it."""
    return aggregator.stage, aggregator.active, aggregator.waiting, len(aggregator.received), aggregator._sum.tobytes()


def kept(secrets: list[Secret], public: bytes = b"") -> list[Secret]:
    """Those that were not wiped; a commitment to a seed is made as a secret, but is part of a `public` message."""
    return [secret for secret in secrets if secret._raw and bytes(secret._raw) not in public]


class WholeAttempt(RuleBasedStateMachine):
    """An attempt of an honest aggregator and honest sites, some of which are lost on the way, and all that must hold in
    it whatever else happens."""

    def __init__(self, consortium: Callable[..., Any], made: list[Secret], ends: Counter[str]) -> None:
        super().__init__()
        self._consortium, self._made, self._ends = consortium, made, ends

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        n = data.draw(st.sampled_from([5, 6, 4, 3]), "n")
        threshold = data.draw(st.sampled_from([n // 2 + 1, 2 * n // 3 + 1, n]), "threshold")
        self.found(n, threshold, data.draw(layouts(n), "layout"))
        # Some of the attempt has gone well by the time that things happen; or but for one site, which was lost.
        leaves = data.draw(st.sampled_from([*STAGES[1:3], None]), "leaves")
        if leaves is not None and n > 3:
            self.go_on_until(leaves)
            self.lost.add(self.sites[data.draw(st.integers(0, n - 1), "left")])
        self.go_on_until(data.draw(st.sampled_from(STAGES), "begun"))

    def found(self, n: int, threshold: int, layout: VectorLayout) -> None:
        """A consortium with an earlier attempt behind it."""
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
        self.split, self.hidden = False, 0

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

    @property
    def spare(self) -> bool:
        """Whether as many sites are left as the attempt needs: so that not every one of them ends early."""
        return len(self.refused | self.lost) <= len(self.sites) - self.minimum

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

    @precondition(lambda self: self.spare)
    @rule(data=st.data())
    def lose_a_site(self, data: st.DataObject) -> None:
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


class UnsoundNetwork(WholeAttempt):
    """Messages are damaged, repeated, crossed and old, and methods are called whether due or not."""

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
        """Any method with any broadcast."""
        site = data.draw(st.sampled_from(self.sites), "site")
        method = data.draw(st.sampled_from(METHODS), "method")
        if DUE.get(self.parties.sessions[site].state) == method and not self.spare:
            return
        payload = self.broadcast_for(site, method)
        if method not in ("advertise", "masked_input") and (payload is None or data.draw(st.booleans(), "other")):
            payload = data.draw(st.sampled_from(self.broadcasts()), "broadcast")
        self.ask(site, method, payload)

    @precondition(lambda self: self.spare)
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


class HostileServer(WholeAttempt):
    """Sites are sent what a server makes up of all that it has seen."""

    @rule(data=st.data())
    def make_up_a_broadcast(self, data: st.DataObject) -> None:
        site, method = self.due_at(data)
        if method in (None, "advertise", "masked_input"):
            return
        body = data.draw(self.made_up(site, method), "made up")
        answer = self.ask(site, method, encode_broadcast(body, self.context))
        if answer is not None and data.draw(st.booleans(), "arrives"):
            self.hand_in(method, site, answer)

    @precondition(lambda self: self.hidden < 2)
    @rule(data=st.data())
    def hide_peers_from_a_site(self, data: st.DataObject) -> None:
        """It masks with some of the peers that mask with it."""
        self.go_on_until("masked")
        site = data.draw(st.sampled_from(self.sites), "site")
        self.hidden += 1
        whole = self.broadcast_for(site, "deliver")
        if whole is None:
            return
        texts = decode(whole).body.ciphertexts
        hidden = data.draw(st.sets(st.sampled_from(texts), min_size=1, max_size=len(texts) // 2), "hidden")
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
            how = data.draw(st.sampled_from(["alike", "one twice", "both stories"]), "signatures")
            if how == "both stories":
                parts = [self.said[at] for at in self.said if at[0] == "confirm"]
            parts += parts[: how == "one twice"]
            self.ask(site, "unmask", encode_broadcast(Confirmations(tuple(parts)), self.context))

    def made_up(self, site: str, method: str) -> st.SearchStrategy[Any]:
        """A well-formed body of the kind that is due, some way off the right one."""
        index, n = self.sites.index(site), len(self.sites)
        if method == "confirm":
            return st.one_of(
                st.sets(st.integers(0, n), max_size=2).map(lambda out: Survivors(tuple(sorted({*range(n)} - out)))),
                st.sets(st.integers(0, n)).map(lambda some: Survivors(tuple(sorted(some)))),
            )
        if method == "deliver":
            own = decode(self.broadcast_for(site, method) or self.old.broadcast["share"][site]).body.ciphertexts
            sent = [*self.parties.broadcast.get("share", {}).values(), *self.old.broadcast["share"].values()]
            texts = st.sampled_from([text for cast in sent for _, text in decode(cast).body.ciphertexts])
            fewer = st.sets(st.sampled_from(own), max_size=2).map(lambda out: [one for one in own if one not in out])
            other = st.dictionaries(st.integers(0, n), texts).map(lambda pairs: sorted(pairs.items()))
            to = st.sampled_from([index, *range(n)])
            return st.builds(lambda recipient, pairs: Delivery(recipient, tuple(pairs)), to, st.one_of(fewer, other))
        stage, kind = ("advertise", Advertised) if method == "share" else ("confirm", Confirmations)
        old = [*self.old.sent[stage].values()]
        now = [message for (at, _), message in sorted(self.said.items()) if at == stage] or old
        fewer = st.sets(st.sampled_from(now), max_size=2).map(lambda out: [one for one in now if one not in out])
        other = st.one_of(st.lists(st.sampled_from(now + old)), st.sampled_from(now).map(lambda one: [*now, one]))
        return st.one_of(fewer, st.permutations(now), other).map(lambda parts: kind(tuple(parts)))


@pytest.mark.parametrize("method", ["share", "deliver", "confirm", "unmask"])
@settings(REPEATABLE, max_examples=25)
@given(data=st.data())
def test_sites_go_on_with_no_broadcast_that_could_lay_one_of_them_bare(consortium, made, method, data) -> None:
    """An attempt that went well so far, or in which two stories were told; now every site is sent something else."""
    attempt = HostileServer(consortium, made, Counter())
    n = data.draw(st.integers(4, 6), "n")
    attempt.found(n, data.draw(st.integers(n // 2 + 1, n - 1), "threshold"), data.draw(layouts(n, n - 1), "layout"))
    attempt.go_on_until({"deliver": "masked", "unmask": "confirm"}.get(method, method))
    if method == "unmask":
        missing = data.draw(st.tuples(st.integers(0, n), st.integers(0, n)), "missing")
        stories = [Survivors(tuple(i for i in range(n) if i != one)) for one in missing]
        for site in attempt.sites:
            story = data.draw(st.sampled_from(stories), "story")
            attempt.ask(site, "confirm", encode_broadcast(story, attempt.context))
    for site in attempt.sites:
        body = data.draw(attempt.made_up(site, method), site)
        attempt.ask(site, method, encode_broadcast(body, attempt.context))
        if method == "deliver":
            attempt.ask(site, "masked_input", attempt.parties.vectors[site])
    attempt.who_refused_or_ended_is_out_and_holds_nothing()
    attempt.a_masked_vector_leaves_no_key_behind()
    attempt.teardown()


@pytest.mark.parametrize("machine", [UnsoundNetwork, HostileServer])
def test_whatever_happens_in_an_attempt_its_promises_hold(consortium, made, machine) -> None:
    ends: Counter[str] = Counter()
    steps = settings(REPEATABLE, max_examples=60, stateful_step_count=15)
    explore(lambda: machine(consortium, made, ends), settings=steps)
    assert ends["exact"] > 5  # or else little was tried
    assert ends["failed"] > 5


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
@settings(REPEATABLE, max_examples=40)
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
    whole = consortium(**size, attempt_number=2)  # in which the site was not lost: what it would have gone on to say
    whole.run()
    parties = consortium(**size, attempt_number=2)
    aggregator, liar = parties.aggregator, data.draw(st.sampled_from(parties.sites[:-1]), "liar")
    sent = [(stage, site, m) for p in (model, whole, past) for stage in STAGES for site, m in p.sent[stage].items()]
    taken: dict[tuple[str, str], bytes] = {}

    def hand_in(stage: str, site: str, message: bytes) -> None:
        before = footprint(aggregator)
        if outcome(parties.receive, stage, site, message)[1] is not None:
            assert footprint(aggregator) == before
            return
        assert (stage, site) not in taken
        assert site in before[2]  # it was waited for
        honest = [p.sent[stage][site] for p in (model, whole) if site in p.sent[stage]]
        if stage == "unmask":  # even of one who lies, no other shares than those due are ever held
            due = [[(peer, kind) for peer, kind, _ in decode(m).body.shares] for m in honest]
            assert [(peer, kind) for peer, kind, _ in decode(message).body.shares] in due
        assert message in honest or (lies and site == liar and stage != "confirm")
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
        for site in set(lost) - set(aggregator.active):  # one that was given up goes on all the same
            hand_in(stage, site, whole.sent[stage][site])
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
        course = model if model.aggregator._statement == aggregator._statement else whole
        both = taken["masked", liar], course.sent["masked"][liar]
        told, true = (unpack(layout, decode(message).body.packed) for message in both)
        expected += told - true
        reduce(layout, expected)
    np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize("stage", STAGES)
def test_no_sum_of_two_is_opened_even_where_two_are_the_threshold(consortium, stage) -> None:
    parties = consortium(3, threshold=2, size=4, lost={"site1": (stage, "during")})
    _, refusal = outcome(parties.run)
    assert isinstance(refusal, TooFewSites)
    assert parties.aggregator.stage is Stage.FAILED


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
        self.unheard: SecureSumError | None = None  # why the aggregator did not take the lie
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
            _, refusal = outcome(parties.receive, stage, site, message)
            self._made.clear()
            if site == self.liar and lie is not None:
                self.unheard = refusal
            assert refusal is None or site == self.liar or self.refused
            if refusal is None:
                parties.sent[stage][site] = message
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
    for site in set(lying.refused) - {liar}:
        assert parties.sessions[site].state is SiteState.CLOSED
        assert not kept(lying.secrets[site], lying.adverts[site])
    stories = {tuple((p, kind) for p, kind, _ in decode(m).body.shares) for m in parties.sent["unmask"].values()}
    assert len(stories) <= 1
    if result is not None:
        total, contributors = result
        assert len(contributors) >= parties.attempt.minimum
        if liar not in contributors or (stage != "masked" and not (stage == "advertise" and "mask_key" in fields)):
            np.testing.assert_array_equal(total, expected_sum(parties, contributors))


@pytest.mark.parametrize(("threshold", "helpers"), [(4, 4), (3, 4), (3, 3)])
@pytest.mark.parametrize("lost", [False, True], ids=["a survivor's seed", "a lost site's mask key"])
def test_shares_that_are_bent_to_give_another_secret_change_no_sum(consortium, threshold, helpers, lost) -> None:
    """The secret that comes out is 32 bytes long and off by one: only what its owner committed to tells."""
    n = helpers + lost
    left = {f"site{n - 1}": ("share", "after")} if lost else {}
    parties = consortium(n, threshold=max(threshold, n // 2 + 1), lost=left, size=8)
    first = tuple(range(parties.attempt.threshold))  # who is asked first, and the liar among them
    (bend, *_) = shamir.weights([helper + 1 for helper in first])
    parties.run(until="confirm")
    parties.broadcast["confirm"] = parties.close("confirm")
    for site in parties.aggregator.active:
        message = parties.call("unmask", site, parties.broadcast["confirm"])
        if site == "site0":
            *shares, (peer, kind, share) = decode(message).body.shares
            bent = (int.from_bytes(share, "big") + pow(bend, -1, shamir.PRIME)) % shamir.PRIME
            body = Unmask((*shares, (peer, kind, bent.to_bytes(len(share), "big"))))
            message = encode_signed(body, parties.attempt.digest(), 0, parties.identities[site])
        parties.aggregator.receive_unmask(site, message)
    result, refusal = outcome(parties.aggregator.total)
    if len(parties.aggregator._survivors) > parties.attempt.threshold:
        np.testing.assert_array_equal(result[0], expected_sum(parties, result[1]))
    else:
        assert isinstance(refusal, ForgedShares)


@pytest.mark.parametrize("point", DEGENERATE)
@pytest.mark.parametrize("field", ["mask_key", "channel_key"])
def test_the_aggregator_passes_no_degenerate_key_on(consortium, made, point, field) -> None:
    """All who read it would leave the attempt."""
    lying = LyingPeer(consortium, made, 4, 1, VectorLayout((Lane("a", 4, 1.0),), 4))
    total, contributors = lying.run("advertise", lambda body: replace(body, **{field: point}))
    assert contributors == ("site0", "site2", "site3")
    np.testing.assert_array_equal(total, expected_sum(lying.parties, contributors))
    assert isinstance(lying.unheard, ForgedKeys)


@pytest.mark.parametrize("liar", [0, 1, 3])
@pytest.mark.parametrize("field", ["mask_key", "channel_key"])
def test_sites_refuse_a_degenerate_key_by_name_and_keep_no_secret(consortium, made, field, liar) -> None:
    """A server that passes it on, for a site that keeps to the protocol otherwise."""
    lying = LyingPeer(consortium, made, 4, liar, VectorLayout((Lane("a", 4, 1.0),), 4))
    parties, context = lying.parties, lying.parties.attempt.digest()
    own, lie = parties.sessions[lying.liar], {field: DEGENERATE[2]}
    adverts = {site: session.advertise() for site, session in parties.sessions.items()}
    adverts[lying.liar] = own._own_advertise = lying.signed(replace(decode(adverts[lying.liar]).body, **lie))
    cast = encode_broadcast(Advertised(tuple(adverts.values())), context)
    made.clear()
    texts: dict[str, dict[int, bytes]] = {}
    for site, session in parties.sessions.items():
        message, refusal = outcome(session.share, cast)
        lying.secrets[site] += made
        made.clear()
        texts[site] = {} if message is None else dict(decode(message).body.ciphertexts)
        assert (refusal is None) == (field == "mask_key" or site == lying.liar)
    for index, (site, session) in enumerate(parties.sessions.items()):
        if site == lying.liar:
            continue
        senders = [(i, texts[peer][index]) for i, peer in enumerate(parties.sites) if peer != site and texts[peer]]
        if field == "mask_key":
            _, refusal = outcome(session.deliver, encode_broadcast(Delivery(index, tuple(senders)), context))
            assert isinstance(refusal, ForgedKeys)
            lying.secrets[site] += made
            made.clear()
        assert session.state is SiteState.CLOSED
        assert not kept(lying.secrets[site], adverts[site]), site
