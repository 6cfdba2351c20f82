"""Whatever befalls one site in any stage, the round goes on, its sum is the survivors', and the site is soon back.

In one process, on toys; `tests/cluster/test_faults.py` does the same to real processes and nodes.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fault_table import SURVIVORS, Row, note
from support.faults import Fault, FaultySite
from support.toys import Oracle, ToySite, slices_of, toy_federation, toy_specs

from fedsam_core.errors import RoundError
from fedsam_core.federation.engine import InProcessEngine, OnAnswer, in_process
from fedsam_core.federation.rounds import Federation, RoundReport, run_rounds

BAD = "site-001"
STAGES = ("advertise", "share", "fit", "confirm", "unmask")
AFTER_THE_VECTOR = ("confirm", "unmask")


def faulty(
    tmp_path: Path, faults: list[Fault], sites: int = 4, **federation: Any
) -> tuple[Federation, dict[str, FaultySite], Oracle]:
    """A federation of toys to which the faults happen, and what its sums must be."""
    specs = toy_specs(sites, tmp_path / "sites", **{"rejoin_wait_s": 0, **federation})
    (tmp_path / "marks").mkdir(parents=True)
    there = {spec.site: FaultySite(spec, faults, tmp_path / "marks", real=False) for spec in specs}
    opened = toy_federation(InProcessEngine(there), specs[0])
    return opened, there, Oracle(specs, opened.total_weight())


WHAT = ("die before", "die after", "raise", "garbage", "corrupt", "nothing")
MATRIX = [
    *(("masked", method, what) for method in STAGES for what in WHAT),
    *(("plain", "advertise", what) for what in ("die before", "die after", "raise", "nothing")),
    *(("plain", "fit", what) for what in WHAT),
]


@pytest.mark.faults
@pytest.mark.parametrize(("secure_sum", "method", "what"), MATRIX)
def test_the_sum_is_the_survivors_and_the_site_is_back(tmp_path: Path, secure_sum: str, method: str, what: str) -> None:
    federation, sites, oracle = faulty(tmp_path, [Fault(BAD, 2, method, what)], secure_sum=secure_sum)
    assert oracle.train(federation, 1).contributors == tuple(sites)
    begun = time.monotonic()
    total = oracle.train(federation, 2)
    seconds, why = time.monotonic() - begun, federation.disturbed.get(BAD, "")
    assert federation.failed == []  # at the first attempt
    assert (BAD in total.contributors) == (method in AFTER_THE_VECTOR)
    assert set(total.contributors) == set(sites) - ({BAD} if method not in AFTER_THE_VECTOR else set())
    assert set(federation.disturbed) == {BAD}
    assert total.lost == ({} if method in AFTER_THE_VECTOR else federation.disturbed)
    assert "\n" not in federation.disturbed[BAD]
    for number in (3, 4):
        assert oracle.train(federation, number).contributors == tuple(sites)
        assert federation.disturbed == {}
    # What every site keeps follows the sums, whatever it saw of them.
    assert {name: site.counted() for name, site in sites.items()} == oracle.counted
    assert federation.attendance.absent == ({} if method in AFTER_THE_VECTOR else {BAD: 1})
    if (secure_sum, what) == ("masked", "corrupt"):
        note(Row(f"a bit of the message flipped in {method}", "one process", SURVIVORS, 0, seconds, said=why))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("nan", "its values do not fit their clips"),
        ("disk full", r"site-001/settled.json: the disk is full"),
    ],
)
def test_what_a_site_cannot_send_or_keep_costs_it_the_round_alone(tmp_path: Path, what: str, reason: str) -> None:
    federation, sites, oracle = faulty(tmp_path, [Fault(BAD, 2, "fit", what)])
    oracle.train(federation, 1)
    total = oracle.train(federation, 2)
    assert set(total.lost) == {BAD}
    assert re.search(reason, total.lost[BAD])
    assert oracle.train(federation, 3).contributors == tuple(sites)
    assert {name: site.counted() for name, site in sites.items()} == oracle.counted
    fault = {"nan": "NaN in one site's update", "disk full": "a site's disk is full"}[what]
    note(Row(fault, "one process", SURVIVORS, said=total.lost[BAD]))


def test_a_site_that_comes_back_restarted_between_vector_and_unmask_knows_that_it_counted(tmp_path: Path) -> None:
    """It is away for a whole round in between, and is told of the one before."""
    faults = [Fault(BAD, 2, "confirm", "die before"), Fault(BAD, 3, "advertise", "die before")]
    federation, sites, oracle = faulty(tmp_path, faults)
    for number in (1, 2, 3, 4):
        oracle.train(federation, number)
    assert oracle.counted[BAD] == 3
    assert sites[BAD].counted() == 3


def test_an_attempt_that_fails_after_shares_were_sent_is_repeated_to_the_bit(tmp_path: Path) -> None:
    """Of three sites all are needed: the sum is opened in the second attempt, and counted once by everyone."""
    federation, sites, oracle = faulty(tmp_path, [Fault(BAD, 2, "unmask", "die before")], sites=3)
    for number in (1, 2, 3):
        assert oracle.train(federation, number).contributors == tuple(sites)
        assert len(federation.failed) == (number == 2)
    assert {name: site.counted() for name, site in sites.items()} == dict.fromkeys(sites, 3)


class Timed:
    """An engine on which calls take as long as is said, by a clock of its own. Whoever is late does its work all the
    same."""

    def __init__(self, inner: InProcessEngine, seconds: Callable[[str, str], float]) -> None:
        self._inner, self._seconds = inner, seconds
        self._silent: set[str] = set()
        self.deadlines: list[tuple[str, float]] = []
        self.waited = 0.0  # seconds in calls since it was last set
        self.restarted: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def call(self, method: str, args: Any, deadline: float, on_answer: OnAnswer | None = None) -> Any:
        self.deadlines.append((method, deadline))
        replies, lost = self._inner.call(method, args, deadline)
        end = deadline
        for site in sorted(replies, key=lambda site: self._seconds(site, method)):
            seconds = self._seconds(site, method)
            if seconds > end:
                lost[site] = f"no answer to {method} within {end:g} s"
                self._silent.add(site)
                del replies[site]
            elif on_answer is not None:
                end = min(end, on_answer(site, seconds))
        self.waited += end if self._silent & args.keys() else max(self._seconds(site, method) for site in args)
        return replies, lost

    def poll(self, method: str, args: Any, seconds: float) -> Any:
        # In between rounds there is time for whatever ends at all.
        there = {site: own for site, own in args.items() if self._seconds(site, method) < 1e6}
        self._silent -= there.keys()
        return self._inner.poll(method, there, seconds)

    def silent(self, site: str) -> bool:
        return site in self._silent

    def restart(self, site: str) -> None:
        self.restarted.append(site)


def timed(tmp_path: Path, seconds: Callable[[str, str], float], **federation: Any) -> tuple[Federation, Timed, Oracle]:
    settings = {"deadline_s": 1000, "deadline_factor": 4, "deadline_floor_s": 10, "rejoin_wait_s": 0, **federation}
    specs = toy_specs(4, tmp_path, **settings)
    engine = Timed(in_process(specs, ToySite), seconds)
    opened = toy_federation(engine, specs[0])
    return opened, engine, Oracle(specs, opened.total_weight())


@pytest.mark.faults
def test_a_site_that_is_twenty_times_slower_is_not_waited_for(tmp_path: Path) -> None:
    slow = {"fit": 5.0}

    def seconds(site: str, method: str) -> float:
        return slow.get(method, 0.1) * (20 if site == BAD and method == "fit" else 1)

    federation, engine, oracle = timed(tmp_path / "all", seconds)
    engine.waited = 0.0
    assert len(oracle.train(federation, 1).contributors) == 4
    assert engine.waited > 100  # nobody has said how long the others are to wait

    federation, engine, oracle = timed(tmp_path / "some", seconds, max_wait_after_min=2.0)
    engine.waited = 0.0
    total = oracle.train(federation, 1)
    assert total.lost == {BAD: "no answer to fit within 7 s"}
    assert engine.waited < 8
    fault = "20 times slower than the others, which have 2 s more"
    note(Row(fault, "one process, a clock of its own", SURVIVORS, 0, engine.waited, said=total.lost[BAD]))
    for number in (2, 3):
        assert BAD not in oracle.train(federation, number).contributors
    engine.waited = 0.0
    assert oracle.train(federation, 4).lost[BAD].startswith("parked until round 5: it failed 3 rounds in a row")
    assert engine.waited < 6  # parked sites cost nothing
    slow["fit"] = 0.05  # its neighbours' jobs are done
    assert len(oracle.train(federation, 5).contributors) == 4


@pytest.mark.parametrize("method", STAGES)
def test_stages_close_consistently_where_only_enough_are_waited_for(tmp_path: Path, method: str) -> None:
    """Whoever is cut off after its vector came is in the sum, knows it, and does not count as failing."""

    def seconds(site: str, asked: str) -> float:
        return 50.0 if (site, asked) == (BAD, method) else 0.1

    federation, engine, oracle = timed(tmp_path, seconds, max_wait_after_min=0.0, park_after=1)
    total = oracle.train(federation, 1)
    assert (BAD in total.contributors) == (method in AFTER_THE_VECTOR)
    assert federation.failed == []
    total = oracle.train(federation, 2)
    assert ("parked" in total.lost.get(BAD, "")) == (method not in AFTER_THE_VECTOR)
    assert engine.restarted == []  # slow, not hung


def test_deadlines_follow_what_sites_take_and_a_site_that_hangs_costs_one(tmp_path: Path) -> None:
    hanging: set[str] = set()

    def seconds(site: str, method: str) -> float:
        return 1e9 if site in hanging else 20.0 if method == "fit" else 1.0

    federation, engine, oracle = timed(tmp_path, seconds, rejoin_wait_s=0.05)
    oracle.train(federation, 1)
    engine.deadlines.clear()
    oracle.train(federation, 2)
    assert dict(engine.deadlines) == {"advertise": 10, "share": 10, "fit": 80, "confirm": 10, "unmask": 10}
    hanging.add(BAD)
    engine.waited = 0.0
    assert oracle.train(federation, 3).lost == {BAD: "no answer to advertise within 10 s"}
    assert engine.waited == 10 + 1 + 20 + 1 + 1
    engine.waited = 0.0
    for number in (4, 5, 6):
        why = oracle.train(federation, number).lost[BAD]
        assert why == "is not back since it was lost (no answer to advertise within 10 s)"
    assert engine.waited == 3 * (1 + 1 + 20 + 1 + 1)
    assert engine.restarted == [BAD]
    hanging.clear()
    assert len(oracle.train(federation, 7).contributors) == 4


def test_a_sum_that_sites_began_to_open_is_opened_for_the_same_survivors_or_not_at_all(tmp_path: Path) -> None:
    """Six sites, five are needed: one is lost before its vector, another in the last stage."""
    faults = [Fault(BAD, 2, "fit", "raise"), Fault("site-002", 2, "unmask", "die before")]
    federation, sites, oracle = faulty(tmp_path, faults, sites=6)
    oracle.train(federation, 1)
    total = oracle.train(federation, 2)
    assert len(federation.failed) == 1
    assert set(total.contributors) == set(sites) - {BAD}
    assert total.lost == {BAD: "was not in the attempt that sites have begun to open"}
    assert oracle.train(federation, 3).contributors == tuple(sites)
    assert {name: site.counted() for name, site in sites.items()} == oracle.counted


@pytest.mark.faults
def test_a_survivor_that_never_returns_costs_the_round_and_not_the_run(tmp_path: Path) -> None:
    """Its sum was being opened, and may be opened neither without it nor for others: the state stays as it is."""
    gone = "site-002"
    faults = [Fault(BAD, 2, "fit", "raise"), Fault(gone, 2, "unmask", "die before")]
    faults.append(Fault(gone, 2, "open", "raise", lasting=True))
    federation, sites, oracle = faulty(tmp_path, faults, sites=6)
    oracle.train(federation, 1)
    before = federation.server.state.hash
    step, totals = federation.train(2, oracle.weight)
    assert (step.given_up, step.state.hash, totals) == (True, before, ())
    assert len(federation.failed) == 2
    assert federation.failed[1].startswith("the round was given up: round 2 failed: only 4 of the 5 sites")
    why = federation.failed[1]
    for number in (3, 4):
        assert set(oracle.train(federation, number).contributors) == set(sites) - {gone}
        assert federation.failed == []
    assert federation.attendance.absent == {**dict.fromkeys(sites, 1), gone: 3}
    assert {name: site.counted() for name, site in sites.items() if name != gone} == dict.fromkeys(
        sorted(sites.keys() - {gone}), 3
    )
    fault = "two sites lost in a round of six, one in unmask and for good"
    note(Row(fault, "one process", SURVIVORS, lost_rounds=1, said=why))


def test_a_round_that_is_given_up_costs_its_privacy(tmp_path: Path) -> None:
    """Nobody knows who has seen its sum."""
    faults = [Fault(site, 2, "unmask", "die before") for site in (BAD, "site-002")]
    faults.append(Fault(BAD, 2, "open", "raise", lasting=True))
    private = {"privacy": {"clip": 1.0, "noise_multiplier": 1.0}, "weights": "equal", "bits": 24}
    federation, _, _ = faulty(tmp_path, faults, **private)
    spent = [federation.train(number, 4.0)[0].epsilon or 0.0 for number in (1, 2, 3)]
    assert 0 < spent[0] < spent[1] < spent[2]
    assert federation.server.facts()["spent"] == [4, 4, 3]


def test_a_survivor_that_never_returns_ends_the_run_where_the_others_are_too_few(tmp_path: Path) -> None:
    faults = [Fault(BAD, 2, "unmask", "die before"), Fault(BAD, 2, "open", "raise", lasting=True)]
    federation, _, oracle = faulty(tmp_path, faults, sites=3)
    oracle.train(federation, 1)
    with pytest.raises(RoundError, match="round 2 failed: only 2 of the 3 sites"):
        federation.train(2, oracle.weight)
    assert federation.done == 1  # a run that is resumed repeats the round


def test_a_site_that_hangs_only_in_validations_is_parked_from_them_and_trains_on(tmp_path: Path) -> None:
    asked: set[int] = set()

    def seconds(site: str, method: str) -> float:
        if (site, method) == (BAD, "score"):
            asked.add(federation.done)
            return 1e9
        return 1.0

    settings = {"rounds": 24, "validate_every": 2, "park_after": 2, "weights": "equal"}
    federation, _, oracle = timed(tmp_path, seconds, **settings)
    reports: list[RoundReport] = []
    run_rounds(federation, lambda report, _: reports.append(report))
    assert all(report.contributors == tuple(oracle.specs) for report in reports)
    assert [number // 2 for number in sorted(asked)] == [1, 2, 4, 7, 12]  # rests of 1, 2, 4 validations
    assert federation.attendance.absent == {}
    told = federation.attendance.unfit_to_validate(13)[BAD]
    assert told.startswith("parked until validation 21: it failed 5 validations in a row (no answer to score within")
    again, _, _ = faulty(tmp_path / "again", [], weights="equal")
    again.attendance.restore(federation.attendance.to_dict())
    assert again.attendance.unfit_to_validate(13) == {BAD: told}


def test_a_site_that_fails_again_and_again_is_parked_for_longer_and_longer(tmp_path: Path) -> None:
    federation, sites, oracle = faulty(tmp_path, [Fault(BAD, None, "fit", "raise")], park_after=2)
    reasons = {number: oracle.train(federation, number).lost[BAD] for number in range(1, 16)}
    asked = [number for number, why in reasons.items() if why.startswith("ZeroDivisionError")]
    assert asked == [1, 2, 4, 7, 12]  # rests of 1, 2, 4, 8 rounds
    assert reasons[3] == (
        "parked until round 4: it failed 2 rounds in a row (ZeroDivisionError: something in the site's code)"
    )
    assert federation.attendance.absent == {BAD: 15}
    sites[BAD]._faults.clear()
    for number in range(16, 22):
        total = oracle.train(federation, number)
        assert (BAD in total.contributors) == (number >= 21)
    assert federation.attendance.to_dict()[BAD]["training"]["failures"] == 0


def test_parked_sites_are_asked_where_the_others_are_too_few(tmp_path: Path) -> None:
    faults = [Fault(BAD, 1, "fit", "raise"), Fault("site-002", 2, "fit", "die before")]
    federation, _, oracle = faulty(tmp_path, faults, park_after=1)
    assert BAD not in oracle.train(federation, 1).contributors
    total = oracle.train(federation, 2)  # without site-002 only two are left, and site-001 would rest
    assert total.contributors == ("site-000", "site-001", "site-002", "site-003")
    assert len(federation.failed) == 1


def test_fewer_than_min_sites_are_not_opened(tmp_path: Path) -> None:
    federation, sites, oracle = faulty(tmp_path, [Fault(BAD, 2, "share", "raise")], sites=5, min_sites=5)
    oracle.train(federation, 1)
    total = oracle.train(federation, 2)
    assert total.contributors == tuple(sites)
    assert "only 4 of the 5 sites that it needs are left after share" in federation.failed[0]
    assert "ZeroDivisionError" in federation.failed[0]
    lasting, _, oracle = faulty(tmp_path / "lasting", [Fault(BAD, None, "fit", "raise")], sites=5, min_sites=5)
    with pytest.raises(RoundError, match=r"only 4 of the 5 sites .* after fit .*site-001: ZeroDivisionError"):
        lasting.train(1, oracle.weight)


def test_scaffold_weighs_all_sites_or_says_what_to_do(tmp_path: Path) -> None:
    settings = {"scaffold": True, "secure_sum": "masked"}
    _, sites, oracle = faulty(tmp_path, [Fault(BAD, 0, "weigh", "raise")], **settings)
    assert oracle.weight == pytest.approx(sum(map(slices_of, sites)), abs=0.01)  # at the second attempt
    with pytest.raises(RoundError, match=r"SCAFFOLD has to weigh every site once.*federation.weights=equal"):
        faulty(tmp_path / "lasting", [Fault(BAD, None, "weigh", "raise")], **settings)


def test_rounds_report_who_was_absent_and_who_was_disturbed(tmp_path: Path) -> None:
    faults = [Fault(BAD, 1, "fit", "raise"), Fault("site-002", 2, "unmask", "corrupt")]
    federation, _, _ = faulty(tmp_path, faults, rounds=3, weights="equal")
    reports: list[RoundReport] = []
    run_rounds(federation, lambda report, _: reports.append(report))
    assert [set(report.lost) for report in reports] == [{BAD}, set(), set()]
    assert [set(report.disturbed) for report in reports] == [set(), {"site-002"}, set()]


def test_attendance_goes_on_where_it_was_left(tmp_path: Path) -> None:
    federation, _, oracle = faulty(tmp_path, [Fault(BAD, None, "fit", "raise")], park_after=2)
    for number in (1, 2):
        oracle.train(federation, number)
    again, _, _ = faulty(tmp_path / "again", [])
    again.attendance.restore(federation.attendance.to_dict())
    assert again.attendance.to_dict() == federation.attendance.to_dict()
    assert again.attendance.resting(3) == (BAD,)
    again.patience.restore(federation.patience.to_dict())
    assert again.patience.deadline("fit") == federation.patience.deadline("fit")
    with pytest.raises(RoundError, match="attendance in the checkpoint is of other sites"):
        again.attendance.restore({BAD: {}})
