"""`fedsam ablate --search`: a selection that grows, step by step, by the candidate that brings most.

Greedy forward selection on *validation* Dice, so that the test cases have no say in what is chosen. Each step tries
every candidate that is left on top of what is taken so far, with every seed; the trials are a study's own, so a search
that was interrupted goes on, and one that comes back to a selection does not run it again.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from fedsam_core.errors import ConfigError
from fedsam_core.selection import LayerSelection
from pipelines.results import TrialResult
from pipelines.study import Search, union

Score = Callable[[Sequence[LayerSelection]], Sequence[Sequence[TrialResult]]]
"""Runs selections with every seed; results in their order, those that failed or were stopped early left out."""


@dataclass(frozen=True)
class Step:
    """What a step of the search took.

    Attributes:
        step: 1 for the first.
        taken: the candidate; "" for what the search ended with when nothing more was worth it.
        selection: all that is taken, as one.
        dice: mean over seeds of the validation Dice after the last round.
        gain: over the step before; over Dice before training in the first.
        megabytes: of a whole run (10^6 bytes), mean over seeds.
        tried: every candidate of the step with its Dice and megabytes.
        why: in words.
    """

    step: int
    taken: str
    selection: LayerSelection
    dice: float
    gain: float
    megabytes: float
    tried: tuple[tuple[str, float, float], ...]
    why: str

    def row(self) -> dict[str, Any]:
        """Flat, for a table."""
        return asdict(self) | {"selection": self.selection.model_dump_json(), "tried": len(self.tried)}


def grow(search: Search, candidates: Sequence[LayerSelection], score: Score) -> tuple[Step, ...]:
    """The steps of the search.

    Raises:
        ConfigError: no candidate has a validation Dice within the budget.
    """
    left = {candidate.name: candidate for candidate in candidates}
    steps: list[Step] = []
    while left and len(steps) < search.steps:
        before = steps[-1] if steps else None
        grown = {
            name: one if before is None else union(before.selection, one, f"step-{len(steps) + 1}.{name}")
            for name, one in left.items()
        }
        found = {
            name: (_dice(results), _megabytes(results), results)
            for name, results in zip(grown, score(list(grown.values())), strict=True)
        }
        known = {name: (dice, size, results) for name, (dice, size, results) in found.items() if dice is not None}
        fits = {name: one for name, one in known.items() if one[1] <= search.budget_mb}
        if not fits:
            if before is None:
                smallest = min((one[1] for one in known.values()), default=None)
                told = "none has a validation Dice" if smallest is None else f"the smallest run takes {smallest:.3g} MB"
                raise ConfigError(f"no candidate fits search.budget_mb={search.budget_mb:g}: {told}")
            break
        start = before.dice if before else _start([one[2] for one in known.values()])
        spent = before.megabytes if before else 0.0

        gains = {name: one[0] - start for name, one in fits.items()}
        per_mb = {name: gain / max(fits[name][1] - spent, 1e-9) for name, gain in gains.items()}
        worth = gains if search.by == "gain" else per_mb
        best = max(sorted(fits), key=worth.__getitem__)
        dice, size, _ = fits[best]
        if before is not None and dice - start <= search.min_gain:
            break
        tried = tuple((name, dice, size) for name, (dice, size, _) in known.items())
        why = f"most {search.by.replace('_', ' ')} of {len(fits)} candidates within {search.budget_mb:g} MB"
        steps.append(Step(len(steps) + 1, best, grown[best], dice, dice - start, size, tried, why))
        del left[best]
    return tuple(steps)


def _dice(results: Sequence[TrialResult]) -> float | None:
    last = [dice for result in results for dice in [result.curve[-1][1] if result.curve else None] if dice is not None]
    return fmean(last) if last else None


def _start(found: Sequence[Sequence[TrialResult]]) -> float:
    first = [result.curve[0][1] for results in found for result in results if result.curve]
    known = [dice for dice in first if dice is not None]
    return fmean(known) if known else 0.0


def _megabytes(results: Sequence[TrialResult]) -> float:
    return fmean(result.bytes_total for result in results) / 1e6 if results else 0.0
