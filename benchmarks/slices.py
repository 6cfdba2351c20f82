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

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rules import ROWS, Budget, begun, cohort_config, mean_dice, prepare_once, tables, tested

from fedsam_core.data.files import write_atomic
from fedsam_core.data.slices import SliceConfig
from fedsam_core.federation.rounds import run_rounds
from fedsam_core.learning.config import LearningConfig
from fedsam_core.sam.backbones import ModelConfig


@dataclass(frozen=True)
class Choice(Budget):
    """A budget, and how its slices are shown."""

    context: str = "2.5d"
    augment: bool = False
    views: int = 0
    checkpoint: str = "random"

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(backbone="vit_t", image_size=self.image_size, checkpoint=self.checkpoint)

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
PAIRS = (("single", "2.5d"), ("2.5d", "fresh"), ("fresh", "4 views"))
"""What is compared with what."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", choices=("hippocampus", "phantom"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of prepared scans, shared with rules.py")
    parser.add_argument("--json", type=Path, required=True, help="file of all runs of this cohort")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    parser.add_argument("--checkpoint", choices=("random", "auto"), default="random", help="auto: pre-trained weights")
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=list(CHOICES))
    options = parser.parse_args()
    prepared = prepare_once(cohort_config(options.cohort), options.out / options.cohort)
    runs: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.json.exists() else []
    for seed in range(options.seeds):
        for name in options.only:
            choice = replace(CHOICES[name], checkpoint=options.checkpoint)
            asked = {**asdict(choice), "seed": seed, "cohort": prepared.cohort.hash}
            if all(run["asked"] != asked for run in runs):
                federation, sites, _ = begun(prepared, ROWS[0], seed, choice)
                run_rounds(federation, lambda report, state: None)
                dice = mean_dice(tables([tested(federation, sites, choice.rounds)]))
                runs.append({"name": name, "asked": asked, "dice": dice})
                write_atomic(options.json, json.dumps(runs, indent=1).encode())
                print(f"{name}, seed {seed}: Dice {dice:.3f}", flush=True)
    print(table(options.cohort, [run for run in runs if run["asked"]["checkpoint"] == options.checkpoint]))


def table(cohort: str, runs: list[dict[str, Any]]) -> str:
    """Dice of each over its seeds, and by how much it is ahead of what it is compared with, seed by seed."""
    dice = {name: {run["asked"]["seed"]: run["dice"] for run in runs if run["name"] == name} for name in CHOICES}
    than = {better: other for other, better in PAIRS}
    lines = [f"### {cohort}", "", "| slices | test Dice | compared with | ahead by, each seed |", "|---|---|---|---|"]
    for name, found in dice.items():
        if found:
            values = list(found.values())
            other = dice.get(than.get(name, ""), {})
            apart = ", ".join(f"{found[seed] - other[seed]:+.3f}" for seed in sorted(found.keys() & other.keys()))
            spread = f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"
            lines.append(f"| {name} | {spread} | {than.get(name, '')} | {apart} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":  # numpy's BLAS and torch read it when they are imported
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    main()
