"""Servers and peers that do not keep to the protocol: every one is refused, by name."""

import contextlib
import struct

import numpy as np
import pytest

from fedsam_core.errors import SecureSumError
from fedsam_core.secagg import Identity, Roster, SiteSession
from fedsam_core.secagg.messages import (
    AGGREGATOR,
    BODIES,
    KEY_SHARE,
    MAGIC,
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
from fedsam_core.secagg.refusals import ForgedShares, MalformedMessage, UnfitValues

STAGES = ("advertise", "share", "masked", "confirm", "unmask")
HEADER = 48


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def incoming(parties, stage: str):
    return parties.broadcast[STAGES[STAGES.index(stage) - 1]]


def poised(consortium, stage: str, **changes):
    """A consortium whose sites have all that they need for `stage`, which none of them has entered."""
    parties = consortium(**{"n": 3, "size": 4, **changes})
    for earlier in STAGES[: STAGES.index(stage)]:
        parties.step(earlier)
        parties.broadcast[earlier] = parties.close(earlier)
    return parties


# Bytes that were damaged or made up


@pytest.mark.parametrize("stage", STAGES)
def test_every_flipped_byte_of_a_sites_message_is_refused_by_the_aggregator(consortium, stage):
    parties = poised(consortium, stage)
    message = parties.call(stage, "site0", incoming(parties, stage) if stage != "advertise" else None)
    for at in range(len(message)):
        with pytest.raises(SecureSumError):
            parties.receive(stage, "site0", flipped(message, at, at % 8))
    for cut in (0, 1, HEADER - 1, HEADER, len(message) // 2, len(message) - 1):
        with pytest.raises(SecureSumError):
            parties.receive(stage, "site0", message[:cut])
    with pytest.raises(SecureSumError):
        parties.receive(stage, "site0", message + b"\x00")
    parties.receive(stage, "site0", message)
    assert "site0" not in parties.aggregator.waiting


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_flipped_byte_of_a_broadcast_is_refused_by_the_site(consortium, stage):
    parties = poised(consortium, stage)
    session, own = parties.sessions["site0"], incoming(parties, stage)
    message = own["site0"] if stage == "masked" else own
    before = {k: v for k, v in vars(session).items() if k in ("_state", "_transcript", "_partners", "_survivors")}
    # Only the first bad message would be read by an honest site: it closes. Here it is put back to try them all.
    wipe, session._wipe = session._wipe, lambda: None
    for at in range(len(message)):
        bad = flipped(message, at, at % 8)
        with pytest.raises(SecureSumError):
            parties.call(stage, "site0", {"site0": bad} if stage == "masked" else bad)
        assert session.state.value == "closed"
        vars(session).update(before)
    session._wipe = wipe
    assert parties.call(stage, "site0", own)


def test_random_bytes_are_never_anything_but_refused(consortium):
    generator = np.random.default_rng(3)
    context = bytes(32)
    kinds = list(BODIES)
    for i in range(10_000):
        body = generator.bytes(int(generator.integers(0, 300)))
        if i % 4 == 0:
            data = body
        else:  # a fitting header, so that the body's reader sees the rest
            kind = kinds[i % len(kinds)]
            if i % 4 == 1:  # and small counts, to get past the first length check
                body = struct.pack(">H", i % 3) + body
            from_site = BODIES[kind].FROM_SITE
            length = len(body) - 64 * from_site
            if length < 0:
                continue
            sender = 0 if from_site else AGGREGATOR
            data = struct.pack(">4sBBH32sQ", MAGIC, 1, kind, sender, context, length) + body
        with contextlib.suppress(SecureSumError):  # a few are well formed by chance
            decode(data)


@pytest.mark.parametrize("data", [None, "text", 5, bytearray(60), memoryview(bytes(60)), b""])
def test_what_is_not_bytes_is_refused(data):
    with pytest.raises(SecureSumError):
        decode(data)


def test_a_future_version_says_so(consortium):
    message = consortium(3).sessions["site0"].advertise()
    with pytest.raises(SecureSumError, match="version 2"):
        decode(message[:4] + b"\x02" + message[5:])


def test_every_message_survives_its_own_encoding(consortium):
    parties = consortium(4, lost={"site3": ("share", "after")})
    parties.run()
    sent = [m for messages in parties.sent.values() for m in messages.values()]
    sent += [m for m in parties.broadcast.values() if isinstance(m, bytes)] + list(parties.broadcast["share"].values())
    kinds = set()
    for data in sent:
        message = decode(data)
        kinds.add(type(message.body).__name__)
        packed = b"".join(bytes(part) for part in message.body.pack())
        assert data == data[:HEADER] + packed + message.signature
        assert "share=b" not in repr(message)
    assert len(kinds) == 9


# Order and repeats


@pytest.mark.parametrize("due", STAGES)
@pytest.mark.parametrize("asked", STAGES)
def test_a_site_answers_only_what_is_due(consortium, due, asked):
    parties = consortium(4)
    parties.run()
    late = poised(consortium, due, n=4, size=64)
    if asked == due:
        return
    with pytest.raises(SecureSumError, match=f"site 'site1' refuses {'deliver' if asked == 'masked' else asked}: its"):
        late.call(asked, "site1", None if asked == "advertise" else incoming(parties, asked))
    # It was not harmed by it.
    assert late.call(due, "site1", None if due == "advertise" else incoming(late, due))


@pytest.mark.parametrize("stage", STAGES)
def test_a_site_answers_once_and_the_aggregator_listens_once(consortium, stage):
    parties = poised(consortium, stage)
    given = None if stage == "advertise" else incoming(parties, stage)
    parties.step(stage)
    with pytest.raises(SecureSumError, match="refuses"):
        parties.call(stage, "site0", given)
    with pytest.raises(SecureSumError, match="twice"):
        parties.receive(stage, "site0", parties.sent[stage]["site0"])


def test_a_second_request_while_the_first_is_answered_is_refused(consortium, entropy):
    parties = poised(consortium, "share")
    session, source, refused = parties.sessions["site0"], entropy("other"), []

    def ask_again(count: int) -> bytes:
        if not refused:
            refused.append(None)
            with pytest.raises(SecureSumError, match="refuses share"):
                session.share(parties.broadcast["advertise"])
        return source(count)

    session._entropy = ask_again
    parties.receive("share", "site0", session.share(parties.broadcast["advertise"]))
    assert refused


@pytest.mark.parametrize("stage", STAGES)
def test_the_aggregator_closes_stages_in_order(consortium, stage):
    parties = poised(consortium, stage)
    for other in STAGES:
        if other != stage:
            with pytest.raises(SecureSumError, match="cannot be closed"):
                parties.close(other)


@pytest.mark.parametrize("stage", STAGES)
def test_messages_of_another_attempt_are_refused_on_both_sides(consortium, stage):
    old = poised(consortium, stage, attempt_number=0)
    new = poised(consortium, stage, attempt_number=1)
    given = None if stage == "advertise" else incoming(old, stage)
    with pytest.raises(SecureSumError, match="another run, round, attempt"):
        new.receive(stage, "site0", old.call(stage, "site0", given))
    if given is not None:
        with pytest.raises(SecureSumError, match="another run, round, attempt"):
            new.call(stage, "site0", given)


def test_a_site_with_another_model_is_refused_by_aggregator_and_peers(consortium):
    parties = consortium(4, model_hashes={"site2": "another"})
    with pytest.raises(SecureSumError, match="model"):
        parties.step("advertise")
    # A server that passes its message on all the same: the peers refuse.
    parties = consortium(4, model_hashes={"site2": "another"})
    messages = tuple(parties.sessions[site].advertise() for site in parties.sites)
    with pytest.raises(SecureSumError, match="model"):
        parties.sessions["site0"].share(encode_broadcast(Advertised(messages), parties.attempt.digest()))


# Keys and identities


def advertised_with(consortium, change):
    """What site0 says to a list of keys that the server has tampered with."""
    parties = poised(consortium, "share", n=4, size=4)
    parts = list(decode(parties.broadcast["advertise"]).body.parts)
    change(parties, parts)
    parties.sessions["site0"].share(encode_broadcast(Advertised(tuple(parts)), parties.attempt.digest()))


def replace(site: int, body=None, identity=None):
    def change(parties, parts):
        original = decode(parts[site]).body
        signer = identity or parties.identities[f"site{site}"]
        parts[site] = encode_signed(
            body(parties, original) if body else original, parties.attempt.digest(), site, signer
        )

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (replace(1, identity=Identity.generate()), "not signed by the key.*'site1'"),
        (lambda parties, parts: parts.append(parts[3]), "twice or out of order"),
        (lambda parties, parts: parts.reverse(), "twice or out of order"),
        (lambda parties, parts: parts.pop(0), "lacks its own"),
        (replace(0, body=lambda p, b: Advertise(b.mask_key, b.mask_key[::-1], b.seed_commitment)), "lacks its own"),
        (lambda parties, parts: parts.__delitem__(slice(2, None)), "fewer than 3"),
        (
            replace(1, body=lambda p, b: Advertise(p.aggregator._keys[2].mask_key, b.channel_key, bytes(32))),
            "same public key twice",
        ),
        (replace(1, body=lambda p, b: Advertise(b.mask_key, b.mask_key, bytes(32))), "same public key twice"),
        (replace(1, body=lambda p, b: Advertise(b.mask_key, bytes(32), bytes(32))), "degenerate"),
        (lambda parties, parts: parts.__setitem__(1, b"junk"), "too short"),
        (lambda parties, parts: parts.__setitem__(1, parts[1][:6] + b"\x00\x09" + parts[1][8:]), "site number 9"),
    ],
)
def test_a_server_that_tampers_with_keys(consortium, change, complaint):
    with pytest.raises(SecureSumError, match=complaint):
        advertised_with(consortium, change)


def test_a_site_that_the_roster_does_not_list(consortium):
    parties = consortium(3)
    stranger = Identity.generate()
    with pytest.raises(SecureSumError, match="pins another key for site 'site0'"):
        SiteSession(parties.attempt, "site0", stranger, parties.roster, parties.layout)
    short = Roster({site: key for site, key in parties.roster.keys.items() if site != "site2"})
    with pytest.raises(SecureSumError, match="'site2' is not in the roster"):
        SiteSession(parties.attempt, "site0", parties.identities["site0"], short, parties.layout)
    with pytest.raises(SecureSumError, match="'elsewhere' is not in this attempt"):
        SiteSession(parties.attempt, "elsewhere", stranger, parties.roster, parties.layout)


def test_a_peer_cannot_speak_for_another(consortium):
    parties = consortium(3)
    message = parties.sessions["site1"].advertise()
    with pytest.raises(SecureSumError, match="in the name of 'site1'"):
        parties.aggregator.receive_advertise("site0", message)


# Shares


def test_shares_must_be_for_exactly_the_peers(consortium):
    parties = poised(consortium, "share", n=4)
    context, identity = parties.attempt.digest(), parties.identities["site0"]
    good = decode(parties.call("share", "site0", parties.broadcast["advertise"])).body.ciphertexts
    for wrong in (good[:-1], (*good, (9, good[0][1])), ((0, good[0][1]), *good[1:])):
        with pytest.raises(SecureSumError, match="exactly its peers"):
            parties.aggregator.receive_share("site0", encode_signed(Shares(wrong), context, 0, identity))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda own, other: Delivery(1, other.ciphertexts), "shares of another site"),
        (lambda own, other: Delivery(0, own.ciphertexts[:1]), "fewer than 3"),
        (lambda own, other: Delivery(0, ((0, own.ciphertexts[0][1]), *own.ciphertexts[1:])), "showed it no keys"),
        (lambda own, other: Delivery(0, (*own.ciphertexts, (7, own.ciphertexts[0][1]))), "showed it no keys"),
        (lambda own, other: Delivery(0, ((1, own.ciphertexts[1][1]), *own.ciphertexts[1:])), "cannot decrypt.*'site1'"),
        (lambda own, other: Delivery(0, (*own.ciphertexts[:2], other.ciphertexts[2])), "cannot decrypt.*'site3'"),
    ],
)
def test_a_server_that_tampers_with_deliveries(consortium, change, complaint):
    parties = poised(consortium, "masked", n=4)
    own, other = (decode(parties.broadcast["share"][site]).body for site in ("site0", "site1"))
    message = encode_broadcast(change(own, other), parties.attempt.digest())
    with pytest.raises(SecureSumError, match=complaint):
        parties.call("masked", "site0", {"site0": message})


@pytest.mark.parametrize("liars", [("site1",), ("site1", "site2")])
@pytest.mark.parametrize(("lost", "owner"), [({}, 0), ({"site3": ("share", "after")}, 3)])
def test_wrong_shares_in_the_last_stage_spoil_no_sum_unnoticed(consortium, lost, owner, liars):
    parties = poised(consortium, "unmask", n=5, threshold=3, lost=lost)
    for site in parties.aggregator.active:
        message = parties.call("unmask", site, parties.broadcast["confirm"])
        if site in liars:
            shares = [
                (peer, kind, flipped(share, 40) if peer == owner else share)
                for peer, kind, share in decode(message).body.shares
            ]
            body = Unmask(tuple(shares))
            message = encode_signed(body, parties.attempt.digest(), int(site[-1]), parties.identities[site])
        parties.aggregator.receive_unmask(site, message)
    honest = len(parties.aggregator.active) - len(liars)
    if honest >= 3:  # the threshold: the honest ones are found, and give the right sum
        total, contributors = parties.aggregator.total()
        np.testing.assert_array_equal(total, parties.plain(contributors)[0])
        return
    with pytest.raises(ForgedShares, match=f"shares of site 'site{owner}' from"):
        parties.aggregator.total()
    assert parties.aggregator.stage.value == "failed"


def test_shares_of_the_wrong_kind_are_refused(consortium):
    parties = poised(consortium, "unmask", n=4)
    good = decode(parties.call("unmask", "site0", parties.broadcast["confirm"])).body.shares
    swapped = tuple((peer, KEY_SHARE, share) for peer, _, share in good)
    for wrong in (swapped, good[:-1], (*good, (9, SEED_SHARE, good[0][2]))):
        message = encode_signed(Unmask(wrong), parties.attempt.digest(), 0, parties.identities["site0"])
        with pytest.raises(SecureSumError, match="exactly the shares"):
            parties.aggregator.receive_unmask("site0", message)


# Survivors


@pytest.mark.parametrize(
    ("sites", "complaint"),
    [
        ((1, 2, 3), "not among the survivors"),
        ((0, 1), "fewer than 3"),
        ((0,), "fewer than 3"),
        ((), "not among the survivors"),
        ((0, 1, 2, 9), "shares no mask"),
        ((0, 2, 1), "twice or out of order"),
        ((0, 1, 1, 2), "twice or out of order"),
    ],
)
def test_a_forged_survivor_set(consortium, sites, complaint):
    parties = poised(consortium, "confirm", n=4)
    with pytest.raises(SecureSumError, match=complaint):
        parties.sessions["site0"].confirm(encode_broadcast(Survivors(sites), parties.attempt.digest()))


def test_a_site_that_was_lost_before_it_shared_is_no_survivor(consortium):
    parties = poised(consortium, "confirm", n=4, lost={"site3": ("share", "before")})
    with pytest.raises(SecureSumError, match="shares no mask"):
        parties.sessions["site0"].confirm(encode_broadcast(Survivors((0, 1, 2, 3)), parties.attempt.digest()))


def test_a_server_that_tells_two_stories_gets_neither_unmasked(consortium):
    """Site 3's seed from one group and its mask key from the other would lay its vector bare."""
    parties = poised(consortium, "confirm", n=4)
    context = parties.attempt.digest()
    stories = {"site0": (0, 1, 2, 3), "site3": (0, 1, 2, 3), "site1": (0, 1, 2), "site2": (0, 1, 2)}
    signed = {
        site: parties.sessions[site].confirm(encode_broadcast(Survivors(story), context))
        for site, story in stories.items()
    }
    with pytest.raises(SecureSumError, match="another course"):
        parties.aggregator.receive_confirmation("site1", signed["site1"])
    with pytest.raises(SecureSumError, match=r"another story.*'site1'"):
        parties.sessions["site0"].unmask(encode_broadcast(Confirmations(tuple(signed.values())), context))
    alike = tuple(signed[site] for site in ("site1", "site2"))
    with pytest.raises(SecureSumError, match="sees 2 signatures of the survivors, fewer than 3"):
        parties.sessions["site1"].unmask(encode_broadcast(Confirmations(alike), context))


def test_a_server_that_hides_a_peer_from_one_site_only(consortium):
    """Site 0 is told that site 3 never shared, the others that it did: their signatures do not fit together."""
    parties = poised(consortium, "masked", n=4)
    context = parties.attempt.digest()
    own = decode(parties.broadcast["share"]["site0"]).body
    parties.call("masked", "site0", {"site0": encode_broadcast(Delivery(0, own.ciphertexts[:2]), context)})
    for site in parties.sites[1:]:
        parties.call("masked", site, parties.broadcast["share"])
    survivors = encode_broadcast(Survivors((0, 1, 2)), context)
    signed = tuple(parties.sessions[site].confirm(survivors) for site in parties.sites[:3])
    for site in parties.sites[:3]:
        with pytest.raises(SecureSumError, match="another story"):
            parties.sessions[site].unmask(encode_broadcast(Confirmations(signed), context))


def test_confirmations_that_are_not_the_survivors(consortium):
    def refuse(change, complaint, **lost):
        parties = poised(consortium, "unmask", n=4, **lost)
        context = parties.attempt.digest()
        parts = change(parties, list(decode(parties.broadcast["confirm"]).body.parts), context)
        with pytest.raises(SecureSumError, match=complaint):
            parties.sessions["site0"].unmask(encode_broadcast(Confirmations(tuple(parts)), context))

    def in_name_of(site: int, identity):
        def change(parties, parts, context):
            body = Confirmation(parties.aggregator._statement)
            return [*parts, encode_signed(body, context, site, identity or parties.identities[f"site{site}"])]

        return change

    refuse(lambda parties, parts, context: parts[:2], "fewer than 3")
    refuse(lambda parties, parts, context: [parts[0]] * 3, "twice")
    refuse(lambda parties, parts, context: [*parts[:3], flipped(parts[3], len(parts[3]) - 1)], "not signed")
    refuse(in_name_of(3, None), "no survivor", lost={"site3": ("share", "after")})
    refuse(in_name_of(3, Identity.generate()), "not signed", lost={"site3": ("share", "after")})


@pytest.mark.parametrize("lost", [None, ("share", "after"), ("masked", "during")])
def test_a_site_reveals_one_kind_of_share_for_each_peer(consortium, lost):
    parties = consortium(4, lost={"site3": lost} if lost else {})
    parties.run()
    for message in parties.sent["unmask"].values():
        kinds = {peer: kind for peer, kind, _ in decode(message).body.shares}
        assert kinds == {0: SEED_SHARE, 1: SEED_SHARE, 2: SEED_SHARE, 3: KEY_SHARE if lost else SEED_SHARE}


def test_a_refused_message_ends_the_attempt_for_the_site(consortium):
    parties = poised(consortium, "confirm", n=4)
    session = parties.sessions["site0"]
    with pytest.raises(SecureSumError, match="fewer than 3"):
        session.confirm(encode_broadcast(Survivors((0, 1)), parties.attempt.digest()))
    with pytest.raises(SecureSumError, match="its state is 'closed'"):
        session.confirm(parties.broadcast["masked"])
    assert session._received == {}


def test_vectors_of_another_size_or_type_are_refused(consortium):
    parties = poised(consortium, "masked", n=4, size=8)
    body = MaskedInput(np.zeros(9, np.uint8))
    message = encode_signed(body, parties.attempt.digest(), 0, parties.identities["site0"])
    with pytest.raises(MalformedMessage, match="9 bytes came where 32"):
        parties.aggregator.receive_masked("site0", message)
    for wrong in (np.zeros(8), np.zeros(8, np.int32), np.zeros((2, 4), np.uint32), np.zeros(9, np.uint32)):
        parties = poised(consortium, "masked", n=4, size=8)
        parties.vectors["site0"] = wrong
        with pytest.raises(UnfitValues, match="8 values of uint32"):
            parties.call("masked", "site0", parties.broadcast["share"])
