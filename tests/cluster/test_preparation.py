"""Preparation on a cluster of several nodes, into an S3 bucket, and a federation that trains from it."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import cloudpickle
from support.federations import run_small, small_specs

from cluster.placement import SiteNeeds, cluster_nodes, plan, preflight
from cluster.pool import each_on_node
from cluster.site import create_sites
from cluster.store import open_store
from fedsam_core.data.cohort import CohortConfig, list_cohort
from fedsam_core.data.preprocess import PreparedCohort, PreprocessConfig
from fedsam_core.data.sources.phantom import PhantomConfig
from fedsam_core.errors import ClusterError, DataError
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.engine import Engine, in_process
from fedsam_core.federation.preparation import CohortSite, CohortSpec, PreparedSites, prepare_shares, share_at
from fedsam_core.federation.site import FederatedSite
from fedsam_core.store import OpenStore

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

COHORT = CohortConfig(
    name="phantom",
    source="phantom",
    phantom=PhantomConfig(sites=3, cases_per_site=5, test_per_site=1, shape=(10, 32, 32)),
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    list_cohort(COHORT, folder)  # draws the scans
    return folder


def specs_of(work: Path, prepared: str, run: str) -> list[CohortSpec]:
    sites = ("site-a", "site-b", "site-c")
    return [
        CohortSpec(
            run=run,
            site=site,
            sites=sites,
            seed=0,
            federation=FederationConfig(),
            cohort=COHORT,
            preprocess=PreprocessConfig(ct_window="auto"),
            work_dir=work,
            prepared=prepared,
        )
        for site in sites
    ]


def here(specs: list[CohortSpec], opener: OpenStore) -> Engine:
    return in_process(specs, partial(CohortSite, open_store=opener))


def on_ray(specs: list[CohortSpec], opener: OpenStore, progress: Any = None) -> PreparedSites:
    needs, nodes = SiteNeeds(cpus=0), cluster_nodes()
    sites = [spec.site for spec in specs]
    preflight(sites, nodes, needs)
    factory: Callable[..., Any] = partial(CohortSite, open_store=opener, each=each_on_node)
    engine = create_sites(specs, plan(sites, nodes, needs), factory)
    try:
        return prepare_shares(engine, specs, progress)
    finally:
        engine.close()


def test_a_cohort_in_a_bucket_is_the_one_in_a_folder(
    ray_cluster: tuple[str, ...], s3_server: Any, work: Path, tmp_path: Path
) -> None:
    """Prepared on three nodes into S3, and in this process into a folder: the same voxels, hashes and global states."""
    opener: OpenStore = partial(open_store, endpoint=s3_server.endpoint)
    bucket = f"s3://{s3_server.bucket}/cohorts/phantom"
    steps: list[tuple[str, int, int]] = []
    across = on_ray(specs_of(work, bucket, "across"), opener, lambda *step: steps.append(step))
    folder = specs_of(work, str(tmp_path / "prepared"), "inside")
    inside = prepare_shares(here(folder, opener), folder)
    assert ("prepare", 15, 15) in steps
    assert (across.hash, across.config, across.sites) == (inside.hash, inside.config, inside.sites)
    shares = {
        kind: PreparedCohort.open(*(opener(share["url"]) for share in sites.shares.values()))
        for kind, sites in (("s3", across), ("folder", inside))
    }
    for case in shares["folder"].cohort.cases:
        one, other = shares["s3"].load(case.id), shares["folder"].load(case.id)
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.label, other.label)

    states = []
    for prepared, place in ((shares["s3"], bucket), (shares["folder"], str(tmp_path / "prepared"))):
        told = small_specs(prepared, rounds=1, site_dir=tmp_path / "own")  # a bucket is no place for what stays here
        specs = [spec.model_copy(update={"cohort": share_at(place, spec.site)}) for spec in told]
        reports, _, _ = run_small(in_process(specs, partial(FederatedSite, open_store=opener)), specs[0])
        states.append([report.state_hash for report in reports])
    assert states[0] == states[1]

    # A second preparation touches nothing; a damaged object is noticed on reading, and made anew once it is removed.
    again = specs_of(work, bucket, "again")
    assert prepare_shares(here(again, opener), again, lambda *step: pytest.fail("worked")) == across
    store = opener(share_at(bucket, "site-b"))
    key = next(key for key in store.list("cases/") if "b01" in key)
    data = store.read_bytes(key)
    store.write_bytes(key, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=r"b01.*the prepared case is damaged.*run prepare again"):
        shares["s3"].load("phantom_b01")
    store.delete(key)
    prepare_shares(here(again, opener), again)
    PreparedCohort.open(store).load("phantom_b01")


def test_a_store_that_is_away_is_named(s3_server: Any, free_port: int, work: Path) -> None:
    opener: OpenStore = partial(open_store, endpoint=f"http://127.0.0.1:{free_port}", patience=0)
    specs = specs_of(work, "s3://nowhere/prepared", "away")
    with pytest.raises(DataError, match=r"site site-. cannot be prepared: s3://nowhere/.*cannot be reached"):
        prepare_shares(here(specs, opener), specs)


def _whereabouts(item: int) -> tuple[int, str]:
    return item, ray.get_runtime_context().get_node_id()


def _fails(item: int) -> int:
    if item == 2:
        raise DataError("scan 2 is torn")
    return item


def _dies(item: int) -> int:
    raise SystemExit(item)


class _Sited:
    """As a site's actor: it holds a sliver of the CPU of its node, which has only one."""

    def work(self) -> list[int]:
        return list(each_on_node(abs, [-1, -2, -3]))


def test_a_node_with_a_single_cpu_prepares_beside_its_site(ray_cluster: tuple[str, ...]) -> None:
    placed: Any = {"num_cpus": 0.001, "resources": {f"site_{ray_cluster[0]}": 0.001}}
    actor: Any = ray.remote(_Sited).options(**placed).remote()
    assert ray.get(actor.work.remote(), timeout=60) == [1, 2, 3]
    ray.kill(actor)


def test_tasks_stay_on_their_node_keep_order_and_pass_errors_on(ray_cluster: tuple[str, ...]) -> None:
    here = ray.get_runtime_context().get_node_id()
    assert list(each_on_node(_whereabouts, range(5))) == [(item, here) for item in range(5)]
    with pytest.raises(DataError, match=r"^scan 2 is torn$"):
        list(each_on_node(_fails, range(4)))
    with pytest.raises(ClusterError, match="a task of preparation died"):
        list(each_on_node(_dies, [1]))
