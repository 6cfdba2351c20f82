"""What a LoRA rule and a narrower wire cost in Dice: every rule and ring beside plain fp32 `flap`, on equal steps.

    python benchmarks/rules.py --cohort hippocampus --out FOLDER            # start it twice for two cores
    python benchmarks/rules.py --cohort hippocampus --out FOLDER --report

A run is a row of `ROWS` with a seed. It ends in one JSON file, FOLDER/COHORT/runs/ROW-SEED.json, and takes about two
minutes on one thread (`BUDGET`). Processes that share FOLDER share the runs; what is finished is not run again, unless
row or budget has changed since. A run that fails leaves ROW-SEED.error: delete it to have it tried again. Rows whose
keys the configuration does not know, or refuses, are named and passed over.

`hippocampus` reads FEDSAM_REAL_DATA/Task04_Hippocampus (default ../shared/data); `phantom` is made by fedsam itself.
Weights are random and differ with the seed; scans, sites and test cases do not. `centralized` is one learner on the
slices of all sites, with as many steps as all of them take together in a federation; `local` is a learner of each site
alone, with as many steps as the site takes, scored on the site's own test cases. Both keep AdamW's moments throughout.

`--report` prints a Markdown table and writes it beside a picture, FOLDER/COHORT.md and FOLDER/COHORT.png. Dice is the
mean over sites of the means over their test cases and classes; before that it is averaged over the seeds, case by case.
Intervals: 95%, cases redrawn within their sites (see fedsam_core/evaluation/bootstrap.py). The difference to fp32
`flap` is taken case by case, over the seeds that both have, and has an interval of its own. Intervals tell how far
another draw of patients would move the mean, not another seed; the range over the seeds stands beside them. A row is
*within* if its mean is not below the interval of `flap` and the interval of its difference reaches 0. Bytes are those
of every message of a run (see fedsam_core/federation/ledger.py), all sites, the last scoring included.
"""

import argparse
import fcntl
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import ValidationError

from fedsam_core.data.cohort import CohortConfig, read_cohort
from fedsam_core.data.files import write_atomic
from fedsam_core.data.preprocess import PreparedCohort, PreprocessConfig, prepare
from fedsam_core.data.slices import SliceConfig, SliceDataset
from fedsam_core.data.sources.phantom import PhantomConfig
from fedsam_core.evaluation.bootstrap import mean_interval, mean_of_means
from fedsam_core.evaluation.inference import segment_scan
from fedsam_core.evaluation.metrics import CaseScore, score_case
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.engine import InProcessEngine
from fedsam_core.federation.rounds import Federation, RoundReport, run_rounds
from fedsam_core.federation.site import FederatedSite, SiteSpec
from fedsam_core.federation.state import weights_hash
from fedsam_core.hashing import derive_seed, file_sha256, stable_hash
from fedsam_core.learning.config import LearningConfig
from fedsam_core.learning.learner import Learner
from fedsam_core.sam.adapters import adapt, shared_state
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.selection import LayerSelection, preset
from fedsam_core.store import LocalStore

Floats = np.ndarray[Any, np.dtype[np.float64]]
Kind = Literal["federated", "centralized", "local"]
REPOSITORY = Path(__file__).parents[1]
REFERENCE = "flap-fp32"


@dataclass(frozen=True)
class Budget:
    """What every run of a cohort is given.

    Tuned on fp32 `flap` on the hippocampus, seed 0, for about two minutes of one core. 64 px beat 112 px by far (Dice
    .75 against .59): a step is a third of the work, and the scans have 35 x 50 voxels a slice.
    """

    rounds: int = 8
    local_steps: int = 64
    batch_size: int = 4
    learning_rate: float = 5e-3
    image_size: int = 64
    rank: int = 8
    checkpoint: str = "random"

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.model_validate(
            {"backbone": "vit_t", "image_size": self.image_size, "checkpoint": self.checkpoint}
        )

    @property
    def weights(self) -> str:
        file = self.model.weights_file
        return "random" if file is None else file_sha256(file)[:12]

    @property
    def selection(self) -> LayerSelection:
        return preset("flap", self.rank)

    @property
    def slices(self) -> SliceConfig:
        return SliceConfig(context_mm=1.0, augment=False)

    @property
    def learning(self) -> LearningConfig:
        # fp32 everywhere: bf16 would give other bits on CPUs that multiply it natively.
        return LearningConfig(
            local_steps=self.local_steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            precision="fp32",
        )


BUDGET = Budget()
INFERENCE_BATCH = 16


@dataclass(frozen=True)
class Row:
    """A line of the table; `federation` are keys of `FederationConfig`."""

    name: str
    kind: Kind = "federated"
    federation: Mapping[str, Any] = field(default_factory=dict)


def _rows() -> tuple[Row, ...]:
    """The most telling first: the cheapest ring of every rule, then what it takes to mend one that is too coarse."""
    plain = {"rule": "factors", "secure_sum": "plain", "bits": 32, "broadcast_bits": 32}
    rules = ("factors", "rolora", "product-sketch", "ffa", "product-dense")
    down = {8: 8, 12: 12, 16: 16, 20: 32, 24: 32, 32: 32}  # bits of the broadcast that goes with a ring
    cells = [(rule, bits) for bits in (8, 12, 16, 32) for rule in rules] + [("factors", 20), ("factors", 24)]
    return (
        Row(REFERENCE, federation=plain),
        Row("centralized", "centralized"),
        Row("local", "local"),
        *(Row(f"{r}-{b}", federation={"rule": r, "bits": b, "broadcast_bits": down[b]}) for r, b in cells),
    )


ROWS = _rows()


class Score(TypedDict):
    """Dice of a test case by class; None where neither truth nor prediction has a voxel of it."""

    case: str
    site: str
    dice: dict[str, float | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", choices=("hippocampus", "phantom"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of prepared scans, runs and reports")
    parser.add_argument("--seeds", type=int, default=3, help="runs of a row")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=[row.name for row in ROWS], help="these rows")
    parser.add_argument("--report", action="store_true", help="run nothing: the table of what is finished")
    options = parser.parse_args()
    rows = [row for row in ROWS if not options.only or row.name in options.only]
    folder = options.out / options.cohort
    if options.report:
        runs = read_runs(folder, rows, options.seeds, BUDGET)
        if REFERENCE not in runs:
            parser.error(f"no finished run of {REFERENCE} in {folder}: everything is compared with it")
        text = report(options.cohort, rows, runs, options.seeds, BUDGET)
        write_atomic(options.out / f"{options.cohort}.md", text.encode())
        write_atomic(options.out / f"{options.cohort}.png", picture(options.cohort, rows, runs))
        print(text)
        return
    prepared = prepare_once(cohort_config(options.cohort), folder)
    for row in rows:
        for seed in range(options.seeds):
            run_once(folder, prepared, row, seed, BUDGET)


# ---- scans


def cohort_config(name: str) -> CohortConfig:
    """Where the scans are. No training case is spared for validation: nothing is decided by it here."""
    if name == "phantom":
        phantom = PhantomConfig(sites=3, cases_per_site=24, test_per_site=6)
        return CohortConfig(name=name, source="phantom", val_fraction=0, phantom=phantom)
    data = Path(os.environ.get("FEDSAM_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    return CohortConfig(name=name, source="nifti", path=data / "Task04_Hippocampus", val_fraction=0)


def prepare_once(config: CohortConfig, folder: Path) -> PreparedCohort:
    """The prepared cohort; made by whoever comes first, while the others wait."""
    with locked(folder / "prepare.lock"):
        cohort = read_cohort(config, folder / "work")
        return prepare(cohort, PreprocessConfig(), LocalStore((folder / "prepared").resolve()))


# ---- runs


def run_once(folder: Path, prepared: PreparedCohort, row: Row, seed: int, budget: Budget) -> None:
    """Makes a run's file, unless it is there or another process is at it."""
    name = f"{row.name}-{seed}"
    path, error = folder / "runs" / f"{name}.json", folder / "runs" / f"{name}.error"
    if row.kind == "federated":
        try:
            federation_config(row, budget)
        except ValidationError as problem:
            reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in problem.errors())
            print(f"{name}: passed over, this checkout cannot be configured so ({reasons})", flush=True)
            return
    with locked(path.with_suffix(".lock"), wait=False) as claimed:
        if not claimed or _finished(path, row, seed, budget):
            return
        if error.exists():
            print(f"{name}: passed over, it failed before; delete {error} to try again", flush=True)
            return
        started, cpu = perf_counter(), process_time()
        try:
            result = RUNS[row.kind](prepared, row, seed, budget)
        except Exception as problem:  # whatever befalls a run must not keep the others from their table
            write_atomic(error, traceback.format_exc().encode())
            print(f"{name}: failed ({problem}); see {error}", flush=True)
            return
        result |= {
            "asked": asked(row, seed, budget),
            "cohort": prepared.cohort.hash,
            "code": code_hash(),
            "seconds": perf_counter() - started,
            "cpu_seconds": process_time() - cpu,
        }
        write_atomic(path, json.dumps(result, indent=1).encode())
        told = ", ".join(f"{part} {result[f'bytes_{part}'] / 1e6:.1f} MB" for part in ("up", "down"))
        dice = mean_dice(tables([result["scores"]]))
        print(f"{name}: Dice {dice:.3f}, {told}, {result['cpu_seconds']:.0f} s of CPU", flush=True)


def asked(row: Row, seed: int, budget: Budget) -> dict[str, Any]:
    """What decides a run beside scans and code, as it is kept in the run's file."""
    return {"name": row.name, "kind": row.kind, "federation": {**row.federation}, "seed": seed, **asdict(budget)}


@cache
def code_hash() -> str:
    """SHA-256 (hex) of the sources of fedsam_core, so that a table made of several versions says so."""
    package = REPOSITORY / "fedsam_core"
    return stable_hash({str(file.relative_to(package)): file_sha256(file) for file in package.rglob("*.py")})


def federation_config(row: Row, budget: Budget) -> FederationConfig:
    """Raises ValidationError: an unknown key, or values that are refused."""
    return FederationConfig.model_validate({"rounds": budget.rounds, "validate_every": 0, **row.federation})


def begun(
    prepared: PreparedCohort, row: Row, seed: int, budget: Budget
) -> tuple[Federation, dict[str, FederatedSite], SiteSpec]:
    """A federation in this process that has not trained yet, its sites, and the settings of one of them."""
    cohort, sites = prepared.cohort, {}
    for site in cohort.sites:
        spec = SiteSpec(
            run=f"rules-{row.name}-{seed}",
            site=site,
            sites=cohort.sites,
            seed=seed,
            config_hash=stable_hash(asked(row, seed, budget)),
            cohort=prepared.url,
            model=budget.model,
            selection=budget.selection,
            slices=budget.slices,
            learning=budget.learning,
            federation=federation_config(row, budget),
            inference_batch=INFERENCE_BATCH,
        )
        sites[site] = FederatedSite(spec)
    classes = len(cohort.classes)
    segmenter = build_segmenter(spec.model, classes, spec.selection, seed=derive_seed(seed, "model"))
    manifest = adapt(segmenter, spec.selection)
    engine = InProcessEngine(sites)
    federation = Federation(engine, spec, manifest, classes, weights_hash(segmenter, manifest))
    federation.open(shared_state(segmenter, manifest))
    return federation, sites, spec


def tested(federation: Federation, sites: Mapping[str, FederatedSite], round_number: int) -> list[Score]:
    """The Dice of the present global state, as the sites find it."""
    federation.score("test", round_number)
    # A site tells nobody the score of a single case; here all of them are in this process.
    return [as_score(score) for site in sites.values() for score, _ in site._scored]


def federated(prepared: PreparedCohort, row: Row, seed: int, budget: Budget) -> dict[str, Any]:
    """All rounds of a federation in this process, and the Dice that its sites find at the end."""
    federation, sites, spec = begun(prepared, row, seed, budget)
    rounds: list[dict[str, Any]] = []
    run_rounds(federation, lambda report, _: rounds.append(as_round(report)))
    scores = tested(federation, sites, budget.rounds)
    purposes: dict[str, int] = {}
    for entry in federation.ledger:
        key = f"{entry.direction} {entry.purpose}"
        purposes[key] = purposes.get(key, 0) + entry.bytes
    up, down = federation.ledger.total("up"), federation.ledger.total("down")
    return {
        "config": spec.model_dump(mode="json", exclude={"site", "cohort"}),
        "scores": scores,
        "rounds": rounds,
        "bytes_up": up,
        "bytes_down": down,
        "bytes_total": up + down,
        "bytes_by_purpose": purposes,
    }


def centralized(prepared: PreparedCohort, row: Row, seed: int, budget: Budget) -> dict[str, Any]:
    """One learner on the slices of all sites."""
    sites = prepared.cohort.sites
    return without_messages(learn_alone(prepared, None, budget.rounds * budget.local_steps * len(sites), seed, budget))


def local(prepared: PreparedCohort, row: Row, seed: int, budget: Budget) -> dict[str, Any]:
    """A learner of each site alone, scored on the site's own test cases."""
    steps = budget.rounds * budget.local_steps
    sites = prepared.cohort.sites
    return without_messages([score for site in sites for score in learn_alone(prepared, site, steps, seed, budget)])


RUNS = {"federated": federated, "centralized": centralized, "local": local}


def learn_alone(prepared: PreparedCohort, site: str | None, steps: int, seed: int, budget: Budget) -> list[Score]:
    """Trains on the slices of a site (None: of all) without federation; the Dice of its test cases."""
    cohort, who = prepared.cohort, site or "all"
    train = [prepared.load(case.id) for case in cohort.select(site, "train")]
    # One long round, which warms up as long as the rounds of a federation do.
    learning = budget.learning.model_copy(
        update={"local_steps": steps, "warmup_rounds": budget.learning.warmup_rounds / budget.rounds}
    )
    segmenter = build_segmenter(budget.model, len(cohort.classes), budget.selection, seed=derive_seed(seed, "model"))
    manifest = adapt(segmenter, budget.selection)
    dataset = SliceDataset(train, budget.image_size, budget.slices)
    learner = Learner(who, segmenter, manifest, dataset, learning, torch.device("cpu"))
    learner.fit(shared_state(segmenter, manifest), 1, 1, seed)
    scores = []
    for case in cohort.select(site, "test"):
        mask = segment_scan(segmenter, prepared.load(case.id), budget.slices, budget.image_size, INFERENCE_BATCH)
        scores.append(as_score(score_case(mask, case, cohort.classes, cohort.structures)))
    return scores


def as_score(score: CaseScore) -> Score:
    values = (None if np.isnan(dice) else dice for dice in score.dice)
    return {"case": score.case, "site": score.site, "dice": dict(zip(score.classes, values, strict=True))}


def as_round(report: RoundReport) -> dict[str, Any]:
    """What explains a row's Dice: how the rule and the wire did in a round."""
    inexact = report.lora.relative
    return {
        "loss": report.loss,
        "update_norm": report.update_norm,
        "inexactness": None if np.isnan(inexact) else inexact,
        "rounding_rms": report.precision.rms,
        "cut": report.precision.cut,
        "failed": report.failed,
        "skipped": report.lora.skipped,
    }


def without_messages(scores: list[Score]) -> dict[str, Any]:
    return {"scores": scores, "bytes_up": 0, "bytes_down": 0, "bytes_total": 0}


def _finished(path: Path, row: Row, seed: int, budget: Budget) -> dict[str, Any] | None:
    """A run's file, if there is one of this very row and budget."""
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result["asked"] == asked(row, seed, budget) else None


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a lock file; without `wait` False is given if another process has it. It falls with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


# ---- the table


@dataclass(frozen=True)
class Line:
    """A row as the table tells it.

    Attributes:
        seeds: mean Dice of each seed.
        interval: of `dice`; None where nothing can be said.
        difference: of the mean Dice to the reference's, over the seeds that both have, with its interval.
        up, down: bytes of all sites in a run, mean over the seeds.
    """

    row: Row
    seeds: tuple[float, ...]
    dice: float
    interval: tuple[float, float] | None
    difference: float
    difference_interval: tuple[float, float] | None
    up: float
    down: float
    within: bool

    @property
    def total(self) -> float:
        return self.up + self.down


Runs = dict[str, dict[int, dict[str, Any]]]
"""Row -> seed -> what its file holds."""


def read_runs(folder: Path, rows: Sequence[Row], seeds: int, budget: Budget) -> Runs:
    """The finished runs of these rows, and of the reference."""
    runs: Runs = {}
    for row in {row.name: row for row in (ROWS[0], *rows)}.values():
        for seed in range(seeds):
            if found := _finished(folder / "runs" / f"{row.name}-{seed}.json", row, seed, budget):
                runs.setdefault(row.name, {})[seed] = found
    return runs


def tables(runs: Sequence[Sequence[Score]]) -> dict[str, Floats]:
    """Site -> float64 [cases, classes]: Dice averaged over runs; nan where no run has one. Cases by name."""
    sites: dict[str, dict[str, list[list[float]]]] = {}
    for scores in runs:
        for score in scores:
            dice = [float("nan") if value is None else value for value in score["dice"].values()]
            sites.setdefault(score["site"], {}).setdefault(score["case"], []).append(dice)
    return {
        site: np.array([_known_mean(np.array(cases[case])) for case in sorted(cases)])
        for site, cases in sorted(sites.items())
    }


def _known_mean(values: Floats) -> Floats:
    """Mean over the first axis of what is not nan, class by class."""
    return np.array(
        [np.mean(column[~np.isnan(column)]) if not np.isnan(column).all() else np.nan for column in values.T]
    )


def mean_dice(groups: Mapping[str, Floats]) -> float:
    """Mean over sites of the means over their cases and classes."""
    return float(np.nanmean([mean_of_means(group) for group in groups.values()]))


def lines(rows: Sequence[Row], runs: Runs) -> list[Line]:
    """The rows that have a finished run, in their order."""
    base = runs[REFERENCE]
    reference = mean_interval(list(tables([run["scores"] for run in base.values()]).values()), seed=0)
    told = []
    for row in rows:
        if row.name not in runs:
            continue
        own = runs[row.name]
        groups = tables([run["scores"] for run in own.values()])
        common = sorted(own.keys() & base.keys())
        mine, theirs = (tables([of[seed]["scores"] for seed in common]) for of in (own, base))
        # A class that either of them has no Dice for (nothing there, nothing found) drops out of the comparison.
        differences = {site: mine[site] - theirs[site] for site in mine}
        dice = mean_dice(groups)
        apart = mean_interval(list(differences.values()), seed=0) if common else None
        told.append(
            Line(
                row=row,
                seeds=tuple(mean_dice(tables([own[seed]["scores"]])) for seed in sorted(own)),
                dice=dice,
                interval=mean_interval(list(groups.values()), seed=0),
                difference=mean_dice(differences) if common else float("nan"),
                difference_interval=apart,
                up=float(np.mean([run["bytes_up"] for run in own.values()])),
                down=float(np.mean([run["bytes_down"] for run in own.values()])),
                within=reference is not None and apart is not None and dice >= reference[0] and apart[1] >= 0,
            )
        )
    return told


def cheapest(told: Sequence[Line]) -> Line | None:
    """The federation within the reference's interval that moves the fewest bytes."""
    return min(
        (line for line in told if line.within and line.row.kind == "federated"),
        key=lambda line: line.total,
        default=None,
    )


def report(cohort: str, rows: Sequence[Row], runs: Runs, seeds: int, budget: Budget) -> str:
    """The table in Markdown, the cheapest row within, and what is missing."""
    told = lines(rows, runs)
    base = next(iter(lines([ROWS[0]], runs)))
    first = next(iter(runs[REFERENCE].values()))["scores"]
    counts = [sum(score["site"] == site for score in first) for site in sorted({score["site"] for score in first})]
    text = [
        f"### {cohort}: {len(counts)} sites, {sum(counts)} test cases ({', '.join(map(str, counts))})",
        "",
        f"vit_t, {budget.image_size} px, rank {budget.rank}, random weights; {budget.rounds} rounds of "
        f"{budget.local_steps} steps, {budget.batch_size} slices each, learning rate {budget.learning_rate:g}.",
        "",
        "| row | up, down bits | Dice [95%] | seeds | minus flap-fp32 [95%] | MB up | MB down | MB in all | fewer "
        "bytes | within |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in told:
        federated = line.row.kind == "federated"
        keys = line.row.federation
        cells = [
            line.row.name,
            f"{keys['bits']}, {keys['broadcast_bits']}" if federated else "",
            f"{line.dice:.3f}{_between(line.interval, '.3f')}",
            f"{min(line.seeds):.3f} to {max(line.seeds):.3f} ({len(line.seeds)})",
            "" if line.row.name == REFERENCE else f"{line.difference:+.3f}{_between(line.difference_interval, '+.3f')}",
            *(f"{size / 1e6:.2f}" if federated else "" for size in (line.up, line.down, line.total)),
            f"{base.total / line.total:.2f}x" if federated else "",
            "yes" if line.within else "no",
        ]
        text.append(f"| {' | '.join(cells)} |")
    best = cheapest(told)
    text += ["", f"Cheapest row within: **{best.row.name}**." if best else "No row is within."]
    missing = [f"{row.name}-{seed}" for row in rows for seed in range(seeds) if seed not in runs.get(row.name, {})]
    if missing:
        text.append(f"Not finished: {', '.join(missing)}.")
    versions = {run["code"] for of in runs.values() for run in of.values()}
    if len(versions) > 1:
        text.append(f"The runs were made by {len(versions)} versions of fedsam_core.")
    if len({run["cohort"] for of in runs.values() for run in of.values()}) > 1:
        text.append("The runs were made on different scans: delete FOLDER and run them again.")
    spent = [run["cpu_seconds"] for of in runs.values() for run in of.values()]
    text.append(f"A run took {np.median(spent):.0f} s of CPU (median of {len(spent)}, {max(spent):.0f} at most).")
    return "\n".join(text) + "\n"


def _between(interval: tuple[float, float] | None, form: str) -> str:
    return "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"


def picture(cohort: str, rows: Sequence[Row], runs: Runs) -> bytes:
    """PNG: Dice against bytes, a color a rule, with intervals; the band is the interval of fp32 `flap`."""
    told = lines(rows, runs)
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    (base,) = lines([ROWS[0]], runs)
    if base.interval is not None:
        axes.axhspan(*base.interval, color="0.92", zorder=0)
    rules = list(dict.fromkeys(rule_of(row) for row in rows if row.kind == "federated"))
    for rule in rules:
        points = sorted((line for line in told if rule_of(line.row) == rule), key=lambda line: line.total)
        if not points:
            continue
        dice = np.array([line.dice for line in points])
        ends = np.array([line.interval or (line.dice, line.dice) for line in points])
        errors = np.abs(ends.T - dice)
        size = [line.total / 1e6 for line in points]
        axes.errorbar(
            size, dice, errors, marker="o", capsize=3, linewidth=1, label=rule, color=COLORS[rules.index(rule)]
        )
        for x, line in zip(size, points, strict=True):
            axes.annotate(f"{line.row.federation['bits']}", (x, line.dice), (4, 4), textcoords="offset points", size=7)
    for line, style in ((line, {"centralized": "--", "local": ":"}.get(line.row.kind)) for line in told):
        if style:
            axes.axhline(line.dice, color="0.3", linestyle=style, linewidth=1, label=line.row.kind)
    axes.set_xscale("log")
    axes.set_xlabel("MB of all messages in a run, all sites, up and down")
    axes.set_ylabel("Dice on the test cases, mean over sites")
    axes.set_title(f"{cohort}: LoRA rules and bits on the wire (95% intervals over cases)", size=10)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    figure.legend(loc="outside right upper", fontsize=8)
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()


# Okabe and Ito's palette, told apart with any color vision.
COLORS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


def rule_of(row: Row) -> str:
    """What the picture calls a federated row; "" for the others."""
    if row.name == REFERENCE:
        return "flap, plain fp32"
    return str(row.federation.get("rule", ""))


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":  # numpy's BLAS and torch read it when they are imported
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    main()
