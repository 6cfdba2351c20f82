"""Means over seeds, paired differences, the Pareto front, advice and the atlas, against numbers from elsewhere."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipelines.analysis import (
    Estimate,
    Row,
    advise,
    atlas,
    difference,
    estimate,
    pareto,
    rows_of,
    unfinished,
    versus,
)
from pipelines.results import TrialResult


def trial(group: str, dice: float | None = 0.5, seed: int = 0, **more: Any) -> TrialResult:
    number = abs(hash((group, seed, more.get("status")))) % 16**16
    given = {"id": f"{number:016x}", "group": group, "selection": group, "seed": seed, "test": {"dice": dice}}
    return TrialResult.model_validate(given | more)


def test_an_interval_over_seeds_is_that_of_students_t():
    values = [0.71, 0.74, 0.69]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high))
    assert (found.least, found.most, found.seeds) == (0.69, 0.74, 3)


def test_one_seed_has_no_interval_and_nothing_has_no_mean():
    assert estimate([0.7]) == Estimate(0.7, None, None, 0.7, 0.7, 1)
    assert not estimate([0.0]).holds_zero
    assert estimate([]) is None


def test_a_difference_is_paired_by_the_seeds_that_match():
    of, to = {0: 0.70, 1: 0.72, 2: 0.74, 7: 0.1}, {2: 0.71, 1: 0.70, 0: 0.69}
    found = difference(of, to)
    expected = stats.ttest_rel([0.70, 0.72, 0.74], [0.69, 0.70, 0.71]).confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((0.02, *expected))
    assert found.seeds == 3


def test_without_a_common_seed_a_difference_has_no_interval():
    found = difference({0: 0.7, 1: 0.8}, {2: 0.6})
    assert found.mean == pytest.approx(0.15)
    assert (found.low, found.high, found.seeds) == (None, None, 0)
    assert difference({}, {0: 0.5}) is None


def test_rows_are_groups_in_the_order_of_the_study_and_leave_failed_trials_out():
    trials = [
        trial("b", 0.6, 1),
        trial("a", 0.4),
        trial("b", 0.5, 0),
        trial("b", 0.0, 2, status="failed", error="out of memory"),
        trial("c", None, status="stopped"),
    ]
    rows = rows_of(trials)
    assert [row.group for row in rows] == ["b", "a"]
    assert rows[0].dice_by_seed == {0: 0.5, 1: 0.6}
    assert [one.group for one in unfinished(trials)] == ["b", "c"]


def test_the_same_seed_twice_is_one_draw():
    (row,) = rows_of([trial("a", 0.4, id="0" * 16), trial("a", 0.6, id="1" * 16), trial("a", 0.7, 1)])
    assert row.dice_by_seed == pytest.approx({0: 0.5, 1: 0.7})
    assert row.dice.seeds == 2


def test_a_trial_without_a_score_is_a_row_without_dice():
    (row,) = rows_of([trial("a", None)])
    assert row.dice is None
    assert pareto([row]) == []
    assert advise([row]) is None


def test_classes_sites_and_fairness_are_means_over_seeds():
    def test_of(a: float, b: float | None) -> dict[str, Any]:
        sites = {"A": {"dice": a, "cases": 3}, "B": {"dice": b, "cases": 2}}
        return {"dice": 0.5, "per_class": {"tumour": {"dice": a / 2}}, "per_site": sites}

    (row,) = rows_of([trial("a", test=test_of(0.8, 0.5)), trial("a", seed=1, test=test_of(0.6, None))])
    assert row.per_class["tumour"].mean == pytest.approx(0.35)
    assert row.per_site["A"].mean == pytest.approx(0.7)
    assert (row.per_site["B"].mean, row.per_site["B"].seeds) == (0.5, 1)
    assert (row.fairness.worst_site, row.fairness.best_site) == ("B", "A")
    assert row.fairness.spread == pytest.approx(0.2)


def test_a_curve_is_a_mean_by_round():
    (row,) = rows_of(
        [trial("a", curve=[(0, 0.1), (1, None), (2, 0.5)]), trial("a", seed=1, curve=[(0, 0.3), (1, 0.4)])]
    )
    assert {round_: one.mean for round_, one in row.curve().items()} == pytest.approx({0: 0.2, 1: 0.4, 2: 0.5})


def test_bytes_are_measured_and_in_the_papers_unit():
    (row,) = rows_of(
        [trial("a", bytes_up=10, bytes_down=2, trainable=90_532_927), trial("a", seed=1, bytes_up=20, bytes_down=4)]
    )
    assert (row.bytes_up, row.bytes_down, row.bytes_total) == (15, 3, 18)
    assert row.paper_gb == pytest.approx(67.45, abs=0.005)  # the paper's Fig. 1 of "full"


def test_a_row_is_compared_with_the_baseline_of_its_own_selection():
    rows = rows_of(
        [trial("flap r=8", dice, seed, selection="flap") for seed, dice in enumerate((0.7, 0.8))]
        + [trial("lora r=8", 0.6, selection="lora")]
        + [trial("local flap", dice, seed, selection="flap", kind="local") for seed, dice in enumerate((0.6, 0.65))]
        + [trial("local full", 0.3, selection="full", kind="local")]
        + [trial("pooled", dice, seed, selection="full", kind="centralized") for seed, dice in enumerate((0.8, 0.8))]
    )
    found = versus(rows[0], rows, "local")
    assert (found.baseline, found.difference.mean, found.difference.seeds) == ("local flap", pytest.approx(0.125), 2)
    assert versus(rows[1], rows, "local") is None  # two baselines, none its own
    assert versus(rows[0], rows, "centralized").difference.mean == pytest.approx(-0.05)  # the only one
    assert versus(rows[1], rows, "zero-shot") is None
    assert versus(rows[2], rows, "centralized") is None  # no federated row


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_that_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    made = [(int(rng.integers(1, 8)), float(rng.integers(1, 8)) / 10) for _ in range(12)]
    rows = rows_of([trial(f"g{i}", dice, bytes_up=size) for i, (size, dice) in enumerate(made)])
    rows += rows_of([trial("pooled", 1.0, kind="centralized")])
    beaten = {
        f"g{i}"
        for i, (size, dice) in enumerate(made)
        for s, d in made
        if (s < size and d >= dice) or (s <= size and d > dice)
    }
    front = pareto(rows)
    assert {row.group for row in front} == {f"g{i}" for i in range(len(made))} - beaten
    assert [row.bytes_total for row in front] == sorted(row.bytes_total for row in front)


def _with_seeds(group: str, size: int, *dice: float) -> list[TrialResult]:
    return [trial(group, one, seed, bytes_up=size) for seed, one in enumerate(dice)]


def test_advice_is_the_cheapest_that_cannot_be_told_from_the_best():
    rows = rows_of(
        _with_seeds("worse", 1, 0.50, 0.51, 0.52)
        + _with_seeds("cheap", 10, 0.70, 0.71, 0.72)
        + _with_seeds("dear", 100, 0.71, 0.70, 0.725)
    )
    found = advise(rows)
    assert (found.best.group, found.take.group) == ("dear", "cheap")
    assert found.difference.holds_zero


def test_advice_is_the_best_itself_where_all_others_are_told_apart_or_seeds_are_too_few():
    found = advise(rows_of(_with_seeds("cheap", 10, 0.60, 0.61, 0.62) + _with_seeds("dear", 100, 0.70, 0.71, 0.725)))
    assert (found.take.group, found.difference) == ("dear", None)
    found = advise(rows_of(_with_seeds("cheap", 10, 0.70) + _with_seeds("dear", 100, 0.70001)))
    assert found.take.group == "dear"


def _parts(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 10)


def test_the_atlas_is_gain_per_megabyte_from_the_zero_shot_trial():
    whole = _parts("encoder.0.lora_q", "encoder.0.lora_v", "encoder.1.lora_q", "encoder.1.lora_v")
    rows = rows_of(
        [
            trial("lora", dice, seed, parts=whole, bytes_up=3_000_000, bytes_down=1_000_000, before={"dice": 0.4})
            for seed, dice in enumerate((0.5, 0.7))
        ]
        + [trial("zero", 0.1, 0, kind="zero-shot"), trial("zero", 0.2, 1, kind="zero-shot")]
    )
    (found,) = atlas(rows)
    assert found.gain.mean == pytest.approx((0.4 + 0.5) / 2)
    assert found.per_megabyte.mean == pytest.approx((0.1 + 0.125) / 2)
    assert found.component == "lora_q, lora_v"
    (found,) = atlas(rows[:1])  # without zero-shot: from the same trial's own start
    assert found.gain.mean == pytest.approx((0.1 + 0.3) / 2)


def test_a_seed_without_its_own_zero_shot_trial_is_compared_with_their_mean():
    rows = rows_of(
        [
            trial("a", 0.6, 5, parts=_parts("encoder.0.mlp"), bytes_up=1_000_000),
            trial("zero", 0.1, 0, kind="zero-shot"),
            trial("zero", 0.3, 1, kind="zero-shot"),
        ]
    )
    assert atlas(rows)[0].gain.mean == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("parts", "component"),
    [
        (("encoder.1.mlp",), "mlp"),
        (("encoder.1.mlp", "encoder.2.mlp"), "mlp"),
        (("encoder.0.mlp", "encoder.2.mlp"), ""),  # a gap
        (("encoder.0.mlp", "encoder.1.norms"), ""),  # not the same everywhere
        (("encoder.2.lora_q", "decoder.0.lora_q"), "lora_q"),  # the next column
        (("decoder.head.upscaling", "decoder.head.mask_tokens"), "mask_tokens, upscaling"),
        (("encoder.2.lora_q", "decoder.head.upscaling"), ""),
    ],
)
def test_a_selection_is_one_cell_only_if_it_trains_the_same_in_a_row(parts, component):
    deepest = trial("all", 0.5, parts=_parts("encoder.2.mlp"), before={"dice": 0.1}, bytes_up=1)
    rows = rows_of([deepest, trial("one", 0.5, parts=_parts(*parts), before={"dice": 0.1}, bytes_up=1)])
    assert atlas(rows)[1].component == component


def test_what_cannot_be_in_the_atlas_is_left_out():
    rows = rows_of(
        [
            trial("no parts", 0.5, before={"dice": 0.1}, bytes_up=1),
            trial("no bytes", 0.5, before={"dice": 0.1}, parts=_parts("encoder.0.mlp")),
            trial("no start", 0.5, parts=_parts("encoder.0.mlp"), bytes_up=1),
        ]
    )
    assert atlas(rows) == []


def test_cross_is_a_mean_over_seeds():
    (row,) = rows_of(
        [
            trial("local", kind="local", cross={"A": {"A": 0.6, "B": 0.2}, "B": {"A": None, "B": 0.5}}),
            trial("local", seed=1, kind="local", cross={"A": {"A": 0.8, "B": 0.4}, "B": {"A": None, "B": 0.7}}),
        ]
    )
    assert isinstance(row, Row)
    assert row.cross() == {"A": pytest.approx({"A": 0.7, "B": 0.3}), "B": pytest.approx({"B": 0.6})}
