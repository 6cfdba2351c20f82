"""Files under keys: the small interface that prepared cohorts are kept behind, and a folder that fulfils it.

`cluster.store` has the other one, a bucket of an S3 server.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from fedsam_core.data.files import write_atomic
from fedsam_core.errors import DataError, StoreError
from fedsam_core.hashing import file_sha256

UNFINISHED = ".part-"  # prefix of files that are still being written


class Store(Protocol):
    """Files under keys such as `runs/3f2a/round-0004.safetensors`.

    A write is atomic: a reader sees the old object or the new one. Every method raises a `StoreError` whose line names
    url, reason and fix; a key that is absolute or climbs with `..` is refused.
    """

    @property
    def url(self) -> str:
        """Where it is, as a person would write it."""
        ...

    def check(self) -> None:
        """Writes, reads and deletes a small object: whoever passes may use the store."""
        ...

    def put_file(self, local: Path, key: str) -> None:
        """Stores a file's content."""
        ...

    def get_file(self, key: str, local: Path, sha256: str | None = None) -> None:
        """Fetches to `local`, which appears whole or not at all; with `sha256` (hex) only if the content has it."""
        ...

    def write_bytes(self, key: str, data: bytes) -> None:
        """Stores bytes."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Stores bytes unless there is such an object: of several writers at once one wins.

        Returns:
            Whether the object has these bytes now: true also for one who wrote them before and never got the answer.
            Writers that must tell each other apart write something of their own.
        """
        ...

    def read_bytes(self, key: str) -> bytes:
        """The whole object."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is an object of that key."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """All keys that begin with `prefix`, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Removes an object; one that is not there is no error."""
        ...


OpenStore = Callable[[str], Store]
"""Opens the store at a url."""


class LocalStore:
    """A folder, created on the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def url(self) -> str:
        return str(self.root)

    def check(self) -> None:
        round_trip(self)

    def put_file(self, local: Path, key: str) -> None:
        require_file(local)
        with self._explained(key), whole(self._path(key)) as part:
            shutil.copyfile(local, part)

    def get_file(self, key: str, local: Path, sha256: str | None = None) -> None:
        with self._explained(key), whole(local) as part:
            shutil.copyfile(self._path(key), part)
            verify_sha256(part, sha256, f"{self.url}/{key}")

    def write_bytes(self, key: str, data: bytes) -> None:
        try:
            write_atomic(self._path(key), data)
        except DataError as error:  # says which disk is full, or may not be written
            raise StoreError(str(error)) from error

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        part = path.parent / f"{UNFINISHED}{uuid.uuid4().hex}"
        try:
            write_atomic(part, data)
            os.link(part, path)  # unlike a rename, it never replaces
        except DataError as error:
            raise StoreError(str(error)) from error
        except FileExistsError:
            return self.read_bytes(key) == data
        except OSError as error:
            raise StoreError(local_problem(error)) from error
        finally:
            part.unlink(missing_ok=True)
        return True

    def read_bytes(self, key: str) -> bytes:
        with self._explained(key):
            return self._path(key).read_bytes()

    def exists(self, key: str) -> bool:
        with self._explained(key):
            return self._path(key).is_file()

    def list(self, prefix: str = "") -> list[str]:
        with self._explained(prefix):
            above = prefix.rpartition("/")[0]
            files = (
                path
                for path in (self._path(above) if above else self.root).rglob("*")
                if path.is_file() and not _unfinished(path.name)
            )
            keys = (path.relative_to(self.root).as_posix() for path in files)
            return sorted(key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        with self._explained(key):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.root / safe_key(key)

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        where = f"{self.url}/{key}" if key else self.url
        try:
            yield
        except FileNotFoundError as error:
            raise StoreError(f"{where} is not there: check the key, or write it first") from error
        except OSError as error:
            raise StoreError(local_problem(error)) from error


def folder_store(url: str) -> Store:
    """The folder at `url`."""
    return LocalStore(Path(url))


def _unfinished(name: str) -> bool:
    return name.startswith(UNFINISHED) or (name.startswith(".") and name.endswith(".tmp"))


def safe_key(key: str) -> str:
    """The key itself.

    Raises:
        StoreError: it is empty, absolute, has empty parts, or climbs out of the store.
    """
    if any(part in ("", ".", "..") for part in key.split("/")) or "\\" in key or not key.isprintable():
        raise StoreError(f"key {key!r} is not a plain relative path: write it like runs/1/round-4.bin")
    return key


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, which takes its name at the end, or is gone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(local_problem(error)) from error
    part = path.parent / f"{UNFINISHED}{uuid.uuid4().hex}"
    try:
        yield part
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def local_problem(error: OSError) -> str:
    """What to tell a person of a file that cannot be used."""
    return f"{error.filename} cannot be used ({error.strerror}): check the folder's rights and space"


def require_file(local: Path) -> None:
    """Raises StoreError where there is no such file to store."""
    if not local.is_file():
        raise StoreError(f"{local} is no file that could be stored: check the path")


def verify_sha256(part: Path, sha256: str | None, where: str) -> None:
    """Raises StoreError where a fetched file is not what was expected."""
    if sha256 is not None and (found := file_sha256(part)) != sha256:
        raise StoreError(f"{where} is damaged (sha256 {found[:12]}, expected {sha256[:12]}): store it again")


def round_trip(store: Store) -> None:
    """Writes, reads and deletes a small object. Raises StoreError where the store cannot be used."""
    key = f".fedsam-check-{uuid.uuid4().hex}"
    try:
        store.write_bytes(key, b"check")
        if store.read_bytes(key) != b"check":
            raise StoreError(f"{store.url} gave back other bytes than were written: check the server")
        store.delete(key)
    except StoreError as error:
        raise StoreError(str(error).replace(f"/{key}", "")) from error  # nobody has heard of that key
