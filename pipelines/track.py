"""`fedsam track`: send what runs could not, and start a tracking server."""

import argparse
import importlib.util
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from cluster.tracking import Synced, Tracking
from fedsam_core.errors import ConfigError, StoreError
from pipelines import console
from pipelines.config import Config, load_config
from pipelines.stage import guarded

PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"  # noqa: S105 - the name of a variable
SECRET = "MLFLOW_FLASK_SERVER_SECRET_KEY"  # noqa: S105 - the name of a variable
# Without a file, sync needs work_dir and tracking only; a configuration has a cohort.
_NO_COHORT = ("cohort.name=none", "cohort.source=phantom")
SERVE_HELP = """
examples:
  fedsam track serve                                             sqlite and files in ~/.fedsam/mlflow, this machine only
  MLFLOW_AUTH_ADMIN_PASSWORD=... PGPASSWORD=... AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... \\
  fedsam track serve --backend postgresql://mlflow@db.internal/mlflow --artifacts s3://fedsam/mlflow --auth \\
      --s3-endpoint http://minio.internal:9000 --host 0.0.0.0 --allowed-hosts mlflow.internal:5000

The server keeps running until Ctrl-C. Files go through it, so that only it needs the bucket's keys. PostgreSQL needs
`pip install 'psycopg[binary]'`. With --auth, runs and browsers log in: the first user is admin with the password of
MLFLOW_AUTH_ADMIN_PASSWORD (12 characters or more), read on the first start only; others are made by the admin at
/signup. Runs then need MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. Set MLFLOW_FLASK_SERVER_SECRET_KEY too
where forms are to outlive a restart. Beyond a trusted network put a TLS proxy in front.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `sync` or `serve`, and exits with 0, or with 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="fedsam track", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    syncing = actions.add_parser(
        "sync",
        help="send what runs recorded while the server was away",
        description="Sends what waits in work_dir/spool to the server that each run was meant for, or to tracking.uri "
        "if that is given. Can be repeated, and run twice at once. A run whose process died is closed as KILLED.",
    )
    syncing.add_argument("--config", metavar="FILE", help="YAML file, or a committed experiment")
    syncing.add_argument("overrides", nargs="*", metavar="key=value", help="such as work_dir=/data/fedsam")
    serving = actions.add_parser(
        "serve",
        help="start an MLflow server",
        description="Starts an MLflow server in the foreground.",
        epilog=SERVE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serving.add_argument(
        "--folder", type=Path, default=Path("~/.fedsam/mlflow"), help="for what is not put elsewhere (~/.fedsam/mlflow)"
    )
    serving.add_argument("--backend", metavar="URI", help="sqlite:///FILE, postgresql://USER@HOST/DB (in FOLDER)")
    serving.add_argument("--artifacts", metavar="URI", help="s3://BUCKET/PREFIX or a folder (FOLDER/artifacts)")
    serving.add_argument("--s3-endpoint", metavar="URL", help="of an S3 server that is not Amazon's")
    serving.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (127.0.0.1)")
    serving.add_argument("--port", type=int, default=5000, help="(5000)")
    serving.add_argument("--allowed-hosts", metavar="NAMES", help="names it is called by, with commas between")
    serving.add_argument("--auth", action="store_true", help="ask for user and password")
    options = parser.parse_args(arguments)
    sys.exit(guarded(lambda: _sync(options) if options.action == "sync" else serve(options)))


def _sync(options: argparse.Namespace) -> None:
    cohort = () if options.config else _NO_COHORT
    sync(load_config(options.config, [*cohort, *options.overrides]))


def sync(config: Config) -> None:
    """Sends what waits, and prints what became of each run.

    Raises:
        StoreError: some could not be sent.
    """
    tracking = Tracking(config.tracking, config.work_dir, config.storage.s3_endpoint)
    with console.Bars() as bars:
        runs = tracking.sync(lambda done, total: bars("send", done, total))
    if not runs:
        console.out.print(f"nothing waits in {config.work_dir / 'spool'}")
        return
    rows = [(console.plain(run.run), run.entries, run.waiting, _state(run)) for run in runs]
    console.out.print(console.table("Sent to MLflow", ("run", "sent", "waiting", ""), rows))
    if problem := next((run.problem for run in runs if run.problem), ""):
        waiting = sum(run.waiting for run in runs)
        raise StoreError(f"{waiting} entries wait still ({problem}): start the server, then `fedsam track sync` again")


def _state(run: Synced) -> str:
    if run.problem:
        return "waits"
    return "runs on" if run.running else "complete"


def serve(options: argparse.Namespace) -> None:
    """Becomes the server.

    Raises:
        ConfigError: something that it needs is missing.
    """
    folder = options.folder.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    command, environment = server_command(options, folder, os.environ)
    if options.auth:
        (folder / "auth.ini").write_text(auth_ini(folder))
    console.out.print(f"MLflow: http://{options.host}:{options.port}  (Ctrl-C ends it)")
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)  # noqa: S606 - no shell


def server_command(
    options: argparse.Namespace, folder: Path, environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of the server; no password is on the former.

    Raises:
        ConfigError: a password in an address, or something that --auth or PostgreSQL needs is missing.
    """
    backend = options.backend or f"sqlite:///{folder / 'mlflow.db'}"
    if urlsplit(backend).password is not None:
        raise ConfigError("--backend must not carry a password, which `ps` shows to everyone: set PGPASSWORD")
    try:
        make_url(backend).get_dialect().import_dbapi()
    except ModuleNotFoundError as error:
        raise ConfigError(f"--backend {backend} needs {error.name}: pip install '{error.name}[binary]'") from error
    except ArgumentError as error:
        raise ConfigError(
            f"--backend {backend} is no database: write sqlite:///FILE or postgresql://USER@HOST/DB"
        ) from error
    needed = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # halves its memory
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--backend-store-uri", backend]
    command += ["--artifacts-destination", options.artifacts or str(folder / "artifacts")]
    command += ["--host", options.host, "--port", str(options.port)]
    if options.allowed_hosts:
        command += ["--allowed-hosts", options.allowed_hosts]
    if options.s3_endpoint:
        needed["MLFLOW_S3_ENDPOINT_URL"] = options.s3_endpoint
    if options.auth:
        if importlib.util.find_spec("flask_wtf") is None:
            raise ConfigError("--auth needs a package: pip install flask-wtf")
        if not environment.get(PASSWORD) and not (folder / "users.db").exists():
            raise ConfigError(f"--auth makes the user admin on its first start: set {PASSWORD} (12 characters or more)")
        command += ["--app-name", "basic-auth"]
        needed["MLFLOW_AUTH_CONFIG_PATH"] = str(folder / "auth.ini")
        needed[SECRET] = environment.get(SECRET) or secrets.token_hex(32)
    return command, {**environment, **needed}


def auth_ini(folder: Path) -> str:
    """MLflow's settings of users and rights. Whoever has an account reads all runs and changes their own."""
    return (
        "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = sqlite:///{folder / 'users.db'}\n"
        "admin_username = admin\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "grant_default_workspace_access = false\n"
    )


if __name__ == "__main__":
    main()
