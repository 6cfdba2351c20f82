"""The store at a url: a folder (`fedsam_core.store`), or a bucket of any S3 server.

Credentials come from the environment, an AWS profile or an instance's role only; they are never taken from a
configuration, logged or pickled.
"""

import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import s3fs
from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError, NoCredentialsError
from botocore.exceptions import ConnectionError as NotConnected
from s3fs.core import S3_RETRYABLE_ERRORS

from fedsam_core.errors import StoreError
from fedsam_core.store import LocalStore, Store, local_problem, require_file, round_trip, safe_key, verify_sha256, whole

PATIENCE_SECONDS = 60.0  # a server that restarts within it fails no run

_CONNECT_SECONDS = 5
_READ_SECONDS = 60
_READ_SECONDS_IMPATIENT = 10
_ATTEMPTS = 3
_PART_BYTES = 16 * 2**20  # of a multipart upload, which begins at twice as much
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 8.0

_PASSING = (*S3_RETRYABLE_ERRORS, NotConnected, IncompleteReadError, aiohttp.ClientError)  # of the connection
# The last is what is left of a multipart upload when the server restarts, or an answer is lost: it begins anew.
_PASSING_CODES = ("RequestTimeout", "SlowDown", "OperationAborted", "ConditionalRequestConflict", "NoSuchUpload")

T = TypeVar("T")


def open_store(url: str, endpoint: str | None = None, patience: float = PATIENCE_SECONDS) -> Store:
    """The store at `url`; nothing is contacted yet.

    Args:
        url: `s3://bucket/prefix`, `file:///folder` or a folder.
        endpoint: `http(s)://host:port` of an S3 server that is not Amazon's.
        patience: seconds for which a request is repeated while the server does not answer; 0 for once only.

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
        return S3Store(url, endpoint, patience)
    return LocalStore(Path(parts.path if parts.scheme == "file" else url))


class S3Store:
    """A bucket, or a prefix in one, on any S3 server.

    An object is written by one PUT, or by a multipart upload that becomes visible when it is complete. What the
    server did not answer, or answered with a failure of its own, is repeated with growing pauses until `patience` is
    over; what it refused is not.
    """

    def __init__(self, url: str, endpoint: str | None, patience: float = PATIENCE_SECONDS) -> None:
        parts = urlsplit(url)
        self._bucket = parts.netloc
        self._root = "/".join(part for part in (parts.netloc, parts.path.strip("/")) if part)
        self._endpoint = endpoint
        self._patience = patience
        self._open: tuple[int, s3fs.S3FileSystem] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}  # a connection does not travel

    @property
    def url(self) -> str:
        return f"s3://{self._root}"

    def check(self) -> None:
        round_trip(S3Store(self.url, self._endpoint, patience=0))  # a wrong endpoint is told within seconds

    def put_file(self, local: Path, key: str) -> None:
        require_file(local)
        self._do(key, lambda fs, path: fs.put_file(str(local), path, chunksize=_PART_BYTES))

    def get_file(self, key: str, local: Path, sha256: str | None = None) -> None:
        with whole(local) as part:
            self._do(key, lambda fs, path: fs.get_file(path, str(part)))
            verify_sha256(part, sha256, f"{self.url}/{key}")

    def write_bytes(self, key: str, data: bytes) -> None:
        self._do(key, lambda fs, path: fs.pipe_file(path, data))

    def create(self, key: str, data: bytes) -> bool:
        def write(fs: s3fs.S3FileSystem, path: str) -> bool:
            try:
                fs.pipe_file(path, data, mode="create")  # If-None-Match: *
            except OSError as error:
                if _answer(error)[0] not in ("PreconditionFailed", "412"):
                    raise
                return bool(fs.cat_file(path) == data)  # ours, where the answer to an earlier try was lost
            return True

        return self._do(key, write)

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
                    "read_timeout": _READ_SECONDS if self._patience else _READ_SECONDS_IMPATIENT,
                    "retries": {"max_attempts": _ATTEMPTS if self._patience else 1, "mode": "standard"},
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
            where, path = f"{where}/{key}", f"{path}/{safe_key(key)}"
        end, pause = time.monotonic() + self._patience, _FIRST_PAUSE
        while True:
            try:
                return action(self._filesystem(), path)
            except Exception as error:
                if isinstance(error, OSError) and error.filename is not None:
                    raise StoreError(local_problem(error)) from error
                if not _may_pass(error) or time.monotonic() + pause > end:
                    raise StoreError(f"{where} {self._explain(error)}") from error
            time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - so that sites do not all come back at once
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _explain(self, error: Exception) -> str:
        """Reason and fix. s3fs turns most answers of the server into OSErrors and keeps the original as their cause."""
        server = self._endpoint or "Amazon S3"
        cause = error if isinstance(error, ClientError) else error.__cause__
        code, status = _answer(error)
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
        if status >= 500:
            return f"failed ({code}, status {status}) at {server}: see the server's log"
        if isinstance(error, BotoCoreError | OSError | aiohttp.ClientError):
            kind = type(cause or error).__name__
            return f"cannot be reached ({kind} at {server}): check the endpoint and that the server runs"
        return f"failed ({type(error).__name__}: {' '.join(str(error).split())}) at {server}: see the server's log"


def _answer(error: Exception) -> tuple[str, int]:
    """S3's code and the HTTP status of what the server answered; of what is no answer "" and 0."""
    cause = error if isinstance(error, ClientError) else error.__cause__
    if not isinstance(cause, ClientError):
        return "", 0
    status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(cause.response.get("Error", {}).get("Code", "")), int(status)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may well be answered soon."""
    code, status = _answer(error)
    if status:
        return code in _PASSING_CODES or (status >= 500 and status != 501)  # 501 is what the server will never do
    return isinstance(error, _PASSING)
