"""Stage `resume`: goes on with a run whose driver was stopped or lost, from the last round that it finished.

  fedsam resume spleen-20261123-141500-ab12cd-9f3e          # in ~/.fedsam/runs, or in the work_dir that follows
  fedsam resume ~/.fedsam/runs/spleen-20261123-141500-ab12cd-9f3e
  fedsam resume NAME storage.results=s3://fedsam/results    # on a machine that has never seen the run
  fedsam submit resume NAME --address http://127.0.0.1:8265 # as a job

The run keeps its id, its folder and its MLflow run, and ends with the same bits as if it had never been interrupted (on
CPUs). Its configuration is its own; only work_dir, storage, tracking and engine may be given anew. A run that was begun
as `fedsam federate run=NAME` also goes on when that command is given again.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import Field, ValidationError

import fedsam_core
from fedsam_core.errors import CheckpointError, ConfigError, StoreError
from fedsam_core.federation.checkpoint import Checkpoint
from fedsam_core.federation.preparation import PreparedSites
from fedsam_core.hashing import file_sha256
from fedsam_core.settings import Settings
from fedsam_core.store import LocalStore, Store
from pipelines.checkpoints import (
    CHECKPOINTS,
    checkpoint_file,
    clear,
    finished_rounds,
    read_checkpoint,
    unfold,
)
from pipelines.commits import (
    BEGUN,
    COMMIT,
    RESULT,
    UNSENT,
    fetch_run,
    last_committed,
    read_commit,
    results_store,
    round_place,
    waiting_rounds,
)
from pipelines.config import Config, config_tree, explain, flatten, inline
from pipelines.run_folder import RECORD, RunFolder
from pipelines.stage import guarded

ELSEWHERE = ("work_dir", "storage", "tracking", "engine")
"""Sections of a configuration that say where and by what a run is done, and nothing of what it is."""

_COMPARED_BY_HASH = ("cohort", "run")
_SUMMARY = "summary.json"
_NAMED = 4  # of what has changed


class FinishedRun(ConfigError):
    """The run has come to its end."""


class Begun(Settings):
    """What a run was begun with: what it goes on with must be the same."""

    run: str
    version: str
    time: str
    config: dict[str, Any] = Field(description="all settings, as JSON values")
    shares: dict[str, str] = Field(description="hash of each site's prepared scans")
    backbone: str = Field(description="SHA-256 (hex) of the file that the weights are from, or nothing")
    code: dict[str, str] = Field(description="SHA-256 (hex) of each source file, by its path")
    tracking: str = Field(description="what its MLflow run is known by")


@dataclass(frozen=True)
class LeftOff:
    """Where a run goes on: its last checkpoint, and the lines of the record up to it."""

    checkpoint: Checkpoint
    record: tuple[bytes, ...]


def main(arguments: Sequence[str] | None = None) -> None:
    """Resumes, and exits with the status of `federate`."""
    from pipelines.federate import run  # which imports this module

    options = resume_parser("fedsam resume", __doc__ or "").parse_intermixed_args(arguments)
    sys.exit(guarded(lambda: run(config_of_run(options.run, options.overrides))))


def resume_parser(prog: str, doc: str) -> argparse.ArgumentParser:
    """For commands that are about one run: `RUN key=value ...`."""
    parser = argparse.ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run's id, or its folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"where it is: keys of {', '.join(ELSEWHERE)}"
    )
    return parser


def resume_command(run: str, overrides: Sequence[str]) -> list[str]:
    """The command line of a job that resumes a run."""
    config = config_of_run(run, overrides)
    places = config_tree(None, list(overrides)) | {"work_dir": str(config.work_dir)}
    settings = [f"{key}={inline(value)}" for key, value in flatten(places).items()]
    return ["python", "-m", "pipelines.resume", str(config.run), *settings]


def config_of_run(run: str, overrides: Sequence[str]) -> Config:
    """The configuration that a run was begun with, told where to find it.

    Args:
        run: its folder, or its id; then `work_dir` or `storage.results` among the overrides may say where it is.

    Raises:
        ConfigError: an override that is not about places, or no such run.
        StoreError: the results store cannot be read.
    """
    given = _given(overrides)
    if "/" in run or Path(run).is_dir():
        folder = Path(run).expanduser().absolute()
        given.setdefault("work_dir", str(folder.parent.parent))
        run = folder.name
    places = _places(given)
    begun = read_begun(LocalStore(places.work_dir), run)
    if begun is None and places.storage.results is not None:
        begun = read_begun(results_store(places), run)
    if begun is None:
        where = " and ".join(filter(None, [str(places.work_dir / "runs"), places.storage.results]))
        raise ConfigError(
            f"no run {run} in {where} that can go on: `fedsam runs` lists them; say where it is with work_dir=FOLDER "
            "or storage.results=URL"
        )
    config = begun.config | {"run": run, "work_dir": str(places.work_dir)}
    for key in ELSEWHERE:
        if isinstance(given.get(key), dict):
            config[key] = _merged(config.get(key) or {}, given[key])
    try:
        return Config.model_validate(config)
    except ValidationError as error:
        reasons = "; ".join(explain(one, None) for one in error.errors())
        raise ConfigError(f"run {run} was begun by version {begun.version}, which has other keys: {reasons}") from error


def places_of(overrides: Sequence[str]) -> Config:
    """A configuration of which only the places count. Raises ConfigError."""
    return _places(_given(overrides))


def _given(overrides: Sequence[str]) -> dict[str, Any]:
    given = config_tree(None, list(overrides))
    if odd := sorted(set(given) - set(ELSEWHERE)):
        raise ConfigError(
            f"a run goes on with its own configuration, and {odd[0]} cannot be changed: only {', '.join(ELSEWHERE)} can"
        )
    return given


def _places(given: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate({"cohort": {"name": "any", "source": "phantom"}, **given})
    except ValidationError as error:
        raise ConfigError("; ".join(explain(one, None) for one in error.errors())) from error


def read_begun(store: Store, run: str) -> Begun | None:
    """What a run was begun with; None where there is no such run.

    Raises:
        StoreError: it is damaged, or the store cannot be read.
    """
    key = f"runs/{run}/{BEGUN}"
    if not store.exists(key):
        return None
    try:
        return Begun.model_validate_json(store.read_bytes(key))
    except ValidationError as error:
        raise StoreError(f"{store.url}/{key} is damaged (no beginning of a run): restore it from a copy") from error


def begin(config: Config, run: str, about: PreparedSites, code: Mapping[str, str]) -> Begun:
    """Notes what a run begins with; for one that has begun, compares it.

    Raises:
        FinishedRun: it has come to its end.
        ConfigError: configuration, code, cohort or backbone are others than it was begun with; names what.
    """
    store, checkpoint = results_store(config), config.model.weights_file
    now = Begun(
        run=run,
        version=fedsam_core.__version__,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        config=config.model_dump(mode="json"),
        shares={site: share["hash"] for site, share in about.shares.items()},
        backbone="" if checkpoint is None else file_sha256(checkpoint),
        code=dict(code),
        tracking=uuid4().hex,
    )
    store.create(f"runs/{run}/{BEGUN}", _packed(now))
    begun = read_begun(store, run) or now
    _require_unfinished(config, store, run)
    if changes := list(_changes(begun, now)):
        raise ConfigError(
            f"run {run} cannot go on, as what decides its result has changed: {'; '.join(changes)}. Put it back, or "
            "begin a new run"
        )
    RunFolder(config.work_dir / "runs" / run).write(BEGUN, _packed(begun))
    return begun


def is_finished(config: Config, store: Store, run: str) -> bool:
    """Whether nothing is left to do for a run."""
    if config.storage.results is not None:
        return read_commit(store, run, RESULT) is not None
    folder = RunFolder(config.work_dir / "runs" / run)
    return folder.file(_SUMMARY).is_file() and not finished_rounds(folder)


def _require_unfinished(config: Config, store: Store, run: str) -> None:
    if is_finished(config, store, run):
        raise FinishedRun(f"run {run} has come to its end: give the next one another name, or none")


def left_off(config: Config, folder: RunFolder, say: Callable[[str], None]) -> LeftOff | None:
    """Brings the folder of a run to its last finished round; None where it has not finished any. The caller holds the
    run's lease.

    Args:
        say: told where a round had to be given up.

    Raises:
        FinishedRun: it has come to its end.
        CheckpointError: checkpoints are there, and none of them can be used.
        StoreError: the store cannot be read.
    """
    store = results_store(config)
    _require_unfinished(config, store, folder.path.name)  # another driver may have been faster
    if config.storage.results is not None:
        _fetch_newest(store, folder, say)
    found = finished_rounds(folder)
    for number in reversed(found):
        try:
            checkpoint, lines = read_checkpoint(folder, number)
        except CheckpointError as error:
            say(f"round {number} is given up: {error}")
            problem = error
            continue
        unfold(folder, checkpoint, lines)
        return LeftOff(checkpoint, tuple(lines))
    if found:
        raise CheckpointError(f"{problem}; nor can an earlier round be used: restore the folder from a copy")
    clear(folder)
    return None


def _fetch_newest(store: Store, folder: RunFolder, say: Callable[[str], None]) -> None:
    """Brings the folder to the last round of the results store, unless it is ahead of that: rounds that the store has
    not taken yet wait here."""
    run = folder.path.name
    there = last_committed(store, run)
    unsent = folder.file(UNSENT)
    shutil.rmtree(unsent / RESULT, ignore_errors=True)
    for place in sorted((unsent / "rounds").glob("*")):
        if int(place.name) <= there or not (place / COMMIT).is_file():
            shutil.rmtree(place)
    waiting = [int(commit.place.rpartition("/")[2]) for commit in waiting_rounds(folder.path)]
    if waiting == list(range(there + 1, there + 1 + len(waiting))) and _continues(store, folder, there):
        here = waiting[-1] if waiting else there
        for number in finished_rounds(folder):
            if number > here:  # not set aside for the store: the driver was lost before
                folder.file(checkpoint_file(number)).unlink()
        if here in finished_rounds(folder):
            return
    for name in (UNSENT, CHECKPOINTS):
        shutil.rmtree(folder.file(name), ignore_errors=True)
    while there >= 0:
        try:
            fetch_run(store, run, folder.path, there)
            return
        except (StoreError, CheckpointError) as error:
            if "damaged" not in str(error) and "not there" not in str(error):
                raise
            say(f"round {there} is given up: {error}")
            store.delete(f"runs/{run}/{round_place(there)}/{COMMIT}")
            there -= 1


def _continues(store: Store, folder: RunFolder, last: int) -> bool:
    """Whether the record in the folder goes on from the one in the store, and not from another driver's."""
    run, record = folder.path.name, folder.file(RECORD)
    if last < 0:
        return True
    if not record.is_file():
        return False
    told = b""
    for number in range(last + 1):
        commit = read_commit(store, run, round_place(number))
        if commit is None:
            return False
        told += store.read_bytes(f"runs/{run}/{commit.key(RECORD)}")
    return record.read_bytes().startswith(told)


def _changes(begun: Begun, now: Begun) -> list[str]:
    """What decides the result and is not as it was, in words."""
    then, given = flatten(compared(begun.config)), flatten(compared(now.config))
    keys = sorted(key for key in then.keys() | given.keys() if then.get(key) != given.get(key))
    found = [f"{key} was {then.get(key)}, now {given.get(key)}" for key in keys[:_NAMED]]
    for what, before, after in (
        ("the prepared scans of site", begun.shares, now.shares),
        ("the code in", begun.code, now.code),
    ):
        if differing := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
            more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
            found.append(f"{what} {', '.join(differing[:_NAMED])}{more}")
    if begun.backbone != now.backbone:
        found.append(
            f"the file model.checkpoint (SHA-256 {begun.backbone[:12] or 'none'}, now {now.backbone[:12] or 'none'})"
        )
    if begun.code != now.code and begun.version != now.version:
        found.append(f"version {begun.version}, now {now.version}")
    return found


def compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration must stay as it is; the cohort is known by its hash, wherever it lies."""
    return {key: value for key, value in config.items() if key not in (*ELSEWHERE, *_COMPARED_BY_HASH)}


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(old[key], new[key]) for key in new if isinstance(old.get(key), dict) and isinstance(new[key], dict)
    }
    return {**old, **new, **both}


def _packed(begun: Begun) -> bytes:
    return (begun.model_dump_json(indent=1) + "\n").encode()


if __name__ == "__main__":
    main()
