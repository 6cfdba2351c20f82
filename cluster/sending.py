"""Sends what waits in a run's spool to MLflow: each entry once, in order, while the run goes on or long after.

A run is told by its tag `fedsam.spool`, which it is looked up by before it is made: where an answer is lost, no second
run comes of it. Whatever else is sent twice because a process died before it could note it, MLflow takes for the same.
Only the client object is used: no global MLflow state.
"""

import logging
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# MLflow reads these when it is imported or at each request. Its own patience is minutes, and its own retries know
# nothing of the run that the first request has made.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # in the midst of the driver's own lines
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

from filelock import FileLock
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from cluster.spool import Entry, Spool
from cluster.store import open_store
from fedsam_core.federation.engine import describe_failure

for _chatter in ("alembic", "mlflow"):
    logging.getLogger(_chatter).setLevel(logging.WARNING)

_log = logging.getLogger(__name__)

SPOOL_TAG = "fedsam.spool"
NAME_TAG = "mlflow.runName"
PARENT_TAG = "mlflow.parentRunId"
NEWEST = "newest"  # MLflow keeps the alias `latest` for itself

_LOCK_SECONDS = 120.0
# After a failed pass the server is left alone for so long.
_PAUSE_SECONDS = 60.0
# How long a question whether anyone is there at all may take.
_PROBE_SECONDS = 3.0
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_GATEWAY_ERRORS = (502, 503, 504)
# What MLflow will refuse as often as it is asked. All else may be the server's state, or a password.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")

Progress = Callable[[int], None]
"""Called for each entry that was sent, with 1."""


@dataclass(frozen=True)
class Server:
    """A tracking server or database.

    Attributes:
        uri: without a password.
        artifact_root: where a new experiment keeps its files; None leaves it to the server.
        s3_endpoint: address of an S3 server that is not Amazon's.
    """

    uri: str
    artifact_root: str | None
    s3_endpoint: str | None

    @property
    def is_web(self) -> bool:
        """Whether it is an MLflow server, and not a database."""
        return urlsplit(self.uri).scheme in ("http", "https")

    @property
    def is_file(self) -> bool:
        """Whether it is a database in a file: always there, and never to be waited for."""
        return self.uri.startswith("sqlite:///")

    def silence(self) -> str:
        """Who does not answer, server or file store, and why; empty if both do. Takes seconds at the most."""
        for address in filter(None, (self.uri, self.s3_endpoint)):
            if why := _silence(address):
                return f"{address} does not answer ({why})"
        return ""

    def client(self) -> MlflowClient:
        """Raises whatever MLflow's database or HTTP library raises."""
        connect = partial(MlflowClient, tracking_uri=self.uri, registry_uri=self.uri)
        if not self.is_file:
            return connect()
        database = Path(self.uri.removeprefix("sqlite:///"))
        database.parent.mkdir(parents=True, exist_ok=True)
        # A client makes the tables where they are missing: of two first runs at once, one has to wait.
        with FileLock(f"{database}.lock", timeout=_LOCK_SECONDS):
            return connect()

    def experiment_id(self, client: MlflowClient, name: str) -> str:
        """The experiment's, which is made if there is none."""
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(client.create_experiment(name, artifact_location=self.artifact_root))
            except MlflowException:
                # Another run may have created it in the meantime.
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return str(experiment.experiment_id)


def deliver(spool: Spool, server: Server, progress: Progress | None = None) -> None:
    """Sends all that waits. What MLflow refuses for good is a warning; after the run's end its spool is removed.

    Raises:
        Exception: whatever keeps an entry from being sent. It and all after it still wait.
    """
    with spool.sending() as here:
        if not here:
            return
        client = None
        for entry, offset in spool.pending():
            client = client or server.client()
            if entry["do"] == "begin":
                _begin(client, spool, server, entry, offset)
            else:
                try:
                    _SENDERS[entry["do"]](client, spool, server, entry)
                except MlflowException as error:
                    if error.error_code not in _REFUSALS:
                        raise
                    _log.warning("MLflow refused %s: %s", _what(entry), brief(error))
                spool.mark(offset, entry)
            if progress:
                progress(1)
        if spool.ended and not spool.waiting():
            spool.remove()


class Sender:
    """A thread that sends what is appended to a spool, so that whoever appends never waits for the server."""

    def __init__(self, spool: Spool, server: Server) -> None:
        self._spool = spool
        self._server = server
        self._news = threading.Event()
        self._closing = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name=f"mlflow-{spool.id}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something to send."""
        self._news.set()

    def close(self, patience: float) -> None:
        """There will be no more. Waits until all is sent, but no longer than `patience` seconds."""
        self._closing.set()
        self._news.set()
        self._thread.join(patience)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._news.wait()
            self._news.clear()
            if not self._try():
                self._closing.wait(_PAUSE_SECONDS)
                self._news.set()
        self._try()  # the last word is worth it

    def _try(self) -> bool:
        try:
            deliver(self._spool, self._server)
        except Exception as error:  # MLflow lets through whatever its database or HTTP library raises
            if not self._failed:
                _log.warning(
                    "MLflow at %s did not take what the run records, which now waits in %s: %s",
                    self._server.uri,
                    self._spool.folder,
                    brief(error),
                )
            self._failed = True
            return False
        self._failed = False
        return True


def brief(error: BaseException) -> str:
    """What went wrong, in a line: of a connection that failed, what the system said, not what wrapped it."""
    root = error
    while (inner := root.__cause__ or root.__context__) is not None:
        root = inner
    text = describe_failure(root if isinstance(root, OSError) else error)
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _begin(client: MlflowClient, spool: Spool, server: Server, entry: Entry, offset: int) -> None:
    experiment = server.experiment_id(client, entry["experiment"])
    made = _runs(client, experiment, spool.id)
    if made:
        run = made[0]
    else:
        tags = {**entry["tags"], SPOOL_TAG: spool.id}
        if entry["parent"] and (parent := _mlflow_run(client, spool, server, entry["parent"])):
            tags[PARENT_TAG] = parent
        run = client.create_run(experiment, start_time=entry["time"], tags=tags, run_name=entry["name"])
    spool.mark(offset, entry, run_id=run.info.run_id, artifact_uri=run.info.artifact_uri)


def _runs(client: MlflowClient, experiment: str, spool_id: str) -> list[Any]:
    """Runs of that spool, oldest first."""
    return list(client.search_runs([experiment], f"tags.`{SPOOL_TAG}` = '{spool_id}'", order_by=["start_time ASC"]))


def _mlflow_run(client: MlflowClient, spool: Spool, server: Server, run: str) -> str | None:
    """What MLflow calls the run of that id, which is begun if it was not; None, and a warning, if nobody knows it."""
    other = Spool.find(spool.folder.parent, run)
    if other is not None:
        with other.sending() as here:
            if here and "run_id" not in other.sent:
                entry, offset = next(other.pending())
                _begin(client, other, server, entry, offset)
            if here:
                return str(other.sent["run_id"])
    for experiment in client.search_experiments():
        if found := _runs(client, experiment.experiment_id, run):
            return str(found[0].info.run_id)
    _log.warning("MLflow at %s has no run %s, the parent of %s: it is recorded alone", server.uri, run, spool.folder)
    return None


def _params(client: MlflowClient, spool: Spool, server: Server, entry: Entry) -> None:
    client.log_batch(spool.sent["run_id"], params=[Param(key, value) for key, value in entry["values"].items()])


def _tags(client: MlflowClient, spool: Spool, server: Server, entry: Entry) -> None:
    client.log_batch(spool.sent["run_id"], tags=[RunTag(key, value) for key, value in entry["values"].items()])


def _metrics(client: MlflowClient, spool: Spool, server: Server, entry: Entry) -> None:
    metrics = [Metric(key, value, entry["time"], entry["step"]) for key, value in entry["values"].items()]
    client.log_batch(spool.sent["run_id"], metrics=metrics)


def _file(client: MlflowClient, spool: Spool, server: Server, entry: Entry) -> None:
    sent, local, folder = spool.sent, spool.folder / entry["file"], entry["folder"]
    if urlsplit(sent["artifact_uri"]).scheme == "s3":
        # Through our own store: its timeouts are bounded, and the endpoint needs no process-wide variable.
        store = open_store(sent["artifact_uri"], server.s3_endpoint)
        store.put_file(local, "/".join(part for part in (folder, local.name) if part))
    else:
        client.log_artifact(sent["run_id"], str(local), folder or None)


def _model(client: MlflowClient, spool: Spool, server: Server, entry: Entry) -> None:
    """A version of a registered model from files that were sent before."""
    name, sent = entry["name"], spool.sent
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = next(iter(client.search_model_versions(f"run_id = '{sent['run_id']}' and name = '{name}'")), None)
    if version is None:
        source = f"{sent['artifact_uri']}/{entry['folder']}"
        version = client.create_model_version(name, source, sent["run_id"], tags=entry["tags"])
    client.set_registered_model_alias(name, NEWEST, version.version)


def _reopen(client: MlflowClient, spool: Spool, server: Server, entry: Entry) -> None:
    """A run that goes on has not ended, whatever was said."""
    run = client.get_run(spool.sent["run_id"])
    client.update_run(run.info.run_id, status="RUNNING")
    if "error" in run.data.tags:
        client.delete_tag(run.info.run_id, "error")


def _end(client: MlflowClient, spool: Spool, server: Server, entry: Entry) -> None:
    run = spool.sent["run_id"]
    client.set_terminated(run, entry["status"], entry["time"])
    # A request that was given up may have been answered after the run was looked up, and have made another.
    for stray in _runs(client, client.get_run(run).info.experiment_id, spool.id):
        if stray.info.run_id != run:
            client.delete_run(stray.info.run_id)


_SENDERS = {
    "params": _params,
    "tags": _tags,
    "metrics": _metrics,
    "file": _file,
    "model": _model,
    "reopen": _reopen,
    "end": _end,
}


def _what(entry: Entry) -> str:
    """An entry in words."""
    match entry["do"]:
        case "metrics":
            return f"{len(entry['values'])} metrics of step {entry['step']}"
        case "params" | "tags":
            return f"{entry['do']} {', '.join(entry['values'])}"
        case "file":
            return f"file {Path(entry['file']).name}"
        case "model":
            return f"model {entry['name']}"
        case "reopen":
            return "that the run goes on"
    return f"the end of the run ({entry['status']})"


def _silence(address: str) -> str:
    """Why nobody answers at an address; empty if someone does, or if there is nobody to ask."""
    parts = urlsplit(address)
    port = parts.port or _PORTS.get(parts.scheme.partition("+")[0])
    try:
        if parts.scheme in ("http", "https"):
            with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=_PROBE_SECONDS):  # noqa: S310 - http(s)
                return ""
        if parts.hostname and port:
            socket.create_connection((parts.hostname, port), _PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        return str(error) if error.code in _GATEWAY_ERRORS else ""  # any other answer is one
    except (OSError, HTTPException) as error:
        return brief(error)
    return ""
