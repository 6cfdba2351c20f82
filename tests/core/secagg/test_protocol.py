"""The whole protocol: the sum of whoever survives, by a table of who is lost when."""

import copy
import pickle

import numpy as np
import pytest

from fedsam_core.errors import SecureSumError
from fedsam_core.secagg import (
    AggregatorSession,
    Attempt,
    Identity,
    Lane,
    PlainAggregator,
    Roster,
    SiteSession,
    VectorLayout,
    decode_sum,
    default_threshold,
    development_roster,
    encode,
    plain_input,
)

STAGES = ("advertise", "share", "masked", "confirm", "unmask")
MOMENTS = [(stage, when) for stage in STAGES for when in ("before", "during", "after")]
LAYOUT = VectorLayout((Lane("update", 60, 0.5), Lane("weight", 1, 100.0), Lane("loss", 1, 10.0)), max_sites=10)


def real_values(sites) -> dict[str, dict[str, np.ndarray]]:
    generator = np.random.default_rng(11)
    return {
        site: {
            "update": generator.normal(0, 0.1, 60),
            "weight": generator.uniform(0, 100, 1),
            "loss": generator.uniform(0, 10, 1),
        }
        for site in sites
    }


def check(consortium, n: int, threshold: int | None, lost: dict[str, tuple[str, str]]) -> None:
    parties = consortium(n, threshold=threshold, size=LAYOUT.size, lost=lost)
    values = real_values(parties.sites)
    parties.vectors = {site: encode(LAYOUT, values[site], seed=i) for i, site in enumerate(parties.sites)}
    enough = n - sum(moment != ("unmask", "after") for moment in lost.values()) >= parties.attempt.minimum
    if not enough:
        with pytest.raises(SecureSumError, match=f"sites that are needed are left.*lost: .*{next(iter(lost))}"):
            parties.run()
        with pytest.raises(SecureSumError, match="failed"):
            parties.aggregator.total()
        return
    total, contributors = parties.run()
    arrived = MOMENTS.index(("masked", "during"))
    assert contributors == tuple(s for s in parties.sites if s not in lost or MOMENTS.index(lost[s]) > arrived)
    plain, plain_contributors = parties.plain(contributors)
    assert plain_contributors == contributors
    np.testing.assert_array_equal(total, plain)
    decoded = decode_sum(LAYOUT, total, len(contributors))
    for lane in LAYOUT.lanes:
        truth = np.sum([values[site][lane.name] for site in contributors], axis=0)
        assert np.abs(decoded[lane.name] - truth).max() <= LAYOUT.error_bound(lane.name, len(contributors))


@pytest.mark.parametrize("n", [3, 4, 6, 10])
def test_nobody_lost(consortium, n):
    check(consortium, n, None, {})


@pytest.mark.parametrize("moment", MOMENTS, ids="-".join)
@pytest.mark.parametrize(("n", "site"), [(3, "site1"), (4, "site0"), (4, "site3"), (6, "site2")])
def test_one_site_lost(consortium, n, site, moment):
    check(consortium, n, None, {site: moment})


@pytest.mark.parametrize(
    "second", [("advertise", "during"), ("share", "after"), ("masked", "after"), ("confirm", "after")]
)
@pytest.mark.parametrize("first", MOMENTS[::2], ids="-".join)
def test_two_sites_lost(consortium, first, second):
    check(consortium, 6, 4, {"site1": first, "site4": second})
    check(consortium, 6, None, {"site1": first, "site4": second})


def test_a_third_of_ten_lost_while_vectors_were_due(consortium):
    check(consortium, 10, None, dict.fromkeys(["site0", "site5", "site9"], ("share", "after")))


def test_a_late_site_cannot_come_back(consortium):
    parties = consortium(4, lost={"site2": ("masked", "during")})
    parties.run(until="confirm")
    with pytest.raises(SecureSumError, match="stage 'confirm'"):
        parties.aggregator.receive_masked("site2", parties.sent["masked"]["site2"])
    parties.broadcast["confirm"] = parties.close("confirm")
    parties.step("unmask")
    total, contributors = parties.close("unmask")
    assert contributors == ("site0", "site1", "site3")
    np.testing.assert_array_equal(total, parties.plain(contributors)[0])


def test_the_active_sites_are_those_to_ask(consortium):
    parties = consortium(4, lost={"site2": ("share", "after")})
    parties.run(until="masked")
    assert parties.aggregator.active == parties.sites
    assert parties.aggregator.waiting == ("site2",)
    parties.broadcast["masked"] = parties.close("masked")
    assert parties.aggregator.active == ("site0", "site1", "site3")


def test_rounds_repeat_bit_for_bit_whatever_the_keys(consortium):
    first, _ = consortium(4, seed="one").run()
    second, _ = consortium(4, seed="two", attempt_number=1).run()
    np.testing.assert_array_equal(first, second)


def test_fresh_keys_and_masks_by_default():
    sites = ("a", "b", "c")
    roster, identities = development_roster(sites)
    attempt = Attempt("run", 0, 0, "l", "c", "m", sites, 3)
    adverts = {SiteSession(attempt, "a", identities["a"], roster).advertise()[48:144] for _ in range(3)}
    assert len(adverts) == 3


def test_the_aggregator_keeps_no_masked_vector(consortium):
    parties = consortium(3, size=100_000)
    parties.run(until="masked")
    held = [v for v in vars(parties.aggregator).values() if isinstance(v, np.ndarray)]
    assert [v.size for v in held] == [100_000]
    assert all(not isinstance(v, bytes) or len(v) < 1000 for v in vars(parties.aggregator).values())


def test_the_sites_vector_is_left_alone(consortium):
    parties = consortium(3)
    before = parties.vectors["site0"].copy()
    parties.run()
    np.testing.assert_array_equal(parties.vectors["site0"], before)


@pytest.mark.parametrize("sites", [("a",), ("a", "b")])
def test_fewer_than_three_sites_are_refused_but_can_sum_in_the_plain(sites):
    roster, identities = development_roster(sites)
    attempt = Attempt("run", 0, 0, "l", "c", "m", sites, default_threshold(len(sites)))
    with pytest.raises(SecureSumError, match="at least 3 sites"):
        AggregatorSession(attempt, roster, 4)
    with pytest.raises(SecureSumError, match="at least 3 sites"):
        SiteSession(attempt, "a", identities["a"], roster)
    aggregator = PlainAggregator(attempt, roster, 4)
    for site in sites:
        aggregator.receive_plain(site, plain_input(attempt, site, identities[site], np.ones(4, np.uint32)))
    assert aggregator.total()[0].tolist() == [len(sites)] * 4


def test_plain_sum_refuses_what_it_must(consortium):
    parties = consortium(3)
    aggregator = PlainAggregator(parties.attempt, parties.roster, parties.size)
    message = plain_input(parties.attempt, "site0", parties.identities["site0"], parties.vectors["site0"])
    with pytest.raises(SecureSumError, match="in the name of"):
        aggregator.receive_plain("site1", message)
    with pytest.raises(SecureSumError, match="not signed"):
        aggregator.receive_plain("site0", message[:60] + bytes([message[60] ^ 1]) + message[61:])
    aggregator.receive_plain("site0", message)
    with pytest.raises(SecureSumError, match="twice"):
        aggregator.receive_plain("site0", message)
    with pytest.raises(SecureSumError, match="values where"):
        PlainAggregator(parties.attempt, parties.roster, 3).receive_plain("site0", message)
    with pytest.raises(SecureSumError, match="only 1 of the 3"):
        aggregator.total()


@pytest.mark.parametrize(
    ("sites", "threshold", "complaint"),
    [(("b", "a"), 2, "sorted"), (("a", "a"), 1, "distinct"), ((), 0, "named"), (("a", "b", "c"), 4, "threshold 4")],
)
def test_bad_attempts(sites, threshold, complaint):
    with pytest.raises(SecureSumError, match=complaint):
        Attempt("run", 0, 0, "l", "c", "m", sites, threshold)


def test_a_threshold_that_lets_two_groups_open_two_sums_is_refused():
    sites = tuple("abcdef")
    roster, _ = development_roster(sites)
    with pytest.raises(SecureSumError, match="threshold 3 of 6"):
        AggregatorSession(Attempt("run", 0, 0, "l", "c", "m", sites, 3), roster, 4)


def test_every_field_of_the_attempt_is_in_its_digest():
    base = {"run": "r", "round": 1, "attempt": 0, "layout_hash": "l", "config_hash": "c", "model_hash": "m"}
    base |= {"sites": ("a", "b", "c", "d"), "threshold": 3}
    changes = {"run": "s", "round": 2, "attempt": 1, "layout_hash": "x", "config_hash": "x", "model_hash": "x"}
    changes |= {"sites": ("a", "b", "c", "e"), "threshold": 4}
    digests = {Attempt(**base).digest()} | {Attempt(**{**base, key: value}).digest() for key, value in changes.items()}
    assert len(digests) == 9
    assert all(len(digest) == 32 for digest in digests)


def test_thresholds():
    assert [default_threshold(n) for n in (3, 4, 6, 10, 100)] == [3, 3, 5, 7, 67]


def secrets_of(session: SiteSession) -> list[bytearray]:
    held = [session._mask_secret, session._channel_secret, session._seed]
    return [secret.reveal() for secret in held]


def test_nothing_secret_is_shown_or_serialized(consortium):
    parties = consortium(3)
    parties.run(until="share")
    session = parties.sessions["site0"]
    shown = repr(session) + repr(vars(session)) + repr(parties.identities["site0"])
    for secret in secrets_of(session):
        assert len(secret) == 32
        assert secret.hex() not in shown
        assert str(bytes(secret)) not in shown
    for subject in (session, parties.identities["site0"], session._seed):
        for attempt_to_copy in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(SecureSumError, match="never serialized"):
                attempt_to_copy(subject)


def test_secrets_are_overwritten_when_done_and_when_closed(consortium):
    finished = consortium(3)
    finished.run(until="share")
    before = {site: secrets_of(session) for site, session in finished.sessions.items()}
    assert all(any(secret) for secrets in before.values() for secret in secrets)
    finished.broadcast["share"] = finished.close("share")
    for stage in ("masked", "confirm", "unmask"):
        finished.step(stage)
        # As soon as the vector is masked, a site needs none of its own secrets again.
        assert not any(any(secret) for secrets in before.values() for secret in secrets)
        finished.broadcast[stage] = finished.close(stage)
    assert not any(session._received for session in finished.sessions.values())

    closed = consortium(3)
    closed.run(until="confirm")
    session = closed.sessions["site0"]
    shares = [share.reveal() for kinds in session._received.values() for share in kinds.values()]
    assert len(shares) == 5  # its own seed's, and two of each peer
    session.close()
    assert not any(any(share) for share in shares)
    with pytest.raises(SecureSumError, match="'closed'"):
        session.unmask(closed.close("confirm"))


def test_rosters_refuse_shared_and_malformed_keys():
    key = Identity.generate().public
    with pytest.raises(SecureSumError, match="same identity key"):
        Roster({"a": key, "b": key})
    with pytest.raises(SecureSumError, match="not 32 bytes"):
        Roster({"a": key[:-1]})
    with pytest.raises(SecureSumError, match="'c' is not in the roster"):
        Roster({"a": key}).key("c")
    assert Roster({"a": key}).hash != Roster({"b": key}).hash
    assert pickle.loads(pickle.dumps(Roster({"a": key}))).key("a") == key
