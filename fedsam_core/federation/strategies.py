"""What the server makes of a round's mean update: the step that it adds to the shared values.

FedAvg adds the mean itself. FedAvgM (Hsu, Qi and Brown 2019, arXiv 1909.06335) keeps a momentum of the means; FedAdam
and FedYogi (Reddi et al. 2021, arXiv 2003.00295, algorithm 2) also keep, for each value, a running mean of their
squares, and divide by its root. They see only the opened mean, so they work with any rule whose sum is a mean of
updates, masked or plain, and with any number of lost sites.

A momentum of .9 remembers ten rounds, and does not shrink with the sites' decaying learning rates: the last steps are
as long as the first. In a run of 8 rounds on the hippocampus cohort (AdamW at the sites, cosine schedule) FedAvg did
best by far. Take the others for long runs, with learning.schedule=constant or a smaller momentum, and compare.

The arithmetic is float64, one value at a time, in operations that IEEE 754 rounds exactly (no BLAS, no pow): equal
means give equal steps on every machine, and `fedsam verify` can repeat them.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fedsam_core.errors import CheckpointError
from fedsam_core.settings import Settings

Vector = NDArray[np.float64]
Index = NDArray[np.intp]

_ADAPTIVE = ("fedadam", "fedyogi")


class StrategyConfig(Settings):
    """The server's optimiser."""

    kind: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = Field(
        "fedavg",
        description="fedavg adds the mean update, fedavgm its momentum; fedadam, fedyogi divide that by its usual size",
    )
    learning_rate: float = Field(
        1.0,
        gt=0,
        description="factor of the step. Left out, it is 1 for fedavg and fedavgm and 0.01 for fedadam and fedyogi, "
        "where it is about what a value changes by in a round. Momentum .9 may make fedavgm's steps ten times the mean",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="not fedavg: share of the last momentum that is kept")
    beta2: float = Field(0.99, ge=0, lt=1, description="fedadam, fedyogi: share of the last mean square that is kept")
    adaptivity: float = Field(
        1e-3,
        gt=0,
        description="fedadam, fedyogi: the paper's tau, added to the size that is divided by: far smaller changes are "
        "multiplied by learning_rate / adaptivity instead of being made all alike",
    )

    @model_validator(mode="before")
    @classmethod
    def _rate_of_the_kind(cls, given: Any) -> Any:
        """Adaptive steps are of the size of the learning rate whatever the mean's: 1.0 would wreck any model."""
        if isinstance(given, Mapping) and given.get("kind") in _ADAPTIVE:
            return {"learning_rate": 0.01, **given}
        return given


class ServerStrategy:
    """Turns the mean updates of a run, one after the other, into steps."""

    def __init__(self, config: StrategyConfig, size: int) -> None:
        """A strategy before its first round, for a shared vector of `size` values."""
        self.config = config
        self.size = size
        self._moments = {name: np.full(size, start) for name, start in _starts(config).items()}

    def step(self, mean: Vector, active: Index) -> Vector:
        """The step of one round.

        Args:
            mean: float64 [n], the mean update of the active values.
            active: [n], their places in the shared vector, no place twice. The moments of all others stay as they
                are: a value that this round does not train (RoLoRA's other half) has no mean to learn from.

        Returns:
            float64 [n], to be added to the active values. FedAvg with learning rate 1 returns `mean` itself.
        """
        kind, rate = self.config.kind, self.config.learning_rate
        if kind == "fedavg":
            return mean if rate == 1.0 else rate * mean
        keep = self.config.momentum
        fresh = 1.0 if kind == "fedavgm" else 1.0 - keep
        momentum = keep * self._moments["momentum"][active] + fresh * mean
        self._moments["momentum"][active] = momentum
        if kind == "fedavgm":
            return rate * momentum
        square = self._mean_square(self._moments["square"][active], mean * mean)
        self._moments["square"][active] = square
        # As in the paper, without Adam's correction of the first rounds: `square` starts at tau^2 instead of at 0.
        return rate * momentum / (np.sqrt(square) + self.config.adaptivity)

    def arrays(self) -> dict[str, Vector]:
        """Copies of the moments by name, float64 [size] each; `load` goes on from them bit for bit. FedAvg has none."""
        return {name: moment.copy() for name, moment in self._moments.items()}

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Goes on from the moments that `arrays` gave.

        Raises:
            CheckpointError: they are another strategy's, of another size or type, or damaged.
        """
        if set(arrays) != set(self._moments):
            raise CheckpointError(
                f"the server's moments are {_listed(arrays)}, but strategy.kind={self.config.kind} has "
                f"{_listed(self._moments)}: resume with the strategy that the run began with"
            )
        for name, array in arrays.items():
            if array.shape != (self.size,) or array.dtype != np.float64:
                raise CheckpointError(
                    f"the server's {name} is {array.dtype}{list(array.shape)}, expected float64[{self.size}]: resume "
                    "with the selection that the run began with"
                )
            if not np.isfinite(array).all() or (name == "square" and (array < 0).any()):
                raise CheckpointError(f"the server's {name} is damaged: resume from an earlier round")
        self._moments = {name: arrays[name].copy() for name in self._moments}

    def _mean_square(self, before: Vector, new: Vector) -> Vector:
        """The mean square after a round. Yogi moves it by a share of `new`, up or down, where Adam moves it by a share
        of the difference: it forgets large updates slowly."""
        fresh = 1.0 - self.config.beta2
        if self.config.kind == "fedyogi":
            return before - fresh * new * np.sign(before - new)
        return self.config.beta2 * before + fresh * new


def _starts(config: StrategyConfig) -> dict[str, float]:
    """By name, what the moments of a strategy are before the first round."""
    if config.kind == "fedavg":
        return {}
    if config.kind == "fedavgm":
        return {"momentum": 0.0}
    return {"momentum": 0.0, "square": config.adaptivity * config.adaptivity}


def _listed(names: Mapping[str, Any]) -> str:
    return " and ".join(sorted(names)) or "none"
