"""One run as a consortium would have it, with token, TLS, rosters, S3 and JSON logs; and no secret in all it leaves."""

import base64
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from support.servers import S3Server

from cluster import jobs
from cluster.store import open_store
from fedsam_core import logs
from fedsam_core.secagg.keyfiles import create_identity
from pipelines import federate
from pipelines.config import load_config
from pipelines.submit import stage_command, working_dir

SITES = ("site-a", "site-b", "site-c")
PASSWORD, PASSPHRASE = "planted-mlflow-password", "planted-key-passphrase"


@pytest.fixture
def short_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the local cluster puts its sessions and logs; Ray's socket paths lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def spellings(secret: bytes) -> list[bytes]:
    """A secret as it may stand in a file: as it is, in hex, in base64 at every offset."""
    shifted = [base64.b64encode(b"\0" * offset + secret)[4:-4] for offset in range(3)]
    return [secret, secret.hex().encode(), secret.hex().upper().encode(), *shifted]


def holders(files: dict[str, bytes], secrets: dict[str, bytes]) -> list[tuple[str, str]]:
    """Which secret stands in which file."""
    return [
        (name, where)
        for where, data in files.items()
        for name, secret in secrets.items()
        if any(spelling in data for spelling in spellings(secret))
    ]


def contents(folder: Path, leave_out: tuple[Path, ...] = ()) -> dict[str, bytes]:
    """Every file below a folder, links and sockets aside."""
    return {
        str(path): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and not any(path.is_relative_to(part) for part in leave_out)
    }


def test_secrets_are_found_where_they_are() -> None:
    secret = bytes(range(7, 39))
    for data in (secret, secret.hex().encode(), b"x" + base64.b64encode(b"ab" + secret + b"c")):
        assert holders({"file": b"before" + data + b"after"}, {"key": secret}) == [("key", "file")]
    assert holders({"file": b"other" * 100}, {"key": secret}) == []


def test_a_run_with_token_tls_and_rosters_leaves_no_secret_behind(
    s3_server: S3Server, short_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, work = tmp_path / "keys", tmp_path / "work"
    for site in SITES:
        create_identity(site, keys, PASSPHRASE.encode())
    (tmp_path / "roster.txt").write_text("".join((keys / f"{site}.pub").read_text() for site in SITES))
    for name, value in {
        "FEDSAM_KEY_PASSPHRASE": PASSPHRASE,
        "MLFLOW_TRACKING_USERNAME": "somebody",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        logs.VARIABLE: "1",
        "RAY_AUTH_MODE": "disabled",  # until the cluster is up
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"s3://{s3_server.bucket}/{tmp_path.name}"
    overrides = [
        f"work_dir={work}",
        f"federation={{rounds: 1, roster: {tmp_path / 'roster.txt'}, key_dir: {keys}, site_dir: {tmp_path / 'sites'}}}",
        f"storage={{results: '{bucket}', s3_endpoint: '{s3_server.endpoint}'}}",
        "learning.local_steps=1",
        "model.image_size=32",
        "cohort.phantom={shape: [8, 32, 32], cases_per_site: 3, test_per_site: 1}",
    ]
    config = load_config("demo", overrides)
    said: dict[str, str] = {}
    with jobs.local_cluster(object_store_mb=100, tls=True) as address:
        token = os.environ["RAY_AUTH_TOKEN"]
        for stage in ("federate", "doctor"):
            lines: list[str] = []
            job = jobs.submit(address, shlex.join(stage_command(stage, config)), working_dir())
            status = jobs.follow(address, job, lines.append)
            said[stage] = "".join(lines)
            assert status == 0, said[stage][-3000:]
        tls_keys = {path.name: path.read_bytes() for path in short_folder.rglob("tls/*.key")}
        session = contents(short_folder, tuple(path.parent for path in short_folder.rglob("tls/*.key")))
    # A second run, whose tracking server is away: what was meant for it stays in the spool.
    away = [*overrides, "engine.kind=in-process", "tracking.uri=http://127.0.0.1:9"]
    federate.run(load_config("demo", away))

    told = [json.loads(line) for line in said["federate"].splitlines() if line.startswith("{")]
    (run,) = {line["run"] for line in told if "run" in line}
    assert run.startswith("demo-")
    assert any(line.get("round") == 1 and "round 1:" in line["message"] for line in told)
    worker_lines = [
        json.loads(line)
        for path, data in session.items()
        if "/logs/worker-" in path
        for line in data.decode().splitlines()
        if line.startswith('{"time"')
    ]
    assert any(line["logger"] == "cluster.metrics" and line["run"] == run for line in worker_lines)
    doctor = [json.loads(line)["message"] for line in said["doctor"].splitlines() if line.startswith("{")]
    assert any("every site's key is the one in roster" in message for message in doctor), doctor
    assert doctor[-1].endswith("0 failures")

    secrets = {"S3 key": s3_server.secret_key.encode(), "MLflow password": PASSWORD.encode(), "token": token.encode()}
    secrets |= {"passphrase": PASSPHRASE.encode()}
    for site in SITES:
        pem = (keys / f"{site}.key").read_bytes()
        secrets[f"{site}.key"] = load_pem_private_key(pem, PASSPHRASE.encode()).private_bytes_raw()  # type: ignore[union-attr]
        secrets[f"{site}.key, encrypted"] = base64.b64decode(b"".join(pem.splitlines()[1:-1]))
    for name, pem in tls_keys.items():
        secrets[name] = base64.b64decode(b"".join(pem.splitlines()[1:-1]))
    store = open_store(bucket, s3_server.endpoint)
    stored = {key: store.read_bytes(key) for key in store.list()}
    left = contents(work) | contents(tmp_path / "sites")
    left |= {f"said/{stage}": text.encode() for stage, text in said.items()}
    for kind, needle in (
        ("run folder", "/runs/"),
        ("MLflow database", "mlflow.db"),
        ("MLflow artifacts", "/mlartifacts/"),
        ("spool", "/spool/"),
        ("checkpoint", "state.safetensors"),
    ):
        assert any(needle in path for path in left), kind
    assert any("/rounds/000001/" in key for key in stored)
    assert len(tls_keys) == 2
    for kind in ("raylet.out", "gcs_server", "dashboard", "worker-", "job-driver", "start.log"):
        assert any(kind in path for path in session), kind
    assert holders(left | stored | session, secrets) == []
