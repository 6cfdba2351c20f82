"""The engine's contract on a real cluster of four nodes: every site asked is in exactly one of replies and lost."""

import os
import signal
import threading
import time
from dataclasses import dataclass

import numpy as np
import psutil
import pytest
import ray

from cluster.engine import RayEngine
from cluster.placement import SiteNeeds, cluster_nodes, plan, preflight
from cluster.site import create_sites
from fedsam_core.errors import ClusterError


@dataclass(frozen=True)
class Spec:
    site: str


def make_site(spec):
    """A plain site. Defined in here so that it travels to the actors by value."""
    import os

    from fedsam_core.errors import TrainingError

    class Site:
        def __init__(self):
            self.calls = []

        def echo(self, value):
            self.calls.append("echo")
            return {"site": spec.site, "value": value}

        def add(self, state, scale):
            return state * scale

        def large(self):
            return np.full(500_000, 7, dtype=np.float32)

        def refuse(self):
            raise TrainingError("loss is NaN at batch 3: lower the learning rate")

        def bug(self):
            return {}["absent"]

        def awkward(self):
            class Local(Exception):
                def __init__(self, a, b):
                    super().__init__(f"{a} and {b}")
                    self.lock = __import__("threading").Lock()

            raise Local("one", "two")

        def sleep(self, seconds, value=None):
            __import__("time").sleep(seconds)
            return np.zeros(300_000) if value is None else value

        def where(self):
            return ray.get_runtime_context().get_node_id(), os.getpid()

        def forget(self):
            self.calls.clear()

        def history(self):
            return list(self.calls)

        def die(self):
            os._exit(1)

        def _private(self):
            return "secret"

    return Site()


def start(sites, factory=make_site, cpus=0.0, deadline=60):
    """Actors without CPUs of their own fit beside those of the fixture."""
    needs = SiteNeeds(cpus=cpus)
    nodes = cluster_nodes()
    preflight(sites, nodes, needs)
    return create_sites([Spec(site) for site in reversed(sites)], plan(sites, nodes, needs), factory, deadline)


@pytest.fixture(scope="module")
def shared_engine(ray_cluster):
    engine = start(ray_cluster, cpus=1)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared_engine):
    """Sites that have been called for nothing yet."""
    _, lost = shared_engine.call("forget", everyone(shared_engine), 60)
    assert lost == {}
    return shared_engine


def everyone(engine: RayEngine, **kwargs):
    return {site: dict(kwargs) for site in engine.sites}


def test_each_site_answers_from_its_own_node(engine):
    replies, lost = engine.call("echo", {site: {"value": i} for i, site in enumerate(engine.sites)}, 30)
    assert engine.sites == ("site-a", "site-b", "site-c")
    assert lost == {}
    assert replies == {site: {"site": site, "value": i} for i, site in enumerate(engine.sites)}
    where, _ = engine.call("where", everyone(engine), 30)
    homes = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
    for site, (node_id, _pid) in where.items():
        assert f"site_{site}" in homes[node_id]


def test_a_shared_value_is_resolved_at_every_site(engine):
    state = np.arange(500_000, dtype=np.float32)
    handle = engine.share(state)
    replies, lost = engine.call("add", {site: {"state": handle, "scale": k} for k, site in enumerate(engine.sites)}, 30)
    assert lost == {}
    for k, site in enumerate(engine.sites):
        np.testing.assert_array_equal(replies[site], state * k)


def test_one_sites_failure_is_its_own_line_and_nobody_elses(engine):
    args = everyone(engine)
    for method, reason in [
        ("refuse", "loss is NaN at batch 3: lower the learning rate"),
        ("bug", "KeyError: 'absent'"),
        ("awkward", "Local: one and two"),
        ("absent_method", "has no attribute 'absent_method'"),
        ("_private", "not a public method"),
    ]:
        replies, lost = engine.call(method, args, 30)
        assert replies == {}
        assert set(lost) == set(args)
        for text in lost.values():
            assert reason in text
            assert "\n" not in text
    replies, lost = engine.call("echo", {"site-a": {"value": 1}, "site-b": {"wrong": 1}}, 30)
    assert set(replies) == {"site-a"}
    assert "TypeError" in lost["site-b"]


def test_large_replies_of_the_quick_sites_come_in_although_one_straggles(engine):
    args = {site: {"seconds": 4.0 if site == "site-b" else 0.0} for site in engine.sites}
    begin = time.monotonic()
    replies, lost = engine.call("sleep", args, 1.5)
    assert time.monotonic() - begin < 3
    assert set(replies) == {"site-a", "site-c"}
    assert all(reply.nbytes == 2_400_000 for reply in replies.values())
    assert lost == {"site-b": "no answer to sleep within 1.5 s"}

    # Still busy: lost again, and this call is not left in its queue.
    replies, lost = engine.call("echo", everyone(engine, value=1), 0.5)
    assert lost == {"site-b": "still busy with an earlier sleep after 0.5 s"}
    # Awake again: the late answer of the first call is not taken for this one's, and the second call never ran.
    replies, lost = engine.call("history", everyone(engine), 30)
    assert lost == {}
    assert replies == {"site-a": ["echo"], "site-b": [], "site-c": ["echo"]}


def test_a_call_ends_when_enough_have_answered_and_the_rest_can_be_polled(engine):
    answered = []

    def on_answer(site, seconds):
        answered.append(site)
        return seconds + 0.2 if len(answered) == 2 else 60

    args = {site: {"seconds": 3.0 if site == "site-b" else 0.0, "value": 1} for site in engine.sites}
    replies, lost = engine.call("sleep", args, 60, on_answer)
    assert sorted(answered) == ["site-a", "site-c"]
    assert set(replies) == set(answered)
    assert lost["site-b"].startswith("no answer to sleep within")
    assert lost["site-b"].endswith("s, when enough others had answered")
    assert [site for site in engine.sites if engine.silent(site)] == ["site-b"]

    assert engine.poll("history", {"site-b": {}}, 0) == ({}, {})  # it is asked, and not waited for
    assert engine.poll("history", {"site-b": {}}, 30) == ({"site-b": []}, {})
    assert not engine.silent("site-b")
    replies, lost = engine.poll("refuse", {"site-b": {}}, 30)
    assert replies == {}
    assert lost == {"site-b": "loss is NaN at batch 3: lower the learning rate"}


def test_a_site_that_hangs_is_ended_and_a_poll_waits_until_it_is_there_again(engine):
    _, lost = engine.call("sleep", {"site-a": {"seconds": 3600}}, 0.2)
    assert set(lost) == {"site-a"}
    assert engine.poll("history", {"site-a": {}}, 0) == ({}, {})
    engine.restart("site-a")
    assert engine.poll("history", {"site-a": {}}, 60) == ({"site-a": []}, {})
    assert not engine.silent("site-a")


def test_large_replies(engine):
    replies, lost = engine.call("large", everyone(engine), 30)
    assert lost == {}
    for reply in replies.values():
        assert reply.nbytes == 2_000_000
        assert (reply == 7).all()


def test_a_site_that_dies_is_lost_and_comes_back_with_an_empty_memory(engine):
    engine.call("echo", everyone(engine, value=1), 30)
    replies, lost = engine.call("die", {"site-c": {}}, 30)
    assert replies == {}
    assert "died" in lost["site-c"]
    end = time.monotonic() + 60
    while True:
        replies, lost = engine.call("history", everyone(engine), 5)
        assert set(replies) | set(lost) == set(engine.sites)
        assert replies["site-a"] == ["echo"]
        if "site-c" in replies or time.monotonic() > end:
            break
    assert replies["site-c"] == []


def test_a_site_killed_during_a_call_is_lost_before_the_deadline(engine):
    pids = {site: pid for site, (_, pid) in engine.call("where", everyone(engine), 30)[0].items()}
    threading.Timer(0.5, os.kill, (pids["site-a"], signal.SIGKILL)).start()
    begin = time.monotonic()
    replies, lost = engine.call("sleep", everyone(engine, seconds=1.5, value=3), 60)
    assert time.monotonic() - begin < 30
    assert replies == {"site-b": 3, "site-c": 3}
    assert "died" in lost["site-a"]


def test_a_site_that_cannot_start_says_why_and_the_others_work(ray_cluster):
    def factory(spec):
        if spec.site == "site-b":
            from fedsam_core.errors import DataError

            raise DataError("site site-b has no training case: add one to sites.csv")
        return make_site(spec)

    engine = start(ray_cluster, factory)
    try:
        replies, lost = engine.call("echo", everyone(engine, value=0), 30)
        assert set(replies) == {"site-a", "site-c"}
        assert lost == {"site-b": "site site-b has no training case: add one to sites.csv"}
    finally:
        engine.close()


def test_actors_that_find_no_room_are_an_error_not_a_wait(engine, ray_cluster):
    with pytest.raises(ClusterError, match="site-a, site-b, site-c did not start within 1 s"):
        start(ray_cluster, cpus=1, deadline=1)


def test_close_ends_the_processes(ray_cluster):
    engine = start(ray_cluster)
    pids = [pid for _, pid in engine.call("where", everyone(engine), 30)[0].values()]
    engine.close()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert alive == []
