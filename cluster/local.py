"""A Ray cluster of one node on this machine, which ends with whoever started it."""

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import requests
from ray.util import get_node_ip_address

from cluster.certificates import make_certificates, tls_variables
from fedsam_core.errors import ClusterError

_MARK = "FEDSAM_LOCAL_CLUSTER"  # in the environment of every process of the cluster, and of nobody else's
_START_SECONDS = 90.0
_STOP_SECONDS = 15.0
_LONGEST_BASE = 25


@contextmanager
def local_cluster(
    num_cpus: int | None = None,
    resources: Mapping[str, float] | None = None,
    object_store_mb: int = 256,
    tls: bool = False,
) -> Iterator[str]:
    """Starts a Ray head with dashboard and jobs on the loopback; yields its address for `cluster.jobs`.

    Within the block RAY_AUTH_MODE and RAY_AUTH_TOKEN in this process's environment open the cluster, and nobody without
    the token gets in. With `tls` what Ray's processes say to each other is encrypted, too, under certificates of this
    cluster's own; the jobs API stays plain, as it is on the loopback. On leaving, what was started is stopped and
    nothing else: other Ray clusters on the machine stay.

    Args:
        num_cpus: CPUs that Ray may book; by default those of the machine, but at least 4, so that three sites fit.
        resources: custom resources of the node, such as {"site_A": 1}.
        object_store_mb: shared memory for objects, MiB.
        tls: encrypt.

    Raises:
        ClusterError: Ray did not come up.
    """
    program = Path(sysconfig.get_path("scripts")) / "ray"
    if not program.exists():
        raise ClusterError(f"no ray program at {program}: install ray[default] beside {sys.executable}")
    gcs, dashboard, agent, client = _free_ports(4)
    # Ray's socket paths lie in here and must be short.
    base = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="fedsam-", dir=base if len(base) <= _LONGEST_BASE else "/tmp"))  # noqa: S108
    mark = secrets.token_hex(16)
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if tls:
        own: str = get_node_ip_address()  # type: ignore[no-untyped-call]
        access |= tls_variables(folder / "tls", make_certificates(folder / "tls", [own])[0])
    environment = {
        **os.environ,
        **access,
        _MARK: mark,
        "PATH": f"{program.parent}{os.pathsep}{os.environ.get('PATH', '')}",  # a job's `python` is this one
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "20",  # from SIGTERM to SIGKILL; 3 by default, too short for sites that hold GPUs
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nobody else is served who would need the time
    }
    environment.pop("RAY_ADDRESS", None)
    command = [str(program), "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    command += [f"--port={gcs}", f"--ray-client-server-port={client}", f"--temp-dir={folder}"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}"]  # by default the same for all: a second cluster runs no job
    command += [f"--num-cpus={num_cpus or max(4, os.cpu_count() or 1)}"]
    command += [f"--object-store-memory={object_store_mb * 2**20}", "--include-log-monitor=false"]
    command += [f"--resources={json.dumps(dict(resources or {}))}"]
    before = {name: os.environ.get(name) for name in access}
    try:
        with (folder / "start.log").open("w") as log:
            head = subprocess.Popen(  # noqa: S603 - our own program and arguments
                command,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours to handle: the job is stopped first, then the cluster
                preexec_fn=_die_with_parent,
            )
        try:
            address = f"http://127.0.0.1:{dashboard}"
            _wait_until_up(address, head, folder / "start.log", access["RAY_AUTH_TOKEN"])
            os.environ.update(access)
            yield address
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
            _stop(head, mark)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_up(address: str, head: subprocess.Popen[bytes], log: Path, token: str) -> None:
    """Returns when the jobs API answers.

    Raises:
        ClusterError: Ray ended, or did not answer in time.
    """
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if head.poll() is not None:
            last = [line.strip() for line in log.read_text().splitlines() if line.strip()][-1:]
            reason = " ".join(last) or f"exit code {head.returncode}"
            raise ClusterError(f"Ray did not start ({reason}): see what `ray start --head` says")
        try:
            reply = requests.get(
                f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"}, timeout=_START_SECONDS / 10
            )
            if reply.ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.3)
    raise ClusterError(f"Ray did not answer at {address} within {_START_SECONDS:g} s: is the machine short of memory?")


def _stop(head: subprocess.Popen[bytes], mark: str) -> None:
    """Ends the head and every process that carries the cluster's mark."""
    head.terminate()
    try:
        head.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    _, alive = psutil.wait_procs(_marked(mark), timeout=_STOP_SECONDS / 3)
    for process in alive:
        with suppress(psutil.Error, OSError):  # it may have ended by now
            process.kill()
    psutil.wait_procs(alive, timeout=_STOP_SECONDS)


def _marked(mark: str) -> list[psutil.Process]:
    """The processes that inherited the cluster's mark, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # it may have ended by now
            if process.environ().get(_MARK) == mark:
                found.append(process)
    return found


def _die_with_parent() -> None:
    """Runs in the child: it gets SIGTERM when this process ends, even by SIGKILL (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
