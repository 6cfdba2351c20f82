"""Stage `prepare`: every site reads and checks its scans, and stores its share ready for training.

On Ray a site's scans are read on its own node, several at once; a few small ones on this machine are read here. Shares
lie in `storage.prepared`, a folder or `s3://bucket/prefix`; an interrupted preparation goes on where it was, and one
that is up to date does nothing.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial
from secrets import token_hex
from threading import Lock
from typing import Any

from cluster.gateway.aggregator import Gateway
from cluster.placement import cluster_nodes, plan, preflight
from cluster.pool import each_on_node
from cluster.session import ray_session
from cluster.site import create_sites
from cluster.store import open_store
from fedsam_core.data.cohort import Each, Progress, list_cohort
from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.errors import ConfigError, DataError, FedsamError
from fedsam_core.federation.engine import Engine, in_process
from fedsam_core.federation.preparation import (
    CohortSite,
    CohortSpec,
    PreparedSites,
    prepare_shares,
    prepared_before,
)
from fedsam_core.hashing import stable_hash
from fedsam_core.store import OpenStore
from pipelines import console, dial_in
from pipelines.config import Config
from pipelines.stage import Stage

RAY_ADDRESS = "RAY_ADDRESS"  # set in a job: work is done on the cluster, however little it is
SMALL_BYTES = 256 * 2**20


def on_ray(config: Config) -> bool:
    """Whether preparation runs on Ray: on this machine alone, processes for a few small scans take longer than they."""
    if config.engine.kind == "gateway":
        return False
    if config.engine.kind == "in-process" or RAY_ADDRESS in os.environ:
        return config.engine.kind == "ray"
    if config.cohort.source == "phantom":
        return False
    try:
        listing = list_cohort(config.cohort, config.work_dir)
    except FedsamError:
        return True  # the scans are elsewhere, or whoever reads them says what is wrong
    paths = (files.image for files in listing.cases)
    files = (file for path in paths for file in (path.iterdir() if path.is_dir() else [path]))
    return sum(file.stat().st_size for file in files) >= SMALL_BYTES


def store_opener(config: Config) -> OpenStore:
    """Opens prepared shares, wherever they are."""
    return partial(open_store, endpoint=config.storage.s3_endpoint)


def prepared_location(config: Config) -> str:
    """Where the prepared shares of this configuration lie: another cohort or preprocessing has another place."""
    cohort = config.cohort.model_dump(mode="json", exclude={"strict"})
    key = stable_hash([cohort, config.preprocess.model_dump(mode="json")])
    root = config.storage.prepared or str(config.work_dir / "cohorts")
    return f"{root.rstrip('/')}/{config.cohort.name}-{key[:10]}"


def site_names(config: Config, progress: Progress | None = None) -> tuple[str, ...]:
    """The sites of the cohort: those that the configuration names, else those of the layout.

    Raises:
        DataError: the layout cannot be read, or no case in it can be used.
    """
    if config.cohort.sites is not None:
        return tuple(sorted(config.cohort.sites))
    listing = list_cohort(config.cohort, config.work_dir, progress)
    if not listing.cases:
        first = next((problem.reason for problem in listing.problems), "it is empty")
        raise DataError(f"{config.cohort.path}: no case can be used ({first})")
    return tuple(sorted({files.site for files in listing.cases}))


def prepare_sites(config: Config, progress: Progress | None = None, gateway: Gateway | None = None) -> PreparedSites:
    """Has every site prepare its share; with Ray, within a `ray_session`; over a gateway, if one is given.

    Raises:
        FedsamError: naming the file, row or site that is wrong, and the fix.
    """
    location = prepared_location(config)
    if config.engine.kind == "gateway":
        if gateway is None:
            raise ConfigError("engine.kind=gateway is for prepare and federate: set engine.kind=ray, or in-process")
        specs = cohort_specs(config, gateway.sites, location)
        with closing(dial_in.preparing_engine(gateway, location, specs)) as engine:
            return prepare_shares(engine, specs, progress)
    store = store_opener(config)(location)  # an address that is none is an error now
    if location.startswith("s3://"):
        store.check()  # before hours are spent on what cannot be kept
    sites = site_names(config, progress)
    specs = cohort_specs(config, sites, location)
    # From here the sites' disks are seen, unless they are other machines'.
    here = not on_ray(config) or location.startswith("s3://") or len(cluster_nodes()) == 1
    if here and (before := prepared_before([CohortSite(spec, store_opener(config)) for spec in specs])) is not None:
        return before
    with _engine(config, sites, specs) as engine:
        return prepare_shares(engine, specs, progress)


def prepared_cohort(config: Config, progress: Progress | None = None) -> PreparedCohort:
    """All shares as one cohort, for work on them in this process; prepared here if they are not there yet."""
    here = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": "in-process"})})
    prepared = prepare_sites(here, progress)
    opener = store_opener(config)
    return PreparedCohort.open(*(opener(share["url"]) for _, share in sorted(prepared.shares.items())))


def cohort_specs(config: Config, sites: Sequence[str], location: str) -> list[CohortSpec]:
    """What each site is told."""
    # The random end keeps two preparations apart: a site enters no attempt of a run twice.
    run = f"{config.name}-prepare-{datetime.now(UTC):%Y%m%d-%H%M%S}-{token_hex(3)}"
    return [
        CohortSpec(
            run=run,
            site=site,
            sites=tuple(sites),
            seed=config.seed,
            federation=config.federation,
            cohort=config.cohort,
            preprocess=config.preprocess,
            work_dir=config.work_dir,
            prepared=location,
        )
        for site in sites
    ]


@contextmanager
def _engine(config: Config, sites: Sequence[str], specs: Sequence[CohortSpec]) -> Iterator[Engine]:
    factory: Any = partial(CohortSite, open_store=store_opener(config))
    engine: Engine
    if not on_ray(config):
        engine = in_process(specs, partial(factory, each=_one_at_a_time(Lock())))
    else:
        # The actors only wait for their tasks, which book the CPUs; but a node without any is no place for them.
        needs = config.engine.site.model_copy(update={"cpus": 0.001, "gpus": 0.0})
        nodes = cluster_nodes()
        preflight(sites, nodes, needs)
        engine = create_sites(specs, plan(sites, nodes, needs), partial(factory, each=each_on_node))
    try:
        yield engine
    finally:
        engine.close()


def _one_at_a_time(lock: Lock) -> Each:
    """`map`, for sites that share a process and its memory: of all of them one scan is held at a time."""

    def each(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        for item in items:
            with lock:
                result = work(item)
            yield result

    return each


def run(config: Config) -> None:
    """Prepares the cohort and prints what is in it."""
    with (
        ray_session() if on_ray(config) else nullcontext(),
        dial_in.gateway_session(config) as gateway,
        console.Bars() as bars,
    ):
        prepared = prepare_sites(config, bars, gateway)
    show(prepared, prepared_location(config))


def show(prepared: PreparedSites, location: str) -> None:
    """Prints sites, splits, what was left out, and where the prepared cohort is."""
    cohort = prepared.described
    left_out = [problem for problem in cohort.problems if problem.quarantined]
    rows = [
        (
            site,
            *(share["cases"][split] for split in ("train", "val", "test")),
            sum(problem.site == site for problem in left_out),
            " x ".join(f"{size:g}" for size in (round(s, 3) for s in share["spacing"])),
        )
        for site, share in prepared.shares.items()
    ]
    note = " (synthetic: made by a program, no patient)" if cohort.synthetic else ""
    count = sum(sum(share["cases"].values()) for share in prepared.shares.values())
    title = f"cohort {cohort.name}{note}: {count} cases, classes {', '.join(cohort.classes)}"
    columns = ("site", "train", "val", "test", "left out", "median spacing, mm")
    console.out.print(console.table(title, columns, rows))
    for problem in cohort.problems:
        name = f"{problem.case}: " if problem.case else ""
        what = "left out" if problem.quarantined else "warning"
        console.out.print(console.plain(f"{what}: {name}{problem.reason}"))
    window = prepared.config.ct_window
    if cohort.modality == "ct" and window != "auto":
        console.out.print(f"{prepared.config.slice_axis} slices, HU {window[0]:g} to {window[1]:g} become 0 to 1")
    console.out.print(f"prepared in {location}")


STAGE = Stage("prepare", __doc__ or "", run)

if __name__ == "__main__":
    STAGE.main()
