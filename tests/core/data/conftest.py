"""Small cohorts on disk, in each layout, with the files to spoil."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
SHAPE = (12, 10, 8)
Saver = Callable[..., None]


def _save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def _scan(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.normal(40, 80, SHAPE).astype(np.float32)
    label = np.zeros(SHAPE, np.uint8)
    label[3:8, 2:7, 2:6] = 1
    label[4:6, 3:5, 3:5] = 2
    return image, label


@pytest.fixture
def save() -> Saver:
    """save(path, array, affine=...) writes NIfTI."""
    return _save


@pytest.fixture
def decathlon(tmp_path: Path) -> Path:
    """Two sites, five training cases and one test case each: CASE = a0..a5, b0..b5."""
    root = tmp_path / "decathlon"
    rows = ["case,site,split"]
    for site in "ab":
        for i in range(6):
            image, label = _scan(ord(site) * 100 + i)
            _save(root / "imagesTr" / f"{site}{i}.nii.gz", image)
            _save(root / "labelsTr" / f"{site}{i}.nii.gz", label)
            rows.append(f"{site}{i},site-{site},{'test' if i == 5 else 'train'}")
    (root / "sites.csv").write_text("\n".join(rows) + "\n")
    (root / "dataset.json").write_text(
        json.dumps({"modality": {"0": "CT"}, "labels": {"0": "background", "1": "kidney", "2": "tumour"}})
    )
    return root


@pytest.fixture
def site_folders(tmp_path: Path) -> Path:
    """Sites X (files side by side) and Y (images and labels), ten cases each, numbered alike, no table."""
    root = tmp_path / "folders"
    for i in range(10):
        image, label = _scan(i)
        suffix = ("_seg", "_label", "_Segmentation")[i % 3]
        _save(root / "X" / f"Case{i:02d}.nii.gz", image)
        _save(root / "X" / f"Case{i:02d}{suffix}.nii.gz", label)
        image, label = _scan(100 + i)
        _save(root / "Y" / "images" / f"Case{i:02d}.nii", image)
        _save(root / "Y" / "labels" / f"Case{i:02d}.nii", label)
    return root


@pytest.fixture
def real_data() -> Path:
    folder = os.environ.get("FEDSAM_REAL_DATA")
    if not folder:
        pytest.skip("FEDSAM_REAL_DATA is not set: the real scans are not checked")
    return Path(folder)
