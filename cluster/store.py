"""The store at a url: a folder (`fedsam_core.store`), or a bucket of any S3 server.

Credentials come from the environment or an AWS profile only; they are never taken from a configuration, logged or
pickled.
"""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import s3fs
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from fedsam_core.errors import StoreError
from fedsam_core.store import LocalStore, Store, local_problem, require_file, round_trip, safe_key, verify_sha256, whole

_CONNECT_SECONDS = 5
_READ_SECONDS = 60
_ATTEMPTS = 3

T = TypeVar("T")


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
        round_trip(self)

    def put_file(self, local: Path, key: str) -> None:
        require_file(local)
        self._do(key, lambda fs, path: fs.put_file(str(local), path))

    def get_file(self, key: str, local: Path, sha256: str | None = None) -> None:
        with whole(local) as part:
            self._do(key, lambda fs, path: fs.get_file(path, str(part)))
            verify_sha256(part, sha256, f"{self.url}/{key}")

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
            where, path = f"{where}/{key}", f"{path}/{safe_key(key)}"
        try:
            return action(self._filesystem(), path)
        except Exception as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise StoreError(local_problem(error)) from error
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
