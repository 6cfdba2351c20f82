"""Differential privacy of a round's sum, with noise that the sites add in integers before they mask.

A site clips its update to an L2 norm, which bounds what it can move the sum by. It rotates it (see `rotation`), scales
it to integers, rounds by chance and adds its share of Skellam noise. Sums of Skellam variables are Skellam, so the sum
that is opened carries exactly the noise of one central mechanism, although nobody, the aggregator included, ever had
the sum without it. Each share is large enough that the fewest sites whose sum is opened bring all of the noise.

What epsilon means here: the neighbour of a run is the same run in which one site's update is zero in every round
(zero-out, or add/remove, of one site); all rounds count, and there is no amplification by sampling, as all sites take
part in each. Weights must be equal. It is about whoever sees the sums. Sites that work together know their own noise
and can take it away: `Accountant.epsilon_against` tells what is left. Whatever else leaves a site (slice counts,
losses, Dice, histograms of magnitudes) has no noise from here, and must not be sent where epsilon is claimed.

Sources: Agarwal, Kairouz and Liu 2021, The Skellam Mechanism, arXiv 2110.04995 (theorem 3.5 and corollary 3.6);
Kairouz, Liu and Steinke 2021, The Distributed Discrete Gaussian Mechanism, arXiv 2102.06387 (conditional rounding,
proposition 22). The formulas were checked against the authors' code (google-research/federated, distributed_dp) and,
in the tests, against divergences of the distribution itself.
"""

import math
import secrets

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedsam_core.secagg.layout import Lane, VectorLayout
from fedsam_core.secagg.refusals import UnfitValues
from fedsam_core.settings import Settings

ORDERS = (*range(2, 129), *range(136, 257, 8), *range(288, 513, 32), 640, 768, 1024, 2048)
"""Orders of the Rényi divergence that epsilon is the best of. The theorem is for integers."""

BEYOND = 2.0**-60
"""Probability, per site and round, that any integer lies beyond `needed_clip` and is cut. A cut could tell a little
that the noise should hide: this adds BEYOND * (1 + e^epsilon) per site and round to delta, less than a thousandth of a
delta of 1e-5 for epsilons below 20."""

WIDEST_RING = 24
"""Bits of a ring whose levels are all float32 numbers, as a lane's limit is."""


class PrivacyConfig(Settings):
    """Differential privacy of one site's updates, all rounds together."""

    clip: float = Field(gt=0, description="largest L2 norm of a site's update in a round; a longer one is scaled to it")
    noise_multiplier: float = Field(gt=0, description="standard deviation of the noise in a round's sum, over clip")
    delta: float = Field(1e-5, gt=0, lt=1, description="the delta that epsilon is told for; well below 1 over sites")
    rounding_beta: float = Field(
        math.exp(-0.5), gt=0, lt=1, description="smaller: rounding repeats less often, and may lengthen an update more"
    )


def secret_rng() -> np.random.Generator:
    """A source of noise that nobody can draw again: keyed by 128 bits of the operating system's entropy.

    Never derive the noise from the run's seed: that is public, and who can draw the noise can subtract it. Hence runs
    with noise do not repeat bit for bit, and a sum that is opened twice is spent twice. Philox is counter-based and
    known for no way back from outputs to its key, but it is no cryptographic cipher.
    """
    return np.random.Generator(np.random.Philox(key=secrets.randbits(128)))


def clip_l2(update: NDArray[np.float32], clip: float) -> tuple[NDArray[np.float32], float]:
    """The update (float32 [n]), scaled to a norm of at most `clip`, and the norm that it came with.

    An update within the clip is returned as it is. Raises UnfitValues for NaN or infinity.
    """
    norm = _norm(update)
    if not math.isfinite(norm):
        raise UnfitValues("the update holds NaN or infinity: this site's training has diverged")
    if norm <= clip:
        return update, norm
    # A little less than clip/norm: rounding to float32 may lengthen each value by 2^-24 of it.
    return np.multiply(update, clip / norm * (1 - 2.0**-23), dtype=np.float64).astype(np.float32), norm


def rounded_norm(config: PrivacyConfig, size: int, step: float) -> float:
    """The largest L2 norm, in steps, of a clipped vector of `size` values after rounding: the sum's sensitivity.

    Proposition 22 of arXiv 2102.06387: either every value moves by less than a step, or the norm is what all but
    `rounding_beta` of the roundings stay below, and the others are drawn again.
    """
    length = config.clip / step
    always = length + math.sqrt(size)
    usually = length**2 + size / 4 + math.sqrt(2 * math.log(1 / config.rounding_beta)) * (length + math.sqrt(size) / 2)
    return min(always, math.sqrt(usually))


def noise_variance(config: PrivacyConfig, minimum: int, step: float) -> float:
    """Variance, in steps squared, of one site's noise: `minimum` sites together bring noise_multiplier * clip."""
    return (config.noise_multiplier * config.clip / step) ** 2 / minimum


def integers(
    values: NDArray[np.floating], step: float, config: PrivacyConfig, minimum: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """What a site gives to the sum: its values (real [n]) as steps (int64 [n]), clipped, rounded, and with its noise.

    The sum over m >= `minimum` sites, times step, is the sum of their clipped values, plus rounding errors of mean
    close to zero, plus Skellam noise of variance m / minimum * (noise_multiplier * clip)^2. The guarantee rests on what
    is done here, whatever norm the values came with. They are to go into the ring without another rounding.

    `rng` is `secret_rng()`, other than in tests. Raises UnfitValues for NaN or infinity.
    """
    rounded = _rounded(values, step, config, rng)
    half = noise_variance(config, minimum, step) / 2
    rounded += rng.poisson(half, rounded.size)
    rounded -= rng.poisson(half, rounded.size)
    return rounded


def needed_clip(config: PrivacyConfig, minimum: int, size: int, step: float, block: int = 1) -> int:
    """Steps that hold a site's integers: beyond lies any of its `size` with a probability of at most `BEYOND`.

    The noise is bounded by Bernstein's inequality; the values by Hoeffding's, over the signs of a rotation that mixes
    `block` values and is drawn anew in every round, or by the norm alone where block is 1.
    """
    log = _log_odds(size)
    variance = noise_variance(config, minimum, step)
    noise = log / 3 + math.sqrt((log / 3) ** 2 + 2 * variance * log)
    return math.ceil(_largest_share(size, block) * config.clip / step + noise) + 1


def suggest_step(config: PrivacyConfig, bits: int, sites: int, minimum: int, size: int, block: int = 1) -> float:
    """The finest step for which the integers (`needed_clip`) of each of up to `sites` sites fit a ring of `bits` bits.

    Where it is coarse, rounding lengthens the updates: `rounded_norm` * step / clip tells by what factor, and epsilon
    grows by that to its square. Raises UnfitValues where no step fits.
    """
    levels = ring_levels(bits, sites)
    log = _log_odds(size)
    room = levels - 2 - log / 3  # one for rounding, one for the ceiling
    if room <= log / 3:
        raise UnfitValues(
            f"a ring of {bits} bits has no room for the noise of {sites} sites: set federation.bits to more, up to "
            f"{WIDEST_RING}"
        )
    # needed_clip = levels, solved for clip / step, the length:
    # share * length + sqrt((log / 3)^2 + spread * length^2) = room.
    share = _largest_share(size, block)
    spread = 2 * log * config.noise_multiplier**2 / minimum
    rest = room**2 - (log / 3) ** 2
    length = rest / (share * room + math.sqrt((share * room) ** 2 + (spread - share**2) * rest))
    return config.clip / length


def ring_levels(bits: int, sites: int) -> int:
    """Largest integer that each of up to `sites` sites may put into a ring of `bits` bits; see `secagg.layout`.

    A lane with this as its clip has a step of exactly one, so its encoder passes integers as they are: rounding once
    more, after the noise, is not what the theorem is about. That holds up to `WIDEST_RING`; raises UnfitValues beyond,
    and where the ring has no room for so many sites.
    """
    if bits > WIDEST_RING:
        raise UnfitValues(
            f"noise in integers takes a ring of at most {WIDEST_RING} bits, not {bits}: set a narrower one"
        )
    lane = Lane("update", 1, 1.0, bits)
    return VectorLayout((lane,), max_sites=sites).levels(lane)


class Accountant:
    """The privacy that a run has spent.

    Attributes:
        rounds: how many sites contributed to each sum that was opened. To resume a run, spend them again.
    """

    def __init__(self, config: PrivacyConfig, minimum: int, size: int, step: float) -> None:
        """For sums of vectors of at most `size` values that `integers` made with `minimum` and a step of `step`."""
        self.rounds: list[int] = []
        self._delta = config.delta
        self._share = noise_variance(config, minimum, step)
        self._l2 = rounded_norm(config, size, step)
        # Cauchy-Schwarz; and no integer is larger than its square.
        self._l1 = self._l2 * min(math.sqrt(size), self._l2)

    def spend(self, contributors: int) -> None:
        """One more sum was opened, over so many sites. A sum that failed before it was opened costs nothing."""
        self.rounds.append(contributors)

    @property
    def epsilon(self) -> float:
        """Of all rounds, at the configured delta, against whoever sees the sums."""
        return self.epsilon_against(0)

    def epsilon_against(self, colluders: int) -> float:
        """The same against sites that see the sums and take their own noise away; infinite where none is left."""
        import dp_accounting.rdp

        if not self.rounds:
            return 0.0
        if min(self.rounds) <= colluders:
            return math.inf
        spent = [
            sum(skellam_rdp(order, self._l1, self._l2, (n - colluders) * self._share) for n in self.rounds)
            for order in ORDERS
        ]
        epsilon, _ = dp_accounting.rdp.compute_epsilon(ORDERS, spent, self._delta)
        return float(epsilon)


def skellam_rdp(order: int, l1: float, l2: float, variance: float) -> float:
    """Rényi divergence of integer `order` > 1, at most, between Skellam noise of `variance` in every coordinate and the
    same noise moved by integers with norms of at most `l1` and `l2`.

    Corollary 3.6 of arXiv 2110.04995. The first term is that of Gaussian noise.
    """
    extra = min(((2 * order - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
    return order * l2**2 / (2 * variance) + extra


def _rounded(
    values: NDArray[np.floating], step: float, config: PrivacyConfig, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Clipped, in steps (int64), up or down by chance; drawn again until no longer than `rounded_norm`."""
    scaled = values / np.float64(step)
    norm = _norm(scaled)
    if not math.isfinite(norm):
        raise UnfitValues("the update holds NaN or infinity: this site's training has diverged")
    if norm * step > config.clip:
        scaled *= config.clip / (norm * step)
    floor = np.floor(scaled)
    scaled -= floor
    bound = rounded_norm(config, scaled.size, step)
    while True:  # each time with a chance of at least 1 - rounding_beta to be the last
        rounded = floor + (rng.random(scaled.size) < scaled)
        if _norm(rounded) <= bound:
            return rounded.astype(np.int64)


def _norm(x: NDArray[np.floating]) -> float:
    return math.sqrt(np.square(x, dtype=np.float64).sum())  # not np.dot: it may sum in any order


def _log_odds(size: int) -> float:
    """ln(2 / p), where p is each value's part of BEYOND: half for its noise, half for the value."""
    return math.log(4 * size / BEYOND)


def _largest_share(size: int, block: int) -> float:
    """Largest magnitude of a rotated value, over the vector's norm."""
    return min(1.0, math.sqrt(2 * _log_odds(size) / block))
