"""What all tests share: where the real scans are, and an order."""

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the Ray cluster come last: its nodes live to the end, and nobody else is to share the machine."""
    items.sort(key=lambda item: "ray_cluster" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real scans; the test is skipped, saying so, where FEDSAM_REAL_DATA does not name it."""
    folder = os.environ.get("FEDSAM_REAL_DATA")
    if not folder:
        pytest.skip("FEDSAM_REAL_DATA is not set: no real scans on this machine")
    path = Path(folder)
    assert (path / "Task04_Hippocampus").is_dir(), f"FEDSAM_REAL_DATA={folder} holds no Task04_Hippocampus"
    return path
