"""The learning rate as a function of the round.

Every site is at the same point of the schedule in the same round, whatever the number of its slices: schedules that
count each site's own steps leave the smallest site in its warm-up while the largest is long past it.
"""

import math

from fedsam_core.learning.config import LearningConfig


def learning_rate(config: LearningConfig, round_number: int, rounds: int, step: int, steps: int) -> float:
    """The learning rate of one step.

    Args:
        config: the site's learning settings.
        round_number: 1 for the first round.
        rounds: number of rounds of the run.
        step: 0 for the first step of the round.
        steps: that the site takes in the round.

    Returns:
        The rate after warm-up and decay. Time is `round_number - 1 + step / steps`, in rounds.
    """
    now = round_number - 1 + (step + 0.5) / steps
    if now < config.warmup_rounds:
        return config.learning_rate * now / config.warmup_rounds
    progress = (now - config.warmup_rounds) / max(rounds - config.warmup_rounds, 1e-9)
    if config.schedule == "poly":
        return float(config.learning_rate * (1.0 - progress) ** config.poly_power)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate
