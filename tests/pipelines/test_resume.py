"""Runs whose driver is killed, stopped or refused, each in a process of its own, and what resumed ones come to."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from mlflow.tracking import MlflowClient
from support.fault_table import SAME_END, Row, note
from support.runs import Runs
from support.zygote import KILLED

from fedsam_core.store import LocalStore
from pipelines.commits import fetch_run
from pipelines.resume import resume_command

ROUNDS = 6
COMMON = (
    "selection={name: own, lora: {encoder: [q], rank: 1}, local: [encoder.norms]}",
    "federation.scaffold=true",
    "federation.bits=8",
    "federation.broadcast_bits=8",
    f"federation.rounds={ROUNDS}",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    found = Runs(tmp_path_factory.mktemp("runs"), *COMMON)
    yield found
    found.zygote.close()


@pytest.fixture(scope="module")
def whole(runs: Runs) -> dict[str, Any]:
    """What an uninterrupted run comes to."""
    runs.goes_well("federate", *runs.settings("whole"))
    return runs.result("whole")


def test_killed_between_the_file_operations_of_its_checkpoints(runs: Runs, whole: dict[str, Any]) -> None:
    """One run, killed again and again, each time a few operations later in the first round that it finishes."""
    for at in range(1, 200, 9):
        status, said = runs.zygote.run("federate", runs.settings("killed"), die_at=at)
        if status != KILLED:
            break
    assert status == 0, said  # a checkpoint has fewer operations
    assert at > 20
    assert runs.result("killed") == whole
    found = runs.in_mlflow("killed")
    assert found.info.status == "FINISHED"
    said = runs.goes_well("verify", "--json", str(runs.path("killed")))
    assert {check["status"] for check in json.loads(said)} == {"ok", "not checked"}
    (line,) = re.findall(r"without a gap but for (\d+) resumptions", said)
    assert int(line) >= 2
    metrics = MlflowClient(f"sqlite:///{runs.folder / 'mlflow.db'}").get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in metrics] == list(range(1, ROUNDS + 1))  # each round once
    record = runs.path("killed") / "record.jsonl"
    record.write_bytes(record.read_bytes().replace(b'"kind":"resumed"', b'"kind":"Resumed"', 1))
    assert runs.zygote.run("verify", [str(runs.path("killed"))])[0] == 1


@pytest.mark.faults
def test_killed_in_each_stage_of_a_round(runs: Runs, whole: dict[str, Any]) -> None:
    """One run, killed seven times, each time in another stage; it is taken up by the same command."""
    settings, rows, killed = runs.settings("staged"), [], ""
    for stage in ("advertise", "share", "fit", "confirm", "unmask", "checkpoint write", "score", ""):
        at, die_in = (9, "") if stage == "checkpoint write" else (0, stage)
        begun = time.monotonic()
        child = runs.zygote.start("federate", settings, die_at=at, die_in=die_in)
        if killed:
            child.wait_for("sites are open")
            seconds = time.monotonic() - begun
            rows.append(Row(f"driver killed in {killed}", "one process", SAME_END, 0, seconds, said=""))
        status, said = child.wait()
        assert status == (KILLED if stage else 0), said
        finished = sorted(int(path.stem) for path in (runs.path("staged") / "checkpoints").glob("*.safetensors"))
        # A round that was finished stays so; the one under way is repeated.
        last = {"": (ROUNDS,), "score": (ROUNDS,), "checkpoint write": (0, 1)}
        assert not stage or finished[-1] in last.get(stage, (0,))
        killed = stage
    assert runs.result("staged") == whole
    said = runs.goes_well("verify", "--json", str(runs.path("staged")))
    assert {check["status"] for check in json.loads(said)} == {"ok", "not checked"}
    for row in rows:
        note(row)


def test_stopped_and_terminated_and_gone_on_with(runs: Runs, whole: dict[str, Any]) -> None:
    """`fedsam stop`, Ctrl-C and SIGTERM: closed as KILLED, nothing left of it, and it goes on."""
    for how, after in (("stop", "round 1:"), (signal.SIGINT, "it goes on after"), (signal.SIGTERM, "sites are open")):
        child = runs.zygote.start("federate", runs.settings("stopped"), pause=5)
        child.wait_for(after)
        if how == "stop":
            said = runs.is_refused("federate", *runs.settings("stopped"))
            assert f"run stopped is driven by process {child.pid} on {os.uname().nodename}, since " in said
            assert "last renewed " in said
            assert "`fedsam stop stopped`; once it has given no sign for 15 s it may be taken over" in said
            listed = runs.goes_well("runs", f"work_dir={runs.folder}")
            assert re.search(r"stopped .* running .* of 6", listed), listed
            assert re.search(r"whole .* finished .* 6 of 6", listed), listed
            assert "asked process" in runs.goes_well("stop", "stopped", f"work_dir={runs.folder}")
        else:
            child.signal(int(how))
        status, said = child.wait()
        assert status == 130, said
        assert not psutil.pid_exists(child.pid)
        assert runs.in_mlflow("stopped").info.status == "KILLED"
    assert "run stopped is not running" in runs.is_refused("stop", "stopped", f"work_dir={runs.folder}")
    assert "it goes on after round " in runs.resumed("stopped")
    assert runs.result("stopped") == whole
    found = runs.in_mlflow("stopped")
    assert found.info.status == "FINISHED"
    assert "error" not in found.data.tags


def test_a_damaged_checkpoint_and_what_is_refused(runs: Runs, whole: dict[str, Any]) -> None:
    child = runs.zygote.start("federate", runs.settings("damaged"), pause=1)
    child.wait_for("round 3:")
    child.signal(signal.SIGKILL)
    child.wait()
    for change, word in (
        ("federation.rounds=9", "federation.rounds was 6, now 9"),
        ("cohort.phantom.cases_per_site=4", "the prepared scans of site site-a, site-b, site-c"),
    ):
        said = runs.is_refused("federate", *runs.settings("damaged", change))
        assert "run damaged cannot go on, as what decides its result has changed" in said
        assert word in said
    begun = runs.path("damaged") / "run.json"
    original = begun.read_bytes()
    told = json.loads(original)
    told["code"]["cluster/driver.py"] = "0" * 64
    begun.write_text(json.dumps(told))
    assert "the code in cluster/driver.py" in runs.is_refused("resume", str(runs.path("damaged")))
    begun.write_bytes(original)
    assert "seed cannot be changed" in runs.is_refused("resume", str(runs.path("damaged")), "seed=4")
    assert "no run unheard-of in" in runs.is_refused("resume", "unheard-of", f"work_dir={runs.folder}")

    job = resume_command("damaged", [f"work_dir={runs.folder}"])
    assert job == ["python", "-m", "pipelines.resume", "damaged", f"work_dir={runs.folder}"]
    newest = sorted((runs.path("damaged") / "checkpoints").glob("*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1] + b"\0")
    said = " ".join(runs.resumed("damaged").split())
    number = int(newest.stem)
    assert f"round {number} is given up: {newest} is damaged" in said
    assert f"it goes on after round {number - 1}" in said
    assert runs.result("damaged") == whole
    said = runs.is_refused("resume", "damaged", f"work_dir={runs.folder}")
    assert "run damaged has come to its end" in said


def test_another_machine_goes_on_from_the_results_store(runs: Runs, whole: dict[str, Any]) -> None:
    """The driver's disk is gone, and then an object of the last round is damaged."""
    where = f"storage.results={runs.folder / 'results'}"
    child = runs.zygote.start("federate", runs.settings("elsewhere", where), pause=1)
    child.wait_for("round 3:")
    child.signal(signal.SIGKILL)
    child.wait()
    shutil.rmtree(runs.path("elsewhere"))
    committed = sorted((runs.folder / "results" / "runs" / "elsewhere" / "rounds").glob("*/commit.json"))
    last = committed[-1].parent
    (checkpoint,) = last.glob("*/checkpoints/*.safetensors")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1] + b"\0")
    said = " ".join(runs.goes_well("resume", "elsewhere", f"work_dir={runs.folder}", where).split())
    assert f"round {int(last.name)} is given up: " in said
    assert f"it goes on after round {int(last.name) - 1}" in said
    assert runs.result("elsewhere") == whole
    assert fetch_run(LocalStore(runs.folder / "results"), "elsewhere", runs.folder / "back") == ROUNDS
    for folder in (runs.folder / "back", runs.path("elsewhere")):
        runs.goes_well("verify", str(folder))
    assert "has come to its end" in runs.is_refused("resume", "elsewhere", f"work_dir={runs.folder}", where)
