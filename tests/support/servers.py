"""An S3 server to be killed and started again: SeaweedFS."""

import contextlib
import json
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

PROGRAM = Path(sysconfig.get_path("scripts")) / "weed"


@dataclass(frozen=True)
class S3Server:
    """A running S3 server; its keys are those that the fixture has put into the environment."""

    endpoint: str
    access_key: str = "test-access"
    secret_key: str = "test-secret"
    bucket: str = "fedsam-test"


class Seaweed:
    """SeaweedFS on free ports of the loopback: it can be killed and started again."""

    def __init__(self, folder: Path | None = None) -> None:
        """What it stores lies in `folder`, which stays; without one in a temporary folder, which ends with it."""
        self._stays = folder is not None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="fedsam-s3-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = {"name": "test", "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        identity["credentials"] = [{"accessKey": S3Server.access_key, "secretKey": S3Server.secret_key}]
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        services = ("master", "volume", "filer", "s3")
        names = [f"{service}.port{kind}" for service in services for kind in ("", ".grpc")]
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self._command = [str(PROGRAM), "server", "-s3", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        self._command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=500"]
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

    def create_bucket(self, seconds: float = 60) -> None:
        """Returns when the bucket is there, and objects can be written to it."""
        end = time.monotonic() + seconds
        client = boto3.client(
            "s3",
            endpoint_url=self.server.endpoint,
            aws_access_key_id=self.server.access_key,
            aws_secret_access_key=self.server.secret_key,
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 1}, connect_timeout=1, read_timeout=5),
        )
        while True:
            try:
                with contextlib.suppress(
                    client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists
                ):
                    client.create_bucket(Bucket=self.server.bucket)
                client.put_object(Bucket=self.server.bucket, Key="ready", Body=b"")
                return
            except (BotoCoreError, ClientError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def remove(self) -> None:
        """Ends it, and leaves nothing behind but a folder that was given."""
        self.kill()
        if not self._stays:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._clear_sockets()

    def _clear_sockets(self) -> None:
        for port in self._ports.values():
            for left_over in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left_over.unlink()


@contextlib.contextmanager
def seaweed_server(folder: Path | None = None) -> Iterator[Seaweed]:
    """A server with its bucket, which ends with the block; see `Seaweed`."""
    own = Seaweed(folder)
    try:
        own.start()
        own.create_bucket()
        yield own
    finally:
        own.remove()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
