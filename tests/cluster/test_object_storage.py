"""Object storage when things go wrong, on a real SeaweedFS: wrong keys, a server that is killed, two writers."""

import hashlib
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error
from support.fault_table import SAME_END, Row, note

from cluster.store import S3Store, open_store
from cluster.tracking import Tracking, TrackingConfig
from fedsam_core.errors import RoundError, StoreError
from fedsam_core.federation.site import FederatedSite
from fedsam_core.federation.state import read_note
from fedsam_core.store import LocalStore
from pipelines import federate, prepare, verify
from pipelines.commits import RunCommits, check_results, fetch_run, round_place
from pipelines.stage import Stage

OUTAGE_SECONDS = float(os.environ.get("FEDSAM_TEST_OUTAGE_SECONDS", "15"))


def test_what_is_there_is_not_created_again(store):
    assert store.create("a/commit.json", b"mine")
    assert store.create("a/commit.json", b"mine")  # as after an answer that was lost
    assert not store.create("a/commit.json", b"other")
    assert store.read_bytes("a/commit.json") == b"mine"
    assert store.list("a/") == ["a/commit.json"]


def test_of_many_writers_at_once_one_wins(store):
    with ThreadPoolExecutor(6) as threads:
        for number in range(10):
            key = f"race/{number}"
            won = list(threads.map(lambda writer, key=key: store.create(key, b"writer %d" % writer), range(6)))
            assert sum(won) == 1
            assert store.read_bytes(key) == b"writer %d" % won.index(True)


def test_an_answer_that_is_lost_is_not_another_writer(s3_server, tmp_path, monkeypatch):
    """The server has written and its answer got lost: the repeated request is refused, and finds our own bytes."""
    store = open_store(f"s3://{s3_server.bucket}/{tmp_path.name}", s3_server.endpoint)
    filesystem, calls = store._filesystem(), []
    write = filesystem.pipe_file

    def loses_the_first_answer(path, data, **options):
        write(path, data, **options)
        calls.append(path)
        if len(calls) == 1:
            raise TimeoutError("the answer is lost")

    monkeypatch.setattr(filesystem, "pipe_file", loses_the_first_answer)
    assert store.create("commit.json", b"mine")
    assert store.read_bytes("commit.json") == b"mine"


def test_a_server_that_comes_back_fails_nothing(seaweed):
    store = open_store(f"s3://{seaweed.server.bucket}/runs", seaweed.server.endpoint)
    store.write_bytes("before", b"kept")
    seaweed.kill()
    later = threading.Timer(4, seaweed.start)
    later.start()
    try:
        began = time.monotonic()
        assert store.read_bytes("before") == b"kept"
        assert time.monotonic() - began > 3
        store.write_bytes("after", b"x")
    finally:
        later.join()
    assert store.list() == ["after", "before"]


def test_patience_has_an_end_and_a_refusal_is_told_at_once(s3_server, free_port, monkeypatch):
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"s3://nowhere/a cannot be reached .*127.0.0.1.*check the endpoint"):
        open_store("s3://nowhere", f"http://127.0.0.1:{free_port}", patience=3).write_bytes("a", b"x")
    assert 2 < time.monotonic() - began < 15
    began = time.monotonic()
    with pytest.raises(StoreError, match="no bucket nowhere"):
        open_store("s3://nowhere", s3_server.endpoint).write_bytes("a", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-key")
    with pytest.raises(StoreError, match=r"was refused by .*check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY") as error:
        open_store(f"s3://{s3_server.bucket}", s3_server.endpoint).write_bytes("a", b"x")
    assert "wrong-key" not in str(error.value)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("code", "status", "again"),
    [
        ("InternalError", 500, True),
        ("SlowDown", 503, True),
        ("ConditionalRequestConflict", 409, True),  # two wrote at once: S3 asks to repeat it
        ("NoSuchUpload", 404, True),  # the server forgot our multipart upload
        ("NotImplemented", 501, False),
        ("NoSuchBucket", 404, False),
        ("AccessDenied", 403, False),
    ],
)
def test_which_answers_are_worth_another_try(monkeypatch, s3_keys, code, status, again):
    store, asked = open_store("s3://bucket", "http://127.0.0.1:9", patience=1), []

    def refused(*args, **options):
        asked.append(args)
        answer = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        raise translate_boto_error(ClientError(answer, "PutObject"))

    monkeypatch.setattr(store._filesystem(), "pipe_file", refused)
    with pytest.raises(StoreError, match="s3://bucket/a "):
        store.write_bytes("a", b"x")
    assert (len(asked) > 1) == again


def test_a_server_killed_in_the_middle_of_an_upload(seaweed, tmp_path):
    """The old object is there until the new one is, whole; the upload is begun anew and right."""
    store = open_store(f"s3://{seaweed.server.bucket}/big", seaweed.server.endpoint)
    assert isinstance(store, S3Store)
    store.write_bytes("state", b"old")
    data = bytes(range(256)) * (40 * 2**12)  # 40 MiB, three parts
    (tmp_path / "new").write_bytes(data)
    begun, died = threading.Event(), []
    filesystem = store._filesystem()
    send = filesystem._call_s3

    async def dies_at_the_last_part(method, *args, **options):
        if method == "upload_part" and options["PartNumber"] == 3 and not begun.is_set():
            begun.set()
            seaweed.kill()  # two parts may be there, or on their way
            died.append(time.monotonic())
        return await send(method, *args, **options)

    filesystem._call_s3 = dies_at_the_last_part
    with ThreadPoolExecutor(1) as thread:
        upload = thread.submit(store.put_file, tmp_path / "new", "state")
        assert begun.wait(30)
        time.sleep(2)
        assert not upload.done()
        seaweed.start()
        reader = open_store(store.url, seaweed.server.endpoint)
        assert reader.read_bytes("state") in (b"old", data)
        upload.result(timeout=120)
    assert died
    reader.get_file("state", tmp_path / "back", sha256=hashlib.sha256(data).hexdigest())
    assert reader.list() == ["state"]


def test_mlflow_is_told_the_one_endpoint(tmp_path):
    tracking = Tracking(TrackingConfig(artifact_root="s3://bucket/mlflow"), tmp_path, "http://127.0.0.1:8333")
    assert "MLFLOW_S3_ENDPOINT_URL=http://127.0.0.1:8333 " in tracking.ui_command()


def a_round(folder: Path, number: int) -> list[str]:
    """Files as a round leaves them in a run's folder, and their names."""
    (folder / "sums").mkdir(parents=True, exist_ok=True)
    (folder / "state.safetensors").write_bytes(b"state %d" % number)
    (folder / f"sums/{number:06d}.bin").write_bytes(b"sum %d" % number)
    return ["state.safetensors", f"sums/{number:06d}.bin", "layers.csv"]


LINES = [b"line %d" % number for number in range(10)]


def test_a_run_is_read_back_as_far_as_it_is_committed(store, tmp_path):
    check_results(store)
    assert store.list() == []
    folder, run = tmp_path / "runs" / "r", RunCommits(store, tmp_path / "runs" / "r", "r")
    with pytest.raises(StoreError, match=r"runs/r has no committed round: check the run's id"):
        fetch_run(store, "r", tmp_path / "back")
    for number in range(3):
        assert run.commit(round_place(number), a_round(folder, number), LINES[: number + 1]) == ""
    assert not (folder / "unsent").exists()
    assert {path.name for path in folder.iterdir()} == {"state.safetensors", "sums"}

    # A driver was killed while it sent round 3: no marker, no round.
    store.write_bytes("runs/r/rounds/000003/0123/state.safetensors", b"half")
    assert fetch_run(store, "r", tmp_path / "back") == 2
    back = {path.relative_to(tmp_path / "back").as_posix(): path for path in (tmp_path / "back").rglob("*.*")}
    assert {name: path.read_bytes() for name, path in back.items()} == {
        "state.safetensors": b"state 2",
        "sums/000000.bin": b"sum 0",
        "sums/000001.bin": b"sum 1",
        "sums/000002.bin": b"sum 2",
        "record.jsonl": b"line 0\nline 1\nline 2\n",
    }
    (folder / "summary.json").write_bytes(b"{}")
    run.finish(["summary.json", "scores.csv"], LINES[:5])
    assert fetch_run(store, "r", tmp_path / "all") == 2
    assert (tmp_path / "all" / "summary.json").read_bytes() == b"{}"
    assert (tmp_path / "all" / "record.jsonl").read_bytes() == b"".join(line + b"\n" for line in LINES[:5])


@pytest.mark.parametrize("name", ["state.safetensors", "record.jsonl", "commit.json"])
def test_a_flipped_byte_in_a_run_is_noticed(store, tmp_path, name):
    run = RunCommits(store, tmp_path / "run", "r")
    run.commit(round_place(0), a_round(tmp_path / "run", 0), LINES[:3])
    (key,) = (key for key in store.list("runs/r/") if key.endswith(name))
    data = store.read_bytes(key)
    store.write_bytes(key, bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(StoreError, match=rf"{key} is damaged"):
        fetch_run(store, "r", tmp_path / "back")


def test_of_two_drivers_that_commit_a_round_one_is_told(store, tmp_path):
    """Both have sent their files before either sets its marker; what the winner has sent stays as it is."""
    both, set_marker = threading.Barrier(2), store.create
    store.create = lambda key, data: (both.wait(60), set_marker(key, data))[1]

    def drive(name: bytes) -> str:
        folder = tmp_path / name.decode()
        names = a_round(folder, 7)
        (folder / "state.safetensors").write_bytes(name)
        try:
            return RunCommits(store, folder, "r").commit(round_place(0), names, [name])
        except RoundError as error:
            return str(error)

    with ThreadPoolExecutor(2) as threads:
        said = dict(zip((b"one", b"two"), threads.map(drive, (b"one", b"two")), strict=True))
    (winner,) = (name for name, text in said.items() if text == "")
    (loser,) = set(said) - {winner}
    assert said[loser] == (
        f"{store.url}/runs/r/rounds/000000 was committed by another driver in the meantime: two drivers are at work "
        "on one run; stop one of them"
    )
    assert fetch_run(store, "r", tmp_path / "back") == 0
    assert (tmp_path / "back" / "state.safetensors").read_bytes() == winner
    assert (tmp_path / "back" / "record.jsonl").read_bytes() == winner + b"\n"
    assert len(store.list("runs/r/")) == 4  # nothing of the loser is left


def test_a_store_that_replaces_is_not_fit_for_commits(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    monkeypatch.setattr(store, "create", lambda key, data: (store.write_bytes(key, data), True)[1])
    with pytest.raises(StoreError, match="replaces objects although it was told not to"):
        check_results(store)
    assert store.list() == []


def test_rounds_wait_for_a_store_that_is_away(tmp_path, monkeypatch):
    store, away = LocalStore(tmp_path / "store"), False
    put = store.put_file

    def put_file(local, key):
        if away:
            raise StoreError(f"{store.url} cannot be reached")
        put(local, key)

    monkeypatch.setattr(store, "put_file", put_file)
    folder = tmp_path / "run"
    run = RunCommits(store, folder, "r")
    assert run.commit(round_place(0), a_round(folder, 0), LINES[:1]) == ""
    away = True
    assert "cannot be reached" in run.commit(round_place(1), a_round(folder, 1), LINES[:2])
    away = False
    assert run.commit(round_place(2), a_round(folder, 2), LINES[:3]) == ""
    assert fetch_run(store, "r", tmp_path / "back") == 2

    # It does not come back: the end of the run says what is missing and how to mend it, and that does mend it.
    away = True
    assert "cannot be reached" in run.commit(round_place(3), a_round(folder, 3), LINES[:4])
    (folder / "summary.json").write_bytes(b"{}")
    with pytest.raises(StoreError) as error:
        run.finish(["summary.json"], LINES[:5])
    assert str(error.value) == (
        f"{store.url}/runs/r lacks rounds/000003, result ({store.url} cannot be reached). All is in {folder}: once the "
        f"store can be used again, `fedsam resume r` sends it, or copy what is in {folder}/unsent to {store.url}/runs/r"
    )
    shutil.copytree(folder / "unsent", tmp_path / "store" / "runs" / "r", dirs_exist_ok=True)
    assert fetch_run(store, "r", tmp_path / "mended") == 3
    assert (tmp_path / "mended" / "summary.json").is_file()
    assert (tmp_path / "mended" / "record.jsonl").read_bytes() == b"".join(line + b"\n" for line in LINES[:5])


def run_stage(stage: Stage, tmp_path: Path, server, *overrides: str) -> int:
    """A stage on small phantoms, with all that it keeps in a bucket; its exit status."""
    bucket = f"s3://{server.bucket}/{tmp_path.name}"
    settings = ["name=small", f"work_dir={tmp_path / 'work'}", "cohort.name=small", "cohort.source=phantom"]
    settings += ["cohort.phantom.cases_per_site=4", "cohort.phantom.test_per_site=1"]
    settings += ["cohort.phantom.shape=[10, 32, 32]", "model.backbone=vit_t", "model.image_size=32"]
    settings += ["selection=lora", "rank=1", "engine.kind=in-process", "federation.rounds=2", "learning.local_steps=2"]
    settings += [f"storage.prepared={bucket}/cohorts", f"storage.results={bucket}/results"]
    settings += [f"storage.s3_endpoint={server.endpoint}", f"tracking.artifact_root={bucket}/mlflow"]
    with pytest.raises(SystemExit) as ended:
        stage.main([*settings, *overrides])
    return int(ended.value.code or 0)


@pytest.mark.faults
def test_a_server_killed_in_the_middle_of_a_round(seaweed, tmp_path, monkeypatch, capsys):
    """It is started again a little later: the run ends as if nothing had been, and every round is in the bucket."""
    fit, fitted, restarts, begun = FederatedSite.fit, [], [], 0.0

    def killing(self, *args, **options):
        nonlocal begun
        fitted.append(self)
        if len(fitted) == 4:  # round 2 has begun
            seaweed.kill()
            begun = time.monotonic()
            restarts.append(threading.Timer(OUTAGE_SECONDS, seaweed.start))
            restarts[0].start()
        return fit(self, *args, **options)

    monkeypatch.setattr(FederatedSite, "fit", killing)
    try:
        status = run_stage(federate.STAGE, tmp_path, seaweed.server)
    finally:
        for restart in restarts:
            restart.join()
    seconds = time.monotonic() - begun
    said = capsys.readouterr()
    assert status == 0, said.out + said.err
    assert len(restarts) == 1
    store = open_store(f"s3://{seaweed.server.bucket}/{tmp_path.name}/results", seaweed.server.endpoint)
    (folder,) = (tmp_path / "work" / "runs").iterdir()
    assert f"the run is kept in {store.url}/runs/{folder.name}" in " ".join(said.out.split())
    assert not (folder / "unsent").exists()

    back = tmp_path / "back"
    assert fetch_run(store, folder.name, back) == 2
    kept = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert {path.relative_to(back) for path in back.rglob("*") if path.is_file()} == kept
    assert all((back / name).read_bytes() == (folder / name).read_bytes() for name in kept)
    assert {check.status for check in verify.checks(back, None)} == {"ok", "not checked"}
    artifacts = open_store(f"s3://{seaweed.server.bucket}/{tmp_path.name}/mlflow", seaweed.server.endpoint).list()
    assert any(key.endswith("adapter_model.safetensors") for key in artifacts)

    assert run_stage(federate.STAGE, tmp_path, seaweed.server, f"work_dir={tmp_path / 'again'}") == 0
    (again,) = (tmp_path / "again" / "runs").iterdir()
    states = [read_note((run / "state.safetensors").read_bytes())["state_hash"] for run in (folder, again)]
    assert states[0] == states[1]
    note(Row(f"object store away for {OUTAGE_SECONDS:g} s in fit", "one process, S3", SAME_END, 0, seconds))


def test_a_flipped_byte_in_a_shard(s3_server, tmp_path, capsys):
    assert run_stage(prepare.STAGE, tmp_path, s3_server) == 0
    store = open_store(f"s3://{s3_server.bucket}/{tmp_path.name}/cohorts", s3_server.endpoint)
    key = next(key for key in store.list() if "/site-b/cases/" in key)
    data = store.read_bytes(key)
    store.write_bytes(key, data[:-1] + bytes([data[-1] ^ 1]))
    capsys.readouterr()
    assert run_stage(federate.STAGE, tmp_path, s3_server) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "site site-b" in said
    assert f"{store.url}/{key}: the prepared case is damaged" in said
    assert "delete it and run prepare again" in said
    store.delete(key)
    assert run_stage(prepare.STAGE, tmp_path, s3_server) == 0
    assert store.read_bytes(key) == data


def test_results_that_cannot_be_kept_are_told_before_anything_is_read(s3_server, tmp_path, capsys, monkeypatch):
    assert run_stage(federate.STAGE, tmp_path, s3_server, "storage.results=s3://no-such-bucket/results") == 2
    assert "no bucket no-such-bucket" in capsys.readouterr().err
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-key")
    assert run_stage(federate.STAGE, tmp_path, s3_server, "tracking.artifact_root=null") == 2
    said = capsys.readouterr().err
    assert "was refused by" in said
    assert "wrong-key" not in said
    assert not (tmp_path / "work" / "runs").exists()
