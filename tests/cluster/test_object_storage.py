"""Object storage when things go wrong, on a real SeaweedFS: wrong keys, a server that is killed, two writers."""

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.store import S3Store, open_store
from cluster.tracking import Tracking, TrackingConfig
from fedsam_core.errors import StoreError


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    server = request.getfixturevalue("s3_server")
    return open_store(f"s3://{server.bucket}/{tmp_path.name}", server.endpoint)


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
