"""`fedsam baselines local|zero-shot`: what a federation is compared with, on the same budget and the same scores.

centralized  one learner on the slices of all sites (`fedsam centralize`)
local        each site alone on its own slices, scored on its own and on every other site's test cases
zero-shot    the backbone as it was loaded

All three read the cases of all sites in one place: they are for cohorts that may be pooled. A site alone takes the
steps that it takes in the federation, rounds x local_steps; the pooled learner as many as all sites together. Both are
on the federation's schedule, validate after each round as it does, and keep their optimiser's state throughout, as
nothing restarts them; FedProx, SCAFFOLD and the LoRA rules have no meaning for them. Full fine-tuning is
selection=full.
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import torch

from cluster.placement import cluster_nodes
from cluster.session import ray_session
from cluster.tracking import RunTracker
from cluster.trainer import Place, Work, alone, together
from fedsam_core.data.preprocess import MANIFEST, PreparedCase, PreparedCohort
from fedsam_core.data.slices import SliceDataset
from fedsam_core.errors import ClusterError, ConfigError, DataError
from fedsam_core.evaluation.metrics import CaseScore
from fedsam_core.federation.engine import describe_failure
from fedsam_core.federation.preparation import PreparedSites
from fedsam_core.hashing import stable_hash
from fedsam_core.learning.config import LearningConfig
from fedsam_core.learning.device import autocast_dtype, describe_device
from fedsam_core.learning.learner import Assignment, Fit, Learner, steps_of
from fedsam_core.sam.adapters import local_state, shared_state
from pipelines import console
from pipelines.baseline_record import Baseline, BaselineRecorder, Kind, Scorer
from pipelines.config import Config
from pipelines.federate import check_weights, initial_model, open_tracking, run_params, run_tags
from pipelines.prepare import prepare_sites, store_opener
from pipelines.recorder import Emit, Event, dice_rows
from pipelines.run_folder import RunFolder
from pipelines.sources import code_hash
from pipelines.stage import Stage

POOLED = "pooled"  # where a site's name would stand in the seeds of a pooled round
STAGES = {"centralized": "centralize", "local": "local", "zero-shot": "zero-shot"}


@dataclass(frozen=True)
class Task:
    """What a baseline is told, wherever it runs.

    Attributes:
        parent: id of the MLflow run that it belongs to, such as a study's.
        tags: for its MLflow run, beside its own.
    """

    kind: Kind
    config: Config
    about: PreparedSites
    run: str
    parent: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def hashes(self) -> dict[str, str]:
        """What the run was made from."""
        config_hash = self.config.science_hash(self.about.hash)
        return {"config_hash": config_hash, "cohort_hash": self.about.hash, "code_hash": code_hash()}

    @property
    def folder(self) -> Path:
        """Checkpoints of an unfinished run: the same settings, scans and code have the same place, and go on there."""
        key = stable_hash([self.kind, self.config.engine.kind, self.config.engine.workers, self.hashes])
        return self.config.work_dir / "unfinished" / f"{self.config.name}-{self.kind}-{key[:10]}"


def centralized(
    config: Config,
    prepared: PreparedSites,
    emit: Emit,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Baseline:
    """Trains on the pooled slices of all sites; with Ray, within a `ray_session`, by Ray Train on `engine.workers`.

    Called again with the same settings after it was killed, it goes on from the last complete round.

    Raises:
        FedsamError: what is wrong, in one line: sites that cannot be pooled, a site without a training case, ...
    """
    workers = config.engine.workers
    if workers > config.learning.batch_size:
        raise ConfigError(
            f"engine.workers={workers} cannot share batches of {config.learning.batch_size} slices: lower it, or raise "
            "learning.batch_size"
        )
    if config.engine.kind == "in-process" and workers > 1:
        raise ConfigError(f"engine.workers={workers} needs Ray: set engine.kind=ray, or engine.workers=1")
    return _launch("centralized", _train_pooled, config, prepared, emit, parent, tags)


def local(
    config: Config,
    prepared: PreparedSites,
    emit: Emit,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Baseline:
    """Trains each site alone, one after another. Otherwise as `centralized`, but begins anew after it was killed."""
    return _launch("local", _train_local, config, prepared, emit, parent, tags)


def zero_shot(
    config: Config,
    prepared: PreparedSites,
    emit: Emit,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Baseline:
    """Scores the model as every site of a federation builds it, before any training. Raises as `centralized`."""
    return _launch("zero-shot", _train_nothing, config, prepared, emit, parent, tags)


def _launch(
    kind: Kind,
    work: Any,
    config: Config,
    prepared: PreparedSites,
    emit: Emit,
    parent: str | None,
    tags: Mapping[str, str] | None,
) -> Baseline:
    _require_pool(config, prepared)
    prepared = prepared.without_problems()
    config_hash = config.science_hash(prepared.hash)
    run = f"{config.name}-{kind}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{config_hash[:6]}-{token_hex(2)}"
    task = Task(kind, config, prepared, run, parent, dict(tags or {}))
    tracked: list[str] = []

    def look_on(event: Event) -> None:
        tracked.extend(filter(None, [event.tracked]))
        emit(event)

    placed: Work = partial(work, task)
    folder = task.folder
    if config.engine.kind == "in-process":
        result: Baseline = alone(placed, emit, folder)
    else:
        workers = config.engine.workers if kind == "centralized" else 1
        try:
            result = together(placed, look_on, folder, workers, cluster_nodes(), config.engine.site)
        except (KeyboardInterrupt, SystemExit, ClusterError) as error:
            # The worker is gone and cannot close its MLflow run itself.
            for run_id in tracked:
                open_tracking(config).end(run_id, "KILLED", describe_failure(error))
            raise
    shutil.rmtree(folder, ignore_errors=True)  # what it is for is in the run's folder
    return result


def _require_pool(config: Config, prepared: PreparedSites) -> None:
    """Finds out whether all sites' cases can be read in one place."""
    why = "a baseline reads the cases of all sites in one place"
    if config.cohort.sites is not None and config.engine.kind == "ray" and len(cluster_nodes()) > 1:
        raise ConfigError(
            f"cohort.sites keeps the scans of {', '.join(prepared.sites)} in folders of their own on their own nodes, "
            f"but {why}: pool them where that is allowed, and give that folder as cohort.path"
        )
    for site, share in prepared.shares.items():
        if not store_opener(config)(share["url"]).exists(MANIFEST):
            raise ConfigError(
                f"the prepared share of site {site} ({share['url']}) is not on this machine, but {why}: set "
                "storage.prepared to a folder or bucket that all nodes see, where pooling is allowed"
            )
        if not share["cases"].get("train"):
            raise DataError(f"site {site}: no training case; give it one in sites.csv, or leave the site out")


class _Desk:
    """What every baseline begins with, in each worker: the cohort, the model, and (in the first) a recorder."""

    def __init__(self, task: Task, place: Place) -> None:
        self.task, self.place, config = task, place, task.config
        torch.set_num_threads(config.learning.threads)
        opener = store_opener(config)
        self.prepared = PreparedCohort.open(*(opener(share["url"]) for _, share in sorted(task.about.shares.items())))
        self.segmenter, self.manifest, self.start = initial_model(config, len(self.prepared.cohort.classes))
        self.segmenter.to(place.device)
        self.scorer = Scorer(config, self.prepared, self.segmenter, place.emit)
        self.tracking = open_tracking(config)

    def training_cases(self, site: str) -> list[PreparedCase]:
        return [self.prepared.load(case.id) for case in self.prepared.cohort.select(site, "train")]

    def learner(self, site: str, cases: Sequence[PreparedCase], who: str) -> Learner:
        config = self.task.config
        dataset = SliceDataset(cases, config.model.image_size, config.slices)
        learning = baseline_learning(config.learning)
        return Learner(site, self.segmenter, self.manifest, dataset, learning, self.place.device, who)

    def validates(self, number: int) -> bool:
        every = self.task.config.federation.validate_every
        return bool(every) and (number % every == 0 or number == self.task.config.federation.rounds)

    def track(self, run: str) -> RunTracker:
        task, config, device = self.task, self.task.config, self.place.device
        tags = run_tags(config, task.about, self.manifest, self.segmenter, task.hashes["config_hash"])
        for of_sums in ("fedsam.secure_sum", "fedsam.roster"):
            del tags[of_sums]
        tags |= {
            "fedsam.stage": STAGES[task.kind],
            "fedsam.run": run,
            "fedsam.workers": str(task.config.engine.workers if task.kind == "centralized" else 1),
            "fedsam.device": describe_device(device),
            "fedsam.precision": "bf16" if autocast_dtype(config.learning.precision, device) else "fp32",
            **task.tags,
        }
        settled = config.model_copy(update={"preprocess": task.about.config})
        tracker = self.tracking.start(run, run_params(settled), tags, parent=task.parent)
        where = f"MLflow run {tracker.run_id} in experiment {config.tracking.experiment}"
        self.place.emit(Event(where, tracked=tracker.run_id))
        return tracker

    def recorder(self, run: str, tracker: RunTracker, history: dict[str, Any] | None = None) -> BaselineRecorder:
        folder = RunFolder(self.task.config.work_dir / "runs" / run)
        return BaselineRecorder(self.task.kind, run, self.scorer, self.manifest, folder, tracker, history)


def baseline_learning(config: LearningConfig) -> LearningConfig:
    """How one learns that is in no federation: no pull towards a global state, and no new optimiser each round."""
    return config.model_copy(update={"keep_optimizer": True, "proximal": 0.0})


def _train_nothing(task: Task, place: Place) -> Baseline:
    desk = _Desk(task, place)
    with desk.track(task.run) as tracker:
        record = desk.recorder(task.run, tracker)
        record.begin()
        masks: dict[str, bytes] = {}
        test = desk.scorer.scores(desk.scorer.split("test"), masks)
        return record.finish(test, masks, desk.tracking.ui_command(), task.hashes)


def _train_pooled(task: Task, place: Place) -> Baseline | None:
    desk, rounds = _Desk(task, place), task.config.federation.rounds
    cases, steps = [], 0
    for site in task.about.sites:
        own = desk.training_cases(site)
        steps += steps_of(task.config.learning, sum(len(case.image) for case in own))
        cases += own
    learner = desk.learner(POOLED, cases, "pooled training")
    del cases
    checkpoints = place.checkpoints(desk.manifest.layout_hash)
    saved = checkpoints.latest()
    done, kept = saved or (0, {})
    told: dict[str, Any] = json.loads(bytes(kept.pop("history"))) if saved else {"run": task.run}
    state = {name.removeprefix("state/"): kept.pop(name) for name in list(kept) if name.startswith("state/")}
    state = state or desk.start

    if place.first and saved and told["mlflow_run"]:
        desk.tracking.end(told["mlflow_run"], "KILLED", "interrupted; another run goes on from its last round")
    with desk.track(told["run"]) if place.first else nullcontext() as tracker:
        record = None
        if tracker is not None:
            shared = f", {task.config.engine.workers} workers" * (task.config.engine.workers > 1)
            begun = f"run {told['run']}: {len(learner.dataset)} slices of {len(task.about.sites)} sites are POOLED"
            place.emit(Event(f"{begun}, {rounds} rounds of {steps} steps{shared}"))
            record = desk.recorder(told["run"], tracker, told.get("history"))
            if not saved:
                record.begin()
        for number in range(done + 1, rounds + 1):
            assignment = Assignment(kept=kept, steps=steps)
            fit = learner.fit(state, number, rounds, task.config.seed, assignment)
            state, kept = shared_state(desk.segmenter, desk.manifest), dict(fit.kept)
            arrays = {**{f"state/{name}": value for name, value in state.items()}, **kept}
            if record is not None and tracker is not None:
                _after_pooled_round(desk, record, number, fit)
                now = {"run": told["run"], "mlflow_run": tracker.run_id, "history": record.history()}
                arrays["history"] = np.frombuffer(json.dumps(now).encode(), np.uint8)
            checkpoints.save(number, arrays)
        if record is None:
            return None
        learner.load(state, Assignment(kept=kept))  # where all rounds were done before
        masks: dict[str, bytes] = {}
        test = desk.scorer.scores(desk.scorer.split("test"), masks)
        return record.finish(test, masks, desk.tracking.ui_command(), task.hashes)


def _after_pooled_round(desk: _Desk, record: BaselineRecorder, number: int, fit: Fit) -> None:
    scorer, rounds = desk.scorer, desk.task.config.federation.rounds
    validation = scorer.summary(scorer.scores(scorer.split("val"))) if desk.validates(number) else None
    with np.errstate(invalid="ignore"):
        dice = fit.dice_numerator / fit.dice_denominator
    seen = {f"train/dice_{name}": float(one) for name, one in zip(scorer.classes, dice, strict=True) if one == one}
    record.after_round(number, validation, {"train/loss": fit.loss, **seen})
    told = "" if validation is None or validation["dice"] is None else f" validation Dice {validation['dice']:.3f},"
    desk.place.emit(Event(f"round {number}:{told} loss {fit.loss:.3f}", number, rounds))


def _train_local(task: Task, place: Place) -> Baseline:
    desk, rounds, sites = _Desk(task, place), task.config.federation.rounds, task.about.sites
    scorer = desk.scorer
    with desk.track(task.run) as tracker:
        place.emit(Event(f"run {task.run}: {len(sites)} sites learn alone, {rounds} rounds each", 0, 0))
        record = desk.recorder(task.run, tracker)
        record.begin()
        untrained = {f"local/{name}": value for name, value in local_state(desk.segmenter, desk.manifest).items()}
        validation: dict[int, list[CaseScore]] = {number: [] for number in range(1, rounds + 1)}
        losses: dict[int, dict[str, float]] = {number: {} for number in range(1, rounds + 1)}
        test: list[CaseScore] = []
        masks: dict[str, bytes] = {}
        cross: dict[str, dict[str, float | None]] = {}
        for at, site in enumerate(sites):
            learner = desk.learner(site, desk.training_cases(site), f"site {site}")
            state, kept = desk.start, dict(untrained)
            for number in range(1, rounds + 1):
                fit = learner.fit(state, number, rounds, task.config.seed, Assignment(kept=kept))
                state, kept = shared_state(desk.segmenter, desk.manifest), dict(fit.kept)
                losses[number][f"site/{site}/loss"] = fit.loss
                if desk.validates(number):
                    validation[number] += scorer.scores(scorer.split("val", site))
                line = f"site {site} alone, round {number}: loss {fit.loss:.3f}"
                place.emit(Event(line, at * rounds + number, len(sites) * rounds))
            own = scorer.scores(scorer.split("test", site), masks)
            others = [scorer.scores(scorer.split("test", other)) for other in sites if other != site]
            found = scorer.summary([*own, *(score for scores in others for score in scores)])["per_site"]
            cross[site] = {other: found[other]["dice"] if other in found else None for other in sites}
            test += own
        for number in range(1, rounds + 1):
            known = scorer.summary(validation[number]) if desk.validates(number) else None
            mean = float(np.mean(list(losses[number].values())))
            record.after_round(number, known, {"train/loss": mean, **losses[number]})
        return record.finish(test, masks, desk.tracking.ui_command(), task.hashes, cross)


def run_stage(name: str, baseline: Any, config: Config) -> None:
    """Runs a baseline as a stage and prints what came of it."""
    check_weights(config)
    open_tracking(config).check()
    with ray_session() if config.engine.kind == "ray" else nullcontext(), console.Bars() as bars:
        prepared = prepare_sites(config, bars)

        def tell(event: Event) -> None:
            console.out.print(console.plain(event.text))
            if event.total:
                bars(name, event.done, event.total)

        outcome = baseline(config, prepared, tell)
    show(outcome)


def show(outcome: Baseline) -> None:
    """Prints the closing table and where everything is."""
    rows = dice_rows(outcome.before, outcome.test)
    title = f"{outcome.kind}: Dice on the test cases, in the scans' own grid"
    console.out.print(console.table(title, ("", "before", "after"), rows))
    if outcome.cross:
        sites = list(outcome.cross)
        cross = [(f"model of {site}", *(outcome.cross[site][other] for other in sites)) for site in sites]
        console.out.print(console.table("each site's model on each site's test cases", ("", *sites), cross))
    console.out.print(f"{outcome.rounds} rounds in {outcome.minutes:.1f} minutes, {outcome.trainable:,} values trained")
    console.out.print(f"run folder: {outcome.folder}\nMLflow UI:  {outcome.ui}")


KINDS = {"local": local, "zero-shot": zero_shot}


def main(arguments: Sequence[str] | None = None) -> None:
    """`fedsam baselines KIND ...`: the stage of that baseline."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in KINDS:
        known = given[:1] in (["-h"], ["--help"])
        print(
            f"usage: fedsam baselines {'|'.join(KINDS)} [--help] ...\n\n{__doc__}", file=None if known else sys.stderr
        )
        sys.exit(0 if known else 2)
    kind = given.pop(0)
    Stage(f"baselines {kind}", __doc__ or "", partial(run_stage, kind, KINDS[kind])).main(given)


if __name__ == "__main__":
    main()
