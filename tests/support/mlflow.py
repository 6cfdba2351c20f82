"""An MLflow server of a test's own, started as `fedsam track serve` starts it."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class MlflowServer:
    """A server that can be stopped and started again; what it knows is in its folder."""

    def __init__(self, folder: Path, port: int, *arguments: str) -> None:
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "pipelines.track", "serve", f"--folder={folder}", f"--port={port}"]
        self._command += arguments
        self._log = folder.with_name(f"{folder.name}.log")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        root = Path(__file__).parents[2]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                self._command, cwd=root, start_new_session=True, stdout=log, stderr=log, env={**os.environ}
            )
        end = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            except OSError:
                assert self.process.poll() is None, self._log.read_text()[-2000:]
                assert time.monotonic() < end, self._log.read_text()[-2000:]
                time.sleep(0.3)

    def signal(self, number: int) -> None:
        """To the server and all its workers."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """Kills it."""
        if self.process is not None and self.process.poll() is None:
            self.signal(9)
            self.process.wait()


@contextmanager
def mlflow_server(folder: Path, port: int, *arguments: str) -> Iterator[MlflowServer]:
    """A server that runs, and ends with the block."""
    server = MlflowServer(folder, port, *arguments)
    try:
        server.start()
        yield server
    finally:
        server.stop()
