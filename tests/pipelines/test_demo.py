"""The demo as a person starts it: a local Ray cluster, a submitted job, and nothing left behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil


def test_demo_runs_as_a_ray_job_and_stops_what_it_started(tmp_path: Path) -> None:
    mark = f"FEDSAM_DEMO_TEST_{os.getpid()}"
    small = [
        "federation.rounds=1",
        "learning.local_steps=2",
        "cohort.phantom.shape=[16, 48, 48]",
        "model.image_size=48",
    ]
    small += ["cohort.phantom.shape=[16, 48, 48]", "cohort.phantom.cases_per_site=4", "cohort.phantom.test_per_site=1"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "demo", f"work_dir={tmp_path / 'work'}", *small],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, mark: "1", "RAY_USAGE_STATS_ENABLED": "0"},
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "synthetic",
        "python -m pipelines.federate",  # it was a job
        "before training",
        "round 1",
        "Dice on the test cases",
        "site-a",
        "bytes a round",
        "run folder:",
        "MLflow UI:",
        "Ray is stopped",
    ):
        assert words in done.stdout, done.stdout
    folder = Path(re.search(r"run folder: (\S+)", done.stdout)[1])
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert len(list((folder / "pictures").glob("site-*.png"))) == 3
    left = [p for p in psutil.process_iter() if _carries(p, mark)]
    assert not left, left


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        return mark in process.environ()
    except (psutil.Error, OSError):
        return False
