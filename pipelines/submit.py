"""`fedsam submit STAGE`: a stage as a Ray job, its log followed until it ends.

The configuration is resolved here and travels on the job's command line, so the cluster needs none of this machine's
files but the scans and `work_dir`.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import jobs
from fedsam_core.errors import ClusterError
from pipelines.config import Config, as_overrides
from pipelines.stage import add_config_arguments, config_from, guarded

STAGES = ("prepare", "federate", "centralize", "evaluate")


def main(arguments: Sequence[str] | None = None) -> None:
    """Submits, follows, and exits with the job's status."""
    parser = argparse.ArgumentParser(
        prog="fedsam submit",
        description="Runs a stage as a job on a Ray cluster and follows its log. Ctrl-C stops the job.",
        epilog="example: fedsam submit federate --address http://127.0.0.1:8265 --config hippocampus "
        "cohort.path=/data/Task04_Hippocampus",
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument(
        "--address", help="the cluster's jobs API; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265"
    )
    add_config_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    sys.exit(guarded(lambda: submit(options.stage, config_from(options), options.address)))


def submit(stage: str, config: Config, address: str | None) -> None:
    """Runs `stage` as a Ray job to its end.

    Raises:
        ClusterError: no cluster answers, or the job failed.
    """
    job = jobs.submit(address, entrypoint(stage, config), working_dir(), env_vars={})
    status = jobs.follow(address, job)
    if status == jobs.STOPPED:
        raise KeyboardInterrupt
    if status != 0:
        raise ClusterError(f"job {job} ended with status {status}: its log is above")


def entrypoint(stage: str, config: Config) -> str:
    """The job's command line."""
    return shlex.join(["python", "-m", f"pipelines.{stage}", *as_overrides(config)])


def working_dir() -> Path | None:
    """The checkout that this code runs from; None where fedsam is installed, and so is on the cluster too."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() else None
