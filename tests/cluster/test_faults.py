"""Real processes and nodes are killed, stopped and cut off: no round is lost, every sum is the survivors'."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.fault_table import SURVIVORS, Row, note
from support.faults import Fault, FaultySite
from support.toys import Oracle, toy_federation, toy_specs

from cluster.placement import SiteNeeds, cluster_nodes, plan
from cluster.site import create_sites

pytestmark = pytest.mark.faults

SITES = tuple(f"site-{number:03d}" for number in range(4))
A, B, C, D = SITES
FLOOR = 4.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head, and a node for each site, to be killed."""
    import ray
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="t-", dir="/tmp")  # Ray's socket paths lie in here and must be short
    Path("/tmp/ray").mkdir(exist_ok=True)
    environment = pytest.MonkeyPatch()
    environment.setenv("PYTHONPATH", f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}")  # for `support`
    try:
        own = Cluster(initialize_head=True, head_node_args={**node(folder), "include_dashboard": False})
        try:
            own.homes = {site: own.add_node(**node(folder), resources={f"site_{site}": 1}) for site in SITES}
            own.add = lambda site: own.add_node(**node(folder), resources={f"site_{site}": 1})
            ray.init(address=own.address, log_to_driver=False, logging_level="CRITICAL")
            yield own
        finally:
            ray.shutdown()
            own.shutdown()
    finally:
        environment.undo()
        shutil.rmtree(folder, ignore_errors=True)


def node(folder: str) -> dict[str, Any]:
    return {"num_cpus": 1, "object_store_memory": 80 * 2**20, "temp_dir": folder}


class Run:
    """A federation on the cluster."""

    def __init__(self, tmp_path: Path, faults: list[Fault]) -> None:
        (tmp_path / "marks").mkdir()
        settings = {"deadline_s": 120, "deadline_floor_s": FLOOR, "deadline_factor": 2, "rejoin_wait_s": 180}
        specs = toy_specs(4, tmp_path / "sites", **settings)
        factory = partial(FaultySite, faults=faults, folder=tmp_path / "marks", real=True)
        placed = plan(SITES, cluster_nodes(), SiteNeeds(cpus=0.5, pin="always"))
        self.engine = create_sites(specs, placed, factory)
        self.federation = toy_federation(self.engine, specs[0])
        self.oracle = Oracle(specs, self.federation.total_weight())
        self.round = 0

    def train(self) -> tuple[tuple[str, ...], float]:
        self.round += 1
        begun = time.monotonic()
        total = self.oracle.train(self.federation, self.round)
        assert self.federation.failed == []  # no attempt of any round was lost
        return total.contributors, time.monotonic() - begun

    def fault(self, what: str, site: str, counts: bool, then: Callable[[], None] = lambda: None) -> str:
        """A round in which a site is lost, and the next, in which it is back; why it was lost. `then`: in between."""
        there, seconds = self.train()
        lost = dict(self.federation.disturbed)
        assert set(lost) == {site}
        assert there == tuple(one for one in SITES if one != site or counts)
        then()
        back, more = self.train()
        assert back == SITES
        assert self.federation.disturbed == {}
        assert self.counted() == self.oracle.counted
        note(Row(what, f"Ray, {len(there)} of 4 in the sum", SURVIVORS, 0, seconds, more, lost[site]))
        return lost[site]

    def counted(self) -> dict[str, int]:
        return self._all("counted")

    def pids(self) -> dict[str, int]:
        return self._all("where")

    def _all(self, method: str) -> dict[str, Any]:
        replies, lost = self.engine.call(method, {site: {} for site in SITES}, 60)
        assert lost == {}
        return replies


@pytest.fixture
def run(cluster: Any, tmp_path: Path) -> Iterator[Callable[[list[Fault]], Run]]:
    made: list[Run] = []

    def make(faults: list[Fault]) -> Run:
        made.append(Run(tmp_path, faults))
        made[-1].train()  # from now on deadlines are known
        return made[-1]

    yield make
    for one in made:
        one.engine.close()


def test_a_process_that_dies_hangs_or_dawdles_costs_no_round(run: Callable[[list[Fault]], Run]) -> None:
    deaths = [(A, "advertise"), (B, "share"), (C, "fit"), (D, "confirm"), (A, "unmask")]
    faults = [Fault(site, 2 + 2 * at, method, "die before") for at, (site, method) in enumerate(deaths)]
    faults += [Fault(C, 12, "fit", "slow", FLOOR * 1.5), Fault(B, 14, "fit", "hang")]
    wrong = {"corrupt": "BadSignature", "nan": "its values do not fit their clips", "disk full": "the disk is full"}
    faults += [Fault(D, 16 + 2 * at, "fit", what) for at, what in enumerate(wrong)]
    federation = run(faults)
    for site, method in deaths:
        why = federation.fault(f"kill -9 in {method}", site, counts=method in ("confirm", "unmask"))
        assert "died" in why
    before = federation.pids()
    assert federation.fault("20 times slower", C, counts=False) == f"no answer to fit within {FLOOR:g} s"
    # Sites have more time now that one has shown that it needs it.
    assert federation.fault("sleeps for ever in fit", B, counts=False) == f"no answer to fit within {2 * FLOOR:g} s"
    after = federation.pids()
    assert {site for site in SITES if before[site] != after[site]} == {B}  # whoever is only slow is not ended
    for what, why in wrong.items():
        assert why in federation.fault(f"{what} in fit", D, counts=False)


def test_a_node_that_is_lost_or_silent_costs_no_round(run: Callable[[list[Fault]], Run], cluster: Any) -> None:
    federation = run([Fault(A, 2, "fit", "slow", 2.0)])  # so that it is in training when its node is killed
    home = cluster.homes[A]
    killer = threading.Timer(1.0, partial(cluster.remove_node, home, allow_graceful=False))
    killer.start()
    why = federation.fault("kill -9 of its node in fit", A, counts=False, then=lambda: cluster.add(A))
    assert "died" in why or "no answer to fit" in why  # Ray need not notice before the deadline
    killer.join()

    raylet = psutil.Process(cluster.homes[B].all_processes["raylet"][0].process.pid)
    processes = [*raylet.children(recursive=True), raylet]
    for process in processes:
        process.suspend()

    def resume() -> None:
        for process in processes:
            process.resume()

    why = federation.fault("its node is silent", B, counts=False, then=resume)
    assert why == f"no answer to advertise within {FLOOR:g} s"
