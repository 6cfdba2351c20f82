"""The stages on a small cohort: what they leave behind, and that it is right."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from safetensors.numpy import load_file

from fedsam_core.sam.adapters import shared_state
from fedsam_core.trained import load_trained

Stage = Callable[..., Any]


@pytest.fixture
def run(stage: Stage, tmp_path: Path) -> Path:
    """Folder of a finished federation."""
    ended = stage("federate")
    assert ended.status == 0, ended.error
    (folder,) = (tmp_path / "work" / "runs").iterdir()
    return folder


def test_a_run_folder_is_complete(run: Path) -> None:
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert names >= {
        "config.yaml",
        "manifest.json",
        "state.safetensors",
        "rounds.csv",
        "ledger.csv",
        "scores.csv",
        "summary.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "pictures/dice.png",
        *(f"pictures/{site}.png" for site in ("north", "south", "west")),
    }
    ledger = list(csv.DictReader((run / "ledger.csv").open()))
    summary = json.loads((run / "summary.json").read_text())
    ledger = [row for row in ledger if row["purpose"] != "picture"]  # once, at the end
    up = sum(int(row["bytes"]) for row in ledger if row["direction"] == "up" and row["round"] in "12")
    closing = len({(row["site"], row["purpose"]) for row in ledger if row["purpose"].startswith("scores/")})
    scores = [row for row in ledger if row["direction"] == "up" and row["round"] == "2" and "scores/" in row["purpose"]]
    assert len(scores) == 2 * closing  # validation, and the test cases after the last round
    assert up - sum(int(row["bytes"]) for row in scores) / 2 == pytest.approx(2 * summary["bytes_up"], abs=100)
    assert summary["bytes_up"] > 3 * 4 * summary["trained"]


def test_a_run_is_in_mlflow_with_comparable_names(run: Path, tmp_path: Path) -> None:
    client = MlflowClient(f"sqlite:///{tmp_path / 'work' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedsam")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == run.name
    assert found.data.params.items() >= {"selection": "flap", "rank": "4", "federation.rounds": "2"}.items()
    assert found.data.metrics.keys() >= {
        "val/dice",
        "site/north/dice",
        "comm/bytes_up",
        "comm/bytes_down",
        "train/loss",
        "test/dice",
        "test/dice_before",
    }
    tags = found.data.tags
    assert tags["fedsam.secure_sum"] == "masked"
    assert tags["fedsam.device"]
    assert all(len(tags[f"fedsam.{what}_hash"]) == 64 for what in ("config", "layout", "cohort", "code"))
    history = client.get_metric_history(found.info.run_id, "val/dice")
    assert [point.step for point in history] == [0, 1, 2]
    artifacts = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert artifacts >= {"adapter", "pictures", "config.yaml", "manifest.json", "rounds.json", "scores.json"}


def test_evaluate_agrees_with_the_sites_and_with_plain_numpy(run: Path, stage: Stage, cohort_folder: Path) -> None:
    ended = stage("evaluate")
    assert ended.status == 0, ended.error
    told = {row["site"]: row for row in csv.DictReader((run / "scores.csv").open())}
    evaluated = list(csv.DictReader((run / "evaluation" / "test" / "scores.csv").open()))
    assert {row["case"] for row in evaluated} == {"north_5", "south_5", "west_5"}
    for row in evaluated:
        prediction = nib.load(run / "evaluation" / "test" / "masks" / f"{row['case']}.nii.gz")
        truth = nib.load(cohort_folder / "labelsTr" / f"{row['case']}.nii.gz")
        np.testing.assert_allclose(prediction.affine, truth.affine)
        for name, value in (("outer", 1), ("inner", 2)):
            a, b = np.asarray(prediction.dataobj) == value, np.asarray(truth.dataobj) == value
            own = 2 * (a & b).sum() / (a.sum() + b.sum())
            assert float(row[f"dice_{name}"]) == pytest.approx(own, abs=1e-6)
            assert float(told[row["site"]][f"dice_{name}"]) == pytest.approx(own, abs=1e-6)


def test_the_exported_adapter_gives_the_global_state(run: Path) -> None:
    segmenter = load_trained(run).segmenter
    state = load_file(run / "state.safetensors")
    exported = shared_state(segmenter, segmenter.manifest)
    assert exported.keys() == state.keys()
    assert all((exported[name] == value).all() for name, value in state.items())


def test_rounds_without_validation_leave_a_gap_in_the_table(stage: Stage, tmp_path: Path) -> None:
    assert stage("federate", "federation.validate_every=2").status == 0
    (table,) = (tmp_path / "work" / "runs").glob("*/rounds.csv")
    rows = list(csv.DictReader(table.open()))
    assert [bool(row["val/dice"]) for row in rows] == [False, True]


def test_a_changed_split_is_noticed(stage: Stage, cohort_folder: Path) -> None:
    assert "4 " in stage("prepare").out
    table = cohort_folder / "sites.csv"
    table.write_text(table.read_text().replace("west_0,west,train", "west_0,west,test"))
    ended = stage("federate", "federation.rounds=1")
    assert ended.status == 0
    assert "read: 6 of 6" in ended.out  # the one site that changed


def test_an_adapter_is_not_evaluated_on_other_inputs(run: Path, stage: Stage) -> None:
    ended = stage("evaluate", "slices.context=single")
    assert ended.status == 2
    assert "context" in ended.error


def test_plain_sums_are_named_in_the_tags(stage: Stage, tmp_path: Path) -> None:
    assert stage("federate", "federation.secure_sum=plain", "federation.rounds=1").status == 0
    client = MlflowClient(f"sqlite:///{tmp_path / 'work' / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("fedsam").experiment_id])
    assert found.data.tags["fedsam.secure_sum"] == "plain"


def test_a_second_prepare_reads_nothing_anew(stage: Stage, tmp_path: Path) -> None:
    assert stage("prepare").status == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "cohorts").rglob("*.safetensors")}
    assert len(files) == 18
    assert stage("prepare").status == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_two_sites_are_refused_because_a_sum_of_two_hides_nothing(stage: Stage, cohort_folder: Path) -> None:
    table = cohort_folder / "sites.csv"
    table.write_text(table.read_text().replace(",west,", ",south,"))
    ended = stage("federate")
    assert ended.status == 2
    assert "at least 3 sites" in ended.error
