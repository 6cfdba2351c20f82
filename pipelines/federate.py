"""Stage `federate`: sites train adapter layers in rounds; only the masked sum of their updates is ever opened."""

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from secrets import token_hex
from types import MappingProxyType
from typing import Any

import fedsam_core
from cluster.driver import drive
from cluster.gateway.aggregator import Gateway
from cluster.lease import Lease, Stopped, release
from cluster.metrics import RoundMetrics
from cluster.placement import cluster_nodes, plan, preflight
from cluster.session import ray_session
from cluster.site import SitePool, create_sites
from cluster.tracking import RunTracker, Tracking
from fedsam_core import logs
from fedsam_core.errors import ClusterError, ConfigError, StoreError
from fedsam_core.federation.engine import Engine, OnAnswer, describe_failure, in_process
from fedsam_core.federation.groups import tensor_groups
from fedsam_core.federation.lora_rules import lora_layers, summed_kinds
from fedsam_core.federation.preparation import PreparedSites, share_at
from fedsam_core.federation.rounds import Federation, RoundReport, State, run_rounds
from fedsam_core.federation.site import FederatedSite, SiteSpec
from fedsam_core.federation.state import GlobalState, weights_hash
from fedsam_core.hashing import derive_seed
from fedsam_core.sam.adapters import adapt, shared_state
from fedsam_core.sam.backbones import build_segmenter
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.secagg.attempt import SMALLEST_PRIVATE_SUM, default_threshold
from fedsam_core.secagg.keyfiles import read_roster
from fedsam_core.selection import ParameterManifest
from pipelines import console, dial_in
from pipelines.checkpoints import remove_checkpoints
from pipelines.commits import RunCommits, check_results, results_store
from pipelines.config import Config, flat_settings
from pipelines.prepare import prepare_sites, prepared_location, store_opener
from pipelines.recorder import Emit, Event, Outcome, Recorder, dice_rows
from pipelines.resume import begin, left_off
from pipelines.run_folder import RunFolder
from pipelines.sources import code_files, code_hash
from pipelines.stage import Stage, interrupt

_LEASE_PATIENCE_SECONDS = 5.0  # a store that is away for longer is asked again with the next beat

OnRound = Callable[[RoundReport, GlobalState], None]
OpenEngine = Callable[[list[SiteSpec]], Engine]


def run(config: Config) -> None:
    """Runs the federation and prints what came of it."""
    check(config)
    with (
        ray_session() if config.engine.kind == "ray" else nullcontext(),
        dial_in.gateway_session(config) as gateway,
        console.Bars() as bars,
    ):
        cohort = prepare_sites(config, bars, gateway)
        if left_out := sum(problem.quarantined for problem in cohort.described.problems):
            console.out.print(f"{left_out} cases were left out: `fedsam prepare` with the same settings says why")
        outcome = federate(config, cohort, partial(_print, bars), gateway)
    show(outcome)


def check(config: Config) -> None:
    """Finds what would only fail hours later, before a scan is read; `fedsam doctor` looks at more.

    Raises:
        FedsamError: names the key and the fix.
    """
    check_settings(config)
    check_weights(config)
    roster_tag(config)  # a roster that cannot be read
    open_tracking(config).check()
    if config.storage.results is not None:
        check_results(results_store(config))


def check_weights(config: Config) -> None:
    """Finds out whether the model's weights are there. Raises FedsamError."""
    file = config.model.weights_file
    if file is not None and not file.is_file():
        raise ConfigError(f"model.checkpoint: no file {file}")


def check_settings(config: Config) -> None:
    """Finds settings that do not go together. Raises ConfigError."""
    if config.federation.scaffold and config.learning.keep_optimizer:
        raise ConfigError("federation.scaffold corrects each round anew: set learning.keep_optimizer=false")
    if config.layers.lora is None and (config.federation.rule != "factors" or config.federation.site_ranks):
        raise ConfigError(
            f"selection {config.layers.name} has no LoRA, which federation.rule={config.federation.rule} and "
            "federation.site_ranks are about: set rule=factors, or give the selection lora"
        )


def check_sites(config: Config, sites: Sequence[str]) -> None:
    """Finds out whether these sites can make a federation.

    Raises:
        FedsamError: they are too few for a secure sum, or the configuration or the roster does not fit them.
    """
    if len(sites) < SMALLEST_PRIVATE_SUM and config.federation.secure_sum == "masked":
        raise ConfigError(
            f"cohort {config.cohort.name} has {len(sites)} sites, but a secure sum needs at least "
            f"{SMALLEST_PRIVATE_SUM} sites, as a sum of two shows each the other's update: add a site, or set "
            "federation.secure_sum=plain"
        )
    if unknown := sorted(set(config.federation.site_ranks) - set(sites)):
        raise ConfigError(
            f"federation.site_ranks names {unknown[0]}, which is no site of cohort {config.cohort.name}: its sites are "
            f"{', '.join(sites)}"
        )
    if (config.federation.min_sites or 0) > len(sites):
        raise ConfigError(
            f"federation.min_sites={config.federation.min_sites}, but cohort {config.cohort.name} has {len(sites)} "
            "sites: no round would ever have enough; set it to fewer"
        )
    if config.federation.roster is not None:
        roster = read_roster(config.federation.roster)
        for site in sites:
            roster.key(site)  # a site that it does not list is an error now, not when all models are loaded


def federate(config: Config, cohort: PreparedSites, emit: Emit, gateway: Gateway | None = None) -> Outcome:
    """Runs a federation on the configured engine; with Ray, within a `ray_session`; over a gateway, if one is given.

    Raises:
        FedsamError: what is wrong, in one line; nothing half-written is left under a final name.
    """
    check_sites(config, cohort.sites)
    # The driver is told names and hashes; which cases there are, and how many slices, stays with the sites.
    cohort = cohort.without_problems()
    if gateway is not None:
        return run_federation(config, cohort, partial(dial_in.run_engine, gateway, config), emit)
    if config.engine.kind == "in-process":
        here = partial(in_process, factory=site_factory(config))
        return run_federation(config, cohort, here, _interrupting(emit))
    preflight(cohort.sites, cluster_nodes(), config.engine.site)
    tracked: list[str] = []
    held: dict[str, int] = {}

    def look_on(event: Event) -> None:
        tracked.extend(filter(None, [event.tracked]))
        held.update({event.run: event.lease} if event.lease else {})
        if event.halt is not None:
            raise event.halt  # ends the driver, and the sites with it
        emit(event)

    try:
        result: Outcome | Stopped = drive(partial(_in_actor, config, cohort), look_on)
        if isinstance(result, Stopped):
            raise result
    except (KeyboardInterrupt, SystemExit, ClusterError) as error:
        # The driver is gone: it can neither give its lease back nor close its MLflow run itself.
        for run, lease in held.items():
            with suppress(StoreError):
                release(results_store(config), run, lease)
        for run_id in tracked:
            open_tracking(config).end(run_id, "KILLED", describe_failure(error))
        raise
    return result


def _in_actor(config: Config, cohort: PreparedSites, emit: Emit) -> Outcome | Stopped:
    """The run in a driver actor. That it was stopped comes back as a value: what is raised, Ray takes for a task that
    somebody cancelled."""
    try:
        return run_federation(config, cohort, partial(ray_engine, config, None), emit)
    except Stopped as why:
        return why


def _interrupting(emit: Emit) -> Emit:
    """For a run in this process: what halts it interrupts it, wherever it is. In another thread than the main one it is
    noticed before sites are asked for anything."""
    whole = threading.current_thread() is threading.main_thread()

    def look_on(event: Event) -> None:
        if event.halt is None:
            emit(event)
        elif whole:
            interrupt()

    return look_on


def run_federation(
    config: Config,
    about: PreparedSites,
    open_engine: OpenEngine,
    emit: Emit,
    parent: str | None = None,
    more_tags: Mapping[str, str] = MappingProxyType({}),
) -> Outcome:
    """The run itself: wherever this executes is the driver. `parent` is the MLflow run of the study it belongs to.

    A run that was begun before goes on from the last round that it finished.

    Raises:
        FinishedRun: it has come to its end.
        LeaseHeld: another driver is at work on it.
        Stopped: somebody asked it to end.
        FedsamError: what is wrong, in a line.
    """
    cohort = about.described
    segmenter, manifest, state = initial_model(config, len(cohort.classes))
    check_ranks(config, manifest, about.sites)
    config_hash = config.science_hash(about.hash)
    # The random end keeps two runs apart that start in the same second.
    run_id = config.run or f"{config.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{config_hash[:6]}-{token_hex(2)}"
    logs.about(run=run_id)
    begun = begin(config, run_id, about, code_files())
    with _leased(config, run_id, emit) as lease:
        folder = RunFolder(config.work_dir / "runs" / run_id)
        left = left_off(config, folder, lambda line: emit(Event(line)))
        size = f"{len(about.sites)} sites, {config.layers.name}, {manifest.trainable:,} values trained"
        after = "" if left is None else f"; it goes on after round {left.checkpoint.round}"
        emit(Event(f"run {run_id}: {size}{after}"))
        specs = site_specs(config, about.sites, run_id, config_hash)
        engine = _Fenced(open_engine(specs), lease)
        try:
            origin = {"cohort_hash": about.hash, "code_hash": code_hash()}
            frozen = weights_hash(segmenter, manifest)
            federation = Federation(engine, specs[0], manifest, len(cohort.classes), frozen, origin)
            federation.open(state, *(() if left is None else (left.checkpoint, left.record)))
            devices = ", ".join(sorted({site["device"] for site in federation.sites.values()}))
            emit(Event(f"sites are open on {devices}; sums are {config.federation.secure_sum}"))
            for site in federation.forgetful:
                emit(Event(f"site {site} has lost what it kept of the rounds before, and goes on without"))
            tags = {
                **more_tags,
                **run_tags(config, about, manifest, segmenter, config_hash),
                "fedsam.run": run_id,
                "fedsam.device": devices,
                "fedsam.precision": next(site["precision"] for site in federation.sites.values()),
            }
            tracking = open_tracking(config)
            settled = config.model_copy(update={"preprocess": about.config})  # what a cohort left open, by its value
            with (
                tracking.start(run_id, run_params(settled), tags, parent, begun.tracking) as tracker,
                _left_to_others(tracker, lease),
            ):
                emit(Event(f"recorded in MLflow experiment {config.tracking.experiment}", tracked=tracker.run_id))
                lines = 0 if left is None else len(left.record)
                kept = config.storage.results is not None
                commits = RunCommits(results_store(config), folder.path, run_id, lines) if kept else None
                recorder = Recorder(
                    config, cohort, federation, folder, tracker, emit, about.config, commits, lease.look
                )
                try:
                    if left is None:
                        recorder.begin(federation.score("test", 0), federation.score("val", 0))
                    else:
                        recorder.go_on(left)
                    run_rounds(federation, _in_turn(recorder.after_round, RoundMetrics(run_id)))
                    rounds = config.federation.rounds
                    final = federation.score("test", rounds, pictures=True)
                    has_own = bool(config.federation.personal_steps or config.layers.local)
                    personal = federation.score("test", rounds, personal=True) if has_own else None
                    outcome = recorder.finish(segmenter, final, personal, tracking.ui_command())
                    if config.tracking.register_as is not None:
                        about_it = {"fedsam.selection": config.layers.name, "fedsam.dice": str(outcome.after["dice"])}
                        tracker.log_model(config.tracking.register_as, folder.path / "adapter", tags | about_it)
                finally:
                    if not lease.is_lost:
                        recorder.keep_record()  # of what failed, too
        finally:
            engine.close()
        remove_checkpoints(folder.path)  # from now on there is nothing to resume
        return outcome


@contextmanager
def _leased(config: Config, run: str, emit: Emit) -> Iterator[Lease]:
    """This process drives the run, and no other."""
    lease = Lease.take(results_store(config, _LEASE_PATIENCE_SECONDS), run)
    try:
        emit(Event(f"driver: process {os.getpid()} on {socket.gethostname()}", run=run, lease=lease.number))
        lease.renew(lambda why: emit(Event(str(why), halt=why)))
        yield lease
    except KeyboardInterrupt:
        lease.look()  # says why, where it was not somebody at this terminal
        raise
    finally:
        lease.release()


@contextmanager
def _left_to_others(tracker: RunTracker, lease: Lease) -> Iterator[None]:
    """What becomes of the MLflow run is for another driver to say, once that has the run."""
    try:
        yield
    finally:
        if lease.is_lost:
            tracker.leave()


class _Fenced:
    """An engine that asks sites nothing more once this driver has lost the run, or is to end."""

    def __init__(self, engine: Engine, lease: Lease) -> None:
        self._engine = engine
        self._lease = lease
        self.share, self.close = engine.share, engine.close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def sites(self) -> tuple[str, ...]:
        return self._engine.sites

    def call(
        self,
        method: str,
        args: Mapping[str, Mapping[str, Any]],
        deadline: float,
        on_answer: OnAnswer | None = None,
    ) -> tuple[dict[str, Any], dict[str, str]]:
        self._lease.check()
        return self._engine.call(method, args, deadline, on_answer)

    def poll(
        self, method: str, args: Mapping[str, Mapping[str, Any]], seconds: float
    ) -> tuple[dict[str, Any], dict[str, str]]:
        self._lease.check()
        return self._engine.poll(method, args, seconds)


def _in_turn(record: OnRound, tell: RoundMetrics) -> OnRound:
    """What is called after a round: it is kept first, and then told of."""

    def after_round(report: RoundReport, state: GlobalState) -> None:
        record(report, state)
        tell(report)

    return after_round


def open_tracking(config: Config) -> Tracking:
    """Where MLflow runs go; nothing is contacted yet."""
    return Tracking(config.tracking, config.work_dir, config.storage.s3_endpoint)


def check_ranks(config: Config, manifest: ParameterManifest, sites: Sequence[str]) -> None:
    """Finds ranks by site that change nothing, or that leave components to too few sites to be summed, once as many are
    lost as a round may lose.

    Raises:
        ConfigError: names the key and the fix.
    """
    federation = config.federation
    full = max((layer.rank for layer in lora_layers(manifest)), default=0)
    for site, rank in sorted(federation.site_ranks.items()):
        if rank > full:
            raise ConfigError(
                f"federation.site_ranks gives {site} rank {rank}, but the selection has at most {full}: give fewer, or "
                "leave the site out"
            )
    kinds = summed_kinds(federation, 1) | summed_kinds(federation, 2)
    fewest = max(default_threshold(len(sites)), federation.min_contributors, federation.min_sites or 0)
    spare = max(0, len(sites) - fewest)
    for name, group in tensor_groups(manifest, kinds, sites, federation.site_ranks).items():
        if group.sites is not None and len(group.sites) < federation.min_contributors:
            raise ConfigError(
                f"federation.site_ranks leaves {name} to {len(group.sites)} sites, but a sum is opened over at least "
                f"{federation.min_contributors}: give more sites that rank, lower the selection's rank, or set "
                "federation.rule=product-sketch"
            )
        if group.sites is not None and len(group.sites) < federation.min_contributors + spare:
            raise ConfigError(
                f"federation.site_ranks leaves {name} to {len(group.sites)} sites; a round may lose {spare} of all "
                f"{len(sites)}, and with them this run, as fewer than {federation.min_contributors} would be left to "
                "it: give more sites that rank, set federation.rule=product-sketch, or "
                f"federation.min_sites={len(sites)} where rounds are to wait for every site"
            )


def initial_model(config: Config, classes: int) -> tuple[SamSegmenter, ParameterManifest, State]:
    """The model as every site builds it, its manifest, and the global state before the first round."""
    segmenter = build_segmenter(config.model, classes, config.layers, seed=derive_seed(config.seed, "model"))
    manifest = adapt(segmenter, config.layers)
    return segmenter, manifest, shared_state(segmenter, manifest)


def site_specs(config: Config, sites: Sequence[str], run_id: str, config_hash: str) -> list[SiteSpec]:
    """What each site is told."""
    return [
        SiteSpec(
            run=run_id,
            site=site,
            sites=tuple(sites),
            seed=config.seed,
            config_hash=config_hash,
            cohort=share_at(prepared_location(config), site),
            model=config.model,
            selection=config.layers,
            slices=config.slices,
            learning=config.learning,
            federation=config.federation,
            inference_batch=config.evaluation.batch_size,
        )
        for site in sites
    ]


_NO_PARAMS = {"work_dir", "run", "storage", "tracking", "engine", "cohort", "selection", "rank"}


def run_params(config: Config) -> dict[str, Any]:
    """Flat parameters of an MLflow run; the same names for every run, so that runs compare."""
    lora = config.layers.lora
    return {
        **flat_settings(config, exclude=_NO_PARAMS),
        "selection": config.layers.name,
        **flat_settings(config.layers, "selection.", exclude={"name"}),
        "rank": lora.rank if lora else 0,
        "cohort": config.cohort.name,
        "engine": config.engine.kind,
    }


def run_tags(
    config: Config, about: PreparedSites, manifest: ParameterManifest, segmenter: SamSegmenter, config_hash: str
) -> dict[str, str]:
    """Tags of an MLflow run: what it was made from, by hash, and what a reader must know to judge it."""
    return {
        "fedsam.stage": "federate",
        "fedsam.version": fedsam_core.__version__,
        "fedsam.config_hash": config_hash,
        "fedsam.layout_hash": manifest.layout_hash,
        "fedsam.cohort_hash": about.hash,
        "fedsam.code_hash": code_hash(),
        "fedsam.trainable": str(manifest.trainable),
        "fedsam.secure_sum": config.federation.secure_sum,
        "fedsam.roster": roster_tag(config),
        "fedsam.synthetic": str(about.described.synthetic).lower(),
        "fedsam.weights": segmenter.weights,
    }


def roster_tag(config: Config) -> str:
    """Whose keys the run trusts. Those of a development roster are collected by the driver: nobody vouches for them."""
    path = config.federation.roster
    return "development" if path is None else f"pinned {read_roster(path).hash}"


def show(outcome: Outcome) -> None:
    """Prints the closing table and where everything is."""
    rows = dice_rows(outcome.before, outcome.after)
    console.out.print(console.table("Dice on the test cases, in the scans' own grid", ("", "before", "after"), rows))
    if outcome.personal:
        own = [(f"site {site}", group["dice"]) for site, group in sorted(outcome.personal["per_site"].items())]
        own.append(("all sites", outcome.personal["dice"]))
        console.out.print(console.table("Dice of each site's own model, which stays at the site", ("", "own"), own))
    if outcome.epsilon is not None:
        console.out.print(f"differential privacy of the updates: epsilon {outcome.epsilon:.3g}")
    up, down = console.size(outcome.bytes_up), console.size(outcome.bytes_down)
    console.out.print(f"bytes a round, all sites: {up} up, {down} down ({outcome.trained:,} values trained)")
    console.out.print(f"{outcome.rounds} rounds in {outcome.minutes:.1f} minutes")
    console.out.print(
        f"run folder: {outcome.folder}\npictures:   {outcome.folder / 'pictures'}\n"
        f"verify:     fedsam verify {outcome.folder}\nMLflow UI:  {outcome.ui}"
    )


def _print(bars: console.Bars, event: Event) -> None:
    logs.about(**({"run": event.run} if event.run else {}), **({"round": event.done} if event.total else {}))
    console.out.print(event.text)
    if event.total:
        bars("rounds", event.done, event.total)


def ray_engine(config: Config, pool: SitePool | None, specs: Sequence[SiteSpec]) -> Engine:
    """The sites as Ray actors; those of `pool`, if it has them."""
    placed = plan([spec.site for spec in specs], cluster_nodes(), config.engine.site)
    return create_sites(specs, placed, site_factory(config), pool=pool)


def site_factory(config: Config) -> Callable[[SiteSpec], FederatedSite]:
    return partial(FederatedSite, open_store=store_opener(config))


STAGE = Stage("federate", __doc__ or "", run)

if __name__ == "__main__":
    STAGE.main()
