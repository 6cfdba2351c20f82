"""`fedsam doctor` on a real cluster with an odd node, and on a real S3 server."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.servers import S3Server

from pipelines import doctor
from pipelines.config import load_config

ROOT = Path(__file__).parents[2]

# Python runs this in every process of the odd node: its clock is ahead, and the packages it finds are the copy.
ODD = """
import sys, time
sys.path.insert(0, {copy!r})
import cluster, fedsam_core, pipelines
_true = time.time
time.time = lambda: _true() + 3600
"""


@pytest.fixture
def odd_cluster() -> Iterator[str]:
    """Address of a head, the node of site-a, and a node of site-b with other sources and a clock an hour ahead."""
    from ray.cluster_utils import Cluster

    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    Path("/tmp/ray").mkdir(exist_ok=True)
    copy = folder / "copy"
    for package in ("fedsam_core", "cluster", "pipelines"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "fedsam_core" / "hashing.py").open("a") as changed:
        changed.write("\n# changed\n")
    (folder / "odd").mkdir()
    (folder / "odd" / "sitecustomize.py").write_text(ODD.format(copy=str(copy)))
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "temp_dir": str(folder)}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node, resources={"site_site-a": 1})
        path = f"{folder / 'odd'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        cluster.add_node(**node, resources={"site_site-b": 1}, env_vars={"PYTHONPATH": path})
        yield cluster.address
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def test_every_node_is_asked_and_the_odd_one_named(odd_cluster: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.doctor", "--config", "demo", f"work_dir={tmp_path / 'w'}", "--json"]
    environment = {**os.environ, "RAY_ADDRESS": odd_cluster, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    found = [doctor.Finding(**finding) for finding in json.loads(done.stdout)]

    def text(check: str, level: str) -> str:
        return " | ".join(finding.text for finding in found if (finding.check, finding.level) == (check, level))

    assert "site site-c needs the resource site_site-c" in text("placement", "FAIL")
    assert "site site-a needs" not in text("placement", "FAIL")
    assert "not " in text("libraries", "FAIL")
    assert text("libraries", "FAIL").count("install the same") == 1  # of one node
    assert "3600 s ahead of" in text("clocks", "FAIL") or "3599 s ahead of" in text("clocks", "FAIL")
    assert text("clocks", "FAIL").count("set it") == 1
    assert "RAY_AUTH_MODE=token" in text("trust", "warn")
    assert {finding.check for finding in found if finding.level == "FAIL"} == {"placement", "libraries", "clocks"}


def test_a_bucket_with_the_right_and_with_a_wrong_key(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = f"s3://{s3_server.bucket}/doctor"
    overrides = ["engine.kind=in-process", f"work_dir={tmp_path}", f"storage.s3_endpoint={s3_server.endpoint}"]
    overrides += [f"storage.results={bucket}/results", f"storage.prepared={bucket}/cohorts"]
    config = load_config("demo", overrides)
    assert {f.level for f in doctor.examine(config) if f.check == "stores"} == {"ok"}
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-wrong-key")
    findings = doctor.examine(config)
    failed = [finding for finding in findings if finding.level == "FAIL"]
    assert {finding.check for finding in failed} == {"stores"}, failed
    assert all("AWS_SECRET_ACCESS_KEY" in finding.text for finding in failed)
    assert "planted-wrong-key" not in repr(findings)
    missing = load_config("demo", [*overrides, "storage.results=s3://nowhere/at/all"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    found = [finding.text for finding in doctor.examine(missing) if finding.level == "FAIL"]
    assert any("no bucket nowhere" in text for text in found), found


def test_a_server_that_replaces_what_it_should_not_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsam_core.store import LocalStore

    monkeypatch.setattr(LocalStore, "create", lambda self, key, data: self.write_bytes(key, data) or True)
    config = load_config(
        "demo", ["engine.kind=in-process", f"work_dir={tmp_path}", f"storage.results={tmp_path / 'results'}"]
    )
    (failed,) = [finding for finding in doctor.examine(config) if finding.level == "FAIL"]
    assert failed.check == "stores"
    assert "If-None-Match" in failed.text
