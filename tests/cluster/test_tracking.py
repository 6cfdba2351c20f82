"""What MLflow holds after a run: on a local database, and on a real server with its files in a real S3 bucket."""

import json
import logging
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import boto3
import pytest
from mlflow.tracking import MlflowClient
from support.servers import free_ports

from cluster.tracking import Tracking, TrackingConfig
from fedsam_core.errors import RoundError, StoreError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds one database for the module: MLflow takes seconds to make one."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def local(folder):
    return Tracking(TrackingConfig(), folder)


def held(tracking, run_id):
    """What MLflow holds of the run of that id, which is the tracker's and not MLflow's."""
    client = MlflowClient(tracking.uri, tracking.uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (found,) = client.search_runs(experiments, f"tags.`fedsam.spool` = '{run_id}'")
    return found


def files(tracking, run_id, folder=None):
    run = held(tracking, run_id).info.run_id
    return sorted(item.path for item in MlflowClient(tracking.uri, tracking.uri).list_artifacts(run, folder))


def record(tracking, tmp_path, **kwargs):
    """A run with one of everything; returns its id."""
    adapter = tmp_path / "adapter"
    (adapter / "deep").mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "deep" / "weights.bin").write_bytes(b"\x00" * 1000)
    (tmp_path / "manifest.json").write_text("[]")
    with tracking.start(
        "demo-1", {"rank": 8, "layers.head": "flap", "empty": None}, {"layout": "abc"}, **kwargs
    ) as run:
        for step in range(3):
            run.log_round(step, {"val/dice": 0.1 * step, "site/site-a/dice": 0.5, "comm/bytes_up": 7_385_536})
        run.log_artifact(tmp_path / "manifest.json")
        run.log_artifact(adapter, "adapter")
        run.log_table("scores", [{"case": "a1", "dice": 0.7}, {"case": "a2", "dice": None}])
        run.set_tags({"device": "cpu"})
    return run.run_id


def check_record(tracking, run_id):
    data = held(tracking, run_id)
    assert data.info.status == "FINISHED"
    assert data.info.run_name == "demo-1"
    assert data.data.params == {"rank": "8", "layers.head": "flap", "empty": "None"}
    assert data.data.metrics == {"val/dice": 0.2, "site/site-a/dice": 0.5, "comm/bytes_up": 7_385_536}
    history = MlflowClient(tracking.uri, tracking.uri).get_metric_history(data.info.run_id, "val/dice")
    assert [(point.step, point.value) for point in history] == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert data.data.tags["layout"] == "abc"
    assert data.data.tags["device"] == "cpu"
    assert json.loads(data.data.tags["mlflow.loggedArtifacts"]) == [{"path": "scores.json", "type": "table"}]
    return data


def test_a_run_on_the_local_database(local, folder, tmp_path, monkeypatch):
    local.check()
    run_id = record(local, tmp_path)
    data = check_record(local, run_id)
    assert (folder / "mlflow.db").is_file()
    assert data.info.artifact_uri.startswith((folder / "mlartifacts").as_uri())
    assert files(local, run_id) == ["adapter", "manifest.json", "scores.json"]
    assert files(local, run_id, "adapter") == ["adapter/adapter_config.json", "adapter/deep"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", local.uri)  # which loading a table depends on, whatever the client's
    client = MlflowClient(local.uri, local.uri)
    table = client.load_table(data.info.experiment_id, "scores.json", run_ids=[data.info.run_id])
    assert table["case"].tolist() == ["a1", "a2"]
    assert table["dice"].tolist()[0] == pytest.approx(0.7)
    # Nothing about who and where: only what was passed in.
    assert data.info.user_id == "unknown"
    assert set(data.data.tags) == {"layout", "device", "fedsam.spool", "mlflow.loggedArtifacts", "mlflow.runName"}
    assert not list((folder / "spool").iterdir())  # nothing is left of what was sent


def test_the_environments_keys_are_nowhere_in_it(local, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hush-hush-hush")
    record(local, tmp_path)
    for path in folder.rglob("*"):
        if path.is_file():
            assert b"hush-hush" not in path.read_bytes()


def test_children_name_their_parent(local):
    with local.start("ablation", {}, {}) as parent, local.start("flap", {}, {}, parent=parent.run_id) as child:
        pass
    assert held(local, child.run_id).data.tags["mlflow.parentRunId"] == held(local, parent.run_id).info.run_id


def test_more_than_a_batch_of_params_and_metrics(local):
    with local.start("many", {f"p{i}": i for i in range(250)}, {}) as run:
        run.log_round(1, {f"m{i}": float(i) for i in range(1500)})
    data = held(local, run.run_id).data
    assert len(data.params) == 250
    assert len(data.metrics) == 1500


def test_how_a_run_ended(local):
    with pytest.raises(RoundError), local.start("x", {}, {}) as failed:
        raise RoundError("only 1 of 3 sites answered")
    with pytest.raises(KeyboardInterrupt), local.start("y", {}, {}) as killed:
        raise KeyboardInterrupt
    lost = local.start("z", {}, {})
    local.end(lost.run_id, "KILLED", "the driver died")
    local.end(failed.run_id, "KILLED", "a run that has ended is left as it is")
    for run, status, error in [
        (failed, "FAILED", "only 1 of 3 sites answered"),
        (killed, "KILLED", "KeyboardInterrupt: "),
        (lost, "KILLED", "the driver died"),
    ]:
        data = held(local, run.run_id)
        assert data.info.status == status
        assert data.data.tags["error"] == error
        assert data.info.end_time


def test_what_mlflow_refuses_is_a_warning_that_names_it(local, caplog, tmp_path):
    with caplog.at_level(logging.WARNING), local.start("x", {}, {}) as run:
        run.log_round(4, {"x" * 300: 1.0})
        run.log_artifact(tmp_path / "absent.png")
        run.log_round(5, {"good, but <odd>": 1.0})
    assert "refused 1 metrics of step 4" in caplog.text
    assert "absent.png" in caplog.text
    data = held(local, run.run_id)
    assert data.data.metrics == {"good_ but _odd_": 1.0}
    assert data.info.status == "FINISHED"


def test_it_is_quiet(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom cluster.tracking import Tracking, TrackingConfig\n"
        "tracking = Tracking(TrackingConfig(), Path(sys.argv[1]))\ntracking.check()\n"
        "with tracking.start('x', {'a': 1}, {}) as run:\n    run.log_round(0, {'m': 1.0})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""


def test_configurations_that_cannot_work_say_so(folder, tmp_path):
    for uri, part in [
        (str(tmp_path), "sqlite:///"),
        (f"file://{tmp_path}", "sqlite:///"),
        ("http://me:hush@host:1", "MLFLOW_TRACKING_PASSWORD"),
        ("postgresql://me:hush@host/db", "MLFLOW_TRACKING_PASSWORD"),
    ]:
        with pytest.raises(StoreError, match=part) as error:
            Tracking(TrackingConfig(uri=uri), tmp_path)
        assert "hush" not in str(error.value)
    with pytest.raises(StoreError, match="cannot be used"):
        Tracking(TrackingConfig(uri="nonsense://x"), tmp_path).check()
    first = Tracking(TrackingConfig(experiment="e", artifact_root=str(tmp_path / "one")), folder)
    with first.start("x", {}, {}):
        pass
    with pytest.raises(StoreError, match=r"experiment e keeps its files in .*one, not in .*two: choose another"):
        Tracking(TrackingConfig(experiment="e", artifact_root=str(tmp_path / "two")), folder).check()
    client = MlflowClient(first.uri, first.uri)
    client.delete_experiment(client.get_experiment_by_name("e").experiment_id)
    with pytest.raises(StoreError, match="experiment e was deleted"):
        first.check()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real MLflow server, started by the command that users are told, over a database with one run."""
    folder = tmp_path_factory.mktemp("mlflow")
    tracking = Tracking(TrackingConfig(experiment="from-a-laptop"), folder)
    with tracking.start("x", {}, {}):
        pass
    port = free_ports(1)[0]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            f"exec env {tracking.ui_command()} --port {port} --artifacts-destination {folder / 'files'}",
            shell=True,
            cwd=Path(__file__).parents[2],
            start_new_session=True,
            stdout=log,
            stderr=log,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=2):
                    break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
                assert time.monotonic() < end, (folder / "log").read_text()[-2000:]
                time.sleep(0.3)
        yield address, process
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_a_run_on_a_server_that_keeps_the_files(server, tmp_path):
    tracking = Tracking(TrackingConfig(uri=server[0], experiment="served"), tmp_path)
    tracking.check()
    run_id = record(tracking, tmp_path)
    check_record(tracking, run_id)
    assert files(tracking, run_id) == ["adapter", "manifest.json", "scores.json"]
    assert server[0] in tracking.ui_command()
    assert not (tmp_path / "mlflow.db").exists()


def test_a_run_on_a_server_with_its_files_in_a_bucket(server, s3_server, tmp_path, monkeypatch):
    config = TrackingConfig(
        uri=server[0],
        experiment="bucket",
        artifact_root=f"s3://{s3_server.bucket}/mlflow",
    )
    tracking = Tracking(config, tmp_path, s3_server.endpoint)
    tracking.check()
    run_id = record(tracking, tmp_path)
    data = check_record(tracking, run_id)
    assert data.info.artifact_uri == f"s3://{s3_server.bucket}/mlflow/{data.info.run_id}/artifacts"
    # MLflow's own client finds the files where ours has put them.
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", s3_server.endpoint)
    assert files(tracking, run_id) == ["adapter", "manifest.json", "scores.json"]
    assert files(tracking, run_id, "adapter/deep") == ["adapter/deep/weights.bin"]
    bucket = boto3.client("s3", endpoint_url=s3_server.endpoint, region_name="us-east-1")
    listed = bucket.list_objects_v2(Bucket=s3_server.bucket, Prefix=f"mlflow/{data.info.run_id}/")["Contents"]
    assert sum(item["Size"] for item in listed if item["Key"].endswith("weights.bin")) == 1000

    bad = config.model_copy(update={"artifact_root": "s3://no-such-bucket/x", "experiment": "other"})
    with pytest.raises(StoreError, match="no bucket no-such-bucket"):
        Tracking(bad, tmp_path, s3_server.endpoint).check()


def test_a_server_that_is_away_or_silent_is_a_warning(server, tmp_path, caplog):
    away = Tracking(TrackingConfig(uri=f"http://127.0.0.1:{free_ports(1)[0]}"), tmp_path)
    with caplog.at_level(logging.WARNING):
        away.check()
    assert "does not answer (Connection" in caplog.text
    assert f"waits in {tmp_path / 'spool'} until `fedsam track sync` sends it" in caplog.text
    caplog.clear()
    os.killpg(server[1].pid, 19)  # SIGSTOP: it takes connections and says nothing
    try:
        with caplog.at_level(logging.WARNING):
            Tracking(TrackingConfig(uri=server[0], experiment="silent"), tmp_path).check()
    finally:
        os.killpg(server[1].pid, 18)  # SIGCONT
    assert "does not answer (" in caplog.text


def test_the_ui_command_shows_the_runs(server):
    query = json.dumps({"max_results": 10}).encode()
    request = urllib.request.Request(
        f"{server[0]}/api/2.0/mlflow/experiments/search", query, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as reply:
        assert "from-a-laptop" in {experiment["name"] for experiment in json.load(reply)["experiments"]}


def test_two_first_runs_at_once_make_one_database(tmp_path: Path) -> None:
    """Both find no database and would make its tables."""
    script = (
        "import sys; from pathlib import Path; from cluster.tracking import Tracking, TrackingConfig\n"
        "with Tracking(TrackingConfig(), Path(sys.argv[1])).start(sys.argv[2], {}, {}): pass"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), name], stderr=subprocess.PIPE, text=True, cwd=Path.cwd()
        )
        for name in ("one", "two", "three")
    ]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedsam")
    assert experiment is not None
    assert {run.info.run_name for run in client.search_runs([experiment.experiment_id])} == {"one", "two", "three"}
