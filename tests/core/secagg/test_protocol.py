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
from fedsam_core.secagg.messages import Survivors, encode_broadcast
from fedsam_core.secagg.refusals import BareLane, OutOfTurn, TooFewSites

STAGES = ("advertise", "share", "masked", "confirm", "unmask")
MOMENTS = [(stage, when) for stage in STAGES for when in ("before", "during", "after")]
FOUR = VectorLayout((Lane("a", 4, 1.0),), max_sites=6)
UPDATE = 61  # odd: the last value of 20 bits fills no whole byte


def layout_of(n: int, bits: int = 32) -> VectorLayout:
    """Parameters in that ring, weight and loss in the widest one, and a lane that the last site has no part in."""
    sites = tuple(f"site{i}" for i in range(n))
    lanes = [Lane("update", UPDATE, 0.5, bits), Lane("weight", 1, 100.0), Lane("loss", 1, 10.0)]
    return VectorLayout((*lanes, Lane("some", 5, 1.0, bits, sites[:-1])) if n > 5 else tuple(lanes), max_sites=n)


def real_values(sites, layout) -> dict[str, dict[str, np.ndarray]]:
    generator = np.random.default_rng(11)
    values = {}
    for site in sites:
        values[site] = {lane.name: generator.uniform(-lane.clip, lane.clip, lane.size) for lane in layout.lanes}
        for lane in layout.lanes:
            if lane.sites and site not in lane.sites:
                values[site][lane.name] = np.zeros(lane.size)
    return values


def survives(n: int, minimum: int, lost: dict[str, tuple[str, str]]) -> bool:
    """Whether enough sites are left after every stage; one that is lost after the last answer harms nothing."""
    return n - sum(moment != ("unmask", "after") for moment in lost.values()) >= minimum


def check(
    consortium, n: int, threshold: int | None, lost: dict[str, tuple[str, str]], bits: int = 32, twice: bool = False
) -> None:
    layout = layout_of(n, bits)
    parties = consortium(n, threshold=threshold, layout=layout, lost=lost)
    values = real_values(parties.sites, layout)
    parties.vectors = {site: encode(layout, values[site], seed=i) for i, site in enumerate(parties.sites)}
    if not survives(n, parties.attempt.minimum, lost):
        with pytest.raises(TooFewSites, match=f"sites that are needed are left.*lost: .*{next(iter(lost))}"):
            parties.run()
        with pytest.raises(OutOfTurn, match="failed"):
            parties.aggregator.total()
        return
    total, contributors = parties.run()
    arrived = MOMENTS.index(("masked", "during"))
    assert contributors == tuple(s for s in parties.sites if s not in lost or MOMENTS.index(lost[s]) > arrived)
    plain, plain_contributors = parties.plain(contributors)
    assert plain_contributors == contributors
    np.testing.assert_array_equal(total, plain)
    decoded = decode_sum(layout, total, contributors)
    for lane in layout.lanes:
        truth = np.sum([values[site][lane.name] for site in contributors], axis=0)
        bound = layout.error_bound(lane.name, layout.contributors(lane, contributors))
        assert np.abs(decoded[lane.name] - truth).max() <= bound
    if not twice:
        return
    # Other keys, other masks, the same bits.
    again = consortium(n, threshold=threshold, layout=layout, lost=lost, seed="other", attempt_number=1)
    again.vectors = parties.vectors
    np.testing.assert_array_equal(again.run()[0], total)


@pytest.mark.parametrize("bits", [16, 20, 24, 32])
@pytest.mark.parametrize("n", [3, 4, 6, 10])
def test_nobody_lost(consortium, n, bits):
    check(consortium, n, None, {}, bits)


@pytest.mark.parametrize("moment", MOMENTS, ids="-".join)
@pytest.mark.parametrize("n", [3, 4, 6, 10])
def test_one_site_lost(consortium, n, moment):
    for bits, site in ((32, 0), (16, n // 2), (20, n - 1)):
        check(consortium, n, None, {f"site{site}": moment}, bits, twice=True)


@pytest.mark.parametrize("first", MOMENTS, ids="-".join)
@pytest.mark.parametrize("n", [4, 6, 10])
def test_two_sites_lost_at_any_two_moments(consortium, n, first):
    for second in MOMENTS:
        # With the default threshold, and with the lowest that is allowed: the second survives more.
        for threshold in (None, n // 2 + 1):
            check(consortium, n, threshold, {"site1": first, f"site{n - 2}": second})


@pytest.mark.parametrize("lost", [3, 4])
def test_as_many_of_ten_lost_as_the_threshold_allows_and_one_more(consortium, lost):
    for stage in ("advertise", "share", "masked", "confirm"):
        check(consortium, 10, None, dict.fromkeys(["site0", "site5", "site9", "site2"][:lost], (stage, "after")))


def test_a_lane_of_too_few_survivors_is_laid_bare_by_nobody(consortium):
    """Four of six sites adapt a layer; two of these four are lost: the layer's sum would be that of two."""
    lanes = (Lane("all", 8, 1.0), Lane("some", 4, 1.0, sites=("site0", "site1", "site2", "site3")))
    layout = VectorLayout(lanes, max_sites=6)
    one_lost = consortium(6, threshold=4, layout=layout, lost={"site2": ("share", "after")})
    assert len(one_lost.run()[1]) == 5
    parties = consortium(6, threshold=4, layout=layout, lost=dict.fromkeys(["site1", "site2"], ("share", "after")))
    with pytest.raises(BareLane, match=r"lane 'some' would be the sum of 2 sites, fewer than 3"):
        parties.run()
    # The sites refuse by themselves, whatever the aggregator thinks of it.
    parties = consortium(6, threshold=4, layout=layout, lost=dict.fromkeys(["site1", "site2"], ("share", "after")))
    parties.run(until="masked")
    message = encode_broadcast(Survivors((0, 3, 4, 5)), parties.attempt.digest())
    with pytest.raises(BareLane, match=r"lane 'some'"):
        parties.sessions["site0"].confirm(message)
    with pytest.raises(BareLane, match=r"lane 'few' would be the sum of 2 sites"):
        consortium(6, layout=VectorLayout((Lane("few", 4, 1.0, sites=("site0", "site1")),), 6))
    with pytest.raises(BareLane, match=r"sum of 4 sites, fewer than 5"):
        consortium(4, layout=VectorLayout((Lane("all", 4, 1.0),), 4, min_contributors=5))


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
    adverts = {SiteSession(attempt, "a", identities["a"], roster, FOUR).advertise()[48:144] for _ in range(3)}
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
        AggregatorSession(attempt, roster, FOUR)
    with pytest.raises(SecureSumError, match="at least 3 sites"):
        SiteSession(attempt, "a", identities["a"], roster, FOUR)
    aggregator = PlainAggregator(attempt, roster, FOUR)
    for site in sites:
        aggregator.receive_plain(site, plain_input(attempt, site, identities[site], FOUR, np.ones(4, np.uint32)))
    assert aggregator.total()[0].tolist() == [len(sites)] * 4


def test_plain_sum_refuses_what_it_must(consortium):
    parties = consortium(3)
    aggregator = PlainAggregator(parties.attempt, parties.roster, parties.layout)
    message = plain_input(
        parties.attempt, "site0", parties.identities["site0"], parties.layout, parties.vectors["site0"]
    )
    with pytest.raises(SecureSumError, match="in the name of"):
        aggregator.receive_plain("site1", message)
    with pytest.raises(SecureSumError, match="not signed"):
        aggregator.receive_plain("site0", message[:60] + bytes([message[60] ^ 1]) + message[61:])
    aggregator.receive_plain("site0", message)
    with pytest.raises(SecureSumError, match="twice"):
        aggregator.receive_plain("site0", message)
    with pytest.raises(SecureSumError, match="bytes came where"):
        PlainAggregator(parties.attempt, parties.roster, FOUR).receive_plain("site0", message)
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
        AggregatorSession(Attempt("run", 0, 0, "l", "c", "m", sites, 3), roster, FOUR)


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
