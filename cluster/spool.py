"""What a run records, on disk before anything is sent: a journal that survives a dead server and a killed process.

<work_dir>/spool/NAME-ID/
journal.jsonl  a line an entry, flushed to the disk before the call that wrote it returns
files/         copies of the files to keep: the run's own folder may change, or go, before they are sent. A copy goes
               when it has been sent
sent.json      how much of the journal has been sent, and what MLflow calls the run

No passwords or keys are among it: they come from the environment when it is sent.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from fedsam_core.data.files import write_atomic

Entry = dict[str, Any]

_NOT_IN_FOLDERS = re.compile(r"[^A-Za-z0-9_.-]")
_LOCK_SECONDS = 120.0


class Spool:
    """One run's folder. A run has one writer, and at any time one sender."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name.rpartition("-")[2]
        self._journal = folder / "journal.jsonl"
        # Held as long as the process that writes lives: the system lets go of it even where that is killed.
        self._writing = FileLock(folder / "writing.lock", thread_local=False)
        self._sending = FileLock(folder / "sending.lock", timeout=_LOCK_SECONDS, thread_local=False)

    @classmethod
    def create(cls, root: Path, name: str, run: str | None = None) -> "Spool":
        """A new run's, or that of the id `run`, which may be there; this process is its writer. Raises OSError."""
        spool = cls(root / f"{_NOT_IN_FOLDERS.sub('_', name)[:150]}-{run or uuid.uuid4().hex}")
        spool.folder.mkdir(parents=True, exist_ok=run is not None)
        with suppress(Timeout):  # of a process that hangs, and whose run this one has taken over
            spool._writing.acquire(timeout=0)
        return spool

    @classmethod
    def all(cls, root: Path) -> list["Spool"]:
        """Those that hold anything, oldest first: a parent before its children."""
        begun = [(spool.first, spool) for spool in (cls(path.parent) for path in root.glob("*/journal.jsonl"))]
        return [spool for first, spool in sorted(begun, key=lambda one: one[0].get("time", 0)) if first]

    @classmethod
    def find(cls, root: Path, run: str) -> "Spool | None":
        """The run's of that id; None once it has been sent to its end."""
        found = [path.parent for path in root.glob("*/journal.jsonl") if path.parent.name.endswith(f"-{run}")]
        return cls(found[0]) if found else None

    @property
    def first(self) -> Entry:
        """How the run began; empty where it did not come to that."""
        return next((entry for entry, _ in self._entries(0)), {})

    @property
    def ended(self) -> bool:
        """Whether the run has said how it ended, and was not opened again."""
        said = [entry["do"] for entry, _ in self._entries(0) if entry["do"] in ("end", "reopen")]
        return said[-1:] == ["end"]

    @property
    def abandoned(self) -> bool:
        """Whether the process that wrote is gone."""
        try:
            with self._writing.acquire(timeout=0):
                return True
        except Timeout:
            return False

    @property
    def sent(self) -> dict[str, Any]:
        """`offset`, and once the run is begun `run_id` and `artifact_uri`."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "sent.json").read_text())
        except FileNotFoundError:
            return {"offset": 0}
        return found

    def append(self, entry: Mapping[str, Any], file: Path | None = None) -> None:
        """Adds an entry; with `file`, and a copy of it, whose place the entry then names. Raises OSError."""
        with self._journal.open("ab+") as stream:
            at = _whole_lines(stream)
            stream.truncate(at)  # what a killed writer left half-written
            if file is not None:
                copy = Path("files", str(at), file.name)  # no other entry begins at this byte
                (self.folder / copy).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, self.folder / copy)
                entry = {**entry, "file": str(copy)}
            stream.write(json.dumps(entry).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def pending(self) -> Iterator[tuple[Entry, int]]:
        """What was not sent, in order, each with what `mark` is to be told when it is."""
        return self._entries(self.sent["offset"])

    def waiting(self) -> int:
        """How many entries were not sent."""
        return sum(1 for _ in self.pending())

    def mark(self, offset: int, entry: Entry, **about: str) -> None:
        """The entry has been sent, and all before it; `about` is kept beside. Raises DataError if the disk refuses."""
        write_atomic(self.folder / "sent.json", json.dumps({**self.sent, **about, "offset": offset}).encode())
        if "file" in entry:
            shutil.rmtree((self.folder / entry["file"]).parent, ignore_errors=True)

    @contextmanager
    def sending(self) -> Iterator[bool]:
        """Nobody else sends meanwhile. Gives False where the run was sent to its end by another who did."""
        try:
            self._sending.acquire()
        except FileNotFoundError:  # removed while the lock was being made in it
            yield False
            return
        try:
            here = self._journal.is_file()
            yield here
        finally:
            self._sending.release()
        if not here:
            self.remove()  # the lock has made the folder anew

    def release(self) -> None:
        """This process writes no more."""
        self._writing.release()

    def remove(self) -> None:
        """Everything was sent."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _entries(self, offset: int) -> Iterator[tuple[Entry, int]]:
        if not self._journal.is_file():
            return
        with self._journal.open("rb") as stream:
            stream.seek(offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return  # still being written, or never finished
                offset += len(line)
                yield json.loads(line), offset


def _whole_lines(stream: BinaryIO) -> int:
    """How many bytes of a journal are finished lines."""
    end = stream.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        stream.seek(start)
        newline = stream.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
