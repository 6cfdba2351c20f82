"""Files that are there whole or not at all."""

import contextlib
import errno
import os
import tempfile
from pathlib import Path

from fedsam_core.errors import DataError


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, flush it to the disk, then rename: a reader never meets a half-written file.

    Raises DataError (a full disk, a folder that may not be written) and leaves nothing behind.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes 0600, which hides prepared data from a colleague on the same machine
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise write_failed(path, error) from error
    except BaseException:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise


def write_failed(path: Path, error: OSError) -> DataError:
    """What to tell a person when writing `path` failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"{path}: the disk is full; free some space or choose another working folder, then run again: "
            "what is finished is kept"
        )
    return DataError(f"{path}: cannot write ({error.strerror or error}); choose a working folder you may write to")
