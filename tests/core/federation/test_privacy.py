"""Privacy: the noise is distributed as it claims to be, no clip is passed, and epsilon is what others publish."""

import math
from collections.abc import Callable

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_two_probability_mass_functions
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from scipy import stats
from scipy.special import ive

from fedsam_core.federation.privacy import (
    BEYOND,
    Accountant,
    PrivacyConfig,
    clip_l2,
    integers,
    needed_clip,
    noise_variance,
    ring_levels,
    rounded_norm,
    secret_rng,
    skellam_rdp,
    suggest_step,
)
from fedsam_core.federation.rotation import Rotation
from fedsam_core.secagg.layout import Lane, VectorLayout
from fedsam_core.secagg.quantize import decode_sum, encode
from fedsam_core.secagg.refusals import UnfitValues

QUIET = 1e-9
"""A noise multiplier with which, in these tests, no noise is ever drawn: what is left is clipping and rounding."""

FINE = 1e-7
"""A step that is so fine, for a clip of 1, that Skellam noise is Gaussian for all that can be told."""


def make(noise_multiplier: float = 1.0, **keys: float) -> PrivacyConfig:
    return PrivacyConfig(**{"clip": 1.0, "noise_multiplier": noise_multiplier, **keys})


# --- the noise ---


def chi_square(draws: np.ndarray, variance: float) -> float:
    """p-value of integers against Skellam noise of a variance; bins with fewer than 10 expected go to the tails."""
    half = variance / 2
    edge = int(stats.skellam.isf(20 / draws.size, half, half))
    inner = np.arange(-edge, edge + 1)
    expected = stats.skellam.pmf(inner, half, half) * draws.size
    seen = np.array([np.count_nonzero(draws == k) for k in inner])
    below, above = np.count_nonzero(draws < -edge), np.count_nonzero(draws > edge)
    tail = (draws.size - expected.sum()) / 2
    return float(stats.chisquare([below, *seen, above], [tail, *expected, tail]).pvalue)


@pytest.mark.parametrize("steps", [0.7, 3.0, 12.0])
def test_one_sites_noise_is_skellam(steps: float) -> None:
    config, minimum = make(), 3
    step = 1 / (steps * math.sqrt(minimum))
    draws = integers(np.zeros(200_000), step, config, minimum, np.random.default_rng(1))
    assert draws.dtype == np.int64
    assert noise_variance(config, minimum, step) == pytest.approx(steps**2)
    assert chi_square(draws, steps**2) > 1e-3
    assert chi_square(draws, 1.1 * steps**2) < 1e-6  # the test would see a tenth too much


@pytest.mark.parametrize("contributors", [4, 5, 6])
def test_the_sum_of_the_survivors_has_all_the_noise(contributors: int) -> None:
    """Six sites take part, four are the fewest: whoever is lost, what is opened has at least the stated deviation."""
    config, minimum, step = make(2.0, clip=0.5), 4, 0.125
    rng = np.random.default_rng(2)
    total = sum(integers(np.zeros(200_000), step, config, minimum, rng) for _ in range(contributors))
    stated = (2.0 * 0.5 / step) ** 2
    variance = contributors / minimum * stated
    assert variance >= stated
    assert chi_square(np.asarray(total), variance) > 1e-3


def test_with_a_fine_step_the_noise_is_gaussian() -> None:
    draws = integers(np.zeros(100_000), FINE, make(), 3, np.random.default_rng(3))
    assert stats.kstest(draws * FINE * math.sqrt(3), "norm").pvalue > 1e-3


def test_coordinates_are_independent() -> None:
    draws = integers(np.zeros(100_000), 0.1, make(), 3, np.random.default_rng(4)).astype(float)
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 4 / math.sqrt(draws.size)


def test_the_sum_is_that_of_the_updates() -> None:
    rng = np.random.default_rng(5)
    config, step, size = make(0.01), 0.001, 1000
    updates = rng.normal(size=(5, size)) / math.sqrt(size) / 2
    total = np.sum([integers(update, step, config, 3, rng) for update in updates], axis=0) * step
    deviation = math.sqrt(5 * (0.01**2 / 3 + step**2 / 4))
    assert np.abs(total - updates.sum(axis=0)).max() < 5 * deviation


def test_secret_noise_is_never_drawn_twice() -> None:
    np.random.seed(0)  # noqa: NPY002 - whoever seeds everything must not seed this
    first = secret_rng().integers(2**63, size=4)
    np.random.seed(0)  # noqa: NPY002 - as above
    assert not np.array_equal(first, secret_rng().integers(2**63, size=4))


# --- clipping and rounding ---


@given(
    arrays(np.float32, st.integers(1, 50), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.floats(1e-6, 1e6),
)
def test_no_update_is_longer_than_its_clip(update: np.ndarray, clip: float) -> None:
    clipped, norm = clip_l2(update, clip)
    assert clipped.dtype == np.float32
    length = math.sqrt(math.fsum(float(x) ** 2 for x in clipped))
    assert length <= clip
    assert norm == pytest.approx(math.sqrt(math.fsum(float(x) ** 2 for x in update)), rel=1e-12)
    if norm <= clip:
        assert clipped is update
    else:
        assert length > clip * (1 - 1e-5)
        np.testing.assert_allclose(clipped, update.astype(np.float64) * (clip / norm), rtol=1e-6, atol=1e-44)


def test_a_long_update_of_many_values_is_not_longer_than_its_clip() -> None:
    update = np.random.default_rng(6).standard_t(3, 1_000_000).astype(np.float32)
    clipped, _ = clip_l2(update, 0.3)
    assert 0.3 * (1 - 1e-6) < math.sqrt(math.fsum(np.square(clipped, dtype=np.float64))) <= 0.3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_diverged_update_is_refused(bad: float) -> None:
    update = np.array([0.1, bad], np.float32)
    with pytest.raises(UnfitValues, match="diverged"):
        clip_l2(update, 1.0)
    with pytest.raises(UnfitValues, match="diverged"):
        integers(update, 0.1, make(), 3, np.random.default_rng(0))


@pytest.mark.parametrize(
    "update",
    [
        pytest.param(lambda size, step: np.full(size, step / 2), id="half a step everywhere"),
        pytest.param(lambda size, step: np.full(size, 1 / math.sqrt(size)), id="even"),
        pytest.param(lambda size, step: np.eye(1, size)[0], id="one value"),
        pytest.param(lambda size, step: 1e9 * np.random.default_rng(0).normal(size=size), id="far too long"),
    ],
)
@pytest.mark.parametrize("step", [1.0, 0.1, 0.001])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_no_rounding_passes_the_bound(update: Callable[[int, float], np.ndarray], size: int, step: float) -> None:
    """The guarantee rests on this one: the norm, in steps, of what a site gives, without its noise."""
    config, rng = make(QUIET), np.random.default_rng(7)
    bound = rounded_norm(config, size, step)
    for _ in range(20):
        rounded = integers(update(size, step), step, config, 3, rng)
        assert math.sqrt(float(np.square(rounded).sum())) <= bound


def test_rounding_is_drawn_again_at_most_as_often_as_beta_says() -> None:
    """The worst vector: half a step everywhere but for what the norm allows, so that the bound is as tight as it is."""
    size, step, rng = (
        400,
        0.05,
        np.random.default_rng(8),
    )  # a norm of 20 steps: 10 for the halves, the rest in one value
    scaled = np.full(size, 0.5)
    scaled[0] = math.sqrt(400 - 0.25 * (size - 1))
    for beta in (0.9, math.exp(-0.5), 0.1):
        bound = rounded_norm(make(rounding_beta=beta), size, step)
        assert bound < 20 + math.sqrt(size)  # not the bound that always holds
        draws = np.floor(scaled) + (rng.random((5000, size)) < scaled % 1)
        assert np.mean(np.linalg.norm(draws, axis=1) > bound) <= beta


def test_rounding_has_hardly_a_bias() -> None:
    """Drawing again prefers shorter roundings; the paper bounds the bias, and here it cannot be told from none."""
    config, rng, step, size = make(QUIET), np.random.default_rng(9), 0.02, 2000
    update = rng.normal(size=size)
    update /= np.linalg.norm(update)
    draws = np.mean([integers(update, step, config, 3, rng) for _ in range(400)], axis=0) * step
    assert abs(float((draws - update) @ update)) < 0.02
    assert np.abs(draws - update).max() < 5 * step / 2 / math.sqrt(400)


# --- the ring ---


def log_tail(reach: int, variance: float) -> float:
    """ln P(|X| >= reach) of Skellam noise, from its exact mass e^-v I_k(v)."""
    k = np.arange(reach, reach + 20_000)
    with np.errstate(divide="ignore"):
        logs = np.log(ive(k, variance))
    return float(np.logaddexp.reduce(logs)) + math.log(2)


@pytest.mark.parametrize("variance", [0.01, 1.0, 50.0, 1e4, 2.5e5])
@pytest.mark.parametrize("size", [10, 1_800_000])
def test_hardly_any_noise_lies_beyond_the_needed_clip(size: int, variance: float) -> None:
    length = math.sqrt(
        3 * variance
    )  # of the clip in steps, which is the room for the values where they are not rotated
    reach = needed_clip(make(), 3, size, 1 / length) - math.ceil(length) - 1
    odds = math.log(BEYOND / size)
    assert log_tail(reach, variance) < odds
    if variance >= 1e4:
        assert log_tail(int(0.93 * reach), variance) > odds  # and not much room is wasted


def test_rotated_values_stay_within_their_share() -> None:
    """One value holds all of the norm, or many do: after the rotation none is near the share that the clip allows."""
    size, step = 400_000, 1e-4
    quiet = make(QUIET)
    rotation = Rotation(size, "test")
    assert rotation.block == 4096
    reach = needed_clip(quiet, 3, rotation.padded, step, rotation.block)
    assert reach < needed_clip(quiet, 3, rotation.padded, step) / 5
    rng = np.random.default_rng(10)
    for update in (np.eye(1, size)[0], np.full(size, size**-0.5), rng.standard_t(2, size)):
        rotated = rotation.forward(update / np.linalg.norm(update))
        assert np.abs(integers(rotated, step, quiet, 3, rng)).max() < reach
    assert np.abs(integers(np.eye(1, size)[0], step, quiet, 3, rng)).max() <= needed_clip(quiet, 3, size, step)


@pytest.mark.parametrize("size", [4096, 1_800_000])
def test_hardly_any_rotated_value_lies_beyond_its_share(size: int) -> None:
    """Of a block of equal values that holds all of the norm, each rotated one is a mean of signs: exactly binomial."""
    block = 4096
    share = needed_clip(make(QUIET), 3, size, 1e-9, block) * 1e-9
    log_odds = stats.binom.logsf(math.floor(block * (1 + share) / 2), block, 0.5) + math.log(2)
    assert log_odds < math.log(BEYOND / size) - math.log(2)  # the other half is for the noise
    assert log_odds > 1.1 * math.log(BEYOND / size)


@pytest.mark.parametrize("bits", [16, 20, 24])
@pytest.mark.parametrize(("sites", "minimum"), [(3, 3), (6, 4), (40, 27)])
@pytest.mark.parametrize("noise_multiplier", [0.1, 1.0, 8.0])
def test_the_suggested_step_is_the_finest_that_fits(
    bits: int, sites: int, minimum: int, noise_multiplier: float
) -> None:
    config, size = make(noise_multiplier, clip=0.3), 1_800_000
    for block in (1, 4096):
        step = suggest_step(config, bits, sites, minimum, size, block)
        levels = ring_levels(bits, sites)
        assert needed_clip(config, minimum, size, step, block) <= levels
        assert needed_clip(config, minimum, size, step * (1 - 3 / levels), block) > levels


def test_a_ring_without_room_is_refused() -> None:
    with pytest.raises(UnfitValues, match=r"set federation\.bits to more"):
        suggest_step(make(), 16, 1000, 700, 1000)
    with pytest.raises(UnfitValues, match="take a wider one"):
        suggest_step(make(), 16, 100_000, 70_000, 1000)


def test_a_ring_that_would_round_once_more_is_refused() -> None:
    with pytest.raises(UnfitValues, match="at most 24 bits"):
        suggest_step(make(), 32, 6, 4, 1000)


@pytest.mark.parametrize("bits", [16, 20, 24])
def test_integers_pass_the_ring_as_they_are(bits: int) -> None:
    """Rounding once more, after the noise, would not be what the theorem is about."""
    for sites in range(3, 101):
        lane = Lane("update", 1, float(ring_levels(bits, sites)), bits)
        assert VectorLayout((lane,), max_sites=sites).step(lane) == 1.0
    sites, minimum, size = 5, 4, 5000
    config, rng = make(), np.random.default_rng(11)
    levels = ring_levels(bits, sites)
    layout = VectorLayout((Lane("update", size, float(levels), bits),), max_sites=sites)
    assert layout.step(layout.lane("update")) == 1.0
    step = suggest_step(config, bits, sites, minimum, size)
    given_ = [integers(rng.normal(size=size), step, config, minimum, rng) for _ in range(sites)]
    given_[0][:2] = levels, -levels
    total = np.zeros(size, np.uint32)
    for seed, one in enumerate(given_):
        total += encode(layout, {"update": one}, seed)
    summed = decode_sum(layout, total, [str(site) for site in range(sites)])["update"]
    np.testing.assert_array_equal(summed, np.sum(given_, axis=0))


# --- the accountant ---


def spent(config: PrivacyConfig, rounds: int = 1, minimum: int = 3, size: int = 1, step: float = FINE) -> Accountant:
    accountant = Accountant(config, minimum, size, step)
    for _ in range(rounds):
        accountant.spend(minimum)
    return accountant


def test_epsilon_of_one_that_dp_accounting_publishes() -> None:
    """rdp_privacy_accountant_test of Google's dp_accounting: noise of 4.530877117 is exactly (1, 1e-6)-private."""
    assert spent(make(4.530877117, delta=1e-6)).epsilon == pytest.approx(1.0, abs=1e-6)


def test_the_library_reproduces_abadis_epsilon() -> None:
    """Abadi et al. 2016, arXiv 1607.00133, section 3.2: q = 0.01, sigma = 4, delta = 1e-5, T = 10000 give 1.26 by the
    moments accountant; the library converts moments to epsilon more tightly (Balle et al. 2020) to below that."""
    accountant = RdpAccountant(range(2, 65))
    step = dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(4.0))
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, 10_000))
    moments = zip(accountant.orders, accountant.rdp, strict=True)
    assert min(rdp + math.log(1e5) / (order - 1) for order, rdp in moments) == pytest.approx(1.26, abs=0.005)
    assert accountant.get_epsilon(1e-5) < 1.26


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("rounds", [1, 25])
def test_with_a_fine_step_epsilon_is_the_gaussian_one(noise_multiplier: float, rounds: int) -> None:
    epsilon = spent(make(noise_multiplier), rounds).epsilon
    exact = dp_accounting.get_epsilon_gaussian(noise_multiplier / math.sqrt(rounds), 1e-5)  # Balle and Wang 2018
    assert exact < epsilon < 1.2 * exact + 0.05
    gaussian = RdpAccountant(range(2, 513))
    gaussian.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(noise_multiplier), rounds))
    assert epsilon == pytest.approx(gaussian.get_epsilon(1e-5), rel=1e-3)


def test_fedavg_of_the_discrete_papers_costs_hardly_more_than_gaussian_noise() -> None:
    """Agarwal et al. 2021, section 5: at 16 bits or more Skellam noise matches Gaussian noise. 100 sites, 2^20 values,
    20 bits here, as our ring leaves room for the largest sum and theirs wraps around."""
    config = make(6.0)
    step = suggest_step(config, 20, 100, 100, 2**20, 4096)
    discrete = spent(config, 100, 100, 2**20, step).epsilon
    assert 1 < discrete / spent(config, 100, 100).epsilon < 1.7
    step = suggest_step(config, 24, 100, 100, 2**20, 4096)
    assert spent(config, 100, 100, 2**20, step).epsilon / spent(config, 100, 100).epsilon < 1.01


def shifted(variance: float, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """ln of the masses of Skellam noise, and of the same moved by `shift`, where both can be told from zero."""
    reach = int(80 + 12 * math.sqrt(variance)) + shift
    mass = ive(np.abs(np.arange(-reach, reach + 1)), variance)
    p, q = mass[shift:], mass[:-shift]
    there = (p > 0) & (q > 0)
    return np.log(p[there]), np.log(q[there])


@pytest.mark.parametrize("variance", [0.5, 2.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize(("shift", "orders"), [(1, [2, 3, 8, 32]), (2, [2, 3, 8, 16]), (5, [2, 3, 8]), (10, [2, 3])])
def test_the_theorem_bounds_the_exact_divergence(variance: float, shift: int, orders: list[int]) -> None:
    p, q = shifted(variance, shift)
    for order in orders:
        terms = order * p + (1 - order) * q
        assert max(terms[0], terms[-1]) < terms.max() - 40  # float64 holds all of the sum that matters
        exact = float(np.logaddexp.reduce(terms)) / (order - 1)
        bound = skellam_rdp(order, shift, shift, variance)
        assert exact <= bound
        if variance >= 1000:
            assert bound < 1.02 * exact


@pytest.mark.parametrize(
    ("noise_multiplier", "length", "rounds"), [(1.0, 1, 1), (2.0, 2, 1), (2.0, 3, 4), (4.0, 2, 25)]
)
def test_epsilon_is_not_below_that_of_the_distribution(noise_multiplier: float, length: int, rounds: int) -> None:
    """Against the privacy loss of the integers themselves, composed numerically: here of one value, `length` steps."""
    config = make(noise_multiplier)
    p, q = shifted((noise_multiplier * length) ** 2, length)
    loss = from_two_probability_mass_functions(
        dict(enumerate(q)), dict(enumerate(p)), pessimistic_estimate=False, value_discretization_interval=1e-3
    )
    exact = loss.self_compose(rounds).get_epsilon_for_delta(config.delta)
    epsilon = spent(config, rounds, step=1 / length).epsilon
    assert 0 < exact < epsilon


@pytest.mark.parametrize("size", [10_000, 100_000_000])
def test_epsilon_is_the_papers_formula_in_real_units(size: int) -> None:
    """Corollary 3.6 with the scale s and the sensitivities unscaled, as the authors' own code has it."""
    config, step, sites, rounds = make(2.0, clip=0.5), 1 / 4000, 6, 10
    scale, variance = 1 / step, (2.0 * 0.5) ** 2
    l2 = rounded_norm(config, size, step) / scale
    l1 = l2 * min(math.sqrt(size), l2 * scale)
    epsilons = []
    for order in range(2, 129):
        first = order * l2**2 / (2 * variance)
        second = ((2 * order - 1) * scale * l2**2 + 6 * l1) / (4 * scale**3 * variance**2)
        rdp = rounds * (first + min(second, 3 * l1 / (2 * scale * variance)))
        epsilons.append(rdp + math.log1p(-1 / order) - math.log(config.delta * order) / (order - 1))
    assert spent(config, rounds, sites, size, step).epsilon == pytest.approx(min(epsilons), rel=1e-12)


def test_rounding_costs_privacy_and_is_counted() -> None:
    """With a coarse step rounding lengthens an update; epsilon tells."""
    epsilons = [spent(make(), step=step, size=1_000_000).epsilon for step in (1e-6, 1e-4, 1e-3, 1e-2)]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] > 5 * epsilons[0]


def test_more_sites_bring_more_noise_and_colluders_take_theirs_away() -> None:
    config = make()
    accountants = {}
    for contributors in (3, 4, 6):
        accountants[contributors] = Accountant(config, 3, 1, FINE)
        accountants[contributors].spend(contributors)
    fewest, four, six = accountants.values()
    assert six.epsilon < four.epsilon < fewest.epsilon
    assert six.epsilon_against(3) == fewest.epsilon
    assert four.epsilon_against(1) == fewest.epsilon
    assert fewest.epsilon_against(2) > fewest.epsilon_against(1) > fewest.epsilon
    assert fewest.epsilon_against(3) == math.inf


def test_nothing_opened_is_nothing_spent_and_rounds_add_up() -> None:
    accountant = Accountant(make(), 3, 1, FINE)
    seen = [accountant.epsilon]
    for _ in range(3):
        accountant.spend(4)
        seen.append(accountant.epsilon)
    assert seen[0] == 0
    assert seen == sorted(set(seen))
    resumed = Accountant(make(), 3, 1, FINE)
    for contributors in accountant.rounds:
        resumed.spend(contributors)
    assert resumed.epsilon == accountant.epsilon


@settings(max_examples=50)
@given(
    st.floats(1e-3, 1e3),
    st.floats(0.05, 50),
    st.sampled_from([20, 24]),
    st.integers(3, 100),
    st.integers(1, 10_000_000),
)
def test_any_configuration_is_accounted_for(clip: float, noise: float, bits: int, sites: int, size: int) -> None:
    """Epsilon does not depend on the unit of the parameters, is finite, and is never below the Gaussian one."""
    minimum = 2 * sites // 3 + 1
    config = make(noise, clip=clip)
    step = suggest_step(config, bits, sites, minimum, size)
    epsilon = spent(config, 3, minimum, size, step).epsilon
    assert math.isfinite(epsilon)
    assert epsilon >= spent(make(noise), 3, minimum).epsilon * (1 - 1e-6)
    unit = suggest_step(make(noise), bits, sites, minimum, size)
    assert epsilon == pytest.approx(spent(make(noise), 3, minimum, size, unit).epsilon, rel=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        {"clip": 0.0, "noise_multiplier": 1.0},
        {"clip": 1.0, "noise_multiplier": 0.0},
        {"clip": 1.0},
        {"clip": math.inf, "noise_multiplier": 1.0},
        {"clip": 1.0, "noise_multiplier": 1.0, "delta": 0.0},
        {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1.0},
        {"clip": 1.0, "noise_multiplier": 1.0, "rounding_beta": 1.0},
        {"clip": 1.0, "noise_multiplier": 1.0, "epsilon": 1.0},
    ],
)
def test_a_configuration_without_a_bound_is_refused(keys: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        PrivacyConfig(**keys)
