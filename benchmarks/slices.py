"""What a site's slices are worth in Dice: neighbours as channels, augmentation, and augmented views drawn once.

    python benchmarks/slices.py --cohort hippocampus --out FOLDER --json FILE

    2.5d      the neighbouring slices as the other two channels (what fedsam does unless told otherwise)
    single    the slice three times, as FLAP-SAM's code shows it to the model; what its blocks of five give for a slice
              does not depend on the other four (benchmarks/inference.py)
    fresh     2.5d, augmented anew in every step
    4 views   2.5d, four augmented views of each slice for the whole run (learning.cache_views=4)

Cohorts, sites, steps and model are those of benchmarks/rules.py (vit_t at 64 px, `flap` at rank 8, plain fp32 sums),
from random weights, or with --checkpoint auto from those that come with fedsam. Dice of the test cases after the last
round, mean over sites of the means over cases and classes. FILE is written after every run, and what it holds is not
run again; a run takes a minute or two of one core.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pretrained import ahead, read_kept, run_missing, run_options, spread
from rules import ROWS, Budget, begun, cohort_config, mean_dice, prepare_once, tables, tested

from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.data.slices import SliceConfig
from fedsam_core.federation.rounds import run_rounds
from fedsam_core.learning.config import LearningConfig


@dataclass(frozen=True)
class Choice(Budget):
    """A budget, and how its slices are shown."""

    context: str = "2.5d"
    augment: bool = False
    views: int = 0

    @property
    def slices(self) -> SliceConfig:
        asked = {"context": self.context, "augment": self.augment}
        return SliceConfig.model_validate(super().slices.model_dump() | asked)

    @property
    def learning(self) -> LearningConfig:
        return LearningConfig.model_validate(super().learning.model_dump() | {"cache_views": self.views})


CHOICES = {
    "2.5d": Choice(),
    "single": Choice(context="single"),
    "fresh": Choice(augment=True),
    "4 views": Choice(augment=True, views=4),
}
THAN = {"2.5d": "single", "fresh": "2.5d", "4 views": "fresh"}
"""What each is compared with."""


def main() -> None:
    parser = run_options(__doc__)
    parser.add_argument("--checkpoint", choices=("random", "auto"), default="random", help="auto: pre-trained weights")
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=list(CHOICES))
    options = parser.parse_args()
    prepared = prepare_once(cohort_config(options.cohort), options.out / options.cohort)
    choices = {name: replace(CHOICES[name], checkpoint=options.checkpoint) for name in options.only}
    runs = read_kept(options.json)
    for seed in range(options.seeds):
        for name, choice in choices.items():
            run_missing(options.json, runs, name, prepared, choice, seed, last_dice)
    print(table(options.cohort, runs, choices))


def last_dice(prepared: PreparedCohort, choice: Choice, seed: int) -> float:
    """Test Dice after the last round."""
    federation, sites, _ = begun(prepared, ROWS[0], seed, choice)
    run_rounds(federation, lambda report, state: None)
    return mean_dice(tables([tested(federation, sites, choice.rounds)]))


def table(cohort: str, runs: list[dict[str, Any]], choices: Mapping[str, Choice]) -> str:
    """Dice of each over its seeds, and by how much it is ahead of what it is compared with, seed by seed."""
    lines = [f"### {cohort}", "", "| slices | test Dice | compared with | ahead by, each seed |", "|---|---|---|---|"]
    dice = {name: {run["asked"]["seed"]: run["dice"] for run in runs if of(c, run)} for name, c in choices.items()}
    for name, found in dice.items():
        than = THAN.get(name, "")
        lines.append(f"| {name} | {spread(found)} | {than} | {ahead(found, dice.get(than, {}))} |")
    return "\n".join(lines)


def of(choice: Choice, run: Mapping[str, Any]) -> bool:
    wanted = {**asdict(choice), "checkpoint": choice.weights}
    return wanted.items() <= run["asked"].items()


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":  # numpy's BLAS and torch read it when they are imported
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    main()
