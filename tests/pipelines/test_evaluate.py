"""The evaluate stage on masks that are known: what it writes, prints and records, and what happens without a server."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from pipelines import evaluate
from pipelines.config import load_config
from pipelines.run_folder import RunFolder

Stage = Callable[..., Any]
TEST = {"north": 3, "south": 2, "west": 1}  # test cases a site
LEFT_OUT = "south_4"  # its inner structure is missed


@pytest.fixture
def run(stage: Stage, cohort_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a finished federation of a round, whose model then sees every structure a little off its place."""
    rows = ["case,site,split"]
    for site, count in TEST.items():
        rows += [f"{site}_{k},{site},{'test' if k >= 6 - count else 'train'}" for k in range(6)]
    (cohort_folder / "sites.csv").write_text("\n".join(rows) + "\n")
    ended = stage("federate", "federation.rounds=1")
    assert ended.status == 0, ended.error
    monkeypatch.setattr(evaluate, "segment_scan", lambda segmenter, case, *rest: shifted(case.case.id, case.case.label))
    (folder,) = (tmp_path / "work" / "runs").iterdir()
    return folder


def shifted(case: str, label: str) -> np.ndarray:
    """The truth, moved by as many voxels as the last digit of its name says (5: not at all)."""
    mask = np.roll(np.asarray(nib.load(label).dataobj), 5 - int(case[-1]), axis=0)
    return np.where(mask == 2, 1, mask) if case == LEFT_OUT else mask


def client(tmp_path: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{tmp_path / 'work' / 'mlflow.db'}")


def own_dice(folder: Path, cohort_folder: Path, case: str, values: tuple[int, ...]) -> float:
    a, b = (
        np.isin(np.asarray(nib.load(path).dataobj), values)
        for path in (folder / "masks" / f"{case}.nii.gz", cohort_folder / "labelsTr" / f"{case}.nii.gz")
    )
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_what_an_evaluation_leaves(run: Path, stage: Stage, cohort_folder: Path, tmp_path: Path) -> None:
    ended = stage("evaluate", "federation.rounds=1", "evaluation.nsd_tolerance_mm=1.5")
    assert ended.status == 0, ended.error
    folder = run / "evaluation" / "test"

    # A row a case and class, and the same a case.
    rows = pq.read_table(folder / "scores.parquet").to_pylist()
    assert len(rows) == 2 * sum(TEST.values())
    assert set(rows[0]) == {
        "case", "site", "split", "class", "dice", "hd95_mm", "hd95_penalised_mm", "nsd", "truth_ml", "predicted_ml",
        "empty", "missed", "false_positive",
    }  # fmt: skip
    for row in rows:
        value = {"outer": 1, "inner": 2}[row["class"]]
        assert row["dice"] == pytest.approx(own_dice(folder, cohort_folder, row["case"], (value,)))
        assert row["truth_ml"] == pytest.approx({1: 256, 2: 32}[value] * 3 / 1000)
    by_case = {(row["case"], row["class"]): row for row in rows}
    assert by_case["west_5", "inner"]["dice"] == by_case["west_5", "inner"]["nsd"] == 1
    assert by_case["west_5", "inner"]["hd95_mm"] == 0
    assert by_case["north_3", "inner"]["hd95_mm"] == 2  # moved by two voxels of 1 mm
    lost = by_case[LEFT_OUT, "inner"]
    assert (lost["hd95_mm"], lost["nsd"], lost["missed"]) == (None, 0, True)
    assert lost["hd95_penalised_mm"] == pytest.approx(np.linalg.norm([20, 22, 18]))
    wide = {row["case"]: row for row in csv.DictReader((folder / "scores.csv").open())}
    for (case, name), row in by_case.items():
        assert float(wide[case][f"dice_{name}"]) == row["dice"]
        assert float(wide[case][f"nsd_{name}"]) == row["nsd"]

    summary = json.loads((folder / "summary.json").read_text())
    inner = [row["dice"] for row in rows if row["class"] == "inner"]
    outer = [row["dice"] for row in rows if row["class"] == "outer"]
    assert summary["per_class"]["inner"]["dice"] == pytest.approx(np.mean(inner))
    assert summary["dice"] == pytest.approx((np.mean(inner) + np.mean(outer)) / 2)
    assert summary["ci95"]["dice"][0] < summary["dice"] < summary["ci95"]["dice"][1]
    assert summary["nsd_tolerance_mm"] == 1.5
    assert summary["worst"]["dice"]["site"] == "south"

    # Each picture once: three of three cases, two of two, one of one.
    assert {path.name for path in (folder / "pictures").iterdir()} == {
        "north-best.png", "north-median.png", "north-worst.png", "south-best.png", "south-worst.png", "west-median.png",
        "dice.png",
    }  # fmt: skip
    for text in ("sites alike", "1.5 mm", "worst site: Dice", "missed altogether: inner in 1 case"):
        assert text in ended.out

    # In MLflow: below the federation's run, with the same names.
    runs = {found.info.run_name: found for found in client(tmp_path).search_runs(["1"])}
    assert set(runs) == {run.name, f"{run.name}-evaluate-test"}
    found, parent = runs[f"{run.name}-evaluate-test"], runs[run.name]
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert found.data.params.keys() == parent.data.params.keys()
    assert found.data.params["evaluation.nsd_tolerance_mm"] == "1.5"
    for tag in ("cohort_hash", "code_hash", "config_hash", "weights", "synthetic", "device", "precision"):
        assert found.data.tags[f"fedsam.{tag}"] == parent.data.tags[f"fedsam.{tag}"]
    recorded = found.data.metrics
    assert {name for name in parent.data.metrics if name.startswith("test/dice") and "before" not in name} <= set(
        recorded
    )
    assert {f"site/{site}/test_dice" for site in TEST} <= set(recorded) & set(parent.data.metrics)
    assert recorded["test/dice"] == pytest.approx(summary["dice"])
    assert recorded["test/hd95_penalised_inner"] == pytest.approx(summary["per_class"]["inner"]["hd95_penalised"])
    assert recorded["site/north/test_nsd"] == pytest.approx(summary["per_site"]["north"]["nsd"])
    assert recorded["test/macro_dice"] == pytest.approx(summary["macro_dice"])
    assert [recorded["test/ci_low_dice"], recorded["test/ci_high_dice"]] == pytest.approx(summary["ci95"]["dice"])
    assert recorded["test/n_missed_inner"] == 1
    files = {item.path for item in client(tmp_path).list_artifacts(found.info.run_id)}
    assert files == {"cases.json", "pictures", "scores.csv", "scores.parquet", "summary.json"}
    table = json.loads(Path(client(tmp_path).download_artifacts(found.info.run_id, "cases.json")).read_text())
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == rows


def test_what_stayed_at_the_sites_is_untrained_in_a_run_s_adapter_and_trained_in_a_site_s_own(
    stage: Stage, tmp_path: Path
) -> None:
    settings = (
        "selection={name: fedbn, lora: {encoder: [q], rank: 2}, train: [head], local: [decoder.norms, lora.scale]}",
        "rank=null",
        "federation.rounds=1",
        f"federation.site_dir={tmp_path / 'sites'}",
    )
    assert stage("federate", *settings).status == 0
    told = "decoder.norms, lora.scale stayed at the sites: this adapter has them as they were before training"
    ended = stage("evaluate", *settings)
    assert ended.status == 0, ended.error
    assert told in " ".join(ended.out.split())
    (own,) = (tmp_path / "sites").glob("*/north/adapter")
    ended = stage("evaluate", *settings, f"evaluation.adapter={own}")
    assert ended.status == 0, ended.error
    assert "stayed at the sites" not in ended.out
    tags = [found.data.tags for found in client(tmp_path).search_runs(["1"], order_by=["start_time ASC"])]
    assert [tag.get("fedsam.untrained") for tag in tags] == [None, "decoder.norms, lora.scale", None]


def test_a_kidney_holds_its_tumour_and_masks_are_optional(run: Path, stage: Stage, cohort_folder: Path) -> None:
    # The manifest of the run's cohort names no union: as another cohort the same scans are scored another way.
    assert stage("evaluate").status == 0
    kits = "cohort.scored_as={outer: [outer, inner]}"
    before = json.loads((run / "evaluation" / "test" / "summary.json").read_text())
    folder = run / "evaluation" / "test"
    expected = [own_dice(folder, cohort_folder, f"north_{k}", (1, 2)) for k in (3, 4, 5)]
    (folder / "masks" / "north_3.nii.gz").unlink()
    ended = stage("evaluate", kits, "evaluation.save_masks=false")
    assert ended.status == 0, ended.error
    after = json.loads((folder / "summary.json").read_text())
    assert not (folder / "masks" / "north_3.nii.gz").exists()
    assert after["per_site"]["north"]["per_class"]["outer"]["dice"] == pytest.approx(np.mean(expected))
    assert after["per_class"]["outer"]["dice"] > before["per_class"]["outer"]["dice"]
    assert after["per_class"]["inner"] == before["per_class"]["inner"]


def test_a_server_that_goes_away_costs_a_warning(
    run: Path, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("gone")

    real = evaluate.evaluate

    def and_then_it_dies(*args: Any) -> Any:
        scores = real(*args)
        for method in ("log_batch", "log_artifact", "log_artifacts", "set_terminated"):
            monkeypatch.setattr(MlflowClient, method, away)
        return scores

    monkeypatch.setattr(evaluate, "evaluate", and_then_it_dies)
    ended = stage("evaluate")
    assert ended.status == 0, ended.error
    assert "entries wait in" in caplog.text
    folder = run / "evaluation" / "test"
    assert all((folder / name).is_file() for name in ("summary.json", "scores.csv", "scores.parquet"))
    assert (folder / "pictures" / "dice.png").is_file()
    assert "all cases" in ended.out


def test_a_server_that_is_dead_is_noticed_before_the_first_scan_and_stops_nothing(
    run: Path, stage: Stage, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    ended = stage("evaluate", "tracking.uri=http://127.0.0.1:9")
    assert ended.status == 0, ended.error
    assert "http://127.0.0.1:9 does not answer" in caplog.text
    (spool,) = (tmp_path / "work" / "spool").iterdir()
    assert f"entries wait in {spool}: `fedsam track sync` sends them" in caplog.text
    assert (run / "evaluation" / "test" / "summary.json").is_file()


def test_a_run_folder_that_names_no_mlflow_run(tmp_path: Path) -> None:
    assert evaluate.parent_run(tmp_path / "adapter") is None
    for text in ("no json", "[]", "{}"):
        (tmp_path / "summary.json").write_text(text)
        assert evaluate.parent_run(tmp_path / "adapter") is None
    (tmp_path / "summary.json").write_text('{"mlflow_run": "abc"}')
    assert evaluate.parent_run(tmp_path / "adapter") == "abc"


def test_names_of_validation_metrics_are_those_of_the_rounds() -> None:
    group = {"dice": 0.5, "ci95": {"dice": None}, "per_class": {"inner": {"dice": 0.5, "n_missed": 1}}}
    group["per_class"]["inner"] |= {"n_empty": 0, "n_false_positive": 0}
    summary = {**group, "per_site": {"north": group}, "macro": {"dice": 0.5}, "worst": {"dice": None}}
    named = evaluate.metrics(summary, "val")
    assert {"val/dice", "val/dice_inner", "site/north/dice", "val/macro_dice"} < set(named)
    assert "val/worst_dice" not in named
    assert "val/ci_low_dice" not in named


def test_parquet_reads_back(tmp_path: Path) -> None:
    rows = [{"case": "a", "dice": 0.1, "hd95": None, "n": 3, "empty": False}, {"case": "b", "dice": None, "hd95": None}]
    folder = RunFolder(tmp_path)
    folder.write_parquet("t.parquet", rows)
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.to_pylist() == [rows[0], {**rows[1], "n": None, "empty": None}]
    assert [str(field.type) for field in table.schema] == ["string", "double", "double", "int64", "bool"]
    folder.write_parquet("none.parquet", [])
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_the_tolerance_is_a_setting() -> None:
    base = ["cohort.name=x", "cohort.source=phantom"]
    assert load_config(None, base).evaluation.nsd_tolerance_mm == 2.0
    assert load_config(None, [*base, "evaluation.nsd_tolerance_mm=1"]).evaluation.nsd_tolerance_mm == 1.0
