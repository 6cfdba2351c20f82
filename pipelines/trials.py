"""One trial of a study, of whatever kind, and what it books on a cluster."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.placement import Node, plan
from cluster.site import SitePool
from cluster.trials import Tell
from fedsam_core.federation.engine import Engine, in_process
from fedsam_core.federation.preparation import PreparedSites
from fedsam_core.federation.site import SiteSpec
from pipelines.federate import check_sites, code_hash, ray_engine, run_federation, site_factory
from pipelines.recorder import Event, Outcome
from pipelines.results import TrialResult
from pipelines.study import Trial

# What the process of a trial books: sums and scores of others' work take a moment between rounds.
_DRIVER_CPUS = 0.001
_POOL = "sites"


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

    @property
    def id(self) -> str:
        """Of the trial with this cohort and this code."""
        return self.trial.id(self.cohort.hash, code_hash())

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.trial.group} seed {self.trial.config.seed}"


def bundles(task: Task, nodes: tuple[Node, ...]) -> tuple[Mapping[str, float], ...]:
    """What the trial's own process and each of its actors book."""
    needs = task.trial.config.engine.site
    if task.trial.kind != "federated":  # one process that trains by itself
        gpus = needs.gpus if needs.gpus is not None else float(any(node.gpus for node in nodes))
        return ({"CPU": max(needs.cpus, _DRIVER_CPUS), "GPU": gpus},)
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
    check_sites(config, cohort.sites)
    cohort = replace(cohort, described=cohort.described.model_copy(update={"problems": ()}))

    def look_on(event: Event) -> None:
        if event.numbers:
            tell(event.done, event.numbers)

    def open_engine(specs: list[SiteSpec]) -> Engine:
        if config.engine.kind == "in-process":
            return in_process(specs, site_factory(config))
        return ray_engine(config, kept.setdefault(_POOL, SitePool()), specs)

    tags = {"fedsam.study": task.study, "fedsam.trial": task.id, "fedsam.group": task.trial.group}
    outcome = run_federation(config, cohort, open_engine, look_on, task.parent, tags)
    return result_of(task, outcome)


def result_of(task: Task, outcome: Outcome) -> TrialResult:
    """What a trial that came to its end gave."""
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
        }
    )


def described(task: Task) -> TrialResult:
    """What is known of a trial before it runs."""
    config = task.trial.config
    lora = config.layers.lora
    return TrialResult(
        id=task.id,
        group=task.trial.group,
        kind=task.trial.kind,
        selection=config.layers.name,
        rule=config.federation.rule,
        rank=lora.rank if lora else 0,
        bits=config.federation.bits,
        seed=config.seed,
        config_hash=config.science_hash(task.cohort.hash),
        cohort_hash=task.cohort.hash,
        code_hash=code_hash(),
    )
