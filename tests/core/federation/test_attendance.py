"""Deadlines and rests, by tables."""

import pytest

from fedsam_core.federation.attendance import HISTORY, LONGEST_REST, Attendance, Patience, deadline_after


@pytest.mark.parametrize(
    ("times", "factor", "floor", "ceiling", "expected"),
    [
        ((), 4.0, 60.0, 3600.0, 3600.0),  # nothing is known yet
        ((100.0,), 4.0, 60.0, 3600.0, 400.0),
        ((100.0, 200.0, 50.0), 4.0, 60.0, 3600.0, 800.0),  # the slowest counts
        ((1.0,), 4.0, 60.0, 3600.0, 60.0),  # the floor
        ((1000.0,), 4.0, 60.0, 3600.0, 3600.0),  # the ceiling
        ((1.0,), 4.0, 60.0, 10.0, 10.0),  # the ceiling is above all
        ((1.0,), None, 60.0, 3600.0, 3600.0),  # not learnt
    ],
)
def test_deadlines(
    times: tuple[float, ...], factor: float | None, floor: float, ceiling: float, expected: float
) -> None:
    assert deadline_after(times, factor, floor, ceiling) == expected


def test_kinds_of_calls_have_deadlines_of_their_own_and_old_times_are_forgotten() -> None:
    patience = Patience(3600.0, 4.0, 10.0)
    patience.took("fit", 100.0)
    patience.took("confirm", 1.0)
    assert [patience.deadline(kind) for kind in ("fit", "confirm", "unmask")] == [400.0, 10.0, 3600.0]
    for _ in range(HISTORY):
        patience.took("fit", 5.0)
    assert patience.deadline("fit") == 20.0


def test_a_slow_site_gets_twice_the_time_once_it_is_back() -> None:
    patience = Patience(1000.0, 4.0, 10.0)
    patience.took("fit", 5.0)
    assert patience.deadline("fit") == 20.0
    patience.missed("a", "fit", 20.0)
    assert patience.deadline("fit") == 20.0  # one that hangs changes nothing for the others
    patience.returned("b")
    assert patience.deadline("fit") == 20.0
    patience.returned("a")
    assert patience.deadline("fit") == 40.0
    patience.returned("a")
    assert patience.deadline("fit") == 40.0


@pytest.mark.parametrize(
    ("park_after", "asked"),
    [
        (1, [1, 3, 6, 11, 20, 37]),  # rests of 1, 2, 4, 8, 16
        (3, [1, 2, 3, 5, 8, 13, 22, 39]),
    ],
)
def test_rests_double(park_after: int, asked: list[int]) -> None:
    attendance = Attendance(["a", "b"], park_after)
    found = []
    for number in range(1, 40):
        if "a" in attendance.present(number):
            found.append(number)
            attendance.lose("a", "it is broken")
            attendance.take_back("a")  # it opens, and fails again
        attendance.close(number, ["b"])
    assert found == asked
    assert attendance.absent == {"a": 39}


def test_rests_have_an_end_and_one_good_round_ends_them() -> None:
    attendance, number = Attendance(["a"], 1), 1
    longest = 0
    while number < 1000:
        attendance.lose("a", "broken")
        attendance.close(number, [])
        attendance.take_back("a")
        following = next(n for n in range(number + 1, number + 200) if attendance.present(n))
        longest, number = max(longest, following - number - 1), following
    assert longest == LONGEST_REST
    attendance.close(number, ["a"])
    attendance.lose("a", "broken")
    attendance.close(number + 1, [])
    assert attendance.resting(number + 2) == ("a",)
    assert attendance.resting(number + 3) == ()


def test_who_is_only_away_is_not_parked_and_costs_nothing() -> None:
    attendance = Attendance(["a", "b"], 2)
    attendance.lose("a", "its actor or node died")
    for number in range(1, 9):
        assert attendance.left_out(number) == {"a": "is not back since it was lost (its actor or node died)"}
        attendance.close(number, ["b"])
    attendance.take_back("a")
    assert attendance.present(9) == ("a", "b")


def test_the_last_round_that_counts_is_known_from_the_first_on() -> None:
    attendance = Attendance(["a", "b"], 2)
    assert attendance.counted == {}  # a resumed run may not say "none"
    attendance.begin()
    assert attendance.counted == {"a": 0, "b": 0}
    attendance.close(1, ["a"])
    attendance.close(2, ["b"])
    assert attendance.counted == {"a": 1, "b": 2}
    again = Attendance(["a", "b"], 2)
    again.restore(attendance.to_dict())
    assert again.counted == attendance.counted
