"""A tracking server that is away, silent, or restarted: what a run records waits on disk and is sent once, complete."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from support.mlflow import MlflowServer, mlflow_server
from support.servers import free_ports

from cluster import sending, tracking
from cluster.spool import Spool
from cluster.tracking import Tracking, TrackingConfig
from pipelines import track


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """As `fedsam track serve` starts it."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow") / "server", free_ports(1)[0]) as started:
        yield started


@pytest.fixture
def silent() -> Iterator[str]:
    """Address of a server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a run does not wait at all for what is left."""
    monkeypatch.setattr(tracking, "_PATIENCE_SECONDS", 0.0)


def record(there: Tracking, folder: Path, steps: int = 3, parent: str | None = None) -> str:
    """A run with one of everything; returns its id."""
    (folder / "adapter" / "deep").mkdir(parents=True, exist_ok=True)
    (folder / "adapter" / "weights.bin").write_bytes(b"\x01" * 1000)
    (folder / "adapter" / "deep" / "card.json").write_text("{}")
    with there.start("run", {f"p{i}": i for i in range(150)}, {"fedsam.study": "s"}, parent) as run:
        for step in range(steps):
            run.log_round(step, {"val/dice": 0.1 * step, "train/loss": 1.0 - 0.1 * step})
        run.log_artifact(folder / "adapter", "adapter")
        run.log_table("scores", [{"case": "a", "dice": 0.5}])
        run.set_tags({"device": "cpu"})
    (folder / "adapter" / "weights.bin").write_bytes(b"written over later")
    return run.run_id


def held(uri: str, run_id: str) -> dict[str, Any]:
    """All that MLflow has of a run, but for its ids and times."""
    client = MlflowClient(uri, uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`fedsam.spool` = '{run_id}'")
    metrics = {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "params": run.data.params,
        "tags": {key: value for key, value in run.data.tags.items() if key != "fedsam.spool"},
        "metrics": metrics,
        "files": dict(files(client, run.info.run_id)),
    }


def files(client: MlflowClient, run: str, folder: str | None = None) -> Iterator[tuple[str, int]]:
    for item in client.list_artifacts(run, folder):
        if item.is_dir:
            yield from files(client, run, item.path)
        else:
            yield item.path, item.file_size


def quietly(done: int, total: int) -> None:
    """No progress bar."""


def test_what_was_recorded_without_a_server_is_sent_as_if_it_had_been_there(
    server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    live = record(Tracking(TrackingConfig(uri=server.uri), tmp_path / "live"), tmp_path)
    away = Tracking(TrackingConfig(uri=f"http://127.0.0.1:{free_ports(1)[0]}"), tmp_path / "away")
    with caplog.at_level(logging.WARNING):
        spooled = record(away, tmp_path)
    (spool,) = Spool.all(tmp_path / "away" / "spool")
    waiting = spool.waiting()
    assert f"{waiting} entries wait in {spool.folder}: `fedsam track sync` sends them" in caplog.text

    # The server is still away: nothing is lost, and it is said.
    with pytest.raises(SystemExit) as ended:
        track.main(["sync", f"work_dir={tmp_path / 'away'}"])
    assert ended.value.code == 2
    assert f"{waiting} entries wait still" in capsys.readouterr().err
    # It is elsewhere now.
    for told in (f"send: {waiting} of {waiting}", "nothing waits"):
        with pytest.raises(SystemExit) as ended:
            track.main(["sync", f"work_dir={tmp_path / 'away'}", f"tracking.uri={server.uri}"])
        assert ended.value.code == 0
        assert told in capsys.readouterr().out
    assert held(server.uri, spooled) == held(server.uri, live)
    found = held(server.uri, spooled)
    assert found["status"] == "FINISHED"
    assert found["metrics"]["val/dice"] == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert found["files"] == {
        "adapter/weights.bin": 1000,
        "adapter/deep/card.json": 2,
        "scores.json": found["files"]["scores.json"],
    }
    assert len(found["params"]) == 150
    assert not list((tmp_path / "away" / "spool").iterdir())


def test_nothing_is_asked_of_a_server_by_who_records(
    silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    asked: list[str] = []
    ask = sending.Server.client

    def noted(self: sending.Server) -> MlflowClient:
        asked.append(threading.current_thread().name)
        return ask(self)

    monkeypatch.setattr(sending.Server, "client", noted)
    run = record(Tracking(TrackingConfig(uri=silent), tmp_path), tmp_path)
    assert set(asked) <= {f"mlflow-{run}"}
    (spool,) = Spool.all(tmp_path / "spool")
    assert spool.ended
    assert spool.waiting() == len(list(spool._entries(0)))


def test_a_server_that_is_restarted_in_the_midst_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_PAUSE_SECONDS", 0.5)
    monkeypatch.setattr(tracking, "_PATIENCE_SECONDS", 120.0)
    with mlflow_server(tmp_path / "server", free_ports(1)[0]) as server:
        there = Tracking(TrackingConfig(uri=server.uri), tmp_path)
        with there.start("run", {"a": 1}, {}) as run:
            run.log_round(0, {"m": 0.0})
            (spool,) = Spool.all(tmp_path / "spool")
            wait_until(lambda: spool.waiting() == 0)
            server.stop()
            run.log_round(1, {"m": 1.0})
            assert spool.waiting() == 1
            server.start()
            run.log_round(2, {"m": 2.0})
        found = held(server.uri, run.run_id)
    assert found["status"] == "FINISHED"
    assert found["metrics"] == {"m": [(0, 0.0), (1, 1.0), (2, 2.0)]}


def test_an_answer_that_is_lost_makes_no_second_run(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    create, lost = MlflowClient.create_run, []

    def cut_off(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        made = create(self, *args, **kwargs)
        if not lost:
            lost.append(made)
            raise ConnectionError("cut off")
        return made

    monkeypatch.setattr(MlflowClient, "create_run", cut_off)
    there = Tracking(TrackingConfig(uri=server.uri, experiment="lost"), tmp_path)
    monkeypatch.setattr(tracking, "_PATIENCE_SECONDS", 120.0)
    run = record(there, tmp_path)
    there.sync(quietly)
    assert lost
    assert held(server.uri, run)["status"] == "FINISHED"  # of the one run that there is


def test_children_are_sent_with_their_parent(server: MlflowServer, tmp_path: Path, impatient: None) -> None:
    away = Tracking(TrackingConfig(uri=f"http://127.0.0.1:{free_ports(1)[0]}"), tmp_path)
    with away.start("study", {}, {}) as parent:
        child = record(away, tmp_path, parent=parent.run_id)
    Tracking(TrackingConfig(uri=server.uri), tmp_path).sync(quietly)
    client = MlflowClient(server.uri, server.uri)
    tags = held(server.uri, child)["tags"]
    assert client.get_run(tags["mlflow.parentRunId"]).data.tags["fedsam.spool"] == parent.run_id
    # A parent that was sent long ago is found by its tag.
    late = record(Tracking(TrackingConfig(uri=server.uri), tmp_path), tmp_path, parent=parent.run_id)
    Tracking(TrackingConfig(uri=server.uri), tmp_path).sync(quietly)
    assert held(server.uri, late)["tags"]["mlflow.parentRunId"] == tags["mlflow.parentRunId"]


def test_a_killed_process_leaves_a_run_that_sync_closes_as_killed(server: MlflowServer, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from cluster.tracking import Tracking, TrackingConfig\n"
        "run = Tracking(TrackingConfig(uri=sys.argv[1]), Path(sys.argv[2])).start('x', {'a': 1}, {})\n"
        "run.log_round(0, {'m': 1.0}); print(run.run_id, flush=True); time.sleep(600)"
    )
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    process = subprocess.Popen([sys.executable, "-c", code, nobody, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    run = process.stdout.readline().strip()
    there = Tracking(TrackingConfig(uri=server.uri), tmp_path)
    (synced,) = there.sync(quietly)
    assert (synced.running, synced.waiting) == (True, 0)
    assert held(server.uri, run)["status"] == "RUNNING"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (journal,) = (tmp_path / "spool").glob("*/journal.jsonl")
    with journal.open("ab") as stream:
        stream.write(b'{"do": "metr')  # as if it had been killed while it wrote
    there.sync(quietly)
    found = held(server.uri, run)
    assert found["status"] == "KILLED"
    assert found["tags"]["error"] == "its process ended without a word"
    assert found["metrics"] == {"m": [(0, 1.0)]}


def test_two_syncs_at_once_send_nothing_twice(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    away = Tracking(TrackingConfig(uri=f"http://127.0.0.1:{free_ports(1)[0]}"), tmp_path)
    runs = [record(away, tmp_path) for _ in range(2)]
    entries = sum(spool.waiting() for spool in Spool.all(tmp_path / "spool"))
    sent: list[str] = []
    mark = Spool.mark
    monkeypatch.setattr(
        Spool,
        "mark",
        lambda self, offset, *rest, **about: (sent.append(f"{self.id} {offset}"), mark(self, offset, *rest, **about)),
    )
    there = Tracking(TrackingConfig(uri=server.uri), tmp_path)
    threads = [threading.Thread(target=there.sync, args=(quietly,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sent) == len(set(sent)) == entries
    for run in runs:
        assert held(server.uri, run)["status"] == "FINISHED"


def test_secrets_never_reach_the_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD"):
        monkeypatch.setenv(name, "hush-hush-hush")
    record(Tracking(TrackingConfig(uri="http://127.0.0.1:9"), tmp_path), tmp_path)
    kept = [path for path in (tmp_path / "spool").rglob("*") if path.is_file()]
    assert any(path.name == "journal.jsonl" for path in kept)
    assert all(b"hush-hush" not in path.read_bytes() for path in kept)


def test_the_servers_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: started.append(given))
    monkeypatch.delenv(track.PASSWORD, raising=False)

    def serve(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            track.main(["serve", f"--folder={tmp_path}", *arguments])
        return int(ended.value.code or 0), capsys.readouterr().err

    assert serve("--artifacts", "s3://b/p", "--s3-endpoint", "http://minio:9000", "--allowed-hosts", "m:5000")[0] == 0
    _, command, environment = started.pop()
    told = " ".join(command)
    assert f"--backend-store-uri sqlite:///{tmp_path}/mlflow.db --artifacts-destination s3://b/p" in told
    assert "--workers 1" in told
    assert "--host 127.0.0.1" in told
    assert "--allowed-hosts m:5000" in told
    assert environment["MLFLOW_S3_ENDPOINT_URL"] == "http://minio:9000"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    status, error = serve("--auth")
    assert status == 2
    assert "set MLFLOW_AUTH_ADMIN_PASSWORD" in error
    status, error = serve("--backend", "postgresql://me:hush@host/db")
    assert status == 2
    assert "PGPASSWORD" in error
    assert "hush" not in error
    status, error = serve("--backend", "nonsense")
    assert status == 2
    assert "nonsense is no database" in error
    assert not started


def test_a_server_that_asks_who_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flask_wtf")
    monkeypatch.setenv(track.PASSWORD, "a-long-password-1")
    with mlflow_server(tmp_path / "server", free_ports(1)[0], "--auth") as server:
        there = Tracking(TrackingConfig(uri=server.uri), tmp_path)
        with pytest.raises(Exception, match="cannot be used"):
            there.check()  # no password is a fault of the settings
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password-1")
        there.check()
        run = record(there, tmp_path)
        there.sync(quietly)
        assert held(server.uri, run)["status"] == "FINISHED"
    assert "a-long-password-1" not in (tmp_path / "server" / "auth.ini").read_text()


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = threading.Event()
    for _ in range(int(seconds / 0.1)):
        if true():
            return
        end.wait(0.1)
    raise AssertionError("it never came true")
