"""What all tests share: where the real scans are, an order, and a table of the faults that they inflict."""

import os
from pathlib import Path

# Equal bits are what many tests demand, and a GPU adds in whatever order it likes: `make gpu-check` is for those.
if os.environ.get("FEDSAM_GPU_CHECK") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
from support.fault_table import table


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the shared Ray cluster come last: its nodes live to the end, and others start a Ray of their own."""
    items.sort(key=lambda item: "ray_cluster" in getattr(item, "fixturenames", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the faults cost that the tests have inflicted; `make faults` runs just these tests."""
    if lines := table():
        terminalreporter.section("faults")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture(scope="session", autouse=True)
def folder_of_all_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `tmp_path` lies, settled before a test may set another folder for temporary files."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real scans; the test is skipped, saying so, where FEDSAM_REAL_DATA does not name it."""
    folder = os.environ.get("FEDSAM_REAL_DATA")
    if not folder:
        pytest.skip("FEDSAM_REAL_DATA is not set: no real scans on this machine")
    path = Path(folder)
    assert (path / "Task04_Hippocampus").is_dir(), f"FEDSAM_REAL_DATA={folder} holds no Task04_Hippocampus"
    return path
