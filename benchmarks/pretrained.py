"""What the weights that come with fedsam are worth: `flap` from them, and from random ones, on equal steps.

    python benchmarks/pretrained.py --cohort hippocampus --out FOLDER --json FILE
    python benchmarks/pretrained.py --cohort phantom --out FOLDER --json FILE --checkpoint weights.safetensors

Both start from the same architecture (vit_t, 64 px, `flap` at rank 8) and take the same steps on the same slices, with
scans, sites and budget of benchmarks/rules.py, except that there are ten rounds. Its plain fp32 federation runs in this
process. Dice of the test cases after 1, 3 and 10 rounds, mean over sites of the means over cases and classes.
FILE is written after every run, and what it holds is not run again; a run takes two to three minutes of one core.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rules import ROWS, Budget, begun, cohort_config, mean_dice, prepare_once, tables, tested

from fedsam_core.data.files import write_atomic
from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.federation.rounds import run_rounds

AFTER = (1, 3, 10)  # rounds


@dataclass(frozen=True)
class Start(Budget):
    """The budget of every run, and what weights it begins with."""

    rounds: int = AFTER[-1]
    checkpoint: str = "auto"


def main() -> None:
    parser = run_options(__doc__)
    parser.add_argument("--learning-rate", type=float, default=Budget.learning_rate, help="of both")
    parser.add_argument("--checkpoint", type=Path, help="pre-trained weights; default: those that come with fedsam")
    options = parser.parse_args()
    prepared = prepare_once(cohort_config(options.cohort), options.out / options.cohort)
    starts = [
        Start(learning_rate=options.learning_rate, checkpoint=str(options.checkpoint or "auto")),
        Start(learning_rate=options.learning_rate, checkpoint="random"),
    ]
    runs = read_kept(options.json)
    for seed in range(options.seeds):
        for start in starts:
            run_missing(options.json, runs, start.weights, prepared, start, seed, dice_by_round)
    print(table(options.cohort, runs, starts))


def run_options(about: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark that keeps its runs in one file, to which it may add others."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", choices=("hippocampus", "phantom"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of prepared scans, shared with rules.py")
    parser.add_argument("--json", type=Path, required=True, help="file of all runs of this cohort")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    return parser


def read_kept(file: Path) -> list[dict[str, Any]]:
    """The runs that were finished before."""
    runs: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    return runs


def run_missing(
    file: Path,
    runs: list[dict[str, Any]],
    name: str,
    prepared: PreparedCohort,
    budget: Budget,
    seed: int,
    dice_of: Callable[[PreparedCohort, Any, int], Any],
) -> None:
    """Adds a run to the file, unless it is there: what was asked, with the hash of the weights, and its Dice."""
    asked = {**asdict(budget), "checkpoint": budget.weights, "seed": seed, "cohort": prepared.cohort.hash}
    if all(run["asked"] != asked for run in runs):
        runs.append({"asked": asked, "dice": dice_of(prepared, budget, seed)})
        write_atomic(file, json.dumps(runs, indent=1).encode())
        print(f"{name}, seed {seed}: {runs[-1]['dice']}", flush=True)


def spread(dice: Mapping[int, float]) -> str:
    """Mean, lowest and highest over the seeds."""
    values = list(dice.values())
    return f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def ahead(dice: Mapping[int, float], other: Mapping[int, float]) -> str:
    """How much more the first has, in each seed that both have."""
    return ", ".join(f"{dice[seed] - other[seed]:+.3f}" for seed in sorted(dice.keys() & other.keys()))


def dice_by_round(prepared: PreparedCohort, start: Start, seed: int) -> dict[str, float]:
    """Test Dice after each of the rounds `AFTER`."""
    federation, sites, _ = begun(prepared, ROWS[0], seed, start)
    dice: dict[str, float] = {}

    def score(report: Any, _: Any) -> None:
        if report.round in AFTER:
            dice[str(report.round)] = mean_dice(tables([tested(federation, sites, report.round)]))

    run_rounds(federation, score)
    return dice


def table(cohort: str, runs: list[dict[str, Any]], starts: list[Start]) -> str:
    """Mean Dice over the seeds of either start, with the lowest and highest, and how much more the first has."""
    lines = [f"### {cohort}", "", "| after | pre-trained | random | difference, each seed |", "|---|---|---|---|"]
    for after in AFTER:
        found = [
            {run["asked"]["seed"]: run["dice"][str(after)] for run in runs if of(start, run["asked"])}
            for start in starts
        ]
        lines.append(f"| {after} rounds | {' | '.join(map(spread, found))} | {ahead(*found)} |")
    return "\n".join(lines)


def of(start: Start, asked: dict[str, Any]) -> bool:
    return (asked["checkpoint"], asked["learning_rate"]) == (start.weights, start.learning_rate)


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":  # numpy's BLAS and torch read it when they are imported
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    main()
