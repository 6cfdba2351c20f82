"""The same federation on both engines: global states bit-equal after every round, and again when repeated."""

import pytest
from support.federations import run_small, small_cohort, small_federation, small_specs

from cluster.engine import RayEngine
from cluster.placement import SiteNeeds, cluster_nodes, plan, preflight
from cluster.site import create_sites
from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.errors import RoundError
from fedsam_core.federation.engine import in_process
from fedsam_core.federation.site import FederatedSite, SiteSpec


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedCohort:
    return small_cohort(tmp_path_factory.mktemp("cohort"))


def ray_engine(specs: list[SiteSpec]) -> RayEngine:
    sites = [spec.site for spec in specs]
    needs = SiteNeeds(cpus=0.5)
    preflight(sites, cluster_nodes(), needs)
    return create_sites(specs, plan(sites, cluster_nodes(), needs), FederatedSite)


def test_engines_agree_bit_for_bit_and_runs_repeat(ray_cluster: tuple[str, ...], prepared: PreparedCohort) -> None:
    specs = small_specs(prepared)
    assert tuple(spec.site for spec in specs) == ray_cluster  # each site on the node that is its own
    inside, state, scores = run_small(in_process(specs, FederatedSite), specs[0])
    for _ in range(2):
        engine = ray_engine(specs)
        try:
            across, remote_state, remote_scores = run_small(engine, specs[0])
        finally:
            engine.close()
        assert [report.state_hash for report in across] == [report.state_hash for report in inside]
        assert all((remote_state[name] == value).all() for name, value in state.items())
        assert remote_scores.by_site == scores.by_site
        assert remote_scores.dice == scores.dice
        assert [report.bytes_up for report in across] == [report.bytes_up for report in inside]


def test_what_is_wrong_at_a_site_reaches_the_driver_in_a_line(
    ray_cluster: tuple[str, ...], prepared: PreparedCohort
) -> None:
    specs = small_specs(prepared)
    specs[1] = specs[1].model_copy(update={"cohort": f"{prepared.url}/gone"})
    engine = ray_engine(specs)
    try:
        with pytest.raises(RoundError, match=r"site site-b cannot take part: .*gone: no prepared cohort here"):
            small_federation(engine, specs[0])
    finally:
        engine.close()
