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
from fedsam_core import logs
from fedsam_core.errors import ClusterError, ConfigError
from pipelines.config import Config, as_overrides
from pipelines.resume import resume_command
from pipelines.stage import add_config_arguments, config_from, guarded
from pipelines.study import Study, load_study

STAGES = ("doctor", "prepare", "federate", "resume", "ablate", "centralize", "evaluate")


def main(arguments: Sequence[str] | None = None) -> None:
    """Submits, follows, and exits with the job's status."""
    parser = argparse.ArgumentParser(
        prog="fedsam submit",
        description="Runs a stage as a job on a Ray cluster and follows its log. Ctrl-C stops the job.",
        epilog="example: fedsam submit federate --address http://127.0.0.1:8265 --config hippocampus "
        "cohort.path=/data/Task04_Hippocampus; with ablate the study comes first, with resume the run: fedsam submit "
        "ablate STUDY key=value",
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument(
        "--address", help="the cluster's jobs API; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265"
    )
    add_config_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    sys.exit(guarded(lambda: submit(_command(options), options.address)))


def _command(options: argparse.Namespace) -> list[str]:
    if options.stage == "resume":
        if not options.overrides or "=" in options.overrides[0]:
            raise ConfigError("which run? write `fedsam submit resume RUN key=value ...`")
        return resume_command(options.overrides[0], options.overrides[1:])
    if options.stage != "ablate":
        return stage_command(options.stage, config_from(options))
    if not options.overrides or "=" in options.overrides[0].partition("{")[0]:
        raise ConfigError("which study? write `fedsam submit ablate STUDY key=value ...`")
    return study_command(load_study(options.overrides[0], options.overrides[1:]))


def submit(command: Sequence[str], address: str | None) -> None:
    """Runs a command as a Ray job to its end.

    Raises:
        ClusterError: no cluster answers, or the job failed.
    """
    environment = {logs.VARIABLE: "1"} if logs.wanted() else {}
    job = jobs.submit(address, shlex.join(command), working_dir(), environment)
    status = jobs.follow(address, job)
    if status == jobs.STOPPED:
        raise KeyboardInterrupt
    if status != 0:
        raise ClusterError(f"job {job} ended with status {status}: its log is above")


def stage_command(stage: str, config: Config) -> list[str]:
    """The job's command line."""
    return ["python", "-m", f"pipelines.{stage}", *as_overrides(config)]


def study_command(study: Study) -> list[str]:
    """The job's command line for a study: its file travels in it."""
    return ["python", "-m", "pipelines.ablate", study.model_dump_json(by_alias=True, exclude_unset=True)]


def working_dir() -> Path | None:
    """The checkout that this code runs from; None where fedsam is installed, and so is on the cluster too."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() else None
