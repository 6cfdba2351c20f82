"""A consortium as its members set it up: keys, roster, certificates, a file for each hospital, and its process."""

import os
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from cluster.gateway.aggregator import GatewayConfig
from cluster.gateway.certificates import create_authority, create_request, sign_aggregator, sign_site
from cluster.gateway.transport import client_context
from fedsam_core.secagg.keyfiles import create_identity

ROOT = Path(__file__).parents[2]


class Consortium:
    """Files below `folder`: authority/, aggregator/, and a folder a site with nothing in it that is not its own."""

    def __init__(self, folder: Path, sites: tuple[str, ...]) -> None:
        self.folder, self.sites, self.port = folder, sites, free_port()
        self.authority = folder / "authority"
        create_authority(self.authority)
        _, request = create_request("aggregator", folder / "aggregator")
        sign_aggregator(request, ["127.0.0.1", "localhost"], self.authority)
        public = []
        for site in sites:
            _, request = create_request(site, folder / site)
            sign_site(request, site, self.authority)
            public.append(create_identity(site, folder / site / "keys", None)[1])
        self.roster = folder / "roster.txt"
        self.roster.write_bytes(b"".join(path.read_bytes() for path in public))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def gateway(self) -> GatewayConfig:
        """As the aggregator is configured."""
        own = self.folder / "aggregator"
        return GatewayConfig(
            listen=f"127.0.0.1:{self.port}",
            certificate=own / "aggregator.crt",
            key=own / "aggregator.tls.key",
            authority=self.authority / "authority.crt",
            wait_s=120,
            patience_s=60,
        )

    @property
    def engine(self) -> dict[str, Any]:
        """The same as a configuration's YAML has it, below `engine`."""
        return {"gateway": self.gateway.model_dump(mode="json")}

    def file(self, site: str, /, **settings: Any) -> Path:
        """A site's own YAML file."""
        own = self.folder / site
        path = own / "site.yaml"
        tree = {
            "site": site,
            "aggregator": f"127.0.0.1:{self.port}",
            "certificate": str(own / f"{site}.crt"),
            "key": str(own / f"{site}.tls.key"),
            "authority": str(self.authority / "authority.crt"),
            "roster": str(self.roster),
            "key_dir": str(own / "keys"),
            "prepared": str(own / "prepared"),
            "site_dir": str(own / "own"),
            "work_dir": str(own / "work"),
            **settings,
        }
        path.write_text(yaml.safe_dump(tree))
        return path

    def serve(self, site: str, **settings: Any) -> None:
        """Starts the site's process; what it says goes to `log(site)`."""
        command = [sys.executable, "-m", "pipelines.site", "serve", str(self.file(site, **settings))]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        with (self.folder / site / "log").open("ab") as log:
            self._processes[site] = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment)

    def log(self, site: str) -> str:
        return (self.folder / site / "log").read_text()

    def kill(self, site: str) -> None:
        """As the power failing: SIGKILL."""
        process = self._processes.pop(site)
        process.kill()
        process.wait()

    def end(self) -> None:
        for site in list(self._processes):
            self.kill(site)

    def context(self, site: str) -> ssl.SSLContext:
        """TLS with a site's certificate, for whoever holds it."""
        own = self.folder / site
        return client_context(own / f"{site}.crt", own / f"{site}.tls.key", self.authority / "authority.crt")


def until(condition: Any, seconds: float = 60.0) -> None:
    """Waits for something that other threads and processes bring about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
