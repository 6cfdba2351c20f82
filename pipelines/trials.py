"""One trial of a study, of whatever kind, and what it books on a cluster."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cluster.lease import Stopped
from cluster.placement import Node, plan
from cluster.sending import NAME_TAG
from cluster.site import SitePool
from cluster.trials import Tell
from fedsam_core.errors import TrialError
from fedsam_core.federation.engine import Engine, in_process
from fedsam_core.federation.preparation import PreparedSites
from fedsam_core.federation.site import SiteSpec
from fedsam_core.hashing import stable_hash
from fedsam_core.sam.backbones import manifest_for
from pipelines.baselines import centralized, local, zero_shot
from pipelines.federate import check_sites, ray_engine, run_federation, site_factory
from pipelines.parts import parts_of
from pipelines.recorder import Event, Outcome, ended_outcome
from pipelines.results import TrialResult
from pipelines.resume import FinishedRun, compared
from pipelines.sources import code_hash
from pipelines.study import Trial

# What the process of a trial books: sums and scores of others' work take a moment between rounds.
_DRIVER_CPUS = 0.001
_POOL = "sites"
_BASELINES: dict[str, Any] = {"centralized": centralized, "local": local, "zero-shot": zero_shot}


@dataclass(frozen=True)
class Task:
    """A trial and all that it needs.

    Attributes:
        trial: what to run.
        cohort: prepared as the trial's configuration says.
        study: its name.
        parent: MLflow run of the study.
    """

    trial: Trial
    cohort: PreparedSites
    study: str
    parent: str | None

    @cached_property  # a checkpoint is hashed for it
    def id(self) -> str:
        """Of the trial with this cohort and this code."""
        return self.trial.id(self.cohort.hash, code_hash())

    @property
    def tags(self) -> dict[str, str]:
        """Of its MLflow run, beside those that every run has."""
        return {
            NAME_TAG: self.name,
            "fedsam.study": self.study,
            "fedsam.trial": self.id,
            "fedsam.group": self.trial.group,
        }

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.trial.group} seed {self.trial.config.seed}"


def bundles(task: Task, nodes: tuple[Node, ...]) -> tuple[Mapping[str, float], ...]:
    """What the trial's own process and each of its actors book."""
    needs = task.trial.config.engine.site
    if task.trial.kind != "federated":  # one process that trains by itself
        gpus = needs.gpus if needs.gpus is not None else float(any(node.gpus for node in nodes))
        return ({"CPU": max(needs.cpus, _DRIVER_CPUS), "GPU": gpus},)  # Ray Train books its workers itself
    placed = plan(task.cohort.sites, nodes, needs)
    sites = ({"CPU": one.cpus, "GPU": one.gpus, **one.resources} for one in placed.values())
    return ({"CPU": _DRIVER_CPUS}, *sites)


def run_trial(task: Task, tell: Tell, kept: dict[str, Any]) -> TrialResult:
    """Runs it here: this process is the driver.

    Args:
        tell: told after each round.
        kept: holds what the next trial of this process can use: site actors.

    Raises:
        FedsamError: what is wrong, in a line.
    """
    config, cohort = task.trial.config, task.cohort
    if task.trial.kind != "federated":
        return _run_baseline(task)
    check_sites(config, cohort.sites)
    cohort = cohort.without_problems()

    def look_on(event: Event) -> None:
        if event.numbers:
            tell(event.done, event.numbers)

    def open_engine(specs: list[SiteSpec]) -> Engine:
        if config.engine.kind == "in-process":
            return in_process(specs, site_factory(config))
        return ray_engine(config, kept.setdefault(_POOL, SitePool()), specs)

    # Named by what it is: a trial that was lost with its study goes on from its last round.
    run = f"{task.study}-{task.id}-{stable_hash(compared(config.model_dump(mode='json')))[:6]}"
    try:
        named = config.model_copy(update={"run": run})
        outcome = run_federation(named, cohort, open_engine, look_on, task.parent, task.tags)
    except Stopped as why:  # by `fedsam stop`: this trial alone, which goes on when the study is called again
        raise TrialError(str(why)) from None
    except FinishedRun:  # the study was lost before it could note the result
        outcome = ended_outcome(config, run)
    return _federated(task, outcome)


def _run_baseline(task: Task) -> TrialResult:
    config = task.trial.config
    if config.engine.workers == 1:  # this process has the place that the trial has booked
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": "in-process"})})
    found = _BASELINES[task.trial.kind](config, task.cohort, lambda event: None, task.parent, task.tags)
    kept = ("trainable", "rounds", "curve", "before", "test", "cross", "minutes", "run", "mlflow_run")
    return described(task).model_copy(update={name: getattr(found, name) for name in kept})


def _federated(task: Task, outcome: Outcome) -> TrialResult:
    return described(task).model_copy(
        update={
            "trainable": outcome.trained,
            "rounds": outcome.rounds,
            "bytes_up": outcome.total_up,
            "bytes_down": outcome.total_down,
            "curve": outcome.curve,
            "before": outcome.before,
            "test": outcome.after,
            "minutes": outcome.minutes,
            "run": outcome.folder.name,
            "mlflow_run": outcome.mlflow_run,
        }
    )


def described(task: Task) -> TrialResult:
    """What is known of a trial before it runs."""
    config = task.trial.config
    lora = config.layers.lora
    manifest = manifest_for(config.model, len(task.cohort.described.classes), config.layers)
    return TrialResult(
        id=task.id,
        group=task.trial.group,
        kind=task.trial.kind,
        selection=config.layers.name,
        layers=config.layers.model_dump(mode="json"),
        parts=parts_of(manifest),
        rule=config.federation.rule,
        rank=lora.rank if lora else 0,
        bits=config.federation.bits,
        seed=config.seed,
        config_hash=config.science_hash(task.cohort.hash),
        cohort_hash=task.cohort.hash,
        code_hash=code_hash(),
    )
