"""`fedsam export` of a run: what it writes, and that a run, its merged checkpoint and its ONNX give one mask."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from support.models import trained_adapter

from fedsam_core.data.preprocess import prepare_image
from fedsam_core.evaluation.inference import segment_scan
from fedsam_core.selection import preset
from fedsam_core.trained import load_trained
from pipelines import console, export
from pipelines.cli import COMMANDS


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """command(argument, ...) runs `fedsam export` and gives (status, stdout, stderr), no line of them wrapped."""
    monkeypatch.setattr(console.out, "width", 400)

    def run(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            export.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return trained_adapter(tmp_path / "adapter", preset("flap", 4))


def test_a_run_is_exported_into_its_folder(
    stage: Callable[..., Any], command: Callable[..., Any], tmp_path: Path, cohort_folder: Path
) -> None:
    steps = ("learning.local_steps=25", "learning.learning_rate=3e-3", "slices.augment=false")
    settings = ("preprocess.slice_axis=axial", "learning.precision=fp32", *steps)
    ended = stage("federate", *settings)
    assert ended.status == 0, ended.error
    (run,) = (tmp_path / "work" / "runs").iterdir()
    trained = load_trained(run)
    card = trained.card
    assert (card.run, card.cohort, card.classes, card.modality) == (run.name, "small", ("outer", "inner"), "mri")
    assert (card.precision, card.synthetic, card.preprocess.slice_axis) == ("fp32", False, "axial")
    summary = json.loads((run / "summary.json").read_text())
    assert card.dice == summary["after"]["dice"]
    assert card.dice_by_class == {name: one["dice"] for name, one in summary["after"]["per_class"].items()}

    status, out, error = command(run)
    assert status == 0, error
    written = {str(path.relative_to(run / "export")) for path in (run / "export").rglob("*") if path.is_file()}
    assert written == {
        *(f"adapter/{name}" for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")),
        *(f"adapter/{name}" for name in ("card.json", "manifest.json")),
        *(f"merged/{name}" for name in ("README.md", "card.json", "sam.pth")),
        *(f"onnx/{name}" for name in ("README.md", "card.json", "segmenter.onnx")),
    }
    for told in (
        "adapter/adapter_model.safetensors",
        "merged/sam.pth",
        "onnx/segmenter.onnx",
        "MB",
        str(run / "export"),
    ):
        assert told in out
    assert "synthetic scans" not in (run / "export" / "adapter" / "README.md").read_text()

    assert stage("evaluate", *settings).status == 0
    for case in ("north_5", "south_5", "west_5"):
        expected = np.asarray(nib.load(run / "evaluation" / "test" / "masks" / f"{case}.nii.gz").dataobj)
        scan = prepare_image(cohort_folder / "imagesTr" / f"{case}.nii.gz", card.preprocess, card.modality)
        for path in (run, run / "export", run / "export" / "merged", run / "export" / "merged" / "sam.pth"):
            model = load_trained(path)
            mask = segment_scan(model.segmenter, scan, model.slices, model.segmenter.image_size, 16)
            # To the last bit from the adapter; folding LoRA in changes last bits, and a voxel on an edge may tip over.
            assert (mask != expected).mean() <= (0 if model.card.merged_sha256 is None else 0.002)
        assert 0.05 < (expected > 0).mean() < 0.5


def test_formats_and_folders_are_chosen(
    adapter: Path, command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, error = command(adapter, "--format", "merged, adapter")
    assert status == 0, error
    made = tmp_path / "kits-20261123-141500-ab12cd-9f3e-export"
    assert {path.name for path in made.iterdir()} == {"adapter", "merged"}
    assert "the same bytes as were loaded" in out
    assert "segment_anything loads it strictly: logits within" in out
    assert "made-up scans" in out
    assert command(made / "merged", "-o", tmp_path / "again", "--format", "merged")[0] == 0
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["merged"]
    status, _, error = command(made / "merged", "--format", "adapter")
    assert status == 2
    assert "has no adapter any more" in error


def test_wrong_arguments_are_one_line(adapter: Path, command: Callable[..., Any], tmp_path: Path) -> None:
    for arguments, told in [
        ([adapter, "--format", "merged,tflite"], "--format: there is no 'tflite'; name some of adapter,merged,onnx"),
        ([tmp_path / "none"], "none is no model: give the folder of a run"),
        (
            [adapter, "--checkpoint", adapter / "card.json"],
            "is not needed, as the model was trained from random weights",
        ),
        ([adapter, "-o", tmp_path], "adapter is the model that is to be exported: choose another folder with -o"),
    ]:
        status, out, error = command(*arguments)
        assert status == 2
        assert told in error
        assert len(error.strip().splitlines()) == 1
        assert out == ""
    assert {path.name for path in tmp_path.iterdir()} - {"Task"} == {"adapter"}


def test_it_is_a_command() -> None:
    assert "export" in COMMANDS
