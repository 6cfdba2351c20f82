"""A small cohort of real layout on disk, and stages called as a person calls them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

SITES = ("north", "south", "west")


@pytest.fixture
def cohort_folder(tmp_path: Path) -> Path:
    """A Decathlon folder: three sites with five training cases and one test case each, two classes."""
    root = tmp_path / "Task"
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    rows, listing = ["case,site,split"], []
    rng = np.random.default_rng(5)
    for site in SITES:
        for index in range(6):
            case = f"{site}_{index}"
            image = rng.normal(100, 20, (20, 22, 6)).astype(np.float32)
            label = np.zeros(image.shape, np.uint8)
            label[4:12, 5:14, 1:5] = 1
            label[8:12, 9:13, 2:4] = 2
            image[label == 1] += 120
            image[label == 2] += 240
            affine = np.diag([1.0, 1.0, 3.0, 1.0])
            nib.save(nib.Nifti1Image(image, affine), root / "imagesTr" / f"{case}.nii.gz")
            nib.save(nib.Nifti1Image(label, affine), root / "labelsTr" / f"{case}.nii.gz")
            rows.append(f"{case},{site},{'test' if index == 5 else 'train'}")
            listing.append({"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"})
    (root / "sites.csv").write_text("\n".join(rows) + "\n")
    description = {
        "name": "Task",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "outer", "2": "inner"},
        "training": listing,
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    error: str


@pytest.fixture
def small_settings(tmp_path: Path, cohort_folder: Path) -> list[str]:
    """The small cohort, vit_t at 32 px, no Ray."""
    return [
        "name=small",
        f"work_dir={tmp_path / 'work'}",
        "cohort.name=small",
        "cohort.source=nifti",
        f"cohort.path={cohort_folder}",
        "model.backbone=vit_t",
        "model.image_size=32",
        "rank=4",
        "engine.kind=in-process",
        "federation.rounds=2",
        "federation.share_pictures=true",
        "learning.local_steps=2",
        "learning.batch_size=4",
    ]


@pytest.fixture
def stage(small_settings: list[str], capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """stage("prepare", "key=value", ...) runs a stage with the small settings."""
    from importlib import import_module

    def run(name: str, *overrides: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            import_module(f"pipelines.{name}").STAGE.main([*small_settings, *overrides])
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return run
