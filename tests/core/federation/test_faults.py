"""Whatever befalls one site in any stage, the round goes on, its sum is the survivors', and the site is soon back.

In one process, on toys; `tests/cluster/test_faults.py` does the same to real processes and nodes.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from support.faults import Fault, FaultySite
from support.toys import Oracle, slices_of, toy_federation, toy_specs

from fedsam_core.errors import RoundError
from fedsam_core.federation.engine import InProcessEngine
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


@pytest.mark.parametrize(("secure_sum", "method", "what"), MATRIX)
def test_the_sum_is_the_survivors_and_the_site_is_back(tmp_path: Path, secure_sum: str, method: str, what: str) -> None:
    federation, sites, oracle = faulty(tmp_path, [Fault(BAD, 2, method, what)], secure_sum=secure_sum)
    assert oracle.train(federation, 1).contributors == tuple(sites)
    total = oracle.train(federation, 2)
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


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("nan", "its values do not fit their clips"),
        ("disk full", r"held-000002.safetensors: the disk is full"),
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
    assert federation.attendance.to_dict()[BAD]["failures"] == 0


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
