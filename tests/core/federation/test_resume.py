"""A driver that is lost at any call it makes: another goes on from the last checkpoint to the same bits."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from support.federations import small_cohort, small_federation, small_specs

from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.errors import CheckpointError, RoundError, SecureSumError
from fedsam_core.federation import site
from fedsam_core.federation.checkpoint import unpack_checkpoint
from fedsam_core.federation.engine import Engine, in_process
from fedsam_core.federation.rounds import Federation, run_rounds
from fedsam_core.federation.site import FederatedSite, SiteSpec
from fedsam_core.federation.verify import Check, Stored, verify
from fedsam_core.learning.config import LearningConfig
from fedsam_core.secagg.keyfiles import create_identity, read_roster
from fedsam_core.secagg.keys import Roster
from fedsam_core.secagg.record import GENESIS, read_chain
from fedsam_core.selection import LayerSelection, LoraTargets, preset

LOCAL = LayerSelection(name="own", lora=LoraTargets(encoder=("q", "v"), rank=2), local=("encoder.norms",))
KEEPS = LearningConfig(local_steps=2, batch_size=4, precision="fp32", keep_optimizer=True)
SETTINGS: dict[str, dict[str, Any]] = {
    "scaffold, local layers, narrow ring, coded broadcast": {
        "selection": LOCAL, "scaffold": True, "bits": 8, "broadcast_bits": 8,
    },
    "kept optimiser, server's moments": {"learning": KEEPS, "strategy": {"kind": "fedadam"}, "broadcast_bits": 16},
    "product in two sums": {"rule": "product-sketch", "bits": 16, "broadcast_bits": 8},
    "privacy": {"privacy": {"clip": 1.0, "noise_multiplier": 1.0}, "bits": 24, "weights": "equal"},
}  # fmt: skip


class Lost(BaseException):
    """What befalls a driver in these tests."""


class Failing:
    """An engine whose driver is lost at one of its calls, before or after the sites have done what it asks."""

    def __init__(self, engine: Engine, at: int, after: bool) -> None:
        self._engine, self._at, self._after = engine, at, after
        self.calls = 0
        self.sites, self.share, self.close = engine.sites, engine.share, engine.close
        self.poll, self.silent, self.restart = engine.poll, engine.silent, engine.restart

    def call(self, method: str, args: Mapping[str, Mapping[str, Any]], deadline: float, *rest: Any) -> Any:
        self.calls += 1
        if self.calls == self._at and not self._after:
            raise Lost
        replies = self._engine.call(method, args, deadline, *rest)
        if self.calls == self._at:
            raise Lost
        return replies


class Course:
    """A run and what its driver has put aside after each round."""

    def __init__(self, specs: Sequence[SiteSpec]) -> None:
        self.specs = specs
        self.saved: list[bytes] = []
        self.lines: list[bytes] = []
        self.sums: dict[int, bytes] = {}

    def drive(self, lost_at: int = 0, after: bool = False, engine: type[Failing] = Failing) -> Federation:
        """Begins or goes on; raises `Lost` at that call of the engine, if it comes to it."""
        self.engine = engine(in_process(self.specs, FederatedSite), lost_at, after)
        federation, state = small_federation(self.engine, self.specs[0], opened=False)
        self.federation, self.initial = federation, state
        if self.saved:
            saved = unpack_checkpoint(self.saved[-1])
            federation.open(state, saved, self.lines[: saved.facts["record"]["lines"]])
        else:
            federation.open(state)
            self._put_aside(federation)

        def on_round(report: Any, state: Any) -> None:
            self.sums |= {total.entry: total.packed for total in report.totals}
            self._put_aside(federation)

        run_rounds(federation, on_round)
        self.lines = list(federation.record.lines)
        return federation

    def _put_aside(self, federation: Federation) -> None:
        self.saved.append(federation.save().pack())
        self.lines = list(federation.record.lines)

    def verify(self, roster: Roster | None, lines: Sequence[bytes] = ()) -> list[Check]:
        """What `fedsam verify` finds of the run, or of other lines beside its files."""
        federation = self.federation
        note = {"run": federation.run, "round": str(federation.done), "state_hash": federation.server.state.hash}
        note |= {"layout_hash": federation.manifest.layout_hash, "record_head": sha256(self.lines[-1]).hexdigest()}
        stored = Stored(
            manifest=federation.manifest,
            initial=lambda: self.initial,
            final=lambda: (federation.server.state.tensors, note),
            read_sum=self.sums.get,
        )
        return verify(lines or self.lines, stored, roster)

    def kept(self) -> dict[str, bytes]:
        """What lies at the sites."""
        root = self.specs[0].federation.site_dir
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.safetensors")}


def course(prepared: PreparedCohort, settings: dict[str, Any], **more: Any) -> Course:
    settings = {**settings, **more}
    learning, selection = settings.pop("learning", None), settings.pop("selection", None)
    settings = {"rounds": 3, "share_pictures": False, **settings}
    specs = small_specs(prepared, selection or preset("lora", 2), **settings)
    return Course([spec.model_copy(update={"learning": learning} if learning else {}) for spec in specs])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_lost_driver_loses_no_finished_round(
    prepared: PreparedCohort, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "secret_rng", lambda: np.random.default_rng(7))  # for two runs with equal noise
    whole = course(prepared, SETTINGS[name])
    expected = whole.drive()
    calls = whole.engine.calls
    rng = np.random.default_rng(len(name))
    once = course(prepared, SETTINGS[name])
    for first, last in ((8, calls), (3, 9)):  # the second driver is lost soon after it has gone on
        with pytest.raises(Lost):
            once.drive(int(rng.integers(first, last)), after=bool(rng.integers(2)))
    resumed = once.drive()
    assert resumed.server.state.hash == expected.server.state.hash
    assert resumed.done == 3
    assert once.kept() == whole.kept()


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedCohort, dict[str, Any]]:
    """Four sites, of which one may be lost, with keys of their own."""
    folder = tmp_path_factory.mktemp("four")
    prepared = small_cohort(folder, sites=4)
    public = [create_identity(site, folder / "keys", None)[1] for site in prepared.cohort.sites]
    (folder / "roster.txt").write_text("".join(path.read_text() for path in public))
    return prepared, {"roster": folder / "roster.txt", "key_dir": folder / "keys"}


def test_a_sum_that_a_lost_driver_had_opened_is_opened_for_the_same_sites(
    consortium: tuple[PreparedCohort, dict[str, Any]],
) -> None:
    prepared, pinned = consortium
    run = course(prepared, {"selection": LOCAL, **pinned})
    fits = 0

    class Away(Failing):
        """One site is away in round 2, and the driver is lost when that round's sum has just been opened."""

        def call(self, method: str, args: Mapping[str, Mapping[str, Any]], deadline: float, *rest: Any) -> Any:
            nonlocal fits
            fits += method == "fit"
            away = {"site-d": "no answer"} if method == "fit" and fits == 2 else {}
            replies, lost = super().call(method, {s: a for s, a in args.items() if s not in away}, deadline)
            if method == "unmask" and fits == 2:
                raise Lost
            return replies, lost | away

    with pytest.raises(Lost):
        run.drive(engine=Away)
    assert [unpack_checkpoint(data).round for data in run.saved] == [0, 1]
    resumed = run.drive()
    entries, _ = read_chain(resumed.record.lines)
    trained = [e for e in entries if e["kind"] == "sum" and e["task"]["purpose"] == "update"]
    assert [len(entry["contributors"]) for entry in trained] == [4, 3, 4]
    assert trained[1]["lost"]["site-d"].startswith("was not in this sum when it was opened")
    found = {check.what: check for check in run.verify(read_roster(pinned["roster"]))}
    assert "failed" not in {check.status for check in found.values()}
    assert "which a lost driver had begun" in found["lost attempts"].detail
    assert "without a gap but for 1 resumptions" in found["attempts"].detail


def test_a_sum_that_can_be_opened_no_more_costs_its_round(consortium: tuple[PreparedCohort, dict[str, Any]]) -> None:
    """Two of four sites are lost while they open round 2, one of them for good: the run goes on from the same state,
    also in the hands of another driver, and its record says so."""
    prepared, pinned = consortium
    run = course(prepared, {"selection": LOCAL, "rounds": 3, "validate_every": 1, "key_dir": pinned["key_dir"]})
    fits = 0

    class Gone(Failing):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.gone: set[str] = set()

        def call(self, method: str, args: Mapping[str, Mapping[str, Any]], deadline: float, *rest: Any) -> Any:
            nonlocal fits
            fits += method == "fit"
            lost = {site: "no answer" for site in args if site in self.gone}
            if (method, fits) == ("unmask", 2):
                self.gone = {"site-d"}
                lost = dict.fromkeys(("site-c", "site-d"), "no answer")
            if (method, fits) == ("fit", 3) and self._at:
                raise Lost
            replies, more = super().call(method, {s: a for s, a in args.items() if s not in lost}, deadline)
            return replies, lost | more

        def poll(self, method: str, args: Mapping[str, Mapping[str, Any]], seconds: float) -> Any:
            if lost := {site: "no answer" for site in args if site in self.gone}:
                return {}, lost
            return self._engine.poll(method, args, seconds)

    with pytest.raises(Lost):
        run.drive(10**6, engine=Gone)
    entries, _ = read_chain(run.lines)
    states = {entry["round"]: entry for entry in entries if entry["kind"] == "state"}
    assert (states[2]["state_hash"], states[2]["sums"]) == (states[1]["state_hash"], [])
    assert [unpack_checkpoint(data).round for data in run.saved] == [0, 1, 2]
    resumed = run.drive()  # on from the round that was given up
    entries, _ = read_chain(resumed.record.lines)
    states = {entry["round"]: entry for entry in entries if entry["kind"] == "state"}
    assert len({entry["state_hash"] for entry in states.values()}) == 3
    found = {check.what: check for check in run.verify(None)}
    assert "failed" not in {check.status for check in found.values()}
    assert "3 of 3 rounds repeated bit for bit" in found["states"].detail
    # What was not half opened, or another state, is no round that was given up.
    for change in ({"state_hash": "0" * 64}, {"sums": [1]}):
        lines, head = list[bytes](), GENESIS
        for entry in entries:
            told = {**entry, **(change if entry["kind"] == "state" and entry["round"] == 2 else {}), "previous": head}
            lines.append(json.dumps(told, sort_keys=True, separators=(",", ":")).encode())
            head = sha256(lines[-1]).hexdigest()
        assert "states" in {check.what for check in run.verify(None, lines) if check.status == "failed"}


def test_a_site_that_no_longer_has_the_round_is_named(prepared: PreparedCohort) -> None:
    run = course(prepared, {"selection": LOCAL, "rounds": 5})
    run.drive()
    whole, run.saved = run.saved, run.saved[:2]
    with pytest.raises(
        RoundError, match="site site-a keeps what it had after rounds 3, 4, 5, the run would go on from"
    ):
        run.drive()
    run.saved = whole[:1]
    for path in run.specs[0].federation.site_dir.glob("**/round-*.safetensors"):
        path.unlink()
    assert run.drive().forgetful == ()  # before the first round there is nothing to forget


def test_a_checkpoint_of_another_run_is_refused(prepared: PreparedCohort) -> None:
    run = course(prepared, {"strategy": {"kind": "fedavgm"}})
    run.drive()
    good = run.saved[-1]
    for change, words in (
        ({"scaffold": True}, "begun with another settings_hash"),
        ({"broadcast_bits": 8}, "begun with another settings_hash"),
    ):
        other = course(prepared, {"strategy": {"kind": "fedavgm"}}, **change)
        other.saved, other.lines = run.saved, run.lines
        with pytest.raises(CheckpointError, match=words):
            other.drive()
    for at in (len(good) // 2, len(good) - 1, 100):
        with pytest.raises(CheckpointError, match=r"^(damaged|unreadable|no checkpoint)"):
            unpack_checkpoint(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    run.lines = [*run.lines[:-9], *run.lines[-8:]]
    with pytest.raises((CheckpointError, SecureSumError)):
        run.drive()


def test_what_a_resumption_may_not_claim(prepared: PreparedCohort) -> None:
    """Entries that say of a run what did not happen, in a chain that is whole."""
    run = course(prepared, {"bits": 16})
    with pytest.raises(Lost):
        run.drive(20)
    run.drive()
    assert "failed" not in {check.status for check in run.verify(None)}
    entries, _ = read_chain(run.lines)
    (at,) = [number for number, entry in enumerate(entries) if entry["kind"] == "resumed"]
    for change, failing in (
        ({"attempts": entries[at]["attempts"] - 1}, "attempts"),
        ({"attempts": entries[at]["attempts"] + 1}, "attempts"),
        ({"round": entries[at]["round"] + 1}, "states"),
        ({"attempts": 10**12}, "attempts"),
        ({"attempts": "many"}, "attempts"),
    ):
        lines, head = list[bytes](), GENESIS
        for number, entry in enumerate(entries):
            told = {**entry, **(change if number == at else {}), "previous": head}
            lines.append(json.dumps(told, sort_keys=True, separators=(",", ":")).encode())
            head = sha256(lines[-1]).hexdigest()
        found = run.verify(None, lines)
        assert failing in {check.what for check in found if check.status == "failed"}
