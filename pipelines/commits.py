"""Keeps a run in the results store (`storage.results`): a reader finds a round whole or not at all.

Under runs/RUN/ of the store, and in the run's folder under unsent/ what the store has not taken yet:

run.json        what the run was begun with (`pipelines.resume`)
lease/          who drives it (`cluster.lease`)
rounds/000000/  what the run began with: configuration, manifest, first global state, checkpoint
rounds/000012/  what round 12 gave: checkpoint with the global state, opened sums, tables
result/         last global state, adapter, scores, pictures, summary
each of them:   commit.json, a `Commit`: its files and their SHA-256; written last, by one driver only
                DRIVER/FILE, the files; record.jsonl holds the lines by which the record has grown
"""

import shutil
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex

from pydantic import Field, ValidationError

from cluster.store import PATIENCE_SECONDS, open_store
from fedsam_core.errors import RoundError, StoreError
from fedsam_core.hashing import file_sha256
from fedsam_core.settings import Settings
from fedsam_core.store import LocalStore, Store, safe_key
from pipelines.checkpoints import CHECKPOINTS, checkpoint_file, finished_rounds, read_checkpoint, unfold
from pipelines.config import Config
from pipelines.run_folder import RECORD, RunFolder

COMMIT = "commit.json"
RESULT = "result"
UNSENT = "unsent"
BEGUN = "run.json"


class StoredFile(Settings):
    """What a file must be."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Commit(Settings):
    """That a round, or the result, is complete."""

    run: str
    place: str = Field(description="rounds/NUMBER or result")
    driver: str = Field(description="drawn by each driver for itself: of two, the markers differ")
    time: str
    files: dict[str, StoredFile] = Field(description="by name in the run's folder")

    def key(self, name: str) -> str:
        """Where a file is, under the run."""
        return f"{self.place}/{self.driver}/{name}"


def results_store(config: Config, patience: float = PATIENCE_SECONDS) -> Store:
    """Where runs and studies are kept; `patience` as `open_store` has it."""
    return open_store(config.storage.results or str(config.work_dir), config.storage.s3_endpoint, patience)


def check_results(store: Store) -> None:
    """Finds out, within seconds, whether rounds can be committed to a store.

    Raises:
        StoreError: it cannot be used, or would let two drivers commit the same round.
    """
    store.check()
    key = f".fedsam-check-{token_hex(8)}"
    store.create(key, b"one")
    replaced = store.create(key, b"other")
    store.delete(key)
    if replaced:
        raise StoreError(
            f"{store.url} replaces objects although it was told not to (If-None-Match: *), so that two drivers could "
            "commit the same round: set storage.results to a server that heeds it, or to a folder"
        )


def round_place(number: int) -> str:
    """Of a round; 0 is what the run began with."""
    return f"rounds/{number:06d}"


class RunCommits:
    """Commits the rounds of one run, in their order.

    A store that is away fails no round: what it has not taken waits in the run's folder and goes with the next, also
    with that of a driver that resumes the run there.
    """

    def __init__(self, store: Store, folder: Path, run: str, lines: int = 0) -> None:
        """`lines` of the record are committed, or wait, where the run goes on."""
        self._store = store
        self._folder = folder
        self._unsent = LocalStore(folder / UNSENT)
        self._run = run
        self._driver = token_hex(8)
        self._due = waiting_rounds(folder)
        self._lines = lines  # of the record that are committed, or waiting
        self._away = False

    @property
    def url(self) -> str:
        """Of the run."""
        return f"{self._store.url}/runs/{self._run}"

    def commit(self, place: str, names: Iterable[str], record: Sequence[bytes]) -> str:
        """Commits a round, and before it those that wait.

        Args:
            place: of the round.
            names: its files in the run's folder; one that is not there is left out.
            record: all lines of the run's record.

        Returns:
            Why it waits; "" once it is committed.

        Raises:
            RoundError: another driver has committed this round.
            StoreError: the run's folder cannot be written.
        """
        self._stage(place, names, record)
        try:
            if self._away:  # waited for once: the rounds after that only look whether it is back
                self._store.check()
            self._send()
        except StoreError as error:
            self._away = True
            return str(error)
        self._away = False
        return ""

    def finish(self, names: Iterable[str], record: Sequence[bytes]) -> None:
        """Commits the result, and all that still waits.

        Raises:
            RoundError: another driver has committed it.
            StoreError: the store does not take it; names what it lacks, and the fix.
        """
        self._stage(RESULT, names, record)
        try:
            self._send()
        except StoreError as error:
            lacking = ", ".join(commit.place for commit in self._due)
            raise StoreError(
                f"{self.url} lacks {lacking} ({error}). All is in {self._folder}: once the store can be used again, "
                f"`fedsam resume {self._run}` sends it, or copy what is in {self._unsent.url} to {self.url}"
            ) from error

    def _stage(self, place: str, names: Iterable[str], record: Sequence[bytes]) -> None:
        """Sets aside what is to be sent: the next round will replace it in the run's folder."""
        names = [name for name in names if (self._folder / name).is_file()]
        made = datetime.now(UTC).isoformat(timespec="seconds")
        commit = Commit(run=self._run, place=place, driver=self._driver, time=made, files={})
        for name in names:
            self._unsent.put_file(self._folder / name, commit.key(name))
        self._unsent.write_bytes(commit.key(RECORD), b"".join(line + b"\n" for line in record[self._lines :]))
        self._lines = len(record)
        files = {name: _describe(self._folder / UNSENT / commit.key(name)) for name in (*names, RECORD)}
        commit = commit.model_copy(update={"files": files})
        self._unsent.write_bytes(f"{place}/{COMMIT}", _marker(commit))
        self._due.append(commit)

    def _send(self) -> None:
        root = f"runs/{self._run}"
        while self._due:
            commit = self._due[0]
            for name in commit.files:
                self._store.put_file(self._folder / UNSENT / commit.key(name), f"{root}/{commit.key(name)}")
            if not self._store.create(f"{root}/{commit.place}/{COMMIT}", _marker(commit)):
                for name in commit.files:
                    self._store.delete(f"{root}/{commit.key(name)}")
                raise RoundError(
                    f"{self.url}/{commit.place} was committed by another driver in the meantime: two drivers are at "
                    "work on one run; stop one of them"
                )
            self._due.pop(0)
        shutil.rmtree(self._folder / UNSENT, ignore_errors=True)


def waiting_rounds(folder: Path) -> list[Commit]:
    """The rounds in a run's folder that wait for the store, in their order."""
    unsent = LocalStore(folder / UNSENT)
    found = [key for key in unsent.list("rounds/") if key.endswith(f"/{COMMIT}")]
    return [_read_marker(unsent, key) for key in found]


def last_committed(store: Store, run: str) -> int:
    """The number of the last round of an unbroken row that is committed; -1 where none is."""
    there = set(store.list(f"runs/{run}/rounds/"))
    number = 0
    while f"runs/{run}/{round_place(number)}/{COMMIT}" in there:
        number += 1
    return number - 1


def fetch_run(store: Store, run: str, folder: Path, last: int | None = None) -> int:
    """Reads a run back as its driver left it after the last round that is committed, each file checked.

    Args:
        store: the results store.
        run: its id.
        folder: where its files go.
        last: an earlier round, to read it back as it was then.

    Returns:
        The number of that round.

    Raises:
        StoreError: there is no such run, or an object of it is missing or damaged.
        CheckpointError: the round's checkpoint is damaged.
    """
    newest_round = last_committed(store, run) if last is None else last
    commits = [_committed(store, run, round_place(number)) for number in range(newest_round + 1)]
    if not commits:
        raise StoreError(f"{store.url}/runs/{run} has no committed round: check the run's id and storage.results")
    result = read_commit(store, run, RESULT) if last is None else None
    if result is not None:
        commits.append(result)
    newest = {name: commit for commit in commits for name in commit.files if name != RECORD}
    checkpoint = checkpoint_file(newest_round)
    for name, commit in newest.items():
        if not name.startswith(f"{CHECKPOINTS}/") or (name == checkpoint and result is None):
            _fetch(store, commit, name, folder)
    record = b""
    for commit in commits:
        record += _fetch(store, commit, RECORD, folder).read_bytes()
    whole = RunFolder(folder)
    whole.write(RECORD, record)
    if store.exists(f"runs/{run}/{BEGUN}"):
        store.get_file(f"runs/{run}/{BEGUN}", folder / BEGUN)
    if newest_round in finished_rounds(whole):
        unfold(whole, *read_checkpoint(whole, newest_round))
    return newest_round


def read_run_file(store: Store, run: str, name: str) -> bytes | None:
    """A file of a run's result: from its folder, or as it was committed; None where neither has it.

    Raises:
        StoreError: the store cannot be read.
    """
    plain = f"runs/{run}/{safe_key(name)}"
    if store.exists(plain):
        return store.read_bytes(plain)
    result = read_commit(store, run, RESULT)
    return store.read_bytes(f"runs/{run}/{result.key(name)}") if result is not None and name in result.files else None


def read_commit(store: Store, run: str, place: str) -> Commit | None:
    """The marker of a round or of the result; None where that is not committed.

    Raises:
        StoreError: the store cannot be read, or the marker is damaged.
    """
    key = f"runs/{run}/{place}/{COMMIT}"
    return _read_marker(store, key) if store.exists(key) else None


def _committed(store: Store, run: str, place: str) -> Commit:
    return _read_marker(store, f"runs/{run}/{place}/{COMMIT}")


def _read_marker(store: Store, key: str) -> Commit:
    try:
        return Commit.model_validate_json(store.read_bytes(key))
    except ValidationError as error:
        raise StoreError(f"{store.url}/{key} is damaged (no readable commit): restore it from a copy") from error


def _fetch(store: Store, commit: Commit, name: str, folder: Path) -> Path:
    path = folder / safe_key(name)
    store.get_file(f"runs/{commit.run}/{commit.key(name)}", path, commit.files[name].sha256)
    return path


def _describe(path: Path) -> StoredFile:
    return StoredFile(sha256=file_sha256(path), bytes=path.stat().st_size)


def _marker(commit: Commit) -> bytes:
    return (commit.model_dump_json(indent=1) + "\n").encode()
