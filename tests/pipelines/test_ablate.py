"""A small study from its file to its table, in one process."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fedsam_core.errors import ConfigError, RoundError, TrialError
from pipelines import trials as trial_module
from pipelines.ablate import ablate, main, search
from pipelines.recorder import Recorder
from pipelines.results import TrialResult
from pipelines.study import Study, load_study


@pytest.fixture
def study(tmp_path: Path, cohort_folder: Path) -> Callable[..., Study]:
    """study(text, *overrides): a study of the small cohort, no Ray."""
    settings = {
        "work_dir": str(tmp_path / "work"),
        "cohort.name": "small",
        "cohort.source": "nifti",
        "cohort.path": str(cohort_folder),
        "cohort.val_fraction": 0.2,
        "model.backbone": "vit_t",
        "model.image_size": 32,
        "rank": 2,
        "engine.kind": "in-process",
        "federation.rounds": 2,
        "learning.local_steps": 1,
        "learning.batch_size": 4,
    }

    def make(text: str, *overrides: str) -> Study:
        path = tmp_path / "study.yaml"
        path.write_text(f"name: which\noverrides: {json.dumps(settings)}\n{text}\n")
        return load_study(str(path), overrides)

    return make


def kept(results: tuple[TrialResult, ...], *without: str) -> list[dict[str, Any]]:
    """All but what differs from run to run."""
    return [one.model_dump(exclude={"minutes", "run", "mlflow_run", *without}) for one in results]


def test_a_study_is_run_once_and_what_is_missing_later(
    study: Callable[..., Study], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baselines = "baselines: {local: [lora], zero-shot: [partial-decoder]}"
    text = f"selections: [partial-decoder, {{blocks: 3}}]\nseeds: [0, 1]\n{baselines}"
    first = ablate(study(text), "fedsam ablate which")
    groups = ["local lora", "zero-shot partial-decoder", "partial-decoder", "blocks-0-2", "blocks-3-5"]
    assert [(one.group, one.seed) for one in first] == [(group, seed) for group in groups for seed in (0, 1)]
    assert {one.status for one in first} == {"finished"}
    federated = first[4:]
    for one in federated:
        assert 0 <= one.test["dice"] <= 1
        assert len(one.test["per_site"]) == 3
        assert [number for number, _ in one.curve] == [0, 1, 2]
        assert sum(one.parts.values()) == one.trainable > 0
        ledger = (tmp_path / "work" / "runs" / one.run / "ledger.csv").read_text().splitlines()
        assert one.bytes_total == sum(int(row.rsplit(",", 1)[1]) for row in ledger[1:])
    assert set(first[0].cross) == {"north", "south", "west"}
    # Nothing trained; a masked sum rounds.
    assert first[2].test["dice"] == pytest.approx(federated[0].before["dice"], abs=1e-4)
    assert "blocks-3-5" in capsys.readouterr().out

    trials_folder = tmp_path / "work" / "studies" / "which" / "trials"
    gone = trials_folder / f"{federated[-1].id}.json"
    gone.unlink()
    again = ablate(study(text), "fedsam ablate which")
    assert kept(again) == kept(first)
    assert [one.run for one in again] == [one.run for one in first]  # that run had ended: only its note was lost
    assert len(ablate(study(text, "federation.rounds=1"), "x")) == 10
    assert len(list(trials_folder.iterdir())) == 10 + 10

    about = json.loads((trials_folder.parent / "about.json").read_text())
    assert about["planned"][-10:] == [path.id for path in ablate(study(text, "federation.rounds=1"), "x")]


def test_a_study_that_was_killed_goes_on_to_the_same_table(study: Callable[..., Study], tmp_path: Path) -> None:
    text = "selections: [partial-decoder, lora, decoder]"
    small = study(text, "federation.rounds=1")
    command = [sys.executable, "-m", "pipelines.ablate", small.model_dump_json(by_alias=True, exclude_unset=True)]
    trials_folder = tmp_path / "work" / "studies" / "which" / "trials"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (ended := sorted(trials_folder.glob("*.json"))):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    before = {path.name: json.loads(path.read_text())["run"] for path in ended}
    assert 1 <= len(before) < 3
    resumed = ablate(small, "x")
    assert {f"{one.id}.json": one.run for one in resumed if f"{one.id}.json" in before} == before  # not run twice
    whole = ablate(study(text, "federation.rounds=1", f"work_dir={tmp_path}/other"), "x")
    sent = ("bytes_up", "bytes_down")  # a trial that was lost has its sites opened twice
    assert kept(resumed, *sent) == kept(whole, *sent)
    assert all(one.bytes_total >= other.bytes_total for one, other in zip(resumed, whole, strict=True))


def test_a_trial_that_was_lost_goes_on_from_its_last_round(
    study: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Recorder.after_round

    def lost(self: Recorder, report: Any, state: Any) -> None:
        finish(self, report, state)
        if report.round == 2:
            raise KeyboardInterrupt

    small = study("selections: [lora]", "federation.rounds=3")
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "after_round", lost)
        with pytest.raises(KeyboardInterrupt):
            ablate(small, "x")
    (resumed,) = ablate(small, "x")
    record = (tmp_path / "work" / "runs" / resumed.run / "record.jsonl").read_text().splitlines()
    assert [one["round"] for one in map(json.loads, record) if one["kind"] == "resumed"] == [2]
    (whole,) = ablate(study("selections: [lora]", "federation.rounds=3", f"work_dir={tmp_path}/other"), "x")
    assert (resumed.test, resumed.curve) == (whole.test, whole.curve)


def test_a_trial_that_fails_is_named_and_run_again(
    study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, broken = trial_module.run_federation, [True]

    def sometimes(config: Any, *rest: Any, **more: Any) -> Any:
        if config.layers.name == "lora" and broken:
            raise RoundError("too few sites are left")
        return run(config, *rest, **more)

    monkeypatch.setattr(trial_module, "run_federation", sometimes)
    text = "selections: [lora, partial-decoder]"
    with pytest.raises(TrialError, match=r"1 of 2 trials failed.*lora seed 0: too few sites are left"):
        ablate(study(text), "x")
    broken.clear()
    monkeypatch.setattr(trial_module, "run_federation", run)
    results = ablate(study(text), "x")
    assert [one.status for one in results] == ["finished", "finished"]


def test_children_hang_from_one_run_of_the_study(study: Callable[..., Study]) -> None:
    from mlflow.tracking import MlflowClient

    small = study("selections: [partial-decoder, lora]")
    results = ablate(small, "x")
    client = MlflowClient(f"sqlite:///{small.overrides['work_dir']}/mlflow.db")
    experiment = client.get_experiment_by_name("which")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if run.data.tags.get("fedsam.stage") == "ablate"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(parents) == 1
    assert {run.data.tags["fedsam.trial"] for run in children} == {one.id for one in results}
    assert len({frozenset(run.data.params) for run in children}) == 1
    assert {run.data.params["selection"] for run in children} == {"partial-decoder", "lora"}


def test_a_search_takes_steps_within_its_budget(study: Callable[..., Study], tmp_path: Path) -> None:
    text = "selections: [{components: [mask_tokens, hypernetworks]}]\nsearch: {budget_mb: 100, steps: 2}"
    steps = search(study(text, "learning.local_steps=3"), "x")
    written = json.loads((tmp_path / "work" / "studies" / "which" / "search.json").read_text())
    assert [row["taken"] for row in written] == [step.taken for step in steps]
    assert steps[0].taken in ("mask_tokens", "hypernetworks")
    with pytest.raises(ConfigError, match="says nothing of a search"):
        search(study("selections: [lora]"), "x")


def test_another_cohort_is_another_study(study: Callable[..., Study], cohort_folder: Path) -> None:
    ablate(study("selections: [partial-decoder]", "federation.rounds=1"), "x")
    scan = cohort_folder / "imagesTr" / "north_0.nii.gz"
    image: Any = nib.load(scan)
    nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32) + 1, image.affine), scan)
    with pytest.raises(ConfigError, match="begun with other scans"):
        ablate(study("selections: [partial-decoder]", "federation.rounds=1"), "x")


def test_the_command_lists_and_refuses(study: Callable[..., Study], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in (
        (["hippocampus", "--list", "cohort.path=/nowhere"], 0),
        (["nothing.yaml"], 2),
        (["hippocampus", "federation.rool=1"], 2),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == status
    said = SimpleNamespace(**capsys.readouterr()._asdict())
    assert "lora-decoder" in said.out
    assert "federation.rool" in said.err
