"""Trials on a cluster of several nodes: placed as a whole, told of, stopped early, failed, kept apart."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.placement import ActorOptions
from cluster.site import SitePool, create_sites
from cluster.trials import EarlyStop, Ended, Placed, Tell, run_trials
from fedsam_core.errors import RoundError

ROUNDS = 6
HEAD = ({"CPU": 0.001},)


def grow(what: Mapping[str, Any], tell: Tell, kept: dict[str, Any]) -> dict[str, Any]:
    """A trial whose Dice grows by its own rate."""
    served = kept.setdefault("served", [])
    served.append(what["name"])
    for number in range(1, ROUNDS + 1):
        if number == what.get("fails"):
            raise RoundError(f"{what['name']}: too few sites are left")
        if number == what.get("breaks"):
            raise ZeroDivisionError("a bug")
        tell(number, {"dice": what["rate"] * number, "bytes_up": 10.0 * number})
    return {"dice": what["rate"] * ROUNDS, "process": os.getpid(), "served": len(served)}


def run(folder: Path, trials: list[Placed], work: Any = grow, **more: Any) -> tuple[dict[str, Ended], list[str]]:
    ended: dict[str, Ended] = {}
    rounds: list[str] = []
    run_trials(
        trials,
        work,
        lambda trial, number, numbers: rounds.append(f"{trial} {number} {numbers['dice']:g}"),
        lambda end: ended.__setitem__(end.id, end),
        folder,
        ROUNDS,
        **more,
    )
    return ended, rounds


def placed(name: str, rate: float, **more: int) -> Placed:
    return Placed(name, {"name": name, "rate": rate, **more}, HEAD)


def test_each_is_told_of_and_failures_are_its_own(ray_cluster: tuple[str, ...], tmp_path: Path) -> None:
    trials = [placed("good", 0.1), placed("poor", 0.01, fails=3), placed("broken", 0.02, breaks=2), placed("last", 0.2)]
    ended, rounds = run(tmp_path, trials, at_once=1)
    assert list(ended) == ["good", "poor", "broken", "last"]
    assert ended["good"].result["dice"] == pytest.approx(0.6)
    assert not ended["good"].error
    assert not ended["good"].stopped
    assert [number for number, _ in ended["good"].told] == list(range(1, ROUNDS + 1))
    assert ended["poor"].error == "poor: too few sites are left"
    assert ended["poor"].result is None
    assert [number for number, _ in ended["poor"].told] == [1, 2]
    assert ended["broken"].error.startswith("ZeroDivisionError: a bug (test_trials.py:")
    assert "good 6 0.6" in rounds
    # One process served them all: what a trial leaves there is for the next.
    assert ended["last"].result["process"] == ended["good"].result["process"]
    assert ended["last"].result["served"] == 4


def test_hopeless_ones_are_stopped_early(ray_cluster: tuple[str, ...], tmp_path: Path) -> None:
    trials = [placed(f"rate-{rate}", rate / 100) for rate in (9, 8, 7, 1, 2, 3)]
    ended, _ = run(tmp_path, trials, early_stop=EarlyStop(grace=2, keep_one_in=2), at_once=1)
    stopped = {name for name, end in ended.items() if end.stopped}
    assert {"rate-1", "rate-2", "rate-3"} <= stopped
    assert "rate-9" not in stopped
    assert ended["rate-9"].result["dice"] == pytest.approx(0.54)
    for name in stopped:
        assert ended[name].result is None
        assert not ended[name].error
        assert 2 <= len(ended[name].told) < ROUNDS


class Counting:
    """A site that counts its calls."""

    def __init__(self, spec: Any) -> None:
        self.spec, self.calls = spec, 0

    def count(self) -> tuple[int, str, int]:
        self.calls += 1
        return self.calls, self.spec.run, os.getpid()


class Spec:
    def __init__(self, site: str, run: str) -> None:
        self.site, self.run = site, run


def with_sites(what: Mapping[str, Any], tell: Tell, kept: dict[str, Any]) -> Any:
    sites = ("site-a", "site-b", "site-c")
    plan = {site: ActorOptions(0.25, 0.0, {f"site_{site}": 0.001}) for site in sites}
    pool = kept.setdefault("pool", SitePool())
    engine = create_sites([Spec(site, what["name"]) for site in sites], plan, Counting, pool=pool)
    try:
        replies, lost = engine.call("count", {site: {} for site in sites}, 60)
    finally:
        engine.close()
    tell(1, {"dice": 0.0})
    assert not lost
    return replies


def test_sites_are_placed_with_their_trial_and_serve_the_next(ray_cluster: tuple[str, ...], tmp_path: Path) -> None:
    bundles = (*HEAD, *({"CPU": 0.25, f"site_{site}": 0.001} for site in ray_cluster))
    trials = [Placed(name, {"name": name}, bundles) for name in ("first", "second")]
    ended, _ = run(tmp_path, trials, work=with_sites, at_once=1)
    first, second = ended["first"].result, ended["second"].result
    assert {reply[:2] for reply in first.values()} == {(1, "first")}
    assert {reply[:2] for reply in second.values()} == {(1, "second")}  # nothing of the first is left in them
    assert {s: reply[2] for s, reply in first.items()} == {s: reply[2] for s, reply in second.items()}


def test_no_process_outlives_the_trials(ray_cluster: tuple[str, ...], tmp_path: Path) -> None:
    bundles = (*HEAD, *({"CPU": 0.25, f"site_{site}": 0.001} for site in ray_cluster))
    run(tmp_path, [Placed("only", {"name": "only"}, bundles)], work=with_sites)
    wait_for(lambda: ray.available_resources().get("CPU", 0.0) == ray.cluster_resources()["CPU"])


def test_nothing_to_do_is_nothing_done(tmp_path: Path) -> None:
    assert run(tmp_path, []) == ({}, [])


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "places are still booked"
        time.sleep(0.5)
