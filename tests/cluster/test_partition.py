"""A hospital whose link falls silent: no packet, no reset, no word to either end."""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.consortium import Consortium, until
from support.fault_table import SURVIVORS, Row, note
from support.toys import Oracle, ToySite, toy_federation, toy_specs
from support.wire import Wire

from cluster.gateway import aggregator, hospital
from cluster.gateway.aggregator import Gateway, GatewayEngine
from cluster.gateway.hospital import Hospital, federate_beginning, read_hospital
from fedsam_core.federation.engine import in_process
from fedsam_core.federation.site import SiteSpec

SITES = tuple(f"site-{number:03d}" for number in range(4))
CUT_OFF = SITES[1]
FLOOR = 2.0


class Asked:
    """A toy in place of a hospital's own site."""

    def __init__(self, spec: SiteSpec) -> None:
        self.site = ToySite(spec)

    def ask(self, asked: str, keywords: dict[str, Any]) -> Any:
        return getattr(self.site, asked)(**keywords)


class Hospitals:
    """The hospitals of a consortium, in a thread."""

    def __init__(self, consortium: Consortium, aggregators: Mapping[str, int]) -> None:
        """`aggregators`: the port that each of them dials."""
        self.sites: dict[str, ToySite] = {}
        self.said: dict[str, list[str]] = {site: [] for site in SITES}
        self._loop = asyncio.new_event_loop()
        self._serving = [
            self._loop.create_task(self._hospital(consortium, site, port).serve()) for site, port in aggregators.items()
        ]
        self._thread = threading.Thread(target=self._loop.run_forever, name="hospitals", daemon=True)
        self._thread.start()

    def _hospital(self, consortium: Consortium, site: str, port: int) -> Hospital:
        def start(spec: Any) -> Any:
            asked = Asked(spec)
            self.sites[site] = asked.site
            return in_process([spec], lambda _: asked)

        own = read_hospital(consortium.file(site, aggregator=f"127.0.0.1:{port}"))
        return Hospital(own, start, self.said[site].append)

    def end(self) -> None:
        for serving in self._serving:
            self._loop.call_soon_threadsafe(serving.cancel)
        until(lambda: all(serving.done() for serving in self._serving))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Holding:
    """An engine that has something done to the link before sites are asked to train in a round."""

    def __init__(self, engine: GatewayEngine, at_fit: Callable[[int], None]) -> None:
        self._engine, self._at_fit, self._fits = engine, at_fit, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def call(self, method: str, args: Mapping[str, Mapping[str, Any]], deadline: float, *rest: Any) -> Any:
        self._fits += method == "fit"
        if method == "fit":
            self._at_fit(self._fits)
        return self._engine.call(method, args, deadline, *rest)


@pytest.mark.faults
@pytest.mark.parametrize("notices", [False, True], ids=["shorter than a heartbeat", "longer than a heartbeat"])
def test_a_link_that_falls_silent_costs_its_site_the_rounds_meanwhile_and_nobody_else_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notices: bool
) -> None:
    """Either end may notice, and give the link up, or not: then the same link goes on."""
    for module in (aggregator, hospital):
        monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 1.0 if notices else 600.0)
    consortium = Consortium(tmp_path, SITES)
    with ExitStack() as stack:
        wire = stack.enter_context(Wire(consortium.port))
        gateway = stack.enter_context(Gateway(consortium.gateway, SITES))
        ports = {site: wire.port if site == CUT_OFF else consortium.port for site in SITES}
        hospitals = Hospitals(consortium, ports)
        stack.callback(hospitals.end)
        stack.callback(wire.let_go)
        gateway.wait(lambda names: None)
        settings = {"deadline_s": 60, "deadline_floor_s": FLOOR, "deadline_factor": 2, "rejoin_wait_s": 1}
        specs = toy_specs(4, tmp_path / "unused", roster=consortium.roster, **settings)
        engine = gateway.engine("federate", {spec.site: federate_beginning(spec, "toy-1") for spec in specs})
        federation = toy_federation(Holding(engine, lambda fits: wire.hold() if fits == 2 else None), specs[0])
        oracle = Oracle(specs, federation.total_weight())
        assert oracle.train(federation, 1).contributors == SITES

        begun = time.monotonic()
        total = oracle.train(federation, 2)
        seconds = time.monotonic() - begun
        assert total.lost == {CUT_OFF: f"no answer to fit within {FLOOR:g} s"}
        assert CUT_OFF not in oracle.train(federation, 3).contributors
        lost = "the link to the aggregator was lost"
        if notices:
            until(lambda: lost in hospitals.said[CUT_OFF] and not gateway._links[CUT_OFF].connected.is_set())
        wire.let_go()
        until(lambda: not engine.silent(CUT_OFF))
        begun = time.monotonic()
        assert oracle.train(federation, 4).contributors == SITES
        back = time.monotonic() - begun
        assert federation.failed == []
        assert (lost in hospitals.said[CUT_OFF]) == notices
        assert {site: toy.counted for site, toy in hospitals.sites.items()} == oracle.counted
        engine.close()
    what = "noticed" if notices else "not noticed"
    note(Row(f"silent link in fit, {what} by heartbeats", "gateway", SURVIVORS, 0, seconds, back, total.lost[CUT_OFF]))
