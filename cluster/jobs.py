"""Ray Jobs: submit a command to a cluster, follow its log, stop it."""

import asyncio
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.local import local_cluster
from fedsam_core.errors import ClusterError

__all__ = ["DEFAULT_ADDRESS", "follow", "local_cluster", "stop", "submit"]

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOPPED = 130  # exit status of a job that was stopped, as a shell has it for Ctrl-C

_ANSWER_SECONDS = 10.0
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
    try:
        return str(client.submit_job(entrypoint=entrypoint, runtime_env=environment))
    except ValueError as error:
        if "exceeds the maximum size" in str(error):
            raise ClusterError(
                f"{working_dir} is too large to send to the cluster (over 100 MiB): list what a job does not need in "
                f"{working_dir}/.rayignore"
            ) from error
        raise
    except (RuntimeError, requests.RequestException) as error:
        raise ClusterError(f"the cluster at {client.get_address()} refused the job ({_line(error)})") from error


def follow(address: str | None, job: str, write: Callable[[str], object] = sys.stdout.write) -> int:
    """Passes the job's output on as it comes, until the job ends; Ctrl-C stops the job.

    Returns:
        The job's exit status: 0, that of its command, 1 where it never ran, 130 where it was stopped.

    Raises:
        ClusterError: there is no such job, or the cluster is gone.
    """
    client = _client(address)
    seen = 0
    silent_since: float | None = None
    try:
        while True:
            try:
                skip = seen
                for_now = _Tail(write, skip)
                try:
                    asyncio.run(for_now.run(client, job))
                finally:
                    seen = max(seen, for_now.position)
                status = client.get_job_status(job)
                silent_since = None
            except (RuntimeError, OSError) as error:  # both the socket's and the requests' own errors are among these
                if "does not exist" in str(error):
                    raise ClusterError(f"there is no job {job} at {client.get_address()}") from error
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > _LOST_SECONDS:
                    raise ClusterError(
                        f"the cluster at {client.get_address()} no longer answers ({_line(error)}): job {job} may be lost"
                    ) from error
                time.sleep(1)
                continue
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
        ClusterError: no cluster answers, or there is no such job.
    """
    client = _client(address)
    try:
        client.stop_job(job)
        end = time.monotonic() + _LOST_SECONDS
        while not client.get_job_status(job).is_terminal() and time.monotonic() < end:
            time.sleep(0.2)
    except RuntimeError as error:
        raise ClusterError(f"job {job} at {client.get_address()} cannot be stopped ({_line(error)})") from error


class _Tail:
    """Passes on a job's log from character `skip` on. A connection that broke begins again at the log's first line."""

    def __init__(self, write: Callable[[str], object], skip: int) -> None:
        self.position = 0
        self._write = write
        self._skip = skip

    async def run(self, client: JobSubmissionClient, job: str) -> None:
        async for text in client.tail_job_logs(job):
            fresh = text[max(0, self._skip - self.position) :]
            self.position += len(text)
            if fresh:
                self._write(fresh)
                with suppress(AttributeError, OSError):
                    sys.stdout.flush()


def _exit_status(client: JobSubmissionClient, job: str, status: JobStatus, write: Callable[[str], object]) -> int:
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
    if parts.scheme not in ("http", "https") or not parts.netloc:
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
        f"the Ray cluster at {address} wants a token ({reply.status_code}): set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to "
        "what `ray get-auth-token` prints on the cluster"
    )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
