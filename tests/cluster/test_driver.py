"""The driver actor: progress while it runs, the run's own errors, and nothing left when it ends."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import ray

from cluster.driver import drive
from fedsam_core.errors import ClusterError, RoundError


def make_run(steps, ending=None, pause=0.0):
    """A run that emits `steps` events; made here so that it travels to the driver by value."""

    def run(emit):
        import os
        import time

        from fedsam_core.errors import RoundError

        for step in range(steps):
            emit({"step": step, "pid": os.getpid()})
            time.sleep(pause)
        if ending == "refused":
            raise RoundError("only 1 of 3 sites answered round 4: start the missing ones")
        if ending == "bug":
            return {}["absent"]
        if ending == "crash":
            os._exit(1)
        return {"pid": os.getpid(), "steps": steps}

    return run


def gone(pids, timeout=20):
    """Whether all these processes end within `timeout` seconds."""
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=timeout)
    return not alive


def test_events_come_while_it_runs_in_order_and_then_the_result(ray_cluster):
    seen, times = [], []

    def emit(event):
        seen.append(event["step"])
        times.append(time.monotonic())

    result = drive(make_run(5, pause=0.4), emit)
    assert seen == [0, 1, 2, 3, 4]
    assert times[-1] - times[0] > 1.0  # not all at the end
    assert result["steps"] == 5
    assert result["pid"] != os.getpid()
    assert gone([result["pid"]])


def test_no_event_is_lost_when_it_ends_at_once(ray_cluster):
    seen = []
    drive(make_run(300), seen.append)
    assert [event["step"] for event in seen] == list(range(300))


def test_errors_come_back_as_they_were_raised(ray_cluster):
    seen = []
    with pytest.raises(RoundError) as caught:
        drive(make_run(2, "refused"), seen.append)
    assert str(caught.value) == "only 1 of 3 sites answered round 4: start the missing ones"
    assert type(caught.value) is RoundError
    assert len(seen) == 2
    with pytest.raises(ray.exceptions.RayTaskError, match="KeyError"):
        drive(make_run(0, "bug"), seen.append)
    with pytest.raises(ClusterError, match="driver died") as caught:
        drive(make_run(1, "crash"), seen.append)
    said = str(caught.value)
    assert "\n" not in said
    assert re.search(r"pid: \d+", said)  # whose log to look for, and Ray's own reason
    assert "Worker exit type: " in said
    assert "causes" not in said
    assert said.endswith("`fedsam resume RUN` goes on from the last finished round")


def test_an_interrupt_ends_the_driver(ray_cluster):
    pids = []

    def emit(event):
        pids.append(event["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drive(make_run(100, pause=0.5), emit)
    assert gone(pids[:1])


ENTRY_POINT = """
import sys, time
import ray
from dataclasses import dataclass
from cluster.driver import drive
from cluster.placement import SiteNeeds, cluster_nodes, plan
from cluster.site import create_sites

@dataclass(frozen=True)
class Spec:
    site: str

class Site:
    def __init__(self, spec): pass
    def pid(self):
        import os
        return os.getpid()

def run(emit):
    import os, time
    sites = ["site-a", "site-b"]
    engine = create_sites([Spec(s) for s in sites], plan(sites, cluster_nodes(), SiteNeeds()), Site, 60)
    replies, lost = engine.call("pid", {s: {} for s in sites}, 30)
    emit([os.getpid(), *replies.values()])
    time.sleep(600)

ray.init(address=sys.argv[1], log_to_driver=False)
drive(run, lambda event: print("pids", *event, flush=True))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_driver_and_sites_end_with_the_entry_point(ray_cluster, how, heed_interrupts):
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", ENTRY_POINT, address]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=heed_interrupts
    )
    try:
        line = next(line for line in process.stdout if line.startswith("pids"))
        pids = [int(pid) for pid in line.split()[1:]]
        assert len(pids) == 3
        process.send_signal(how)
        assert process.wait(120) != 0
        assert gone(pids, timeout=120)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
