"""MLflow: one run a federation. What it records is on disk at once, and a thread sends it: nobody waits for a server.

Nothing about the user or machine is recorded that was not passed in. Passwords come from the environment
(MLFLOW_TRACKING_USERNAME, AWS_ACCESS_KEY_ID, ...), never from a configuration.
"""

import json
import logging
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mlflow.exceptions import MlflowException
from pydantic import Field

from cluster.registered import save_model
from cluster.sending import NAME_TAG, Sender, Server, brief, deliver
from cluster.spool import Entry, Spool
from cluster.store import open_store
from fedsam_core.errors import StoreError
from fedsam_core.federation.engine import describe_failure
from fedsam_core.settings import Settings

_log = logging.getLogger(__name__)

# MLflow's limits on one batch.
_PARAMS_PER_BATCH = 100
_METRICS_PER_BATCH = 1000
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.:/ -]")
# How long the end of a run waits for what is left to be sent. A database in a file is slow at times, but never away.
_PATIENCE_SECONDS = 20.0
_FILE_PATIENCE_SECONDS = 120.0

T = TypeVar("T")


class TrackingConfig(Settings):
    """Where runs are recorded."""

    uri: str | None = Field(
        None, description="MLflow server (http://host:port) or database (sqlite:///file); unset: <work_dir>/mlflow.db"
    )
    artifact_root: str | None = Field(
        None, description="folder or s3://bucket/prefix for files of a new experiment; unset: the server's, or a folder"
    )
    experiment: str = Field("fedsam", min_length=1, max_length=500, description="MLflow experiment that holds the runs")
    register_as: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,
        description="name of the registered model that a finished federation becomes a version of; unset: none",
    )


@dataclass(frozen=True)
class Synced:
    """What became of a run that waited.

    Attributes:
        run: its name.
        entries: how many were sent.
        waiting: how many still wait.
        running: it goes on.
        problem: why some wait.
    """

    run: str
    entries: int
    waiting: int
    running: bool
    problem: str


class Tracking:
    """A tracking server or database, and where the files of its runs go."""

    def __init__(self, config: TrackingConfig, work_dir: Path, s3_endpoint: str | None = None) -> None:
        """Contacts nothing.

        Args:
            config: where runs and their files go.
            work_dir: has what `config` does not place elsewhere.
            s3_endpoint: address of an S3 server that is not Amazon's, for files in a bucket.

        Raises:
            StoreError: the uri is none that can be used, or carries a password.
        """
        self.config = config
        self._s3_endpoint = s3_endpoint
        self._work_dir = work_dir.absolute()
        self._spools = self._work_dir / "spool"
        self.uri = config.uri or f"sqlite:///{self._work_dir / 'mlflow.db'}"
        parts = urlsplit(self.uri)
        if parts.scheme in ("", "file"):
            raise StoreError(
                f"tracking uri {self.uri} is a folder, which MLflow no longer writes: use sqlite:///{self.uri}/mlflow.db"
            )
        if parts.password is not None or "password" in parts.query:
            raise StoreError(
                "the tracking uri must not carry a password: remove it, and set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD in the environment"
            )
        remote = parts.scheme in ("http", "https")
        root = config.artifact_root
        if root is None:
            root = None if remote else (self._work_dir / "mlartifacts").as_uri()
        else:
            root = root.rstrip("/") if "://" in root else Path(root).absolute().as_uri()
        self.server = Server(self.uri, root, s3_endpoint)

    def check(self) -> None:
        """Finds out, within seconds, whether a run can be recorded and its files kept.

        A server that does not answer is a warning: runs wait on disk until they are sent.

        Raises:
            StoreError: it answers, and will not do; names what cannot be used and the fix.
        """
        silence = self.server.silence()
        if silence:
            _log.warning("%s: what runs record waits in %s until `fedsam track sync` sends it", silence, self._spools)
            return
        experiment = self._asked(lambda: self.server.client().get_experiment_by_name(self.config.experiment))
        if experiment is not None and experiment.lifecycle_stage != "active":
            raise StoreError(
                f"experiment {self.config.experiment} was deleted at {self.uri}: restore it or choose another name"
            )
        wanted = self.config.artifact_root and self.server.artifact_root
        if experiment is not None and wanted and experiment.artifact_location != wanted:
            raise StoreError(
                f"experiment {self.config.experiment} keeps its files in {experiment.artifact_location}, not in "
                f"{wanted}: choose another experiment name, or leave artifact_root unset"
            )
        root = experiment.artifact_location if experiment is not None else self.server.artifact_root
        if root is not None and urlsplit(root).scheme in ("s3", "file", ""):
            open_store(root, self._s3_endpoint).check()

    def start(
        self,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        parent: str | None = None,
        run_id: str | None = None,
    ) -> "RunTracker":
        """Begins a run, or goes on with one, without a word to the server; use it as a context manager.

        Args:
            name: what the UI shows, unless the tags have another under `NAME_TAG`.
            params: flat and comparable; values are recorded as text.
            tags: hashes, device, engine and the like.
            parent: `run_id` of the run that this one belongs to, such as an ablation's.
            run_id: 32 hex digits that the run is to be known by; one that was begun with them is open again.

        Raises:
            StoreError: nothing can be written in work_dir.
        """
        begin = {
            "do": "begin",
            "time": now_ms(),
            "name": tags.get(NAME_TAG, name),
            "experiment": self.config.experiment,
            "tags": {key: str(value) for key, value in sorted(tags.items())},
            "parent": parent,
            "server": asdict(self.server),
        }
        try:
            spool = Spool.create(self._spools, name, run_id)
            again = bool(spool.first)
            if not again:
                spool.append(begin)
            if run_id is not None:
                spool.append({"do": "reopen"})
        except OSError as error:
            raise StoreError(
                f"{self._spools} cannot be written ({error.strerror}): check the rights of work_dir and its space"
            ) from error
        tracker = RunTracker(spool, self.server)
        if again:
            tracker.set_tags(tags)
            return tracker
        for batch in _batches({key: str(value) for key, value in sorted(params.items())}, _PARAMS_PER_BATCH):
            tracker.record({"do": "params", "values": batch})
        return tracker

    def end(self, run_id: str, status: str, reason: str) -> None:
        """Closes the run of a process that is gone (KILLED, FAILED), unless that has closed it itself."""
        spool = Spool.find(self._spools, run_id)
        if spool is not None and not spool.ended:
            with RunTracker(spool, self.server) as tracker:
                tracker.close_as(status, reason)

    def sync(self, progress: Callable[[int, int], None]) -> list[Synced]:
        """Sends everything that waits in work_dir: to the server that each run was meant for, or to `tracking.uri`.

        A run whose process is gone without having closed it becomes KILLED.

        Args:
            progress: told how many entries of how many are done.
        """
        spools = Spool.all(self._spools)
        total, done = sum(spool.waiting() for spool in spools), 0
        synced, away = [], dict[str, str]()
        for spool in spools:
            first = spool.first
            if not first:
                continue  # another sync was faster
            server = Server(**first["server"]) if self.config.uri is None else self.server
            _close_if_abandoned(spool)

            def count(entries: int) -> None:
                nonlocal done
                done += entries
                progress(min(done, total), total)

            sent_before = done
            if server.uri not in away and (silence := server.silence()):
                away[server.uri] = silence
            problem = away.get(server.uri, "")
            if not problem:
                try:
                    deliver(spool, server, count)
                except Exception as error:  # MLflow lets through whatever its database or HTTP library raises
                    problem = brief(error)
            waiting = spool.waiting()
            if done > sent_before or waiting:
                running = bool(spool.first) and not spool.ended
                synced.append(Synced(first["name"], done - sent_before, waiting, running, problem))
        return synced

    def ui_command(self) -> str:
        """The shell command that shows the runs."""
        if self.server.is_web:
            return f"python -m webbrowser {shlex.quote(self.uri)}"
        environment = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false "  # halves the server's memory
        if self._s3_endpoint:
            environment += f"MLFLOW_S3_ENDPOINT_URL={shlex.quote(self._s3_endpoint)} "
        program = Path(sys.executable).parent / "mlflow"
        if program.is_relative_to(Path.cwd()):
            program = program.relative_to(Path.cwd())
        return f"{environment}{shlex.quote(str(program))} ui --workers 1 --backend-store-uri {shlex.quote(self.uri)}"

    def _asked(self, question: Callable[[], T]) -> T | None:
        """The answer; None, and a warning, if the server is too busy to give one."""
        try:
            return question()
        except Exception as error:  # MLflow lets through whatever its database or HTTP library raises
            code = error.error_code if isinstance(error, MlflowException) else ""
            if code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE") and not self.server.is_file:
                _log.warning("MLflow at %s gave no answer (%s): what runs record waits", self.uri, brief(error))
                return None
            raise StoreError(
                f"MLflow at {self.uri} cannot be used ({brief(error)}): check tracking.uri and that the server runs"
            ) from error


class RunTracker:
    """An open run. Nothing that befalls the server delays or fails it: what cannot be sent waits in its spool.

    On leaving the `with` block the run becomes FINISHED; FAILED with the error's line as tag `error`; KILLED on Ctrl-C.
    What is left is then given some seconds to be sent.
    """

    def __init__(self, spool: Spool, server: Server) -> None:
        self._spool = spool
        self._server = server
        self._sender = Sender(spool, server)
        self._status = ("FINISHED", "")
        self._left = False
        self._tables: list[dict[str, str]] = []

    @property
    def run_id(self) -> str:
        """What the run is known by here and, as tag `fedsam.spool`, in MLflow: its own id exists when it was sent."""
        return self._spool.id

    def __enter__(self) -> "RunTracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._left:
            self._sender.close(0)
            self._spool.release()
            return
        if error is not None:
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            self.close_as(status, describe_failure(error))
        status, reason = self._status
        if reason:
            self.set_tags({"error": reason[:5000]})
        self.record({"do": "end", "time": now_ms(), "status": status})
        self._sender.close(_FILE_PATIENCE_SECONDS if self._server.is_file else _PATIENCE_SECONDS)
        self._spool.release()
        if waiting := self._spool.waiting():
            _log.warning("%d entries wait in %s: `fedsam track sync` sends them", waiting, self._spool.folder)

    def close_as(self, status: str, reason: str) -> None:
        """What the run is to be recorded as when it ends."""
        self._status = (status, reason)

    def leave(self) -> None:
        """Records no end: another process goes on with the run."""
        self._left = True

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Adds or replaces tags."""
        self.record({"do": "tags", "values": {key: str(value) for key, value in sorted(tags.items())}})

    def log_round(self, step: int, metrics: Mapping[str, float], time: int | None = None) -> None:
        """All metrics of a round, such as `val/dice` or `site/<id>/dice`, as one batch; `time` (ms) unless it is now.
        What is told again with the same time counts once."""
        now = now_ms() if time is None else time
        # MLflow allows few characters in names, and a class or a site may be called anything.
        values = {_NOT_IN_NAMES.sub("_", key): float(value) for key, value in sorted(metrics.items())}
        for batch in _batches(values, _METRICS_PER_BATCH):
            self.record({"do": "metrics", "time": now, "step": step, "values": batch})

    def log_artifact(self, local: Path, folder: str = "") -> None:
        """Keeps a file, or a folder with all it holds, in `folder` of the run's files."""
        for file in _files_of(local):
            below = file.parent.relative_to(local).as_posix() if local.is_dir() else "."
            self.record({"do": "file", "folder": "/".join(p for p in (folder, below) if p not in ("", "."))}, file)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with the same keys, as `<name>.json` in the layout that MLflow shows and compares as a table."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.json"
            path.write_text(json.dumps(table))
            self.log_artifact(path)
        self._tables.append({"path": f"{name}.json", "type": "table"})
        self.set_tags({"mlflow.loggedArtifacts": json.dumps(self._tables)})

    def log_model(self, name: str, adapter: Path, tags: Mapping[str, str]) -> None:
        """Registers the adapter as the newest version of model `name`; see `cluster.registered`."""
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            save_model(adapter, model)
            self.log_artifact(model, "model")
        values = {key: str(value) for key, value in sorted(tags.items())}
        self.record({"do": "model", "name": name, "folder": "model", "tags": values})

    def record(self, entry: Entry, file: Path | None = None) -> None:
        """Appends to the spool and has it sent. A disk that refuses is a warning."""
        try:
            self._spool.append(entry, file)
        except OSError as error:
            what = entry["do"] if file is None else f"file {file.name}"
            _log.warning("%s cannot be kept for MLflow in %s: %s", what, self._spool.folder, error.strerror)
        self._sender.wake()


def _close_if_abandoned(spool: Spool) -> None:
    """The process that wrote is gone: nobody else will say how the run ended."""
    with spool.sending() as here:
        if here and not spool.ended and spool.abandoned:
            spool.append({"do": "tags", "values": {"error": "its process ended without a word"}})
            spool.append({"do": "end", "time": now_ms(), "status": "KILLED"})


def _files_of(local: Path) -> Iterable[Path]:
    return sorted(path for path in local.rglob("*") if path.is_file()) if local.is_dir() else [local]


def _batches(values: dict[str, Any], size: int) -> Iterable[dict[str, Any]]:
    items = iter(values.items())
    while batch := dict(islice(items, size)):
        yield batch


def now_ms() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)
