"""Replays the record of a run: who took part, what they signed, and whether the stored states follow from the sums.

What a record can prove and what not: the signatures show that every listed site sent the listed messages of that very
attempt (run, round, layout, settings, global state) and confirmed that set of survivors. The stored sums give the
global states again, bit for bit. That a sum is really that of the masked vectors rests on the aggregator, which does
not keep them, nor do the sites.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedsam_core.errors import FedsamError
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.lanes import Round, layout_of
from fedsam_core.federation.rounds import State
from fedsam_core.federation.server import Course, Server
from fedsam_core.federation.state import GlobalState
from fedsam_core.federation.tasks import Task, attempt_from_dict, sum_hash
from fedsam_core.secagg.attempt import PROTOCOL, default_threshold
from fedsam_core.secagg.keys import Roster, fingerprint
from fedsam_core.secagg.layout import VectorLayout
from fedsam_core.secagg.messages import (
    Advertise,
    Advertised,
    Confirmation,
    encode_broadcast,
    expect_signed,
    read_header,
    seal,
)
from fedsam_core.secagg.packing import unpack
from fedsam_core.secagg.quantize import decode_sum
from fedsam_core.secagg.record import read_chain
from fedsam_core.secagg.site import statement
from fedsam_core.selection import ParameterManifest

Status = Literal["ok", "failed", "not checked"]
Entry = Mapping[str, Any]

_NAMED = 20  # lost attempts that are listed; a record may claim any number


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, how it came out, and in a line what was seen."""

    what: str
    status: Status
    detail: str


@dataclass
class Stored:
    """What a run left behind, besides its record.

    Attributes:
        manifest: of the run.
        initial: reads the shared values before the first round; None where they are not kept.
        final: reads the last shared values, and the notes in the header of their file.
        read_sum: bytes of the sum with that entry number; None where it is not kept.
    """

    manifest: ParameterManifest
    initial: Callable[[], State | None]
    final: Callable[[], tuple[State, Mapping[str, str]]]
    read_sum: Callable[[int], bytes | None]


class _Wrong(Exception):
    """A check that failed; the message is its detail."""


def verify(lines: Sequence[bytes], stored: Stored, pinned: Roster | None) -> list[Check]:
    """All checks of a record, in the order of its making. Never raises for what a record holds.

    Args:
        lines: of the record.
        stored: the files beside it.
        pinned: the consortium's roster, from somewhere else than the run; None to take the record's own keys.
    """
    checks: list[Check] = []

    def check(what: str, look: Callable[[], str]) -> bool:
        try:
            checks.append(Check(what, "ok", look()))
            return True
        except (_Wrong, FedsamError) as error:
            detail = str(error)
        except (
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            MemoryError,
            RecursionError,
        ) as error:
            detail = f"an entry is malformed ({type(error).__name__}: {error})"
        checks.append(Check(what, "failed", detail))
        return False

    replay = _Replay(stored, pinned)
    if not check("chain", lambda: replay.read(lines)):
        return checks
    if not check("run", replay.run):
        return checks
    check("keys", replay.keys)
    check("attempts", replay.attempts)
    check("signatures", replay.signatures)
    check("survivors", replay.survivors)
    check("sums", replay.sums)
    check("states", replay.states)
    check("checkpoint", replay.checkpoint)
    check("head", replay.head_of_checkpoint)
    return checks + [Check(what, "not checked", why) for what, why in replay.unchecked.items()]


@dataclass
class _Replay:
    stored: Stored
    pinned: Roster | None
    unchecked: dict[str, str] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    rosters: dict[int, Roster] = field(default_factory=dict)  # by the entry that they hold from
    last_state: str = ""
    replayed: GlobalState | None = None

    def read(self, lines: Sequence[bytes]) -> str:
        self.entries, head = read_chain(lines)
        self.heads = [sha256(line).hexdigest() for line in lines]
        self.unchecked["head outside"] = (
            f"that nobody wrote the whole record anew: compare its head {head} with the run's MLflow tag "
            "fedsam.record_head, or with what a site has noted down"
        )
        return f"{len(self.entries)} entries, each holds the hash of the one before; head {head[:16]}"

    @property
    def masked(self) -> bool:
        return bool(self.only("run")[0]["secure_sum"] == "masked")

    def only(self, *kinds: str) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["kind"] in kinds]

    def head_of_checkpoint(self) -> str:
        noted = self.stored.final()[1].get("record_head", "")
        if noted not in self.heads:
            raise _Wrong(f"the checkpoint was written after entry {noted[:16] or '-'}, which is not in the record")
        later = [e for e in self.entries[self.heads.index(noted) + 1 :] if e["kind"] == "state"]
        if later:
            raise _Wrong(f"the record goes on to round {later[-1]['round']}, the checkpoint does not")
        return "the checkpoint names an entry of this record, and no later state follows"

    def run(self) -> str:
        first = self.only("run")
        if len(first) != 1 or first[0]["sequence"] != 0:
            raise _Wrong(f"the record has {len(first)} beginnings of a run, and it should start with one")
        strangers = {entry["kind"] for entry in self.entries} - {"run", "roster", "state", "sum", "failed", "resumed"}
        if strangers:
            raise _Wrong(f"the record has entries of an unknown kind: {', '.join(map(repr, sorted(strangers)))}")
        if first[0]["secure_sum"] != first[0]["federation"]["secure_sum"]:
            raise _Wrong("the record says of itself that its sums are masked, and that they are not")
        if first[0]["protocol"] != PROTOCOL:
            raise _Wrong(f"the run spoke {first[0]['protocol']}, this program {PROTOCOL}: use the run's release")
        if first[0]["layout_hash"] != self.stored.manifest.layout_hash:
            raise _Wrong("manifest.json is not that of the run: its layout hash differs")
        self.unchecked["training"] = "what sites trained on, and that their updates are honest: no record can show it"
        if not self.masked:
            self.unchecked["privacy"] = "this run used the plain sum: the aggregator saw every update"
        else:
            self.unchecked["masked vectors"] = (
                "that the sums are those of the masked vectors, which are not kept; their hashes are, and each site "
                "signed its own"
            )
        return f"{first[0]['run']}, version {first[0]['version']}, manifest as recorded"

    def keys(self) -> str:
        for entry in self.only("roster"):
            told = Roster({site: bytes.fromhex(key) for site, key in entry["keys"].items()})
            for site, key in told.keys.items():
                if self.pinned is not None and self.pinned.key(site) != key:
                    raise _Wrong(f"the run took another key for site {site!r} than the given roster pins")
            self.rosters[entry["sequence"]] = self.pinned or told
        if not self.rosters:
            raise _Wrong("the record has no keys")
        count = len(self.only("roster")[-1]["keys"])
        if self.pinned is not None:
            return f"all {count} sites have the keys of the given roster (fingerprint {self.pinned.hash[:16]})"
        self.unchecked["identities"] = (
            "that the keys belong to these hospitals: they were taken from the record itself; give the consortium's "
            "roster with --roster"
        )
        return f"{count} sites, keys as the record lists them"

    def attempts(self) -> str:
        run, number = self.only("run")[0], 0
        lost: list[str] = []
        for entry in self.only("sum", "failed", "resumed"):
            if entry["kind"] == "resumed":
                if not isinstance(entry["attempts"], int) or entry["attempts"] < number:
                    raise _Wrong(f"entry {entry['sequence']}: the run is resumed before attempt {number}")
                lost += [str(one) for one in range(number + 1, entry["attempts"] + 1)[:_NAMED]]
                number = entry["attempts"]
                continue
            number += 1
            attempt = attempt_from_dict(entry["attempt"])
            if attempt.attempt != number:
                raise _Wrong(f"entry {entry['sequence']}: attempt {attempt.attempt} stands where {number} should")
            if (attempt.run, attempt.config_hash) != (run["run"], run["settings_hash"]):
                raise _Wrong(f"entry {entry['sequence']} is of another run or other settings")
            if attempt.sites != tuple(run["sites"]) or attempt.threshold != default_threshold(len(run["sites"])):
                raise _Wrong(f"entry {entry['sequence']} has other sites or another threshold than the run")
        failed = self.only("failed")
        if risky := [e["sequence"] for e in failed if any(m["kind"] == "Unmask" for m in e["messages"])]:
            self.unchecked["failed attempts"] = (
                f"that nobody opened what entry {', '.join(map(str, risky))} says had failed after shares were sent"
            )
        if lost:
            self.unchecked["lost attempts"] = (
                f"what became of attempt {', '.join(lost)}, which a lost driver had begun: a site opens the sum of a "
                "state for one set of sites only, but no record shows it"
            )
        count, resumed = len(self.only("sum", "failed")), len(self.only("resumed"))
        gap = f"without a gap but for {resumed} resumptions" if resumed else "without a gap"
        return f"{count} sums, numbered {gap}; {len(failed)} of them came to nothing and were tried again"

    def signatures(self) -> str:
        count = 0
        for entry in self.only("sum", "failed"):
            roster, attempt = self.roster_at(entry), attempt_from_dict(entry["attempt"])
            context = attempt.digest()
            seen: set[tuple[str, str]] = set()
            for message in entry["messages"]:
                where = f"entry {entry['sequence']}, {message['kind']} of site {message['site']!r}"
                header, digest = bytes.fromhex(message["header"]), bytes.fromhex(message["digest"])
                body_type, sender, about, length = read_header(header)
                if (body_type.__name__, sender, about, length) != (
                    message["kind"],
                    attempt.index(message["site"]),
                    context,
                    message["bytes"],
                ):
                    raise _Wrong(f"{where}: the signed header is of another message, site or attempt")
                if (message["site"], message["kind"]) in seen:
                    raise _Wrong(f"{where}: there are two of them")
                seen.add((message["site"], message["kind"]))
                try:
                    roster.verify(message["site"], bytes.fromhex(message["signature"]), seal(header, digest))
                except FedsamError as error:
                    raise _Wrong(f"{where}: {error}") from None
                count += 1
        return f"{count} signatures hold, each of its kind, site and attempt"

    def survivors(self) -> str:
        for entry in self.only("sum"):
            if self.masked:
                self._survivors(entry)
                continue
            senders = [message["site"] for message in entry["messages"] if message["kind"] == "PlainInput"]
            if sorted(senders) != entry["contributors"] or len(senders) != len(entry["messages"]) or entry["course"]:
                raise _Wrong(f"entry {entry['sequence']}: the contributors are not the sites whose vectors came")
        what = "signed for the survivors and keys" if self.masked else "signed the vectors"
        return f"in all {len(self.only('sum'))} sums the sites {what} that are recorded"

    def _survivors(self, entry: Entry) -> None:
        where = f"entry {entry['sequence']}"
        attempt, roster, course = attempt_from_dict(entry["attempt"]), self.roster_at(entry), entry["course"]
        context = attempt.digest()
        by_kind: dict[str, dict[str, Entry]] = {}
        for message in entry["messages"]:
            by_kind.setdefault(message["kind"], {})[message["site"]] = message
        adverts = {}
        for site, message in by_kind["Advertise"].items():
            data = bytes.fromhex(message["message"])
            sender, _, _ = expect_signed(data, Advertise, context, attempt.sites, roster)
            if attempt.sites[sender] != site:
                raise _Wrong(f"{where}: keys of site {site!r} are those of {attempt.sites[sender]!r}")
            adverts[sender] = data
        told = encode_broadcast(Advertised(tuple(adverts[index] for index in sorted(adverts))), context)
        survivors = tuple(attempt.index(site) for site in course["survivors"])
        partners = {attempt.index(site) for site in course["partners"]}
        expected = statement(fingerprint(b"advertised", told), partners, survivors)
        if expected.hex() != course["statement"]:
            raise _Wrong(f"{where}: the statement does not follow from the recorded keys, partners and survivors")
        if set(by_kind["Shares"]) != set(course["partners"]):
            raise _Wrong(f"{where}: the partners are not the sites whose shares came")
        if set(by_kind["MaskedInput"]) != set(course["survivors"]):
            raise _Wrong(f"{where}: the survivors are not the sites whose vectors came")
        if entry["contributors"] != course["survivors"]:
            raise _Wrong(f"{where}: the sum is said to be of {entry['contributors']}")
        signed = 0
        for site, message in by_kind["Confirmation"].items():
            data = bytes.fromhex(message["message"])
            sender, body, _ = expect_signed(data, Confirmation, context, attempt.sites, roster)
            if attempt.sites[sender] != site or sender not in survivors or body.statement != expected:
                raise _Wrong(f"{where}: site {site!r} confirmed something else")
            signed += 1
        if signed < attempt.minimum or len(by_kind.get("Unmask", {})) < attempt.minimum:
            raise _Wrong(f"{where}: only {signed} sites confirmed, {attempt.minimum} are needed")
        VectorLayout.from_dict(entry["layout"]).require_covered(course["survivors"])

    def sums(self) -> str:
        kept = missing = 0
        config = self._config()
        for entry in self.only("sum"):
            attempt, task = attempt_from_dict(entry["attempt"]), Task.model_validate(entry["task"])
            layout = layout_of(task, self._round(attempt.round))
            if layout != VectorLayout.from_dict(entry["layout"]):
                raise _Wrong(f"entry {entry['sequence']}: the lanes are not those of the run's configuration")
            if sum_hash(self.stored.manifest, layout, task) != attempt.layout_hash:
                raise _Wrong(f"entry {entry['sequence']}: the sites signed for other lanes or another task")
            packed = self.packed(entry)
            if packed is None:
                if config.keep_sums:
                    raise _Wrong(f"entry {entry['sequence']}: the file of its sum is missing")
                missing += 1
                continue
            if len(packed) != entry["sum"]["bytes"] or sha256(packed).hexdigest() != entry["sum"]["sha256"]:
                raise _Wrong(f"entry {entry['sequence']}: the stored sum is not the recorded one")
            decode_sum(layout, unpack(layout, packed), entry["contributors"])
            kept += 1
        if missing:
            self.unchecked["unkept sums"] = f"{missing} sums that were not kept (federation.keep_sums=false)"
        return f"{kept} sums are as recorded, and none is beyond what its sites can reach"

    def states(self) -> str:
        """Global states follow from the sums, and every sum's sites signed for the state of its round.

        The server's arithmetic is repeated. Under a product rule it factors matrices, whose last bits another processor
        may give otherwise: the states then differ, and the check says so.
        """
        config, initial = self._config(), self.stored.initial()
        first, *others = self.only("state")
        if first["round"] != 0 or first["sums"] or any(entry["round"] == 0 for entry in others):
            raise _Wrong("the record should have one state of round 0, before all others")
        self.last_state = first["state_hash"]
        server = None if initial is None else Server(self._round(1), initial)
        if server is not None and server.state.hash != self.last_state:
            raise _Wrong("the initial state is not the recorded one")
        weight = float(len(self.only("run")[0]["sites"])) if config.weights == "equal" else None
        course: Course | None = None  # of the round that is repeated
        sums: list[int] = []  # entries of the sums of that round
        updated = half_opened = False  # what came of its first sum of updates
        repeated = total = 0
        for entry in self.entries:
            where = f"entry {entry['sequence']}"
            if entry["kind"] in ("sum", "failed"):
                attempt, task = attempt_from_dict(entry["attempt"]), Task.model_validate(entry["task"])
                if task.purpose != "weights" and attempt.model_hash != self.last_state:
                    raise _Wrong(f"{where}: the sites signed for another global state than the recorded one")
                if task.purpose == "weights" and entry["kind"] == "sum":
                    weight = float(self._lanes(entry)["amount"][0])
                if task.purpose not in ("update", "magnitudes"):
                    continue
                if task.total != weight:
                    raise _Wrong(f"{where}: the sites were told another total weight than they had summed")
                if attempt.round != total + 1:
                    raise _Wrong(f"{where}: a sum of round {attempt.round} stands where one of {total + 1} should")
                if server is not None:
                    course = course or server.begin(total + 1, task.total or 0.0)
                    if task != course.task():
                        raise _Wrong(f"{where}: what the sites were asked does not follow from the sums before")
                if entry["kind"] == "failed":
                    confirmed = sum(message["kind"] == "Confirmation" for message in entry["messages"])
                    half_opened = half_opened or confirmed >= attempt.minimum
                    continue
                sums.append(entry["sequence"])
                updated = updated or task.purpose == "update"
                if course is not None and self.packed(entry) is not None:
                    course.take(task, self._layout(entry), self._lanes(entry), entry["contributors"])
                else:
                    server = course = None
            elif entry["kind"] == "resumed":
                if sums or course is not None:
                    raise _Wrong(f"{where}: the run is resumed in the midst of round {total + 1}")
                if entry["round"] != total:
                    raise _Wrong(f"{where}: the run is resumed after round {entry['round']}, not after {total}")
            elif entry["kind"] == "state" and entry["round"] > 0:
                total += 1
                if entry["round"] != total:
                    raise _Wrong(f"round {entry['round']} follows round {total - 1}")
                given_up = half_opened and not updated and entry["state_hash"] == self.last_state
                if entry["sums"] != sums or not (updated or given_up):
                    raise _Wrong(f"round {total}: its state is not made from that round's sums")
                if given_up:
                    repeated += server is not None
                elif course is not None and server is not None:
                    if course.task() is not None and not course.give_up():
                        raise _Wrong(f"round {total}: a sum is missing")
                    if course.finish().state.hash != entry["state_hash"]:
                        raise _Wrong(f"round {total}: the recorded state does not follow from the sums")
                    repeated += 1
                course, sums, updated, half_opened = None, [], False, False
                self.last_state = entry["state_hash"]
        self._end(server, total, repeated)
        return f"{repeated} of {total} rounds repeated bit for bit from their sums"

    def _end(self, server: Server | None, total: int, repeated: int) -> None:
        rounds = self._config().rounds
        self.replayed = None if server is None else server.state
        if total < rounds:
            self.unchecked["end of the run"] = f"the run was to have {rounds} rounds, the record has {total}"
        later = [e for e in self.entries[self.only("state")[-1]["sequence"] :] if e["kind"] == "sum"]
        if not later:
            self.unchecked["last state"] = "no site signed for the last state: nothing was summed after it"
        if repeated < total:
            self.unchecked["all states"] = f"{total - repeated} of {total} rounds: a sum or the first state is missing"

    def checkpoint(self) -> str:
        final, note = self.stored.final()
        control = self.replayed.control if self.replayed is not None else None
        found = self.last_state
        if self._config().scaffold and control is None:
            self.unchecked["values of the checkpoint"] = (
                "a state's hash is also over SCAFFOLD's control variates, which only all sums and the first state give "
                "again"
            )
        else:
            found = GlobalState(self.stored.manifest, self.stored.manifest.flatten(final), control).hash
        if found != self.last_state:
            raise _Wrong(f"state.safetensors has hash {found[:16]}, the record ends with {self.last_state[:16]}")
        expected = {
            "run": self.only("run")[0]["run"],
            "round": str(self.only("state")[-1]["round"]),
            "state_hash": found,
            "layout_hash": self.stored.manifest.layout_hash,
        }
        for key, value in expected.items():
            if note.get(key) != value:
                raise _Wrong(f"the header of state.safetensors says {key}={note.get(key)}, the record {value}")
        if not all(np.isfinite(value).all() for value in final.values()):
            raise _Wrong("state.safetensors holds NaN or infinity")
        told = "says that it is" if "values of the checkpoint" in self.unchecked else "is"
        return f"state.safetensors {told} the last recorded state ({found[:16]})"

    def roster_at(self, entry: Entry) -> Roster:
        """The keys that held when an entry was made."""
        return self.rosters[max(start for start in self.rosters if start < entry["sequence"])]

    def packed(self, entry: Entry) -> bytes | None:
        """The bytes of a sum, from the record or from its file."""
        values = entry["sum"]["values"]
        return bytes.fromhex(values) if values is not None else self.stored.read_sum(entry["sequence"])

    def _lanes(self, entry: Entry) -> dict[str, NDArray[np.float64]]:
        layout, packed = self._layout(entry), self.packed(entry)
        if packed is None:
            raise _Wrong(f"entry {entry['sequence']}: its sum is missing")
        return decode_sum(layout, unpack(layout, packed), entry["contributors"])

    def _config(self) -> FederationConfig:
        return FederationConfig.model_validate(self.only("run")[0]["federation"])

    def _layout(self, entry: Entry) -> VectorLayout:
        return VectorLayout.from_dict(entry["layout"])

    def _round(self, number: int) -> Round:
        run = self.only("run")[0]
        return Round(number, run["seed"], tuple(run["sites"]), self.stored.manifest, run["classes"], self._config())
