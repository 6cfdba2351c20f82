"""What all tests share: where the real scans are."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real scans; the test is skipped, saying so, where FEDSAM_REAL_DATA does not name it."""
    folder = os.environ.get("FEDSAM_REAL_DATA")
    if not folder:
        pytest.skip("FEDSAM_REAL_DATA is not set: no real scans on this machine")
    path = Path(folder)
    assert (path / "Task04_Hippocampus").is_dir(), f"FEDSAM_REAL_DATA={folder} holds no Task04_Hippocampus"
    return path
