"""`fedsam ablate STUDY`: many layer selections over one cohort, each a comparable MLflow run, and the table of them.

A trial is known by the hash of its configuration, the cohort and the code: what has ended is not run again, so a study
that was interrupted is simply called again. On Ray as many trials run at once as the cluster holds, each with its
driver and sites placed as a whole; with engine.kind=in-process one after the other, in this process.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from cluster.placement import cluster_nodes, preflight
from cluster.session import ray_session
from cluster.store import open_store
from cluster.tracking import Tracking
from cluster.trials import Ended, Placed, run_trials
from fedsam_core.errors import ConfigError, FedsamError
from fedsam_core.federation.engine import describe_failure
from fedsam_core.federation.preparation import PreparedSites
from fedsam_core.store import Store
from pipelines import console
from pipelines.config import Config
from pipelines.federate import check, code_hash
from pipelines.prepare import prepare_sites, prepared_location
from pipelines.results import StudyAbout, TrialResult, about_key, read_about, read_results, trial_key
from pipelines.stage import guarded
from pipelines.study import Study, Trial, load_study, studies, trials
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
    parser.add_argument(
        "--list", action="store_true", help="say which trials there are, and which have ended; run none"
    )
    options = parser.parse_intermixed_args(arguments)
    sys.exit(guarded(lambda: _command(options)))


def _command(options: argparse.Namespace) -> None:
    study = load_study(options.study, options.overrides)
    command = shlex.join(["fedsam", "ablate", options.study, *options.overrides])
    ablate(study, command, only_list=options.list)


def ablate(study: Study, command: str, only_list: bool = False) -> tuple[TrialResult, ...]:
    """Runs what is missing of a study; all its results, in the order of its trials.

    Raises:
        FedsamError: a setting, the cohort or the cluster is wrong, or a trial failed: the others have still been run.
    """
    planned = trials(study)
    base = planned[0].config
    on_ray = base.engine.kind == "ray"
    if study.early_stop is not None and not on_ray:
        raise ConfigError("early_stop needs trials that run side by side: set engine.kind=ray, or leave it out")
    for config in {
        trial.config.model_copy(update={"seed": 0}).model_dump_json(): trial.config for trial in planned
    }.values():
        check(config)
    store = results_store(base)
    with ray_session() if on_ray else nullcontext(), console.Bars() as bars:
        cohorts = _prepare([trial.config for trial in planned], bars)
        tracking = Tracking(base.tracking, base.work_dir)
        about = _about(study, planned, cohorts, command, store)
        tasks = [_task(trial, cohorts, study, about) for trial in planned]
        done = {result.id: result for result in read_results(store, study.name)}
        missing = [task for task in tasks if task.id not in done or done[task.id].status == "failed"]
        console.out.print(f"study {study.name}: {len(tasks)} trials, {len(tasks) - len(missing)} of them have ended")
        if only_list:
            _list(tasks, done)
            return ()
        if missing:
            with _parent(tracking, study, about) as parent:
                about = about.model_copy(update={"mlflow_run": parent})
                store.write_bytes(about_key(study.name), about.model_dump_json(indent=1).encode())
                run = _run_on_ray if on_ray else _run_here
                run(study, [_task(task.trial, cohorts, study, about) for task in missing], store, bars)
    results = {result.id: result for result in read_results(store, study.name)}
    ordered = tuple(results[task.id] for task in tasks if task.id in results)
    show(ordered)
    if failed := [result for result in ordered if result.status == "failed"]:
        named = "; ".join(f"{result.group} seed {result.seed}: {result.error}" for result in failed)
        raise ConfigError(
            f"{len(failed)} of {len(tasks)} trials failed and are run again when you call again ({named})"
        )
    return ordered


def results_store(config: Config) -> Store:
    """Where studies keep their results."""
    return open_store(str(config.work_dir), config.storage.s3_endpoint)


def _prepare(configs: Iterable[Config], bars: console.Bars) -> dict[str, PreparedSites]:
    """The cohort of each configuration, by its place: trials may differ in preprocessing."""
    cohorts: dict[str, PreparedSites] = {}
    for config in configs:
        if (place := prepared_location(config)) not in cohorts:
            cohorts[place] = prepare_sites(config, bars)
    return cohorts


def _task(trial: Trial, cohorts: Mapping[str, PreparedSites], study: Study, about: StudyAbout) -> Task:
    return Task(trial, cohorts[prepared_location(trial.config)], study.name, about.mlflow_run or None)


def _about(
    study: Study, planned: Sequence[Trial], cohorts: Mapping[str, PreparedSites], command: str, store: Store
) -> StudyAbout:
    """What the study is about; the MLflow run that an earlier call began goes on."""
    first = cohorts[prepared_location(planned[0].config)]
    before = read_about(store, study.name) if store.exists(about_key(study.name)) else None
    if before is not None and before.cohort_hash != first.hash:
        raise ConfigError(
            f"study {study.name} was begun with other scans or another preprocessing (cohort "
            f"{before.cohort_hash[:12]}, now {first.hash[:12]}): give the study another name"
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
        experiment=planned[0].config.tracking.experiment,
        planned=tuple(trial.id(cohorts[prepared_location(trial.config)].hash, code_hash()) for trial in planned),
    )


def _parent_tags(study: Study, about: StudyAbout) -> dict[str, str]:
    return {
        "fedsam.stage": "ablate",
        "fedsam.study": study.name,
        "fedsam.cohort_hash": about.cohort_hash,
        "fedsam.code_hash": code_hash(),
        "fedsam.synthetic": str(about.synthetic).lower(),
        "fedsam.trials": str(len(about.planned)),
    }


@contextmanager
def _parent(tracking: Tracking, study: Study, about: StudyAbout) -> Iterator[str]:
    """The MLflow run that the trials hang from."""
    if about.mlflow_run:
        yield about.mlflow_run
        return
    with tracking.start(study.name, {}, _parent_tags(study, about)) as tracker:
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


def _list(tasks: Sequence[Task], done: Mapping[str, TrialResult]) -> None:
    rows = [
        (task.trial.group, str(task.trial.config.seed), task.id, done[task.id].status if task.id in done else "missing")
        for task in tasks
    ]
    console.out.print(console.table("trials", ("trial", "seed", "id", ""), rows))


def show(results: Sequence[TrialResult]) -> None:
    """Prints the table: a row a group, means over the seeds."""


if __name__ == "__main__":
    main()
