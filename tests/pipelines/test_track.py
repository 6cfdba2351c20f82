"""A federation whose tracking server is away from its first to its last moment, and the model that it registers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.numpy import load_file

from fedsam_core.trained import load_trained
from pipelines import track

Stage = Callable[..., Any]


def contents(client: MlflowClient, run: Any) -> dict[str, Any]:
    """All that MLflow has of a run, but for what differs between two runs: ids, times, seconds."""
    metrics = {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    return {
        "status": run.info.status,
        "params": {key: value for key, value in run.data.params.items() if key != "name"},
        "tags": set(run.data.tags),
        "metrics": {n: p for n, p in metrics.items() if "seconds" not in n and "comm/" not in n},
        "all metrics": {name: [step for step, _ in points] for name, points in metrics.items()},
        "files": sorted(walk(client, run.info.run_id)),
    }


def walk(client: MlflowClient, run: str, folder: str | None = None) -> list[str]:
    items = client.list_artifacts(run, folder)
    below = [path for item in items if item.is_dir for path in walk(client, run, item.path)]
    return [item.path for item in items if not item.is_dir] + below


def test_a_federation_without_its_server_ends_as_with_it_and_is_sent_afterwards(
    stage: Stage, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = ("tracking.register_as=inner-and-outer", "learning.precision=fp32")
    assert stage("federate", *settings, "name=live").status == 0
    assert stage("federate", *settings, "name=away", "tracking.uri=http://127.0.0.1:9").status == 0
    assert "http://127.0.0.1:9 does not answer" in caplog.text
    assert "`fedsam track sync` sends them" in caplog.text
    work = tmp_path / "work"
    (live,), (away,) = work.glob("runs/live-*"), work.glob("runs/away-*")
    states = [load_file(folder / "state.safetensors") for folder in (away, live)]
    assert all(np.array_equal(states[0][name], value) for name, value in states[1].items())
    told, expected = (json.loads((folder / "summary.json").read_text()) for folder in (away, live))
    assert all(told[key] == expected[key] for key in ("before", "after", "trained", "rounds"))

    database = f"sqlite:///{work / 'mlflow.db'}"
    with pytest.raises(SystemExit) as ended:
        track.main(["sync", f"work_dir={work}", f"tracking.uri={database}"])
    assert ended.value.code == 0
    assert "complete" in capsys.readouterr().out
    client = MlflowClient(database, database)
    runs = {run.info.run_name: run for run in client.search_runs(["1"])}
    assert contents(client, runs[away.name]) == contents(client, runs[live.name])
    assert runs[away.name].data.tags["fedsam.spool"] == told["mlflow_run"]
    assert {"fedsam.config_hash", "fedsam.cohort_hash", "fedsam.code_hash", "fedsam.layout_hash"} <= set(
        runs[away.name].data.tags
    )

    # The newest version is the one that was sent last; it computes what the run's adapter computes.
    version = client.get_model_version_by_alias("inner-and-outer", "newest")
    assert version.run_id == runs[away.name].info.run_id
    assert version.tags.items() >= {"fedsam.selection": "flap", "fedsam.dice": str(told["after"]["dice"])}.items()
    assert len(version.tags["fedsam.cohort_hash"]) == len(version.tags["fedsam.config_hash"]) == 64
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    from mlflow import pyfunc

    model = pyfunc.load_model("models:/inner-and-outer@newest")
    slices = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        logits = load_trained(away).segmenter(slices).numpy()
    np.testing.assert_array_equal(model.predict(slices.numpy()), logits)
    schema = model.metadata.signature
    assert [spec.shape for spec in (*schema.inputs, *schema.outputs)] == [(-1, 3, 32, 32), (-1, 3, 32, 32)]
