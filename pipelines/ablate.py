"""`fedsam ablate STUDY`: many layer selections over one cohort, each a comparable MLflow run, and the table of them.

A trial is known by the hash of its configuration, the cohort and the code: what has ended is not run again, so a study
that was interrupted is simply called again. On Ray as many trials run at once as the cluster holds, each with its
driver and sites placed as a whole; with engine.kind=in-process one after the other, in this process.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import yaml

from cluster.placement import cluster_nodes, preflight
from cluster.session import ray_session
from cluster.tracking import Tracking
from cluster.trials import Ended, Placed, run_trials
from fedsam_core.errors import ConfigError, FedsamError, TrialError
from fedsam_core.federation.engine import describe_failure
from fedsam_core.federation.preparation import PreparedSites
from fedsam_core.selection import LayerSelection
from fedsam_core.store import Store
from pipelines import console
from pipelines.analysis import MEGABYTE, Estimate, rows_of, unfinished
from pipelines.commits import results_store
from pipelines.config import Config, inline
from pipelines.federate import check, open_tracking
from pipelines.prepare import prepare_sites, prepared_location
from pipelines.results import (
    StudyAbout,
    TrialResult,
    about_key,
    read_about,
    read_results,
    search_key,
    study_key,
    trial_key,
)
from pipelines.search import Step, grow
from pipelines.sources import code_hash
from pipelines.stage import guarded
from pipelines.study import Study, Trial, candidates, load_study, studies, trials, trials_of
from pipelines.trials import Task, bundles, described, run_trial


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="fedsam ablate",
        description=__doc__,
        epilog="A study file is described in pipelines/study.py; `fedsam report STUDY` makes a page of the results.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", metavar="STUDY", help=f"YAML file, or a committed study: {', '.join(studies())}")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of all trials; they win over the file"
    )
    parser.add_argument("--search", action="store_true", help="grow a selection greedily from the study's selections")
    parser.add_argument("--list", action="store_true", help="say which trials there are; run none")
    options = parser.parse_intermixed_args(arguments)
    sys.exit(guarded(lambda: _command(options)))


def _command(options: argparse.Namespace) -> None:
    study = load_study(options.study, options.overrides)
    # A study that came as text, as in a job, is kept beside its results: that file is what to call again.
    source = f"studies/{study.name}/study.yaml" if options.study.startswith("{") else options.study
    command = shlex.join(["fedsam", "ablate", source, *options.overrides, *["--search"] * options.search])
    if options.list:
        show_trials(study)
    elif options.search:
        search(study, command)
    else:
        ablate(study, command)


def ablate(study: Study, command: str) -> tuple[TrialResult, ...]:
    """Runs what is missing of a study and prints its table; all its results, in the order of its trials.

    Raises:
        FedsamError: a setting, the cohort or the cluster is wrong, or trials failed: the others have still been run.
    """
    planned = trials(study)
    with _at_work(study, planned, command) as desk:
        results = desk.run(planned)
    show(results, desk.cohort.described.classes)
    _raise_failed(results)
    return results


def search(study: Study, command: str) -> tuple[Step, ...]:
    """Grows a selection from the study's own, prints and keeps each step.

    Raises:
        FedsamError: as `ablate`; the study has no `search`; no candidate fits its budget.
    """
    if study.search is None:
        raise ConfigError(f"study {study.name} says nothing of a search: give it search: {{budget_mb: ...}}")
    if study.grid:
        raise ConfigError(f"study {study.name}: a search has no grid; give its settings as overrides")
    found = candidates(study)

    def score(selections: Sequence[LayerSelection]) -> list[list[TrialResult]]:
        wanted = [trials_of(study, selection) for selection in selections]
        results = {result.id: result for result in desk.run([trial for some in wanted for trial in some])}
        _raise_failed(list(results.values()))
        ended = [[results[task.id] for task in desk.tasks(some)] for some in wanted]
        return [[result for result in some if result.status == "finished"] for some in ended]

    with _at_work(study, trials_of(study, found[0]), command) as desk:
        steps = grow(study.search, found, score)
        rows = [step.row() for step in steps]
        desk.store.write_bytes(search_key(study.name), (json.dumps(rows, indent=1) + "\n").encode())
    table = [(step.step, step.taken, step.dice, f"{step.gain:+.3f}", f"{step.megabytes:.2f}") for step in steps]
    title = f"greedy search within {study.search.budget_mb:g} MB: validation Dice, means over {len(study.seeds)} seeds"
    console.out.print(console.table(title, ("step", "takes", "Dice", "gain", "MB a run"), table))
    console.out.print(console.plain(f"as a setting: selection={inline(steps[-1].selection)}"))
    return steps


class Desk:
    """A study at work: its cohorts, where its results are kept, and how its trials are run."""

    def __init__(self, study: Study, command: str, configs: Sequence[Config], bars: console.Bars) -> None:
        """Prepares the cohort as each configuration asks."""
        self.study = study
        self._bars = bars
        self._base = configs[0]
        self._cohorts: dict[str, PreparedSites] = {}
        for config in configs:
            if (place := prepared_location(config)) not in self._cohorts:
                self._cohorts[place] = prepare_sites(config, bars)
        self.store = results_store(self._base)
        self.about = self._about(command)

    @property
    def cohort(self) -> PreparedSites:
        """What the study is about; trials may differ in preprocessing."""
        return next(iter(self._cohorts.values()))

    def tasks(self, some: Sequence[Trial]) -> list[Task]:
        """The trials with what they need."""
        parent = self.about.mlflow_run or None
        return [Task(trial, self._cohorts[prepared_location(trial.config)], self.study.name, parent) for trial in some]

    def run(self, some: Sequence[Trial]) -> tuple[TrialResult, ...]:
        """Runs those that have not ended; the results of all, in their order."""
        tasks = self.tasks(some)
        self._keep_about(planned=tuple(dict.fromkeys([*self.about.planned, *(task.id for task in tasks)])))
        done = self._done()
        missing = [task for task in tasks if task.id not in done or done[task.id].status == "failed"]
        ended = len(tasks) - len(missing)
        console.out.print(f"study {self.study.name}: {len(tasks)} trials, {ended} of them have ended")
        if missing:
            run = _run_on_ray if self._base.engine.kind == "ray" else _run_here
            run(self.study, missing, self.store, self._bars)
            done = self._done()
        return tuple(done[task.id] for task in tasks if task.id in done)

    def track(self, run_id: str) -> None:
        """The MLflow run that the trials hang from; a later call of the study goes on with it."""
        self._keep_about(mlflow_run=run_id)

    def _done(self) -> dict[str, TrialResult]:
        return {result.id: result for result in read_results(self.store, self.study.name)}

    def _keep_about(self, **changes: object) -> None:
        self.about = self.about.model_copy(update=changes)
        self.store.write_bytes(about_key(self.study.name), self.about.model_dump_json(indent=1).encode())
        text = yaml.safe_dump(self.study.model_dump(mode="json", by_alias=True, exclude_unset=True), sort_keys=False)
        self.store.write_bytes(study_key(self.study.name), text.encode())

    def _about(self, command: str) -> StudyAbout:
        study, first = self.study, self.cohort
        before = read_about(self.store, study.name) if self.store.exists(about_key(study.name)) else None
        if before is not None and before.cohort_hash != first.hash:
            raise ConfigError(
                f"study {study.name} was begun with other scans (cohort {before.cohort_hash[:12]}, now "
                f"{first.hash[:12]}): give the study another name"
            )
        return StudyAbout(
            name=study.name,
            cohort=first.described.name,
            cohort_hash=first.hash,
            classes=first.described.classes,
            sites=first.sites,
            synthetic=first.described.synthetic,
            command=command,
            mlflow_run=before.mlflow_run if before else "",
            experiment=self._base.tracking.experiment,
        )


@contextmanager
def _at_work(study: Study, planned: Sequence[Trial], command: str) -> Iterator[Desk]:
    """The cluster is there, the cohort prepared, and the study's own MLflow run open."""
    base = planned[0].config
    on_ray = base.engine.kind == "ray"
    if study.early_stop is not None and not on_ray:
        raise ConfigError("early_stop needs trials that run side by side: set engine.kind=ray, or leave it out")
    for trial in {trial.group: trial for trial in planned}.values():
        check(trial.config)
    with ray_session() if on_ray else nullcontext(), console.Bars() as bars:
        desk = Desk(study, command, [trial.config for trial in planned], bars)
        with _parent(open_tracking(base), study, desk.about) as run_id:
            desk.track(run_id)
            yield desk


@contextmanager
def _parent(tracking: Tracking, study: Study, about: StudyAbout) -> Iterator[str]:
    """The MLflow run that the trials hang from: that of an earlier call, or a new one."""
    if about.mlflow_run:
        yield about.mlflow_run
        return
    tags = {
        "fedsam.stage": "ablate",
        "fedsam.study": study.name,
        "fedsam.cohort_hash": about.cohort_hash,
        "fedsam.code_hash": code_hash(),
        "fedsam.synthetic": str(about.synthetic).lower(),
    }
    with tracking.start(study.name, {}, tags) as tracker:
        yield tracker.run_id


def _run_here(study: Study, tasks: Sequence[Task], store: Store, bars: console.Bars) -> None:
    """One after the other, in this process."""
    for done, task in enumerate(tasks, start=1):
        bars("trials", done - 1, len(tasks))
        try:
            result = run_trial(task, lambda number, numbers: None, {})
        except FedsamError as error:
            result = described(task).model_copy(update={"status": "failed", "error": describe_failure(error)})
        _keep(result, study, store)
        bars("trials", done, len(tasks))


def _run_on_ray(study: Study, tasks: Sequence[Task], store: Store, bars: console.Bars) -> None:
    """As many at once as fit."""
    nodes = cluster_nodes()
    for task in tasks:
        if task.trial.kind == "federated":
            preflight(task.cohort.sites, nodes, task.trial.config.engine.site)
    by_id = {task.id: task for task in tasks}
    ended: list[str] = []

    def on_round(trial: str, number: int, numbers: Mapping[str, float]) -> None:
        dice = f", validation Dice {numbers['dice']:.3f}" if "dice" in numbers else ""
        rounds = by_id[trial].trial.config.federation.rounds
        console.out.print(console.plain(f"{by_id[trial].name}: round {number} of {rounds}{dice}"))

    def on_end(end: Ended) -> None:
        _keep(_result(by_id[end.id], end), study, store)
        ended.append(end.id)
        bars("trials", len(ended), len(tasks))

    bars("trials", 0, len(tasks))
    run_trials(
        [Placed(task.id, task, bundles(task, nodes)) for task in tasks],
        run_trial,
        on_round,
        on_end,
        folder=tasks[0].trial.config.work_dir / "studies" / study.name,
        rounds=max(task.trial.config.federation.rounds for task in tasks),
        early_stop=study.early_stop,
        at_once=study.at_once,
    )


def _result(task: Task, end: Ended) -> TrialResult:
    """Of a trial that was stopped early or failed: what it had told up to then."""
    if end.result is not None:
        result: TrialResult = end.result
        return result
    number, numbers = end.told[-1] if end.told else (0, {})
    return described(task).model_copy(
        update={
            "status": "stopped" if end.stopped else "failed",
            "error": end.error,
            "rounds": number,
            "bytes_up": int(numbers.get("bytes_up", 0)),
            "bytes_down": int(numbers.get("bytes_down", 0)),
            "curve": tuple((number, numbers.get("dice")) for number, numbers in end.told),
        }
    )


def _keep(result: TrialResult, study: Study, store: Store) -> None:
    store.write_bytes(trial_key(study.name, result.id), result.model_dump_json(indent=1).encode())
    dice = result.test.get("dice")
    said = {
        "finished": "no Dice" if dice is None else f"test Dice {dice:.3f}",
        "stopped": f"stopped early after round {result.rounds}",
        "failed": f"failed: {result.error}",
    }[result.status]
    size = f", {console.size(result.bytes_total)}" if result.bytes_total else ""
    line = f"{result.group} seed {result.seed}: {said}{size}, {result.minutes:.1f} minutes"
    console.out.print(console.plain(line))


def _raise_failed(results: Sequence[TrialResult]) -> None:
    if failed := [result for result in results if result.status == "failed"]:
        named = "; ".join(f"{result.group} seed {result.seed}: {result.error}" for result in failed)
        raise TrialError(f"{len(failed)} of {len(results)} trials failed, and are run when you call again ({named})")


def show_trials(study: Study) -> None:
    """Prints the trials of a study; runs and prepares nothing."""
    rows = [(one.group, one.kind, str(one.config.seed), str(one.config.federation.rounds)) for one in trials(study)]
    console.out.print(console.table(f"study {study.name}", ("trial", "kind", "seed", "rounds"), rows))


def show(results: Sequence[TrialResult], classes: Sequence[str]) -> None:
    """Prints the table: a row a group, means over the seeds."""
    rows = [
        (
            console.plain(row.group),
            len(row.trials),
            None if row.dice is None else row.dice.mean,
            _interval(row.dice),
            *(row.per_class[name].mean if name in row.per_class else None for name in classes),
            f"{row.bytes_total / MEGABYTE:,.2f}" if row.bytes_total else None,
            row.trainable,
        )
        for row in rows_of(results)
    ]
    columns = ("", "seeds", "Dice", "95% CI", *classes, "MB a run", "trained")
    console.out.print(console.table("Dice on the test cases, means over seeds; bytes of all sites", columns, rows))
    for result in unfinished(results):
        said = f"stopped early after round {result.rounds}" if result.status == "stopped" else result.error
        console.out.print(console.plain(f"{result.group} seed {result.seed}: {said}"))


def _interval(dice: Estimate | None) -> str:
    return "" if dice is None or dice.low is None else f"{dice.low:.3f} to {dice.high:.3f}"


if __name__ == "__main__":
    main()
