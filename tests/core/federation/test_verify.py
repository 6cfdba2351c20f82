"""The record of a run, replayed: a true one verifies, and a changed one is found out by a check that says where.

The forger here is thorough: after a change it links all lines anew, moves the stored sums along with their entries and
writes the new head into the checkpoint, so that neither `chain` nor `head` can tell. It has no site's private key.
"""

import json
from base64 import b64encode
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.federations import small_cohort, small_federation, small_specs

from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.engine import Engine, InProcessEngine, in_process
from fedsam_core.federation.lanes import Round
from fedsam_core.federation.rounds import State, run_rounds
from fedsam_core.federation.server import Server
from fedsam_core.federation.site import FederatedSite, SiteSpec
from fedsam_core.federation.state import state_hash
from fedsam_core.federation.tasks import Task, attempt_from_dict
from fedsam_core.federation.verify import Check, Stored, verify
from fedsam_core.secagg import site as site_session
from fedsam_core.secagg.keyfiles import create_identity, read_identity, read_roster
from fedsam_core.secagg.keys import Identity, Roster, Secret, fingerprint
from fedsam_core.secagg.layout import VectorLayout
from fedsam_core.secagg.messages import Advertised, MaskedInput, Shares, Unmask, decode, encode_broadcast, seal
from fedsam_core.secagg.packing import pack, unpack
from fedsam_core.secagg.quantize import Encoder, decode_sum
from fedsam_core.secagg.record import GENESIS
from fedsam_core.secagg.site import statement
from fedsam_core.selection import LayerSelection, ParameterManifest, preset

Entry = dict[str, Any]
Change = Callable[[list[Entry]], object]

# The entries of a run of two rounds.
RUN, ROSTER, START, WEIGHTS, SIZES_1, UPDATE_1, STATE_1, VAL_1, UPDATE_2, STATE_2, VAL_2, TEST = range(12)
SUMS = (WEIGHTS, SIZES_1, UPDATE_1, VAL_1, UPDATE_2, VAL_2, TEST)
KINDS = ("Advertise", "Shares", "MaskedInput", "Confirmation", "Unmask")
CHECKS = ["chain", "run", "keys", "attempts", "signatures", "survivors", "sums", "states", "checkpoint", "head"]
SITES = ("site-a", "site-b", "site-c")


@dataclass(frozen=True, repr=False)
class Kept:
    """What a run left behind."""

    lines: list[bytes]
    manifest: ParameterManifest
    initial: State | None
    final: State
    note: dict[str, str]
    sums: dict[int, bytes]

    @property
    def entries(self) -> list[Entry]:
        return [json.loads(line) for line in self.lines]

    def findings(self, pinned: Roster | None = None) -> dict[str, Check]:
        stored = Stored(self.manifest, lambda: self.initial, lambda: (self.final, self.note), self.sums.get)
        found = verify(self.lines, stored, pinned)
        assert len({check.what for check in found}) == len(found)
        return {check.what: check for check in found}

    def failed(self, pinned: Roster | None = None) -> set[str]:
        return {check.what for check in self.findings(pinned).values() if check.status == "failed"}

    def ok(self, pinned: Roster | None = None) -> list[str]:
        return [check.what for check in self.findings(pinned).values() if check.status == "ok"]

    def unchecked(self, pinned: Roster | None = None) -> dict[str, str]:
        found = self.findings(pinned).values()
        return {check.what: check.detail for check in found if check.status == "not checked"}


def kept(engine: Engine, spec: SiteSpec) -> Kept:
    """A whole run, and what `pipelines.recorder` keeps of one: the head is noted when a round is over."""
    federation, initial = small_federation(engine, spec)
    sums: dict[int, bytes] = {}
    note: dict[str, str] = {}

    def after_round(report: Any, _: State) -> None:
        sums.update({total.entry: total.packed for total in report.totals})
        note.update(
            run=federation.run,
            round=str(report.round),
            state_hash=report.state_hash,
            layout_hash=federation.manifest.layout_hash,
            record_head=federation.record.head,
        )

    final = run_rounds(federation, after_round).tensors
    federation.score("test", spec.federation.rounds)
    return Kept(list(federation.record.lines), federation.manifest, initial, final, note, sums)


class Listening:
    """An engine that keeps the bytes of every reply, and can lose some."""

    def __init__(self, inner: InProcessEngine, loses: Collection[tuple[int, str, str]] = ()) -> None:
        self._inner = inner
        self._loses = loses  # (number of the sum, method, site)
        self._sum = 0
        self.replies: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def call(self, method: str, args: Any, deadline: float, *rest: Any) -> Any:
        self._sum += method == "advertise"
        replies, lost = self._inner.call(method, args, deadline, *rest)
        for site in [site for site in replies if (self._sum, method, site) in self._loses]:
            del replies[site]
            lost[site] = "the line broke"
            self._inner._sites[site] = FederatedSite(self._inner._sites[site].spec)  # restarted, without its memory
        self.replies += [reply for reply in replies.values() if isinstance(reply, bytes)]
        return replies, lost


@dataclass(frozen=True, repr=False)
class Spied:
    """A run with pinned identities, and what only its sites knew."""

    kept: Kept
    roster: Roster
    secrets: list[bytes]
    vectors: list[np.ndarray]
    messages: list[bytes]


def spy(patch: pytest.MonkeyPatch) -> tuple[list[bytes], list[np.ndarray]]:
    """Fills with every secret that a site makes or derives, and every vector before it is masked."""
    secrets: list[bytes] = []
    vectors: list[np.ndarray] = []

    def watch(holder: Any, name: str) -> None:
        original = getattr(holder, name)

        def wrapped(*args: Any) -> Any:
            result = original(*args)
            made = result.values() if isinstance(result, dict) else [result]
            secrets.extend(bytes(one.reveal()) for one in (*args, *made) if isinstance(one, Secret))
            return result

        patch.setattr(holder, name, wrapped)

    watch(site_session.shamir, "split")
    for name in ("channel_key", "self_mask_key", "pair_mask_key"):
        watch(site_session, name)
    filled = Encoder.vector

    def remember(self: Encoder) -> np.ndarray:
        vectors.append(filled(self).copy())
        return vectors[-1].copy()

    patch.setattr(Encoder, "vector", remember)
    return secrets, vectors


@pytest.fixture(scope="module")
def spied(prepared: PreparedCohort, tmp_path_factory: pytest.TempPathFactory) -> Spied:
    keys = tmp_path_factory.mktemp("keys")
    paths = [create_identity(site, keys, None) for site in SITES]
    path = keys / "roster.txt"
    path.write_text("".join(public.read_text() for _, public in paths))
    with pytest.MonkeyPatch.context() as patch:
        secrets, vectors = spy(patch)
        specs = small_specs(prepared, selection=preset("lora", 1), bits=16, roster=path, key_dir=keys)
        engine = Listening(in_process(specs, FederatedSite))
        run = kept(engine, specs[0])
    secrets += [read_identity(private, None)._key.private_bytes_raw() for private, _ in paths]
    return Spied(run, read_roster(path), secrets, vectors, engine.replies)


@pytest.fixture(scope="module")
def good(spied: Spied) -> Kept:
    """Two rounds of three sites, the second in a ring of 16 bits."""
    return spied.kept


@pytest.fixture(scope="module")
def plain(prepared: PreparedCohort) -> Kept:
    specs = small_specs(prepared, selection=preset("lora", 1), bits=16, secure_sum="plain")
    return kept(in_process(specs, FederatedSite), specs[0])


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> PreparedCohort:
    return small_cohort(tmp_path_factory.mktemp("four"), sites=4)


@pytest.fixture(scope="module")
def troubled(four: PreparedCohort) -> Kept:
    """Four sites, of which three must be left: one is lost in training, one before it confirms; an attempt fails.
    Each is back in the next sum, with another identity."""
    specs = small_specs(four, selection=preset("lora", 1))
    loses = {(2, "fit", "site-b"), (3, "confirm", "site-c"), (4, "share", "site-a"), (4, "fit", "site-d")}
    return kept(Listening(in_process(specs, FederatedSite), loses), specs[0])


@pytest.fixture(scope="module")
def tiny(prepared: PreparedCohort) -> Kept:
    """A run whose updates are so short that their sums stand in the record itself."""
    specs = small_specs(prepared, selection=LayerSelection(name="token", train=("iou_token",)))
    return kept(in_process(specs, FederatedSite), specs[0])


def link(entries: list[Entry]) -> list[bytes]:
    """The lines of a record with these entries."""
    lines: list[bytes] = []
    head = GENESIS
    for number, entry in enumerate(entries):
        whole = {**entry, "sequence": number, "previous": head}
        lines.append(json.dumps(whole, sort_keys=True, separators=(",", ":")).encode())
        head = sha256(lines[-1]).hexdigest()
    return lines


def forge(kept: Kept, change: Change) -> Kept:
    """`kept` as someone leaves it who changes entries and makes all the rest fit that needs no private key."""
    before = kept.entries
    entries = list(before)
    noted = before[[sha256(line).hexdigest() for line in kept.lines].index(kept.note["record_head"])]
    sources = [(entry, entry["sums"]) for entry in entries if entry["kind"] == "state"]
    change(entries)
    places = {id(entry): number for number, entry in enumerate(entries)}
    for entry, source in sources:
        if entry.get("sums") == source:
            entry["sums"] = [places.get(id(before[at]), at) for at in source]
    lines = link(entries)
    head = sha256(lines[places.get(id(noted), len(lines) - 1)]).hexdigest()
    sums = {places[id(before[at])]: data for at, data in kept.sums.items() if id(before[at]) in places}
    return replace(kept, lines=lines, sums=sums, note={**kept.note, "record_head": head})


def put(at: int, *path: Any) -> Change:
    """Sets what is found at path[:-1] of an entry to path[-1]."""
    *keys, last, value = path

    def change(entries: list[Entry]) -> None:
        place: Any = entries[at]
        for key in keys:
            place = place[key]
        place[last] = value

    return change


def message(entry: Entry, kind: str, site: str = "site-b") -> Entry:
    """What an entry holds of a site's message."""
    return next(one for one in entry["messages"] if (one["kind"], one["site"]) == (kind, site))


def flipped(text: str, at: int = 5) -> str:
    """Hex with one bit of a byte changed."""
    data = bytearray.fromhex(text)
    data[at] ^= 1
    return data.hex()


def replays(kept: Kept, sums: dict[int, bytes]) -> tuple[list[str], State]:
    """The states (hashes of all, and the last) that follow from other sums, as far as there are any."""
    run, state, hashes = kept.entries[RUN], kept.initial, []
    assert state is not None
    config = FederationConfig.model_validate(run["federation"])
    about = Round(1, run["seed"], tuple(run["sites"]), kept.manifest, run["classes"], config)
    server = Server(about, state)
    sizes = kept.entries[SIZES_1]["sum"]["values"]
    known = {SIZES_1: sums.get(SIZES_1) or bytes.fromhex(sizes), **sums}
    for number, *found in ((1, SIZES_1, UPDATE_1), (2, UPDATE_2)):
        course = server.begin(number, kept.entries[UPDATE_1]["task"]["total"])
        for at in found if found[-1] in sums else ():
            entry = kept.entries[at]
            layout, contributors = VectorLayout.from_dict(entry["layout"]), entry["contributors"]
            lanes = decode_sum(layout, unpack(layout, known[at]), contributors)
            course.take(Task.model_validate(entry["task"]), layout, lanes, contributors)
        if found[-1] in sums:
            hashes.append(course.finish().state.hash)
    return hashes, server.state.tensors


def other_sum(kept: Kept, at: int) -> bytes:
    """The stored sum of a round with one parameter moved."""
    layout = VectorLayout.from_dict(kept.entries[at]["layout"])
    total = unpack(layout, kept.sums[at])
    total[3] ^= np.uint32(1 << 12)
    return pack(layout, total).tobytes()


def with_last_sum(kept: Kept, data: bytes, follow: Change) -> Kept:
    """The last round's sum replaced, its state, its checkpoint and all hashes with it; `follow` sees to the rest."""
    (_, last), final = replays(kept, {**kept.sums, UPDATE_2: data})

    def change(entries: list[Entry]) -> None:
        entries[UPDATE_2]["sum"]["sha256"] = sha256(data).hexdigest()
        entries[STATE_2]["state_hash"] = last
        follow(entries)

    moved = replace(kept, sums={**kept.sums, UPDATE_2: data}, final=final, note={**kept.note, "state_hash": last})
    return forge(moved, change)


# A true record.


def test_a_good_run_verifies_and_says_what_it_cannot_tell(good: Kept) -> None:
    found = good.findings()
    assert good.ok() == CHECKS
    assert found["states"].detail == "2 of 2 rounds repeated bit for bit from their sums"
    assert found["attempts"].detail.startswith("7 sums")
    assert found["signatures"].detail.startswith("105 signatures hold")  # five messages of three sites in six sums
    assert good.failed() == set()
    head = sha256(good.lines[-1]).hexdigest()
    words = {"head outside": head, "training": "honest", "masked vectors": "not kept", "identities": "--roster"}
    assert good.unchecked().keys() == words.keys()
    assert all(word in good.unchecked()[what] for what, word in words.items())


def test_the_pinned_roster_settles_whose_keys_they_are(good: Kept, spied: Spied) -> None:
    assert good.ok(spied.roster) == CHECKS
    assert "identities" not in good.unchecked(spied.roster)
    assert spied.roster.hash[:16] in good.findings(spied.roster)["keys"].detail
    more = Roster({**spied.roster.keys, "site-z": bytes(range(32))})
    assert good.failed(more) == set()  # the consortium may have sites that are not in this run


def test_another_roster_than_the_runs_is_noticed(good: Kept, plain: Kept, troubled: Kept, spied: Spied) -> None:
    a, b, c = (spied.roster.keys[site] for site in SITES)
    swapped = good.findings(Roster({"site-a": b, "site-b": a, "site-c": c}))
    assert swapped["keys"].status == "failed"
    assert "site-a" in swapped["keys"].detail
    lacking = good.findings(Roster({"site-a": a, "site-b": b}))
    assert lacking["keys"].status == "failed"
    assert "site-c" in lacking["keys"].detail
    assert "keys" in plain.failed(spied.roster)  # signed by identities that somebody made for the occasion
    assert "keys" in troubled.failed(spied.roster)


def test_a_run_that_lost_sites_and_repeated_an_attempt_verifies(troubled: Kept) -> None:
    assert troubled.ok() == CHECKS
    assert troubled.findings()["attempts"].detail.endswith("1 of them came to nothing and were tried again")
    sums = [entry for entry in troubled.entries if entry["kind"] in ("sum", "failed")]
    assert [entry["kind"] for entry in sums].count("failed") == 1
    assert sums[1]["course"]["survivors"] == ["site-a", "site-c", "site-d"]
    assert len(sums[2]["course"]["survivors"]) == 4  # lost after its vector had come
    assert [one["site"] for one in sums[2]["messages"] if one["kind"] == "Confirmation"] == [
        "site-a",
        "site-b",
        "site-d",
    ]
    assert [entry["attempt"]["attempt"] for entry in sums] == [1, 2, 3, 4, 5, 6, 7]
    keys = [entry["keys"] for entry in troubled.entries if entry["kind"] == "roster"]
    assert len({told["site-b"] for told in keys}) == 2  # it was restarted
    assert len({told["site-c"] for told in keys}) == 2


def test_a_plain_sum_says_that_nothing_was_private(plain: Kept) -> None:
    assert plain.ok() == CHECKS
    assert "plain" in plain.unchecked()["privacy"]
    assert "masked vectors" not in plain.unchecked()


def test_states_are_not_repeated_without_their_sums(good: Kept) -> None:
    unkept = forge(good, put(RUN, "federation", "keep_sums", False))
    without = replace(unkept, sums={})
    assert without.failed() == set()
    assert "2 sums" in without.unchecked()["unkept sums"]
    assert without.unchecked()["all states"].startswith("2 of 2 rounds")
    assert without.findings()["sums"].detail.startswith("5 sums")  # those that stand in the record itself
    half = replace(unkept, sums={UPDATE_1: good.sums[UPDATE_1]})
    assert half.unchecked()["all states"].startswith("1 of 2 rounds")
    first = replace(unkept, sums={UPDATE_2: good.sums[UPDATE_2]})
    assert first.unchecked()["all states"].startswith("2 of 2 rounds")  # nothing to add the second to


def test_states_are_not_repeated_without_the_first(good: Kept) -> None:
    without = replace(good, initial=None)
    assert without.failed() == set()
    assert without.unchecked()["all states"].startswith("2 of 2 rounds")


def test_a_run_with_control_variates_and_no_sums_is_not_wrong(prepared: PreparedCohort) -> None:
    """The hash of its states cannot be had from the checkpoint alone."""
    (spec, *others) = small_specs(prepared, preset("partial-decoder"), scaffold=True, rounds=1, keep_sums=False)
    run = kept(in_process([spec, *others], FederatedSite), spec)
    assert not replace(run, sums={}).failed()
    assert "values of the checkpoint" in replace(run, sums={}).unchecked()
    other = replace(run, sums={}, note={**run.note, "state_hash": "0" * 64})
    assert other.failed() == {"checkpoint"}
    assert "values of the checkpoint" not in run.unchecked()  # with all sums it can


def test_sums_in_the_record_itself_give_the_states_too(tiny: Kept) -> None:
    assert replace(tiny, sums={}).ok() == CHECKS
    assert "all states" not in replace(tiny, sums={}).unchecked()


# What is found without more ado.


def test_any_changed_byte_breaks_the_chain(good: Kept) -> None:
    for at, line in enumerate(good.lines[:-1]):
        for place in {0, 1, len(line) // 3, len(line) // 2, len(line) - 2, len(line) - 1}:
            changed = line[:place] + bytes([line[place] ^ 1]) + line[place + 1 :]
            assert replace(good, lines=[*good.lines[:at], changed, *good.lines[at + 1 :]]).failed() == {"chain"}


def test_a_changed_byte_in_the_last_line_is_found_by_what_it_says(good: Kept) -> None:
    line = good.lines[-1]
    words = (b'"attempt"', b'"model_hash":"', b'"digest":"', b'"signature":"', b'"survivors":["', b'"kind":"Confirm')
    for word in words:
        place = line.index(word) + len(word)
        changed = line[:place] + bytes([line[place] ^ 1]) + line[place + 1 :]
        assert replace(good, lines=[*good.lines[:-1], changed]).failed(), word


@pytest.mark.parametrize("at", range(TEST))
def test_a_removed_line_is_noticed(good: Kept, at: int) -> None:
    assert replace(good, lines=good.lines[:at] + good.lines[at + 1 :]).failed()


@pytest.mark.parametrize("at", range(10))
def test_swapped_lines_break_the_chain(good: Kept, at: int) -> None:
    lines = list(good.lines)
    lines[at], lines[at + 1] = lines[at + 1], lines[at]
    assert replace(good, lines=lines).failed() == {"chain"}


@pytest.mark.parametrize("left", range(TEST))
def test_a_truncated_record_is_noticed(good: Kept, left: int) -> None:
    assert replace(good, lines=good.lines[:left]).failed()


@pytest.mark.parametrize("line", [b"", b"{}", b"null", b"7", b'"text"', b"[]", b"\xff\xfe\x00", b"9" * 5000, b"{"])
def test_an_appended_or_only_line_that_is_no_entry_breaks_the_chain(good: Kept, line: bytes) -> None:
    assert replace(good, lines=[*good.lines, line]).failed() == {"chain"}
    assert replace(good, lines=[line]).failed() == {"chain"}


def test_entries_must_be_numbered(good: Kept) -> None:
    lines, head = [], GENESIS
    for entry in good.entries:
        lines.append(json.dumps({**entry, "sequence": entry["sequence"] + 1, "previous": head}).encode())
        head = sha256(lines[-1]).hexdigest()
    assert replace(good, lines=lines).failed() == {"chain"}


def test_a_copied_entry_appended_breaks_the_chain(good: Kept) -> None:
    for line in good.lines:
        assert replace(good, lines=[*good.lines, line]).failed() == {"chain"}


def test_another_checkpoint_is_noticed(good: Kept) -> None:
    _, first = replays(good, {UPDATE_1: good.sums[UPDATE_1]})
    assert good.initial is not None
    assert replace(good, final=first).failed() == {"checkpoint"}
    assert replace(good, final=good.initial).failed() == {"checkpoint"}
    name = next(iter(good.final))
    for value in (np.float32(1e-7), np.float32(np.nan), np.float32(np.inf)):
        moved = good.final[name].copy()
        moved.flat[0] += value
        assert replace(good, final={**good.final, name: moved}).failed() == {"checkpoint"}
    digest = state_hash(good.manifest, first)  # a header that fits what is below it, but not the record
    assert replace(good, final=first, note={**good.note, "state_hash": digest}).failed() == {"checkpoint"}
    sign = good.final[name].copy()
    sign.flat[0] = -sign.flat[0]
    assert replace(good, final={**good.final, name: sign}).failed() == {"checkpoint"}


@pytest.mark.parametrize("key", ["run", "round", "state_hash", "layout_hash", "record_head"])
def test_another_header_of_the_checkpoint_is_noticed(good: Kept, key: str) -> None:
    expected = {"head"} if key == "record_head" else {"checkpoint"}
    assert replace(good, note={**good.note, key: "1"}).failed() == expected
    assert replace(good, note={k: value for k, value in good.note.items() if k != key}).failed() == expected


def test_a_checkpoint_that_names_an_earlier_round_is_noticed(good: Kept) -> None:
    for at in (START, UPDATE_1, STATE_1, VAL_1, UPDATE_2):
        head = sha256(good.lines[at]).hexdigest()
        assert replace(good, note={**good.note, "record_head": head}).failed() == {"head"}


def test_another_first_state_is_noticed(good: Kept) -> None:
    assert "states" in replace(good, initial=good.final).failed()
    assert "states" in replace(good, initial=good.final, sums={}).failed()


def test_a_changed_stored_sum_is_noticed(good: Kept) -> None:
    for at in (UPDATE_1, UPDATE_2):
        for place in np.linspace(0, len(good.sums[at]) - 1, 10).astype(int):
            data = bytearray(good.sums[at])
            data[place] ^= 1
            assert replace(good, sums={**good.sums, at: bytes(data)}).failed() >= {"sums"}
        for data in (b"", good.sums[at][:-1], good.sums[at] + b"\0", good.sums[UPDATE_1 + UPDATE_2 - at]):
            assert replace(good, sums={**good.sums, at: bytes(data)}).failed() >= {"sums"}


# What a forger leaves who links the whole record anew.


def test_the_forger_leaves_no_trace_of_its_own(good: Kept, troubled: Kept) -> None:
    for run in (good, troubled):
        same = forge(run, lambda entries: None)
        assert same == run


@pytest.mark.parametrize("at", SUMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_signature_and_digest_of_every_sum_counts(good: Kept, at: int, kind: str) -> None:
    for field in ("signature", "digest", "header"):
        for site in SITES:

            def change(entries: list[Entry], site: str = site, field: str = field) -> None:
                one = message(entries[at], kind, site)
                one[field] = flipped(one[field])

            assert forge(good, change).failed() == {"signatures"}


@pytest.mark.parametrize("kind", KINDS)
def test_two_messages_of_one_site_and_strangers_are_found(good: Kept, kind: str) -> None:
    twice = forge(good, lambda entries: entries[UPDATE_1]["messages"].append(message(entries[UPDATE_1], kind)))
    assert twice.failed() == {"signatures"}
    other = forge(good, lambda entries: message(entries[UPDATE_1], kind).update(site="site-a"))
    assert "signatures" in other.failed()
    stranger = forge(good, lambda entries: message(entries[UPDATE_1], kind).update(site="site-x"))
    assert "signatures" in stranger.failed()


def taken_from(kind: str, there: int = VAL_1) -> Change:
    """A site's message of another sum in place of its own: the signature is true, but for something else."""
    return lambda entries: message(entries[UPDATE_1], kind).update(message(entries[there], kind))


def without(kind: str) -> Change:
    return lambda entries: entries[UPDATE_1]["messages"].remove(message(entries[UPDATE_1], kind))


def leave_out(entry: Entry, lost: str, survivors: list[str]) -> None:
    """A survivor less, and everything that the aggregator computes itself made to fit."""
    gone = ("MaskedInput", "Confirmation", "Unmask")
    entry["messages"] = [m for m in entry["messages"] if m["site"] != lost or m["kind"] not in gone]
    entry["course"].update(survivors=survivors, statement=restated(entry, survivors))
    entry["contributors"] = survivors


def restated(entry: Entry, survivors: list[str]) -> str:
    attempt = attempt_from_dict(entry["attempt"])
    keys = tuple(bytes.fromhex(m["message"]) for m in entry["messages"] if m["kind"] == "Advertise")
    transcript = fingerprint(b"advertised", encode_broadcast(Advertised(keys), attempt.digest()))
    partners = {attempt.index(site) for site in entry["course"]["partners"]}
    return statement(transcript, partners, tuple(attempt.index(site) for site in survivors)).hex()


def renumber(entries: list[Entry]) -> None:
    for entry in entries:
        if "attempt" in entry:
            entry["attempt"]["attempt"] += 1


def changed_message(kind: str) -> Change:
    """One bit of a message that is kept whole, in its body."""

    def change(entries: list[Entry]) -> None:
        one = message(entries[UPDATE_1], kind)
        one["message"] = flipped(one["message"], 60)

    return change


def exchanged(kind: str) -> Change:
    """The whole messages of two sites, each under the other's name."""

    def change(entries: list[Entry]) -> None:
        one, other = (message(entries[UPDATE_1], kind, site) for site in TWO)
        one["message"], other["message"] = other["message"], one["message"]

    return change


TWO = ["site-a", "site-b"]
ZERO = "0" * 64
FORGERIES: dict[str, tuple[str, Change]] = {
    "a key message altered": ("survivors", changed_message("Advertise")),
    "a confirmation altered": ("survivors", changed_message("Confirmation")),
    "keys from another sum": ("survivors", taken_from("Advertise")),
    "a confirmation from another sum": ("survivors", taken_from("Confirmation")),
    "a site's message to its peers removed": ("survivors", without("Shares")),
    "a sum's length": ("sums", put(UPDATE_1, "sum", "bytes", 7)),
    "an unknown entry": ("run", lambda entries: entries.insert(UPDATE_1, {"kind": "gossip"})),
    "a second first state": ("states", lambda entries: entries.insert(UPDATE_2, dict(entries[START]))),
    "a sum counted from the end": ("states", put(STATE_2, "sums", [UPDATE_2 - 11])),
    "plain in the settings alone": ("run", put(RUN, "federation", "secure_sum", "plain")),
    "plain in the run alone": ("run", put(RUN, "secure_sum", "plain")),
    "a message to peers of another sum": ("signatures", taken_from("Shares")),
    "a vector's digest of another sum": ("signatures", taken_from("MaskedInput")),
    "shares for opening of another sum": ("signatures", taken_from("Unmask")),
    "a message of an unknown kind": ("signatures", lambda e: message(e[UPDATE_1], "Shares").update(kind="Gossip")),
    "a message called another": ("signatures", lambda e: message(e[UPDATE_1], "Shares").update(kind="Unmask")),
    "a message's length": ("signatures", lambda e: message(e[UPDATE_1], "Advertise").update(bytes=7)),
    "a message's header": ("signatures", lambda e: message(e[UPDATE_1], "Shares").update(header="00" * 48)),
    "weights: their sum removed": ("attempts", lambda entries: entries.pop(WEIGHTS)),
    "a validation removed": ("attempts", lambda entries: entries.pop(VAL_1)),
    "no keys of a site": ("survivors", without("Advertise")),
    "no vector of a site": ("survivors", without("MaskedInput")),
    "no confirmation of a site": ("survivors", without("Confirmation")),
    "no shares for opening of a site": ("survivors", without("Unmask")),
    "other survivors": ("survivors", put(UPDATE_1, "course", "survivors", TWO)),
    "other survivors throughout": ("survivors", lambda entries: leave_out(entries[UPDATE_1], "site-c", TWO)),
    "other partners": ("survivors", put(UPDATE_1, "course", "partners", TWO)),
    "another statement": ("survivors", put(UPDATE_1, "course", "statement", ZERO)),
    "other contributors": ("survivors", put(UPDATE_1, "contributors", TWO)),
    "other contributors of a score": ("survivors", put(TEST, "contributors", TWO)),
    "contributors in another order": ("survivors", put(UPDATE_1, "contributors", ["site-b", "site-a", "site-c"])),
    "a lower threshold": ("survivors", put(UPDATE_1, "attempt", "threshold", 2)),
    "a lower threshold of a score": ("survivors", put(VAL_1, "attempt", "threshold", 2)),
    "a threshold of 3.0": ("survivors", put(UPDATE_1, "attempt", "threshold", 3.0)),
    "a lower threshold and fewer confirmations": (
        "survivors",
        lambda entries: (without("Confirmation")(entries), put(UPDATE_1, "attempt", "threshold", 2)(entries)),
    ),
    "another round": ("survivors", put(VAL_1, "attempt", "round", 2)),
    "keys of two sites exchanged": ("survivors", exchanged("Advertise")),
    "confirmations of two sites exchanged": ("survivors", exchanged("Confirmation")),
    "the fewest sites of a lane": ("survivors", put(UPDATE_1, "layout", "min_contributors", 4)),
    "fewer sites": ("attempts", put(UPDATE_1, "attempt", "sites", TWO)),
    "other sites": ("survivors", put(UPDATE_1, "attempt", "sites", ["site-a", "site-b", "site-c", "site-d"])),
    "another global state": ("states", put(UPDATE_2, "attempt", "model_hash", ZERO)),
    "another global state scored": ("states", put(TEST, "attempt", "model_hash", ZERO)),
    "another layout": ("sums", put(UPDATE_1, "attempt", "layout_hash", ZERO)),
    "another configuration": ("attempts", put(UPDATE_1, "attempt", "config_hash", ZERO)),
    "another run": ("attempts", put(UPDATE_1, "attempt", "run", "other")),
    "all attempts renumbered": ("survivors", renumber),
    "an attempt numbered as the one before": ("attempts", put(UPDATE_1, "attempt", "attempt", 1)),
    "sums in another order": ("attempts", lambda entries: entries.insert(UPDATE_1, entries.pop(VAL_1))),
    "a sum entered twice": ("attempts", lambda entries: entries.insert(VAL_1, dict(entries[VAL_1]))),
    "a clip": ("states", lambda entries: entries[UPDATE_2]["task"]["clips"].update({"lora.encoder.A": 0.5})),
    "a clip, throughout": (
        "sums",
        lambda entries: (
            entries[UPDATE_2]["task"]["clips"].update({"lora.encoder.A": 0.5}),
            entries[UPDATE_2]["layout"]["lanes"][0].__setitem__(2, 0.5),
        ),
    ),
    "other clips in the first round": ("states", lambda entries: entries[UPDATE_1]["task"].update(clips={"x": 1.0})),
    "a lane": ("sums", lambda entries: entries[UPDATE_2]["layout"]["lanes"][0].__setitem__(2, 0.5)),
    "a narrower ring": ("sums", lambda entries: entries[UPDATE_1]["layout"]["lanes"][0].__setitem__(3, 12)),
    "the weights' total": ("sums", put(UPDATE_1, "task", "total", 1.0)),
    "another split": ("sums", put(TEST, "task", "split", "val")),
    "another purpose": ("sums", put(VAL_1, "task", "purpose", "weights")),
    "the first state's hash": ("states", put(START, "state_hash", ZERO)),
    "a round's hash": ("states", put(STATE_1, "state_hash", ZERO)),
    "the last round's hash": ("states", put(STATE_2, "state_hash", ZERO)),
    "a round's number": ("states", put(STATE_2, "round", 3)),
    "a round's sum": ("states", put(STATE_2, "sums", [UPDATE_1])),
    "a round's sum that is none": ("states", put(STATE_2, "sums", [START])),
    "a round's sum beyond the record": ("states", put(STATE_2, "sums", [99])),
    "no first state": ("states", lambda entries: entries.pop(START)),
    "no sum of a round": ("states", lambda entries: entries.pop(UPDATE_1)),
    "no state of a round": ("states", lambda entries: entries.pop(STATE_1)),
    "no last state": ("states", lambda entries: entries.pop(STATE_2)),
    "no last round": ("checkpoint", lambda entries: entries.__delitem__(slice(UPDATE_2, None))),
    "a stored sum's hash": ("sums", put(UPDATE_1, "sum", "sha256", ZERO)),
    "no keys": ("keys", lambda entries: entries.pop(ROSTER)),
    "keys too late": ("signatures", lambda entries: entries.insert(WEIGHTS + 1, entries.pop(ROSTER))),
    "another key": ("signatures", put(ROSTER, "keys", "site-a", "ab" * 32)),
    "one key for two": (
        "keys",
        lambda entries: put(ROSTER, "keys", "site-a", entries[ROSTER]["keys"]["site-b"])(entries),
    ),
    "a key that is none": ("keys", put(ROSTER, "keys", "site-a", "ab")),
    "a site without a key": ("signatures", lambda entries: entries[ROSTER]["keys"].pop("site-a")),
    "no beginning": ("run", lambda entries: entries.pop(RUN)),
    "two beginnings": ("run", lambda entries: entries.insert(1, dict(entries[RUN]))),
    "another protocol": ("run", put(RUN, "protocol", "fedsam/secagg/v0")),
    "another model": ("run", put(RUN, "layout_hash", ZERO)),
    "the run's name": ("attempts", put(RUN, "run", "other")),
    "the run's settings": ("attempts", put(RUN, "settings_hash", ZERO)),
    "the run's sites": ("attempts", put(RUN, "sites", TWO)),
    "more sites in the run": ("attempts", put(RUN, "sites", ["site-a", "site-b", "site-c", "site-d"])),
    "the classes": ("sums", put(RUN, "classes", 3)),
    "the ring": ("sums", put(RUN, "federation", "bits", 32)),
    "the largest change": ("states", put(RUN, "federation", "update_clip", 1.0)),
    "the headroom of clips": ("states", put(RUN, "federation", "clip_headroom", 3.0)),
    "the fewest sites": ("sums", put(RUN, "federation", "min_contributors", 4)),
    "settings that are none": ("sums", put(RUN, "federation", "bits", "many")),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_found_though_the_chain_holds(good: Kept, name: str) -> None:
    check, change = FORGERIES[name]
    found = forge(good, change).findings()
    assert found["chain"].status == "ok"
    assert found.get("head", found["chain"]).status == "ok"
    assert found[check].status == "failed", {what: one.detail for what, one in found.items() if one.status == "failed"}


@pytest.mark.parametrize(
    "name", ["a round's number", "a round's sum", "a round's sum that is none", "no state of a round"]
)
def test_a_forgery_is_found_without_the_sums_too(good: Kept, name: str) -> None:
    check, change = FORGERIES[name]
    assert check in forge(replace(good, sums={}), change).failed()


def test_a_round_entered_twice_is_found_without_the_sums_too(good: Kept) -> None:
    twice = forge(replace(good, sums={}), lambda entries: entries.insert(VAL_1, dict(entries[STATE_1])))
    assert "states" in twice.failed()


def test_a_model_of_nan_is_found_where_no_sum_shows_it(good: Kept) -> None:
    final = {name: np.full_like(value, np.nan) for name, value in good.final.items()}
    digest = state_hash(good.manifest, final)

    def change(entries: list[Entry]) -> None:
        entries[STATE_2]["state_hash"] = digest
        del entries[VAL_2:]

    found = forge(replace(good, sums={}, final=final, note={**good.note, "state_hash": digest}), change).findings()
    assert found["checkpoint"].status == "failed"
    assert "NaN" in found["checkpoint"].detail


def test_a_key_that_the_consortium_does_not_know_is_found(good: Kept, spied: Spied) -> None:
    assert "keys" in forge(good, put(ROSTER, "keys", "site-a", "ab" * 32)).failed(spied.roster)


def test_a_site_that_is_said_to_be_lost_is_missed_by_those_who_confirmed_it(troubled: Kept) -> None:
    """Three of four are enough for a sum, so it is the statement alone that does not fit."""
    at = next(n for n, entry in enumerate(troubled.entries) if len(entry.get("course", {}).get("survivors", ())) == 4)
    three = ["site-a", "site-b", "site-c"]

    def change(entries: list[Entry]) -> None:
        leave_out(entries[at], "site-d", three)

    found = forge(troubled, change).findings()
    assert found["survivors"].status == "failed"
    assert "confirmed something else" in found["survivors"].detail


def test_an_attempt_that_failed_is_checked_too(troubled: Kept) -> None:
    at = next(number for number, entry in enumerate(troubled.entries) if entry["kind"] == "failed")
    assert forge(troubled, put(at, "attempt", "round", 9)).failed() >= {"signatures"}


def test_an_attempt_that_failed_cannot_be_left_out(troubled: Kept) -> None:
    at = next(number for number, entry in enumerate(troubled.entries) if entry["kind"] == "failed")
    assert forge(troubled, lambda entries: entries.pop(at)).failed() >= {"attempts"}


def test_a_message_of_a_site_outside_the_run_is_found_though_its_signature_holds(good: Kept, spied: Spied) -> None:
    stranger, header, digest = Identity.generate(), message(good.entries[UPDATE_1], "Shares")["header"], bytes(32)
    roster = Roster({**spied.roster.keys, "site-z": stranger.public})
    signature = stranger.sign(seal(bytes.fromhex(header), digest)).hex()
    alien = {"site": "site-z", "kind": "Shares", "header": header, "digest": digest.hex(), "signature": signature}
    bare = {"bytes": 414, "message": None}
    forged = forge(good, lambda entries: entries[UPDATE_1]["messages"].append({**alien, **bare}))
    assert "signatures" in forged.failed(roster)


def test_a_changed_stored_sum_with_its_hash_gives_other_states(good: Kept) -> None:
    for at in (UPDATE_1, UPDATE_2):
        data = other_sum(good, at)
        change = put(at, "sum", "sha256", sha256(data).hexdigest())
        assert "states" in forge(replace(good, sums={**good.sums, at: data}), change).failed()


def test_a_changed_inline_sum_with_its_hash_gives_other_states(tiny: Kept) -> None:
    """Of a parameter, its third byte: less than a float32 resolves changes no state, and nobody."""
    for at in (UPDATE_1 - 1, UPDATE_2 - 1):  # in a wide ring no magnitudes are summed before
        values = flipped(tiny.entries[at]["sum"]["values"], 2)
        fitting = {"sha256": sha256(bytes.fromhex(values)).hexdigest(), "bytes": len(values) // 2, "values": values}
        assert "states" in forge(tiny, put(at, "sum", fitting)).failed()
        assert "sums" in forge(tiny, put(at, "sum", "values", values)).failed()


def test_a_sum_beyond_what_its_sites_can_reach_is_found(good: Kept) -> None:
    values = (2**31 - 1).to_bytes(4, "little")
    change = put(WEIGHTS, "sum", {"sha256": sha256(values).hexdigest(), "bytes": 4, "values": values.hex()})
    assert "sums" in forge(good, change).failed()


def test_the_weights_total_follows_from_its_sum(good: Kept) -> None:
    values = flipped(good.entries[WEIGHTS]["sum"]["values"], 0)
    change = put(WEIGHTS, "sum", {"sha256": sha256(bytes.fromhex(values)).hexdigest(), "bytes": 4, "values": values})
    assert "states" in forge(good, change).failed()


def test_other_states_from_another_sum_do_not_fit_what_sites_signed_next(good: Kept) -> None:
    def follow(entries: list[Entry]) -> None:
        for at in (VAL_2, TEST):
            entries[at]["attempt"]["model_hash"] = entries[STATE_2]["state_hash"]

    data = other_sum(good, UPDATE_2)
    assert with_last_sum(good, data, lambda entries: None).failed() >= {"states"}
    assert with_last_sum(good, data, follow).failed() >= {"signatures", "survivors"}


def test_what_nobody_signed_changes_the_head_and_only_that(good: Kept) -> None:
    """Here the record's own checks end: such a change is seen by whoever noted down the head."""

    def score(entries: list[Entry]) -> None:
        values = flipped(entries[VAL_1]["sum"]["values"], 0)
        entries[VAL_1]["sum"].update(values=values, sha256=sha256(bytes.fromhex(values)).hexdigest())

    heads = {good.unchecked()["head outside"]}
    for change in (score, put(RUN, "version", "9"), put(UPDATE_1, "lost", {"site-z": "a storm"})):
        forged = forge(good, change)
        assert forged.ok() == CHECKS
        heads.add(forged.unchecked()["head outside"])
    assert len(heads) == 4


def test_the_last_state_needs_someone_who_signed_for_it(good: Kept, spied: Spied) -> None:
    """The trained model itself, replaced by another: the scores of it, which sites signed, are just left out."""
    data = other_sum(good, UPDATE_2)
    forged = with_last_sum(good, data, lambda entries: entries.__delitem__(slice(VAL_2, None)))
    assert "no site signed" in forged.unchecked(spied.roster)["last state"]
    assert "last state" not in good.unchecked(spied.roster)


def test_a_run_cut_back_to_an_earlier_round_is_noticed(good: Kept) -> None:
    (first,), final = replays(good, {UPDATE_1: good.sums[UPDATE_1]})
    cut = replace(good, sums={UPDATE_1: good.sums[UPDATE_1]}, note={**good.note, "round": "1", "state_hash": first})
    forged = forge(replace(cut, final=final), lambda entries: entries.__delitem__(slice(UPDATE_2, None)))
    assert "2 rounds, the record has 1" in forged.unchecked()["end of the run"]


def test_a_run_of_fewer_rounds_than_it_was_to_have_says_so(good: Kept) -> None:
    assert "end of the run" in forge(good, put(RUN, "federation", "rounds", 3)).unchecked()


def test_a_plain_run_needs_the_vectors_of_its_contributors(plain: Kept) -> None:
    for change in (
        put(UPDATE_1, "contributors", TWO),
        lambda entries: entries[UPDATE_1]["messages"].pop(),
        put(UPDATE_1, "course", {"partners": TWO}),
    ):
        assert "survivors" in forge(plain, change).failed()
    lowered = forge(plain, put(UPDATE_1, "attempt", "threshold", 2))
    assert lowered.failed() >= {"attempts", "signatures"}


def test_a_plain_run_that_nobody_signed_is_noticed(good: Kept, spied: Spied) -> None:
    """A record without one signature, of a model that no site ever trained, under the consortium's own keys."""
    layout = VectorLayout.from_dict(good.entries[UPDATE_2]["layout"])
    total = unpack(layout, good.sums[UPDATE_2])
    total[:1000] = 0

    def follow(entries: list[Entry]) -> None:
        entries[RUN]["secure_sum"] = entries[RUN]["federation"]["secure_sum"] = "plain"
        for at in SUMS:
            entries[at].update(messages=[], course=None)
        for at in (VAL_2, TEST):
            entries[at]["attempt"]["model_hash"] = entries[STATE_2]["state_hash"]

    assert with_last_sum(good, pack(layout, total).tobytes(), follow).failed(spied.roster)


def test_a_sum_that_should_be_there_is_missed(good: Kept) -> None:
    without = replace(good, sums={UPDATE_2: good.sums[UPDATE_2]})
    assert "sums" in without.failed()
    assert "unkept sums" not in without.unchecked()


# Whatever a record holds, no check raises.

MALFORMED: list[tuple[int, tuple[Any, ...]]] = [
    (UPDATE_1, path)
    for path in (
        ("attempt", None),
        ("attempt", "sites", "site-a"),
        ("attempt", "sites", [1, 2, 3]),
        ("attempt", "round", "1"),
        ("attempt", "attempt", float("nan")),
        ("attempt", "threshold", 0),
        ("attempt", "round", None),
        ("task", {}),
        ("task", "total", -1.0),
        ("task", "clips", {"x": 1.0}),
        ("layout", []),
        ("layout", "lanes", []),
        ("layout", "lanes", 0, 1, float("nan")),
        ("layout", "lanes", 0, 2, 1e300),
        ("layout", "lanes", 0, 3, 10**9),
        ("layout", "max_sites", 0),
        ("messages", None),
        ("messages", [5]),
        ("messages", 0, "site", {}),
        ("messages", 0, "kind", []),
        ("messages", 0, "digest", "zz"),
        ("messages", 0, "message", None),
        ("messages", 0, "message", "4653554d"),
        ("course", None),
        ("course", "survivors", 5),
        ("contributors", []),
        ("contributors", 5),
        ("sum", None),
        ("sum", "values", 5),
        ("sum", "values", ""),
    )
] + [
    (STATE_1, ("sums", None)),
    (STATE_1, ("sums", "4")),
    (STATE_1, ("sums", [10**400])),
    (STATE_1, ("round", "1")),
    (STATE_1, ("round", None)),
    (STATE_1, ("state_hash", None)),
    (ROSTER, ("keys", None)),
    (ROSTER, ("keys", "site-a", 5)),
    (RUN, ("federation", None)),
    (RUN, ("classes", "2")),
    (RUN, ("classes", 10**12)),
    (RUN, ("run", None)),
]


@pytest.mark.parametrize(("at", "path"), MALFORMED, ids=str)
def test_a_malformed_entry_is_a_finding(good: Kept, at: int, path: tuple[Any, ...]) -> None:
    found = forge(good, put(at, *path)).findings()
    failed = [check for check in found.values() if check.status == "failed"]
    assert failed
    assert found["chain"].status == "ok"
    assert all(check.detail for check in failed)


@pytest.mark.parametrize("left", ["sequence", "previous", "kind"])
def test_an_entry_that_lacks_what_every_entry_has_breaks_the_chain(good: Kept, left: str) -> None:
    entry = good.entries[0]
    del entry[left]
    assert replace(good, lines=[json.dumps(entry).encode()]).failed() == {"chain"}


def test_a_field_that_an_entry_lacks_is_a_finding(good: Kept) -> None:
    elsewhere = {"weights_hash", "roster_hash", "config_hash", "about"}  # for `fedsam verify`, which has config.yaml
    for at in (RUN, ROSTER, STATE_1, UPDATE_1):
        for field in good.entries[at].keys() - {"sequence", "previous", "kind", "lost"} - elsewhere:

            def change(entries: list[Entry], at: int = at, field: str = field) -> None:
                del entries[at][field]

            assert forge(good, change).failed(), (at, field)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param(("lanes", 0, 1), float("inf")),
        pytest.param(("max_sites",), float("inf")),
        pytest.param(("lanes", 0, 1), 10**17),
    ],
)
def test_a_lane_without_end_is_a_finding(good: Kept, path: tuple[Any, ...], value: float) -> None:
    assert forge(good, put(UPDATE_1, "layout", *path, value)).failed()


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_a_line_nested_without_end_is_a_finding(good: Kept, opening: bytes) -> None:
    assert replace(good, lines=[*good.lines, opening * 100_000]).failed() == {"chain"}


# What a record does not hold.


def shows(record: bytes, value: bytes) -> bool:
    """Whether a record holds these bytes, in hex, base64, decimal or as they are."""
    forms = [value, value.hex().encode(), b64encode(value).rstrip(b"=")[:-1]]
    if len(value) <= 66:
        forms.append(str(int.from_bytes(value, "big")).encode())
    return any(form in record for form in forms)


def test_the_record_holds_no_key_seed_or_share(spied: Spied, prepared: PreparedCohort) -> None:
    record = b"\n".join(spied.kept.lines)
    # Three sites in six sums: two secrets in three shares each, two channels, two common masks and one of its own.
    assert len(set(spied.secrets)) > 18 * 8
    assert not [secret for secret in set(spied.secrets) if shows(record, secret)]
    for data in spied.messages:
        body = decode(data).body
        if isinstance(body, Shares):
            assert not any(shows(record, part) for _, text in body.ciphertexts for part in (text, text[:32]))
        elif isinstance(body, Unmask):
            assert not any(shows(record, share) for _, _, share in body.shares)
    assert b"PRIVATE" not in record
    assert not [case.id for case in prepared.cohort.cases if case.id.encode() in record]


def test_the_record_holds_no_sites_vector_masked_or_not(spied: Spied) -> None:
    record = b"\n".join(spied.kept.lines)
    masked = [body for body in (decode(data).body for data in spied.messages) if isinstance(body, MaskedInput)]
    assert len(masked) == len(spied.vectors) == 21
    for body in masked:
        packed = body.packed.tobytes()
        for at in range(0, max(1, len(packed) - 7), max(8, len(packed) // 50)):
            assert not shows(record, packed[at : at + 8])
    sums = {entry["sum"]["values"] for entry in spied.kept.entries if entry["kind"] == "sum"}
    for vector in spied.vectors:
        assert vector.astype("<u4").tobytes().hex() not in sums
        for at in range(0, vector.size - 1, max(1, vector.size // 50)):
            part = vector[at : at + 2]
            if np.count_nonzero(part.view(np.uint8)) > 6:  # else it may well stand there: counts of one, say
                assert not any(shows(record, part.astype(order).tobytes()) for order in ("<u4", ">u4"))


def test_the_search_finds_what_is_there(spied: Spied) -> None:
    """Public keys and confirmations are, and are looked for as above."""
    record = b"\n".join(spied.kept.lines)
    found = [data for data in spied.messages if shows(record, data)]
    assert len(found) == 2 * 21
    assert shows(record, spied.roster.keys["site-a"])


def test_the_record_names_no_case_when_a_site_is_lost(four: PreparedCohort) -> None:
    specs = small_specs(four, selection=preset("lora", 1))
    federation, _state = small_federation(in_process(specs, FederatedSite), specs[0])
    case = four.cohort.select("site-b", "test")[0].id
    (path,) = Path(four.url).rglob(f"*{case}*")
    data = path.read_bytes()
    path.unlink()
    federation.score("test", 0)
    path.write_bytes(data)
    assert b"site-b" in federation.record.lines[-1]
    assert case.encode() not in federation.record.lines[-1]
