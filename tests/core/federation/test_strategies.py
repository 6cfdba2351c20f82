"""Server strategies, FedProx, SCAFFOLD and step normalisation on problems whose answers are known in closed form.

Site i minimises a_i/2 (x - b_i)^2, in every coordinate of x with its own a_i and b_i. K steps of SGD from x bring it to
b_i + (1 - lr a_i)^K (x - b_i), so where the rounds come to rest follows with pencil and paper.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedsam_core.errors import CheckpointError
from fedsam_core.federation.strategies import ServerStrategy, StrategyConfig
from fedsam_core.learning.corrections import ControlVariate, Proximal

RATE = 0.1
CURVATURE = np.array([[1.0, 0.5, 4.0], [3.0, 2.0, 0.2], [0.3, 6.0, 1.0], [2.0, 1.0, 2.5]])  # [site, coordinate]
CENTRE = np.array([[1.0, -2.0, 0.5], [-1.0, 4.0, 2.0], [3.0, 0.0, -1.0], [0.5, 1.0, -3.0]])
WEIGHT = np.array([0.4, 0.3, 0.2, 0.1])[:, None]
ALL = np.arange(3)
OPTIMUM = (WEIGHT * CURVATURE * CENTRE).sum(0) / (WEIGHT * CURVATURE).sum(0)

Correction = Callable[[list[torch.nn.Parameter]], Proximal | ControlVariate]


@dataclass
class Visit:
    """What a site's local training gave: its update [3], and its control variate where it has one."""

    update: np.ndarray
    own: np.ndarray | None


def train(site: int, x: np.ndarray, steps: int, rate: float = RATE, correct: Correction | None = None) -> Visit:
    """Local SGD of a site in the learner's order: gradient, correction, step. The vector makes two parameters."""
    parts = [torch.nn.Parameter(part) for part in split(x)]
    a, b = split(CURVATURE[site]), split(CENTRE[site])
    correction = correct(parts) if correct else None
    for _ in range(steps):
        with torch.no_grad():
            for index, part in enumerate(parts):
                part.grad = a[index] * (part - b[index])
            if correction is not None:
                correction.correct()
            for part in parts:
                part -= rate * part.grad
    own = torch.cat(correction.new_own()).numpy() if isinstance(correction, ControlVariate) else None
    return Visit(torch.cat(parts).detach().numpy() - x, own)


def split(vector: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(vector[:1]), torch.tensor(vector[1:])]


def run(visit: Callable[[int, np.ndarray], Visit], rounds: int) -> np.ndarray:
    """Where FedAvg over all sites comes to rest."""
    strategy, x = ServerStrategy(StrategyConfig(), 3), np.zeros(3)
    for _ in range(rounds):
        mean = sum(weight * visit(site, x).update for site, weight in enumerate(WEIGHT))
        x = x + strategy.step(mean, ALL)
    return x


def rest(pull: np.ndarray) -> np.ndarray:
    """The x at which sum_i pull_i (b_i - x) is zero; pull is [site, coordinate]."""
    return (pull * CENTRE).sum(0) / pull.sum(0)


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_fedavg_rests_where_drifted_sites_balance(steps: int) -> None:
    found = run(lambda site, x: train(site, x, steps), 300)
    np.testing.assert_allclose(found, rest(WEIGHT * (1 - (1 - RATE * CURVATURE) ** steps)), rtol=1e-12)
    # One step is gradient descent on the true objective; more steps drift away from it.
    drift = np.abs(found - OPTIMUM).max()
    assert drift < 1e-12 if steps == 1 else drift > 0.05


@pytest.mark.parametrize(("mu", "steps"), [(0.5, 5), (2.0, 5), (2.0, 120)])
def test_fedprox_rests_where_sites_held_back_balance(mu: float, steps: int) -> None:
    found = run(lambda site, x: train(site, x, steps, correct=lambda parts: Proximal(parts, mu)), 120)
    held = CURVATURE + mu
    np.testing.assert_allclose(
        found, rest(WEIGHT * CURVATURE / held * (1 - (1 - RATE * held) ** steps)), rtol=1e-12, atol=1e-13
    )
    if steps == 120:  # the sites solve their own problems exactly, as the paper's analysis assumes
        np.testing.assert_allclose(found, rest(WEIGHT * CURVATURE / held), rtol=1e-12, atol=1e-13)
    fedavg = rest(WEIGHT * (1 - (1 - RATE * CURVATURE) ** steps))
    assert np.abs(found - OPTIMUM).max() < np.abs(fedavg - OPTIMUM).max()


def scaffold(
    steps: Sequence[int], rounds: int, weights: np.ndarray = WEIGHT, lost: Callable[[int], set[int]] = lambda _: set()
) -> np.ndarray:
    """SCAFFOLD as `ControlVariate` describes it; `weights` are those of the control variates."""
    x, common, own = np.zeros(3), np.zeros(3), np.zeros((4, 3))
    for number in range(rounds):
        there = [site for site in range(4) if site not in lost(number)]
        visits = {}
        for site in there:
            correct = partial(ControlVariate, own=split(own[site]), common=split(common))
            visits[site] = train(site, x, steps[site], correct=correct)
        mean = sum(WEIGHT[site] * visits[site].update for site in there) / WEIGHT[there].sum()
        common = common + sum(weights[site] * (visits[site].own - own[site]) for site in there) / weights.sum()
        for site in there:
            own[site] = visits[site].own
        x = x + ServerStrategy(StrategyConfig(), 3).step(mean, ALL)
    return x


def test_scaffold_reaches_the_true_optimum_however_many_steps_a_site_takes() -> None:
    np.testing.assert_allclose(scaffold([5, 5, 5, 5], 300), OPTIMUM, rtol=1e-12)
    np.testing.assert_allclose(scaffold([2, 5, 3, 8], 300), OPTIMUM, rtol=1e-12)


def test_scaffold_reaches_it_when_sites_are_lost() -> None:
    rng = np.random.default_rng(0)
    losses = [set(rng.permutation(4)[: rng.integers(0, 3)].tolist()) for _ in range(600)]
    np.testing.assert_allclose(scaffold([5, 5, 5, 5], 600, lost=losses.__getitem__), OPTIMUM, rtol=1e-9)


def test_control_variates_have_the_weights_of_the_updates() -> None:
    # Were they averaged evenly, the sites would solve the evenly weighted problem, whatever their updates weigh.
    even = (CURVATURE * CENTRE).sum(0) / CURVATURE.sum(0)
    np.testing.assert_allclose(scaffold([5] * 4, 300, weights=np.ones((4, 1))), even, rtol=1e-12)
    assert np.abs(even - OPTIMUM).max() > 0.05


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_new_control_variate_is_option_two_of_the_paper(steps: int) -> None:
    rng = np.random.default_rng(1)
    x, own, common = rng.normal(size=(3, 3))
    visit = train(2, x, steps, correct=lambda parts: ControlVariate(parts, split(own), split(common)))
    np.testing.assert_allclose(visit.own, own - common - visit.update / (steps * RATE), rtol=1e-12)


def normalized(steps: Sequence[int], rate: float) -> Callable[[int, np.ndarray], Visit]:
    """FedNova (Wang et al. 2020, arXiv 2007.07481): the mean of the updates a step, times the mean number of steps."""
    mean_steps = float((WEIGHT[:, 0] * steps).sum())

    def visit(site: int, x: np.ndarray) -> Visit:
        return Visit(train(site, x, steps[site], rate).update / steps[site] * mean_steps, None)

    return visit


def test_step_normalisation_removes_the_inconsistency_of_unequal_steps() -> None:
    steps = [1, 2, 4, 12]
    taken = np.array(steps)[:, None]
    plain, normal = [], []
    for rate in (0.04, 0.02, 0.01):
        moved = WEIGHT * (1 - (1 - rate * CURVATURE) ** taken)
        plain.append(run(lambda site, x, rate=rate: train(site, x, steps[site], rate), 800))
        normal.append(run(normalized(steps, rate), 800))
        np.testing.assert_allclose(plain[-1], rest(moved), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(normal[-1], rest(moved / taken), rtol=1e-6, atol=1e-6)
    # FedAvg goes to the optimum of another objective, in which a site counts by its steps, at any learning rate.
    other = rest(WEIGHT * CURVATURE * taken)
    assert np.abs(plain[-1] - OPTIMUM).max() > 0.5 * np.abs(other - OPTIMUM).max() > 0.3
    # What is left of the normalised mean's error is local drift: it halves with the learning rate.
    errors = [np.abs(found - OPTIMUM).max() for found in normal]
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2, rtol=0.2)


# The server's optimisers.


def by_hand(config: StrategyConfig, means: list[float]) -> list[float]:
    """Steps of one value, as the papers' algorithms have them, in plain Python."""
    m, v = 0.0, config.adaptivity**2
    steps = []
    for delta in means:
        if config.kind == "fedavg":
            steps.append(config.learning_rate * delta)
        elif config.kind == "fedavgm":
            m = config.momentum * m + delta
            steps.append(config.learning_rate * m)
        else:
            m = config.momentum * m + (1 - config.momentum) * delta
            if config.kind == "fedadam":
                v = config.beta2 * v + (1 - config.beta2) * delta**2
            elif v != delta**2:
                v = v - (1 - config.beta2) * delta**2 * (1 if v > delta**2 else -1)
            steps.append(config.learning_rate * m / (sqrt(v) + config.adaptivity))
    return steps


CONFIGS = [
    StrategyConfig(kind="fedavg", learning_rate=0.5),
    StrategyConfig(kind="fedavgm", momentum=0.8, learning_rate=0.3),
    StrategyConfig(kind="fedadam", beta2=0.95),
    StrategyConfig(kind="fedyogi", beta2=0.9, adaptivity=1e-2, learning_rate=0.03),
]


def kind(config: StrategyConfig) -> str:
    return config.kind


@pytest.mark.parametrize("config", CONFIGS, ids=kind)
def test_each_value_follows_the_paper_whatever_the_others_do(config: StrategyConfig) -> None:
    """Rounds of random halves of the vector: a value's steps depend on its own means alone."""
    rng = np.random.default_rng(2)
    strategy = ServerStrategy(config, 40)
    means: list[list[float]] = [[] for _ in range(40)]
    steps: list[list[float]] = [[] for _ in range(40)]
    for _ in range(30):
        active = rng.permutation(40)[:20]
        mean = rng.normal(size=20) * 10.0 ** rng.uniform(-5, 0, 20) * (rng.random(20) > 0.1)
        for place, delta, step in zip(active, mean, strategy.step(mean, active), strict=True):
            means[place].append(delta)
            steps[place].append(step)
    for place in range(40):
        np.testing.assert_allclose(steps[place], by_hand(config, means[place]), rtol=1e-13)


def test_under_a_steady_mean_the_moments_have_a_closed_form() -> None:
    delta, tau = 0.02, 1e-3

    def last(rounds: int, config: StrategyConfig) -> float:
        strategy = ServerStrategy(config, 1)
        return [strategy.step(np.array([delta]), np.array([0]))[0] for _ in range(rounds)][-1]

    for rounds in (1, 2, 10):
        momentum = 1 - 0.9**rounds
        adam = delta * momentum / (sqrt(0.99**rounds * tau**2 + (1 - 0.99**rounds) * delta**2) + tau)
        yogi = delta * momentum / (sqrt(tau**2 + rounds * 0.01 * delta**2) + tau)
        assert last(rounds, StrategyConfig(kind="fedavgm")) == pytest.approx(delta * momentum / 0.1, rel=1e-12)
        assert last(rounds, StrategyConfig(kind="fedadam")) == pytest.approx(0.01 * adam, rel=1e-12)
        assert last(rounds, StrategyConfig(kind="fedyogi")) == pytest.approx(0.01 * yogi, rel=1e-12)


@pytest.mark.parametrize("config", CONFIGS, ids=kind)
def test_all_strategies_rest_where_fedavg_does(config: StrategyConfig) -> None:
    """They change the way, not the goal: at the goal the mean update is zero."""
    pull = WEIGHT * (1 - (1 - RATE * CURVATURE) ** 5)
    strategy, x = ServerStrategy(config, 3), np.zeros(3)
    for _ in range(3000):
        x = x + strategy.step((pull * (CENTRE - x)).sum(0), ALL)
    np.testing.assert_allclose(x, rest(pull), rtol=1e-6, atol=1e-6)


def test_fedavg_is_the_mean_itself_bit_for_bit() -> None:
    mean = np.array([0.1, -0.0, 3e-310])
    assert ServerStrategy(StrategyConfig(), 3).step(mean, ALL) is mean
    assert ServerStrategy(StrategyConfig(kind="fedavgm", momentum=0.0), 3).step(mean, ALL).tolist() == mean.tolist()


@pytest.mark.parametrize("config", CONFIGS, ids=kind)
def test_a_resumed_strategy_goes_on_bit_for_bit(config: StrategyConfig) -> None:
    rng = np.random.default_rng(3)
    first = ServerStrategy(config, 50)
    half, rounds = np.arange(0, 50, 2), [rng.normal(0, 0.01, 25) for _ in range(6)]
    for mean in rounds[:3]:
        first.step(mean, half)
    kept = first.arrays()
    second = ServerStrategy(config, 50)
    second.load(kept)
    for mean in rounds[3:]:  # what was kept does not change with the strategy that it was taken from
        assert np.array_equal(first.step(mean, half), second.step(mean, half))
    third = ServerStrategy(config, 50)
    third.load(kept)
    assert np.array_equal(third.step(rounds[3], half), replay(config, [*rounds[:4]], half)[-1])


def replay(config: StrategyConfig, means: list[np.ndarray], active: np.ndarray) -> list[np.ndarray]:
    strategy = ServerStrategy(config, 50)
    return [strategy.step(mean, active) for mean in means]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"square": None}, "strategy.kind=fedadam has momentum and square: resume with the strategy"),
        ({"extra": np.zeros(3)}, "are extra and momentum and square, but"),
        ({"momentum": np.zeros(4)}, r"momentum is float64\[4\], expected float64\[3\]: resume with the selection"),
        ({"momentum": np.zeros(3, np.float32)}, r"momentum is float32\[3\]"),
        ({"momentum": np.array([0, np.nan, 0])}, "momentum is damaged: resume from an earlier round"),
        ({"square": np.array([0.0, -1.0, 0])}, "square is damaged"),
    ],
)
def test_moments_that_do_not_fit_are_refused(change: dict[str, np.ndarray | None], complaint: str) -> None:
    strategy = ServerStrategy(StrategyConfig(kind="fedadam"), 3)
    before = strategy.arrays()
    arrays = {name: array for name, array in (before | change).items() if array is not None}
    with pytest.raises(CheckpointError, match=complaint):
        strategy.load(arrays)
    assert {name: array.tolist() for name, array in strategy.arrays().items()} == {
        name: array.tolist() for name, array in before.items()
    }
    with pytest.raises(CheckpointError, match=r"are momentum and square, but strategy\.kind=fedavg has none"):
        ServerStrategy(StrategyConfig(), 3).load(before)


def test_the_learning_rate_left_out_is_one_for_the_kind() -> None:
    assert [StrategyConfig(kind=kind).learning_rate for kind in ("fedavg", "fedavgm", "fedadam", "fedyogi")] == [
        1.0,
        1.0,
        0.01,
        0.01,
    ]
    given = StrategyConfig.model_validate({"kind": "fedadam", "learning_rate": 0.5})
    assert StrategyConfig.model_validate(given.model_dump()) == given


@pytest.mark.parametrize("wrong", [{"momentum": 1.0}, {"learning_rate": 0}, {"adaptivity": 0}, {"kind": "adam"}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        StrategyConfig(**wrong)
