"""Ray Jobs: submit a command to a cluster, follow its log, stop it."""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.local import local_cluster
from fedsam_core.errors import ClusterError

__all__ = ["DEFAULT_ADDRESS", "follow", "local_cluster", "stop", "submit"]

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOPPED = 130  # exit status of a job that was stopped, as a shell has it for Ctrl-C

# Ray tells at length which files it leaves out of a working directory, and that a connection was closed.
for _chatter in ("ray._private.runtime_env", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
    logging.getLogger(_chatter).setLevel(logging.ERROR)

_ANSWER_SECONDS = 10.0
_AGENT_SECONDS = 60.0  # from a dashboard that answers to a node that can start jobs
_LOST_SECONDS = 30.0  # a dashboard that does not answer for so long is gone


def submit(
    address: str | None, entrypoint: str, working_dir: Path | None = None, env_vars: Mapping[str, str] | None = None
) -> str:
    """Starts `entrypoint` (a shell command) on the cluster's head node; returns the job's id.

    Args:
        address: the cluster's jobs API, http(s)://host:port; None: RAY_API_SERVER_ADDRESS, else the local default.
        entrypoint: runs in a copy of `working_dir`, so paths in it should be absolute.
        working_dir: sent to the cluster, but for what .gitignore and .rayignore name; at most 100 MiB.
        env_vars: environment of the job and of the actors it starts; seen by whoever sees the dashboard.

    Raises:
        ClusterError: no cluster answers, it refuses, or `working_dir` is too large.
    """
    client = _client(address)
    environment: dict[str, object] = {"env_vars": dict(env_vars or {})}
    if working_dir is not None:
        environment["working_dir"] = str(working_dir)
    end = time.monotonic() + _AGENT_SECONDS
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=environment))
        except (RuntimeError, requests.RequestException) as error:
            reason = " ".join(str(error).split())[:300]
            if "status code 413" in reason:
                raise ClusterError(
                    f"{working_dir} is too large to send to the cluster (over 100 MiB): list what a job does not need "
                    f"in {working_dir}/.rayignore"
                ) from error
            # A cluster that has just come up answers before the node's agent does, which starts the jobs.
            if "No available agent" not in reason or time.monotonic() > end:
                raise ClusterError(f"the cluster at {client.get_address()} refused the job: {reason}") from error
            time.sleep(0.5)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def follow(address: str | None, job: str, write: Callable[[str], None] = _show) -> int:
    """Passes the job's output on as it comes, until the job ends; Ctrl-C stops the job.

    Returns:
        The job's exit status: 0, that of its command, 1 where it never ran, 130 where it was stopped.

    Raises:
        ClusterError: there is no such job, or the cluster is gone.
    """
    client = _client(address)
    _status(client, job)
    tail = _Tail(write)
    silent_since: float | None = None
    try:
        while True:
            try:
                asyncio.run(tail.run(client, job))
                status = _status(client, job)
            except (aiohttp.ClientError, requests.RequestException, RuntimeError, OSError) as error:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > _LOST_SECONDS:
                    raise ClusterError(
                        f"the cluster at {client.get_address()} no longer answers ({type(error).__name__}): "
                        f"job {job} may be lost, look there for its log"
                    ) from error
                time.sleep(1)
                continue
            silent_since = None
            if status.is_terminal():
                return _exit_status(client, job, status, write)
            time.sleep(0.2)
    except KeyboardInterrupt:
        write(f"\nstopping job {job} ...\n")
        stop(address, job)
        write(f"job {job} is stopped\n")
        return STOPPED


def stop(address: str | None, job: str) -> None:
    """Stops the job and waits until it has ended; one that has ended already is no error.

    Raises:
        ClusterError: no cluster answers, there is no such job, or it goes on.
    """
    client = _client(address)
    _status(client, job)
    end = time.monotonic() + _LOST_SECONDS
    client.stop_job(job)
    while not _status(client, job).is_terminal():
        if time.monotonic() > end:
            raise ClusterError(f"job {job} at {client.get_address()} does not stop: see its node")
        time.sleep(0.2)


class _Tail:
    """Passes on a job's log. When the connection broke, it begins again at the first line: what was seen is skipped."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._seen = 0

    async def run(self, client: JobSubmissionClient, job: str) -> None:
        position = 0
        async for text in client.tail_job_logs(job):
            fresh = text[max(0, self._seen - position) :]
            position += len(text)
            self._seen = max(self._seen, position)
            if fresh:
                self._write(fresh)


def _status(client: JobSubmissionClient, job: str) -> JobStatus:
    try:
        return client.get_job_status(job)
    except RuntimeError as error:
        if "does not exist" in str(error):
            raise ClusterError(f"there is no job {job} at {client.get_address()}: `ray job list` names them") from error
        raise


def _exit_status(client: JobSubmissionClient, job: str, status: JobStatus, write: Callable[[str], None]) -> int:
    if status == JobStatus.SUCCEEDED:
        return 0
    if status == JobStatus.STOPPED:
        return STOPPED
    info = client.get_job_info(job)
    if info.driver_exit_code is None:
        write(f"{info.message}\n")  # its command never ran, so its log is empty
    return info.driver_exit_code or 1


def _client(address: str | None) -> JobSubmissionClient:
    """A client for a cluster that answers.

    Raises:
        ClusterError: names the address, and what to do.
    """
    address = (address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS).rstrip("/")
    parts = urlsplit(address)
    try:
        usable = parts.scheme in ("http", "https") and bool(parts.netloc) and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise ClusterError(f"{address} is no address of a cluster's jobs API: write it like {DEFAULT_ADDRESS}")
    # Ray reads these variables once, when it is imported; a header works at any time.
    token = os.environ.get("RAY_AUTH_TOKEN") if os.environ.get("RAY_AUTH_MODE") == "token" else None
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        # Ray's own client waits without a limit.
        reply = requests.get(f"{address}/api/jobs/", headers=headers, timeout=_ANSWER_SECONDS)
        if reply.status_code not in (401, 403):
            return JobSubmissionClient(address, headers=headers)
    except (requests.RequestException, ConnectionError, RuntimeError) as error:
        port = parts.port or 8265
        raise ClusterError(
            f"no Ray cluster answers at {address} ({type(error).__name__}): start one with `ray start --head "
            f"--dashboard-port={port}`, or give its address with --address"
        ) from error
    raise ClusterError(
        f"the Ray cluster at {address} wants a token ({reply.status_code}): set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN "
        "to what `ray get-auth-token` prints on the cluster"
    )
