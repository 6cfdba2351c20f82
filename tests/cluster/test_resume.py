"""A run on a cluster whose driver actor is killed, and which is stopped: nothing is left of it, and it goes on."""

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray
from support.fault_table import SAME_END, Row, note
from support.runs import Runs

COMMON = (
    "selection={name: own, lora: {encoder: [q], rank: 1}, local: [encoder.norms]}",
    "federation.scaffold=true",
    "federation.bits=8",
    "federation.rounds=4",
    "engine.site.cpus=0.5",
)


def actors() -> list[str]:
    """Names of the living processes of sites and drivers."""
    return [
        one.info["cmdline"][0]
        for one in psutil.process_iter(["cmdline"])
        if one.info["cmdline"] and re.match(r"ray::(SiteActor|FederationDriver|site |run)", one.info["cmdline"][0])
    ]


@pytest.mark.faults
def test_killed_and_stopped_on_a_cluster(
    ray_cluster: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    runs = Runs(tmp_path, *COMMON)
    before = len(actors())
    try:
        child = runs.zygote.start("federate", runs.settings("r", "engine.kind=ray"))
        child.wait_for("round 1:", 300)
        found = re.search(r"driver: process (\d+)", child.log.read_text())
        assert found
        os.kill(int(found[1]), signal.SIGKILL)
        status, said = child.wait()
        said = " ".join(said.split())
        assert status == 2, said
        assert re.search(rf"the federation's driver died \(ActorDiedError: .*pid: {found[1]}.*Worker exit type: ", said)
        assert runs.in_mlflow("r").info.status == "KILLED"

        begun = time.monotonic()
        child = runs.zygote.start("federate", runs.settings("r", "engine.kind=ray"))
        child.wait_for("goes on after round ", 300)
        seconds = time.monotonic() - begun
        runs.goes_well("stop", "r", f"work_dir={tmp_path}")
        assert child.wait()[0] == 130
        assert runs.in_mlflow("r").info.status == "KILLED"
        end = time.monotonic() + 60
        while len(actors()) > before:
            assert time.monotonic() < end, actors()
            time.sleep(0.2)

        runs.goes_well("federate", *runs.settings("whole"))
        runs.goes_well("resume", "r", f"work_dir={tmp_path}", "engine.kind=in-process")  # begun on Ray
        assert runs.result("r") == runs.result("whole")
        assert runs.in_mlflow("r").info.status == "FINISHED"
        runs.goes_well("verify", str(runs.path("r")))
        note(Row("driver's actor killed", "Ray", SAME_END, 0, seconds))
    finally:
        runs.zygote.close()
