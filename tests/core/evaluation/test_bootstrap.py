"""Bootstrap intervals: they repeat, they cover what they claim to, and little data makes no noise."""

import numpy as np
import pytest

from fedsam_core.evaluation.bootstrap import mean_interval, mean_of_means

NAN = float("nan")
pytestmark = pytest.mark.filterwarnings("error")


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)[:, None]


def test_means_leave_out_what_has_no_score() -> None:
    assert mean_of_means(np.array([[0.8, NAN], [0.6, 0.2]])) == pytest.approx((0.7 + 0.2) / 2)
    assert mean_of_means(np.array([[0.8, NAN], [NAN, NAN]])) == pytest.approx(0.8)
    assert np.isnan(mean_of_means(np.full((2, 2), NAN)))
    assert np.isnan(mean_of_means(np.empty((0, 2))))
    several = np.array([[[0.8, NAN], [0.6, 0.2]], [[0.1, NAN], [0.3, NAN]]])
    np.testing.assert_allclose(mean_of_means(several), [0.45, 0.2])


def test_intervals_repeat_bit_for_bit() -> None:
    rng = np.random.default_rng(1)
    groups = [rng.beta(6, 2, (n, 2)) for n in (7, 12, 1)]
    first = mean_interval(groups, seed=4)
    assert first == mean_interval([group.copy() for group in groups], seed=4)
    other = mean_interval(groups, seed=5)
    assert other != first
    assert other == pytest.approx(first, abs=0.01)


def test_one_group_is_the_plain_percentile_bootstrap() -> None:
    values = np.random.default_rng(2).beta(5, 2, 15)
    drawn = np.random.default_rng(99).choice(values, (40_000, 15)).mean(axis=1)
    low, high = mean_interval([values[:, None]], seed=0) or (NAN, NAN)
    assert (low, high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.004)
    assert low < values.mean() < high


def test_macro_draws_within_each_site() -> None:
    rng = np.random.default_rng(3)
    # Sites differ far more than their cases do: whoever mixed them would get a wide interval.
    sites = [0.2 + 0.02 * rng.random(6), 0.5 + 0.02 * rng.random(30), 0.9 + 0.02 * rng.random(4)]
    low, high = mean_interval([site[:, None] for site in sites], seed=0) or (NAN, NAN)
    macro = np.mean([site.mean() for site in sites])
    assert low < macro < high
    assert high - low < 0.01
    draws = np.mean([rng.choice(site, (20_000, len(site))).mean(axis=1) for site in sites], axis=0)
    assert (low, high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=5e-4)
    pooled = mean_interval([np.concatenate(sites)[:, None]], seed=0) or (NAN, NAN)
    assert pooled[1] - pooled[0] > 0.1


def test_classes_of_a_case_are_drawn_together() -> None:
    rng = np.random.default_rng(4)
    kidney = rng.random(20)
    together, opposed = np.stack([kidney, kidney], axis=1), np.stack([kidney, 1 - kidney], axis=1)
    alone = mean_interval([kidney[:, None]], seed=0)
    assert mean_interval([together], seed=0) == pytest.approx(alone)
    assert mean_interval([opposed], seed=0) == pytest.approx((0.5, 0.5))


def test_it_covers_the_mean_about_as_often_as_it_says() -> None:
    rng, mean = np.random.default_rng(6), 6 / 8
    found = [mean_interval([rng.beta(6, 2, (25, 1))], seed=k) or (NAN, NAN) for k in range(200)]
    covered = sum(low <= mean <= high for low, high in found) / len(found)
    assert 0.89 <= covered <= 0.985
    macro = [
        mean_interval([rng.beta(6, 2, (12, 1)), rng.beta(2, 6, (12, 1))], seed=k) or (NAN, NAN) for k in range(200)
    ]
    covered = sum(low <= 0.5 <= high for low, high in macro) / len(macro)
    assert 0.88 <= covered <= 0.985


def test_little_to_draw_from() -> None:
    assert mean_interval([], seed=0) is None
    assert mean_interval([np.empty((0, 2))], seed=0) is None
    assert mean_interval([column(0.7)], seed=0) is None
    assert mean_interval([column(0.7), column(0.2)], seed=0) is None
    assert mean_interval([column(NAN, NAN, 0.7)], seed=0) is None
    assert mean_interval([column(0.7, 0.7, 0.7)], seed=0) == pytest.approx((0.7, 0.7))
    two = mean_interval([column(0.2, 0.6)], seed=0)
    assert two == pytest.approx((0.2, 0.6))


def test_a_site_of_one_case_is_held() -> None:
    many = column(0.2, 0.4, 0.6, 0.8)
    low, high = mean_interval([many], seed=0) or (NAN, NAN)
    assert mean_interval([many, column(1.0)], seed=0) == pytest.approx(((low + 1) / 2, (high + 1) / 2))
    assert mean_interval([many, column(NAN, NAN)], seed=0) == (low, high)


def test_cases_without_a_score_of_a_class_change_nothing() -> None:
    scores = np.array([[0.9, NAN], [0.7, NAN], [0.8, 0.1], [0.6, NAN]])
    interval = mean_interval([scores], seed=0)
    assert interval is not None
    assert all(np.isfinite(interval))
    assert mean_interval([np.vstack([scores, [[NAN, NAN]]])], seed=0) == interval
