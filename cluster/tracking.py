"""MLflow: one run a federation, written from the driver in one batch a round.

Only the client object is used: no global MLflow state, and nothing about the user or machine is recorded that was not
passed in. Passwords come from the environment (MLFLOW_TRACKING_USERNAME, AWS_ACCESS_KEY_ID, ...), never from a
configuration.
"""

import json
import logging
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

# MLflow reads these when it is imported or at each request. Its own patience is minutes: no round should wait for them.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")

from filelock import FileLock
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from pydantic import Field

from cluster.store import PATIENCE_SECONDS, open_store
from fedsam_core.errors import StoreError
from fedsam_core.federation.engine import describe_failure
from fedsam_core.settings import Settings

for _chatter in ("alembic", "mlflow"):
    logging.getLogger(_chatter).setLevel(logging.WARNING)

_log = logging.getLogger(__name__)

# MLflow's limits on one batch.
_LOCK_SECONDS = 120.0
_PARAMS_PER_BATCH = 100
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.:/ -]")
_METRICS_PER_BATCH = 1000
# After a failed request the server is left alone for so long: rounds go on at their own pace while it is away.
_PAUSE_SECONDS = 60.0


class TrackingConfig(Settings):
    """Where runs are recorded."""

    uri: str | None = Field(
        None, description="MLflow server (http://host:port) or database (sqlite:///file); unset: <work_dir>/mlflow.db"
    )
    artifact_root: str | None = Field(
        None, description="folder or s3://bucket/prefix for files of a new experiment; unset: the server's, or a folder"
    )
    experiment: str = Field("fedsam", min_length=1, max_length=500, description="MLflow experiment that holds the runs")


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
        self.uri = config.uri or f"sqlite:///{self._work_dir / 'mlflow.db'}"
        parts = urlsplit(self.uri)
        if parts.scheme in ("", "file"):
            raise StoreError(
                f"tracking uri {self.uri} is a folder, which MLflow no longer writes: use sqlite:///{self.uri}/mlflow.db"
            )
        if parts.password is not None:
            raise StoreError(
                "the tracking uri must not carry a password: remove it, and set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD in the environment"
            )
        self._remote = parts.scheme in ("http", "https")

    @property
    def artifact_root(self) -> str | None:
        """Where a new experiment keeps its files; None leaves it to the server."""
        root = self.config.artifact_root
        if root is None:
            return None if self._remote else (self._work_dir / "mlartifacts").as_uri()
        return root.rstrip("/") if "://" in root else Path(root).absolute().as_uri()

    def check(self) -> None:
        """Finds out, within seconds, whether a run could be recorded and its files kept.

        Raises:
            StoreError: names what cannot be used and the fix.
        """
        experiment = self._asked(lambda: self._client().get_experiment_by_name(self.config.experiment))
        if experiment is not None and experiment.lifecycle_stage != "active":
            raise StoreError(
                f"experiment {self.config.experiment} was deleted at {self.uri}: restore it or choose another name"
            )
        wanted = self.config.artifact_root and self.artifact_root
        if experiment is not None and wanted and experiment.artifact_location != wanted:
            raise StoreError(
                f"experiment {self.config.experiment} keeps its files in {experiment.artifact_location}, not in "
                f"{wanted}: choose another experiment name, or leave artifact_root unset"
            )
        root = experiment.artifact_location if experiment is not None else self.artifact_root
        if root is not None and urlsplit(root).scheme in ("s3", "file", ""):
            open_store(root, self._s3_endpoint).check()

    def start(
        self,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        parent: str | None = None,
    ) -> "RunTracker":
        """Begins a run; use it as a context manager.

        Args:
            name: what the UI shows.
            params: flat and comparable; values are recorded as text.
            tags: hashes, device, engine and the like.
            parent: id of the run that this one belongs to, such as an ablation's.

        Raises:
            StoreError: the server cannot be used.
        """
        client = self._client()
        tags = {**tags, **({"mlflow.parentRunId": parent} if parent else {})}

        def begin() -> "RunTracker":
            run = client.create_run(self._experiment_id(client), tags=tags, run_name=name)
            tracker = RunTracker(client, run.info.run_id, run.info.artifact_uri, self._s3_endpoint)
            entries = [Param(key, str(value)) for key, value in sorted(params.items())]
            for at in range(0, len(entries), _PARAMS_PER_BATCH):
                client.log_batch(run.info.run_id, params=entries[at : at + _PARAMS_PER_BATCH])
            return tracker

        tracker: RunTracker = self._asked(begin)
        return tracker

    def end(self, run_id: str, status: str, reason: str) -> None:
        """Closes the run of a process that is gone (KILLED, FAILED); a failure to do so is a warning."""
        with RunTracker(self._client(), run_id, "", None) as tracker:
            tracker.close_as(status, reason)

    def ui_command(self) -> str:
        """The shell command that shows the runs."""
        if self._remote:
            return f"python -m webbrowser {shlex.quote(self.uri)}"
        environment = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false "  # halves the server's memory
        if self._s3_endpoint:
            environment += f"MLFLOW_S3_ENDPOINT_URL={shlex.quote(self._s3_endpoint)} "
        program = Path(sys.executable).parent / "mlflow"
        if program.is_relative_to(Path.cwd()):
            program = program.relative_to(Path.cwd())
        return f"{environment}{shlex.quote(str(program))} ui --workers 1 --backend-store-uri {shlex.quote(self.uri)}"

    def _client(self) -> MlflowClient:
        def connect() -> MlflowClient:
            if not self.uri.startswith("sqlite:///"):
                return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            database = Path(self.uri.removeprefix("sqlite:///"))
            database.parent.mkdir(parents=True, exist_ok=True)
            # A client makes the tables where they are missing: of two first runs at once, one has to wait.
            with FileLock(f"{database}.lock", timeout=_LOCK_SECONDS):
                return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

        client: MlflowClient = self._asked(connect)
        return client

    def _experiment_id(self, client: MlflowClient) -> str:
        experiment = client.get_experiment_by_name(self.config.experiment)
        if experiment is None:
            try:
                return str(client.create_experiment(self.config.experiment, artifact_location=self.artifact_root))
            except MlflowException:
                # Another run may have created it in the meantime.
                experiment = client.get_experiment_by_name(self.config.experiment)
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

    def _asked(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except StoreError:
            raise
        except Exception as error:  # MLflow lets through whatever its database or HTTP library raises
            raise StoreError(
                f"MLflow at {self.uri} cannot be used ({_brief(error)}): check tracking.uri and that the server runs"
            ) from error


class RunTracker:
    """An open MLflow run. Once it has begun, nothing that befalls the server fails the federation: what could not be
    recorded is a warning.

    On leaving the `with` block the run becomes FINISHED; FAILED with the error's line as tag `error`; KILLED on Ctrl-C.
    """

    def __init__(self, client: MlflowClient, run_id: str, artifact_uri: str, s3_endpoint: str | None) -> None:
        self.run_id = run_id
        self.artifact_uri = artifact_uri
        self._client = client
        self._s3_endpoint = s3_endpoint
        self._patience = PATIENCE_SECONDS
        self._status: tuple[str, str] | None = None
        self._tables: list[dict[str, str]] = []
        self._silent_until = 0.0

    def __enter__(self) -> "RunTracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            self.close_as(status, describe_failure(error))
        status, reason = self._status or ("FINISHED", "")
        self._silent_until = 0.0  # the last word is worth a try
        if reason:
            self.set_tags({"error": reason[:5000]})
        self._attempt(f"the end of the run ({status})", lambda: self._client.set_terminated(self.run_id, status))

    def close_as(self, status: str, reason: str) -> None:
        """What the run is to be recorded as when it ends."""
        self._status = (status, reason)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        entries = [RunTag(key, str(value)) for key, value in sorted(tags.items())]
        self._attempt(f"tags {', '.join(sorted(tags))}", lambda: self._client.log_batch(self.run_id, tags=entries))

    def log_round(self, step: int, metrics: Mapping[str, float]) -> None:
        """All metrics of a round, such as `val/dice` or `site/<id>/dice`, as one batch."""
        now = int(time.time() * 1000)
        # MLflow allows few characters in names, and a class or a site may be called anything.
        entries = [
            Metric(_NOT_IN_NAMES.sub("_", key), float(value), now, step) for key, value in sorted(metrics.items())
        ]
        for at in range(0, len(entries), _METRICS_PER_BATCH):
            batch = entries[at : at + _METRICS_PER_BATCH]
            self._attempt(
                f"{len(batch)} metrics of step {step}", partial(self._client.log_batch, self.run_id, metrics=batch)
            )

    def log_artifact(self, local: Path, folder: str = "") -> None:
        """Keeps a file, or a folder with all it holds, in `folder` of the run's files."""

        def keep() -> None:
            if not local.exists():
                raise StoreError(f"{local} does not exist")
            if urlsplit(self.artifact_uri).scheme != "s3":
                log = self._client.log_artifacts if local.is_dir() else self._client.log_artifact
                log(self.run_id, str(local), folder or None)
                return
            # Through our own store: its timeouts are bounded, and the endpoint needs no process-wide variable.
            store = open_store(self.artifact_uri, self._s3_endpoint, self._patience)
            files = sorted(path for path in local.rglob("*") if path.is_file()) if local.is_dir() else [local]
            base = local if local.is_dir() else local.parent
            try:
                for file in files:
                    store.put_file(file, "/".join(part for part in (folder, file.relative_to(base).as_posix()) if part))
            except StoreError:
                self._patience = 0.0  # waited for once, not once a file
                raise

        self._attempt(f"file {local.name}", keep)

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

    def _attempt(self, what: str, action: Callable[[], Any]) -> None:
        """Runs `action`; if it fails, warns of what was lost and leaves the server alone for a while."""
        if time.monotonic() < self._silent_until:
            _log.warning("MLflow did not get %s: it did not answer shortly before", what)
            return
        try:
            action()
        except Exception as error:
            _log.warning("MLflow did not get %s: %s", what, _brief(error))
            # A value that MLflow refuses, or a store of its own that is away, says nothing about the server.
            refused = isinstance(error, MlflowException) and error.error_code != "INTERNAL_ERROR"
            if not refused and not isinstance(error, StoreError):
                self._silent_until = time.monotonic() + _PAUSE_SECONDS


def _brief(error: Exception) -> str:
    """What went wrong, in a line: of a connection that failed, what the system said, not what wrapped it."""
    root: BaseException = error
    while (inner := root.__cause__ or root.__context__) is not None:
        root = inner
    text = describe_failure(root if isinstance(root, OSError) else error)
    return text if len(text) <= 300 else f"{text[:300]} ..."
