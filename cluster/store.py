"""Object storage behind one small interface: a folder, or a bucket of any S3 server.

Credentials come from the environment or an AWS profile only; they are never taken from a configuration, logged or
pickled.
"""

import asyncio
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import s3fs
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from fedsam_core.errors import StoreError
from fedsam_core.hashing import file_sha256

_CONNECT_SECONDS = 5
_READ_SECONDS = 60
_ATTEMPTS = 3
_UNFINISHED = ".part-"  # prefix of files that are still being written

T = TypeVar("T")


class Store(Protocol):
    """Files under keys such as `runs/3f2a/round-0004.safetensors`.

    A write is atomic: a reader sees the old object or the new one. Every method raises a `StoreError` whose line names
    url, reason and fix; a key that is absolute or climbs with `..` is refused.
    """

    @property
    def url(self) -> str: ...

    def check(self) -> None:
        """Writes, reads and deletes a small object: whoever passes may use the store."""
        ...

    def put_file(self, local: Path, key: str) -> None: ...

    def get_file(self, key: str, local: Path, sha256: str | None = None) -> None:
        """Fetches to `local`, which appears whole or not at all; with `sha256` (hex) only if the content has it."""
        ...

    def write_bytes(self, key: str, data: bytes) -> None: ...

    def read_bytes(self, key: str) -> bytes: ...

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str = "") -> list[str]:
        """All keys that begin with `prefix`, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Removes an object; one that is not there is no error."""
        ...


def open_store(url: str, endpoint: str | None = None) -> Store:
    """The store at `url`; nothing is contacted yet.

    Args:
        url: `s3://bucket/prefix`, `file:///folder` or a folder.
        endpoint: `http(s)://host:port` of an S3 server that is not Amazon's.

    Raises:
        StoreError: the url or the endpoint is none of these, or carries a password.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("s3", "file", ""):
        raise StoreError(f"{parts.scheme}:// is no store that is known here: use s3://bucket/prefix or a folder")
    for given in (url, endpoint or ""):
        if "@" in urlsplit(given).netloc:
            raise StoreError(
                "a store's url must not carry a user or password: remove it, and set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY in the environment"
            )
    if parts.scheme == "s3":
        if not parts.netloc:
            raise StoreError(f"{url} names no bucket: write s3://bucket/prefix")
        if endpoint is not None and urlsplit(endpoint).scheme not in ("http", "https"):
            raise StoreError(f"endpoint {endpoint} is not a web address: write http://host:port or https://host")
        return S3Store(url, endpoint)
    return LocalStore(Path(parts.path if parts.scheme == "file" else url))


class LocalStore:
    """A folder, created on the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def url(self) -> str:
        return str(self.root)

    def check(self) -> None:
        _round_trip(self)

    def put_file(self, local: Path, key: str) -> None:
        _require_file(local)
        with self._explained(key), _whole(self._path(key)) as part:
            shutil.copyfile(local, part)

    def get_file(self, key: str, local: Path, sha256: str | None = None) -> None:
        with self._explained(key), _whole(local) as part:
            shutil.copyfile(self._path(key), part)
            _verify(part, sha256, f"{self.url}/{key}")

    def write_bytes(self, key: str, data: bytes) -> None:
        with self._explained(key), _whole(self._path(key)) as part:
            part.write_bytes(data)

    def read_bytes(self, key: str) -> bytes:
        with self._explained(key):
            return self._path(key).read_bytes()

    def exists(self, key: str) -> bool:
        with self._explained(key):
            return self._path(key).is_file()

    def list(self, prefix: str = "") -> list[str]:
        with self._explained(prefix):
            files = (path for path in self.root.rglob("*") if path.is_file() and not path.name.startswith(_UNFINISHED))
            keys = (path.relative_to(self.root).as_posix() for path in files)
            return sorted(key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        with self._explained(key):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.root / _safe(key)

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        where = f"{self.url}/{key}" if key else self.url
        try:
            yield
        except FileNotFoundError as error:
            raise StoreError(f"{where} is not there: check the key, or write it first") from error
        except OSError as error:
            raise StoreError(_local_problem(error)) from error


class S3Store:
    """A bucket, or a prefix in one, on any S3 server.

    An object is written by one PUT, or by a multipart upload that becomes visible when it is complete.
    """

    def __init__(self, url: str, endpoint: str | None) -> None:
        parts = urlsplit(url)
        self._bucket = parts.netloc
        self._root = "/".join(part for part in (parts.netloc, parts.path.strip("/")) if part)
        self._endpoint = endpoint
        self._open: tuple[int, s3fs.S3FileSystem] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}  # a connection does not travel

    @property
    def url(self) -> str:
        return f"s3://{self._root}"

    def check(self) -> None:
        _round_trip(self)

    def put_file(self, local: Path, key: str) -> None:
        _require_file(local)
        self._do(key, lambda fs, path: fs.put_file(str(local), path))

    def get_file(self, key: str, local: Path, sha256: str | None = None) -> None:
        with _whole(local) as part:
            self._do(key, lambda fs, path: fs.get_file(path, str(part)))
            _verify(part, sha256, f"{self.url}/{key}")

    def write_bytes(self, key: str, data: bytes) -> None:
        self._do(key, lambda fs, path: fs.pipe_file(path, data))

    def read_bytes(self, key: str) -> bytes:
        data: bytes = self._do(key, lambda fs, path: fs.cat_file(path))
        return data

    def exists(self, key: str) -> bool:
        def look(fs: s3fs.S3FileSystem, path: str) -> bool:
            try:
                return bool(fs.info(path)["type"] == "file")
            except FileNotFoundError:
                fs.ls(self._bucket)  # a missing bucket is an error, not a missing key
                return False

        return self._do(key, look)

    def list(self, prefix: str = "") -> list[str]:
        def look(fs: s3fs.S3FileSystem, path: str) -> list[str]:
            try:
                found: list[str] = fs.find(path)
            except FileNotFoundError:
                found = []
            if not found:
                fs.ls(self._bucket)
            return found

        folder = prefix.rpartition("/")[0]
        keys = (str(path)[len(self._root) + 1 :] for path in self._do(folder or None, look))
        # Some servers list a folder as an empty object whose name ends with a slash.
        return sorted(key for key in keys if key and key.startswith(prefix) and not key.endswith("/"))

    def delete(self, key: str) -> None:
        def remove(fs: s3fs.S3FileSystem, path: str) -> None:
            with suppress(FileNotFoundError):
                fs.rm_file(path)

        self._do(key, remove)

    def _filesystem(self) -> s3fs.S3FileSystem:
        """One connection pool a process: a forked child makes its own."""
        if self._open is None or self._open[0] != os.getpid():
            filesystem = s3fs.S3FileSystem(
                endpoint_url=self._endpoint,
                config_kwargs={
                    "connect_timeout": _CONNECT_SECONDS,
                    "read_timeout": _READ_SECONDS,
                    "retries": {"max_attempts": _ATTEMPTS, "mode": "standard"},
                    # Servers other than Amazon's do not all know the newer checksums.
                    "request_checksum_calculation": "when_required",
                    "response_checksum_validation": "when_required",
                },
                skip_instance_cache=True,
                use_listings_cache=False,
            )
            filesystem.retries = 1  # botocore has tried already
            self._open = (os.getpid(), filesystem)
        return self._open[1]

    def _do(self, key: str | None, action: Callable[[s3fs.S3FileSystem, str], T]) -> T:
        where, path = self.url, self._root
        if key is not None:
            where, path = f"{where}/{key}", f"{path}/{_safe(key)}"
        try:
            return action(self._filesystem(), path)
        except Exception as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise StoreError(_local_problem(error)) from error
            raise StoreError(f"{where} {self._explain(error)}") from error

    def _explain(self, error: Exception) -> str:
        """Reason and fix. s3fs turns most answers of the server into OSErrors and keeps the original as their cause."""
        server = self._endpoint or "Amazon S3"
        cause = error if isinstance(error, ClientError) else error.__cause__
        code = cause.response.get("Error", {}).get("Code", "") if isinstance(cause, ClientError) else ""
        if isinstance(error, NoCredentialsError):
            return "cannot be used without keys: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        if code == "NoSuchBucket" or "bucket does not exist" in str(error):
            return f"cannot be used (no bucket {self._bucket} at {server}): create the bucket or correct the url"
        if isinstance(error, PermissionError) or code in ("403", "AccessDenied", "InvalidAccessKeyId"):
            return (
                f"was refused by {server} ({code or 'access denied'}): check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
                "and their rights on the bucket"
            )
        if isinstance(cause, ClientError) and code == "404" and cause.operation_name == "PutObject":
            return f"cannot be written (404 from {server}): check that the endpoint is an S3 server"
        if isinstance(error, FileNotFoundError):
            return "is not there: check the key, or write it first"
        if isinstance(error, BotoCoreError | OSError | asyncio.TimeoutError):
            kind = type(cause or error).__name__
            return f"cannot be reached ({kind} at {server}): check the endpoint and that the server runs"
        return f"failed ({type(error).__name__}: {' '.join(str(error).split())}) at {server}: see the server's log"


def _safe(key: str) -> str:
    """The key itself.

    Raises:
        StoreError: it is empty, absolute, has empty parts, or climbs out of the store.
    """
    if any(part in ("", ".", "..") for part in key.split("/")) or "\\" in key or not key.isprintable():
        raise StoreError(f"key {key!r} is not a plain relative path: write it like runs/1/round-4.bin")
    return key


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, which takes its name at the end, or is gone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(_local_problem(error)) from error
    part = path.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _local_problem(error: OSError) -> str:
    return f"{error.filename} cannot be used ({error.strerror}): check the folder's rights and space"


def _require_file(local: Path) -> None:
    if not local.is_file():
        raise StoreError(f"{local} is no file that could be stored: check the path")


def _verify(part: Path, sha256: str | None, where: str) -> None:
    if sha256 is not None and (found := file_sha256(part)) != sha256:
        raise StoreError(f"{where} is damaged (sha256 {found[:12]}, expected {sha256[:12]}): store it again")


def _round_trip(store: Store) -> None:
    key = f".fedsam-check-{uuid.uuid4().hex}"
    try:
        store.write_bytes(key, b"check")
        if store.read_bytes(key) != b"check":
            raise StoreError(f"{store.url} gave back other bytes than were written: check the server")
        store.delete(key)
    except StoreError as error:
        raise StoreError(str(error).replace(f"/{key}", "")) from error  # nobody has heard of that key
