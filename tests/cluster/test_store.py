"""One contract on a folder and on a real S3 server, and what each mishap is called."""

import hashlib
import pickle
import time

import boto3
import pytest
from botocore.config import Config

from cluster.store import open_store
from fedsam_core.errors import StoreError
from fedsam_core.store import LocalStore


def says(error, *parts):
    """The error is one line with all these parts."""
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
    return True


def test_what_is_written_is_read_listed_and_deleted(store):
    store.check()
    assert store.list() == []  # the check leaves nothing behind
    store.write_bytes("runs/1/round-1.bin", b"one")
    store.write_bytes("runs/1/round-1.bin", b"uno")
    store.write_bytes("runs/10/round-1.bin", b"ten")
    store.write_bytes("other", b"")
    assert store.read_bytes("runs/1/round-1.bin") == b"uno"
    assert store.read_bytes("other") == b""
    assert store.list() == ["other", "runs/1/round-1.bin", "runs/10/round-1.bin"]
    assert store.list("runs/1/") == ["runs/1/round-1.bin"]
    assert store.list("runs/1") == ["runs/1/round-1.bin", "runs/10/round-1.bin"]
    assert store.list("absent/") == []
    assert store.exists("runs/1/round-1.bin")
    assert not store.exists("runs/1")
    assert not store.exists("absent/key")
    store.delete("runs/1/round-1.bin")
    store.delete("runs/1/round-1.bin")
    assert not store.exists("runs/1/round-1.bin")


def test_files_go_and_come_whole(store, tmp_path):
    data = bytes(range(256)) * 30_000  # 7.3 MiB
    source = tmp_path / "source"
    source.write_bytes(data)
    store.put_file(source, "a/b.bin")
    target = tmp_path / "new" / "target"
    store.get_file("a/b.bin", target, sha256=hashlib.sha256(data).hexdigest())
    assert target.read_bytes() == data


def test_a_fetch_that_fails_leaves_the_old_file(store, tmp_path):
    store.write_bytes("a", b"new")
    target = tmp_path / "fetched" / "file"
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(StoreError) as error:
        store.get_file("a", target, sha256=hashlib.sha256(b"expected").hexdigest())
    assert says(error, store.url, "/a is damaged", "store it again")
    with pytest.raises(StoreError) as error:
        store.get_file("absent", target)
    assert says(error, store.url, "absent is not there")
    assert [path.name for path in target.parent.iterdir()] == ["file"]
    assert target.read_bytes() == b"old"


def test_absent_objects_and_files(store, tmp_path):
    with pytest.raises(StoreError) as error:
        store.read_bytes("no/such")
    assert says(error, f"{store.url}/no/such", "is not there")
    with pytest.raises(StoreError) as error:
        store.put_file(tmp_path / "nothing", "a")
    assert says(error, str(tmp_path / "nothing"))


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/", "./a", "a\\b", "a\nb"])
def test_a_key_that_leaves_the_store_is_refused(store, key, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for action in (
        lambda: store.write_bytes(key, b"x"),
        lambda: store.read_bytes(key),
        lambda: store.put_file(tmp_path / "file", key),
        lambda: store.delete(key),
    ):
        with pytest.raises(StoreError):
            action()
    assert not (tmp_path / "up").exists()


def test_an_s3_key_is_refused_before_anything_is_sent():
    store = open_store("s3://bucket/prefix", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="not a plain relative path"):
        store.write_bytes("../other-prefix/a", b"x")


def test_a_store_travels_to_another_process(store):
    store.write_bytes("a", b"x")
    sent = pickle.dumps(store)
    assert b"test-secret" not in sent
    assert pickle.loads(sent).read_bytes("a") == b"x"


def test_a_reader_of_a_folder_never_sees_half_a_write(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    store.write_bytes("state", b"old")

    def full(source, target):
        target.write_bytes(b"ne")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("shutil.copyfile", full)
    (tmp_path / "big").write_bytes(b"new")
    with pytest.raises(StoreError) as error:
        store.put_file(tmp_path / "big", "state")
    assert says(error, "No space left on device")
    assert store.read_bytes("state") == b"old"
    assert store.list() == ["big", "state"]
    assert {path.name for path in tmp_path.iterdir()} == {"big", "state"}


def test_urls_that_are_no_store(tmp_path):
    assert isinstance(open_store(f"file://{tmp_path}"), LocalStore)
    for url, endpoint, part in [
        ("gs://bucket/x", None, "gs://"),
        ("s3:///prefix", None, "names no bucket"),
        ("s3://bucket", "localhost:9000", "not a web address"),
    ]:
        with pytest.raises(StoreError, match=part):
            open_store(url, endpoint)
    for url, endpoint in [("s3://key:hush@bucket/x", None), ("s3://bucket", "http://key:hush@host:1")]:
        with pytest.raises(StoreError, match="must not carry") as error:
            open_store(url, endpoint)
        assert "hush" not in str(error.value)


def test_a_missing_bucket_is_named(s3_server, tmp_path):
    store = open_store("s3://no-such-bucket/runs", s3_server.endpoint)
    for action in (
        store.check,
        store.list,
        lambda: store.exists("a"),
        lambda: store.read_bytes("a"),
        lambda: store.get_file("a", tmp_path / "a"),
    ):
        with pytest.raises(StoreError) as error:
            action()
        assert says(
            error, "s3://no-such-bucket/runs", "no bucket no-such-bucket", s3_server.endpoint, "create the bucket"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_keys_are_refused_without_being_shown(s3_server, monkeypatch, name):
    monkeypatch.setenv(name, "wrong-key")
    store = open_store(f"s3://{s3_server.bucket}/runs", s3_server.endpoint)
    for action in (store.check, store.list, lambda: store.exists("a"), lambda: store.read_bytes("a")):
        with pytest.raises(StoreError) as error:
            action()
        assert says(error, f"s3://{s3_server.bucket}/runs", "was refused", "AWS_ACCESS_KEY_ID")
        assert "wrong-key" not in str(error.value)


def test_no_keys_at_all(s3_server, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreError) as error:
        open_store(f"s3://{s3_server.bucket}", s3_server.endpoint).check()
    assert says(error, "without keys", "AWS_PROFILE")


def test_a_server_that_is_away_is_an_error_within_seconds(s3_server, free_port):
    store = open_store(f"s3://{s3_server.bucket}/runs", f"http://127.0.0.1:{free_port}")
    begin = time.monotonic()
    with pytest.raises(StoreError) as error:
        store.check()
    assert says(
        error, f"s3://{s3_server.bucket}/runs cannot be reached", f"127.0.0.1:{free_port}", "check the endpoint"
    )
    assert time.monotonic() - begin < 30


def test_objects_are_where_an_independent_client_expects_them(s3_server, tmp_path):
    store = open_store(f"s3://{s3_server.bucket}/{tmp_path.name}/deep/", s3_server.endpoint)
    store.write_bytes("a/b", b"x")
    client = boto3.client(
        "s3",
        endpoint_url=s3_server.endpoint,
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 1}),
    )
    found = client.get_object(Bucket=s3_server.bucket, Key=f"{tmp_path.name}/deep/a/b")
    assert found["Body"].read() == b"x"
