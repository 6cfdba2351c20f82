"""Which code a run was made by.

In a module of its own: a driver is sent what it needs of a stage that runs as `__main__`, and a cache cannot be sent.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import fedsam_core
from fedsam_core.hashing import file_sha256, stable_hash


@cache
def code_files() -> Mapping[str, str]:
    """SHA-256 (hex) of each source of the three packages, by its path, as they were when it was first asked for."""
    root = Path(fedsam_core.__file__).parents[1]
    sources = [path for package in ("fedsam_core", "cluster", "pipelines") for path in (root / package).rglob("*.py")]
    return {str(path.relative_to(root)): file_sha256(path) for path in sorted(sources)}


@cache
def code_hash() -> str:
    """SHA-256 (hex) over all of them."""
    return stable_hash(dict(code_files()))
