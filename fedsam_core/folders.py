"""Folders that are there whole or not at all."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fedsam_core.data.files import write_failed
from fedsam_core.errors import CheckpointError, DataError


@contextmanager
def whole_folder(folder: Path, marker: str, what: str) -> Iterator[Path]:
    """Gives a hidden folder to write into, which becomes `folder` when the block ends without an error.

    Args:
        folder: its name in the end; one of the same kind that is there is replaced.
        marker: a file that every folder of this kind holds, by which one is told from somebody's own files.
        what: the kind in words, with its article.

    Raises:
        CheckpointError: the folder exists and is of another kind.
        DataError: the disk refuses.
    """
    if folder.exists() and not (folder / marker).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not {what}: choose another folder or remove it")
    part, old = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex}") for _ in range(2))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
        for file in part.iterdir():  # some writers leave 0600, which hides the file from a colleague on the machine
            file.chmod(0o644)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except OSError as error:
        raise write_failed(folder, error) from error
    except SafetensorError as error:
        raise DataError(f"{folder}: cannot write ({error}); free some space or choose another folder") from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
