"""docs/data.md, section 3, as it is written: three hospitals' own folders, ten lines of YAML, prepare and federate."""

import re
from importlib import import_module
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from support.dicom import LPS, write_series

from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.store import LocalStore

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
SITES = ("aphp", "charite", "ucl")


def scans(folder: Path, site: str, rng: np.random.Generator) -> None:
    """Five CT scans; the first is a DICOM series, whose mask is NIfTI."""
    spacing = {"aphp": 5.0, "charite": 1.0, "ucl": 2.5}[site]
    affine = LPS @ np.diag([1.5, 1.5, spacing, 1])
    for number in range(5):
        image = rng.normal(-50, 15, (24, 22, 8)).round()
        label = np.zeros(image.shape, np.uint8)
        label[5:14, 6:15, 2:6] = 1
        label[8:12, 9:12, 3 + number % 2 : 5] = 2
        image[label == 1] += 160
        image[label == 2] += 90
        name = f"p{number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(label, affine), folder / f"{name}_seg.nii.gz")
        if number == 0:
            write_series(folder / name, image, affine)
        else:
            nib.save(nib.Nifti1Image(image.astype(np.int16), affine), folder / f"{name}.nii.gz")


def test_ten_lines_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(text.splitlines()) == 10
    written = yaml.safe_load(text)
    assert tuple(sorted(written["cohort"]["sites"])) == SITES
    rng = np.random.default_rng(11)
    for site, folder in written["cohort"]["sites"].items():
        scans(tmp_path / "nodes" / site / folder.lstrip("/"), site, rng)
        text = text.replace(f"{site}: {folder}", f"{site}: {tmp_path / 'nodes' / site / folder.lstrip('/')}")
    file = tmp_path / "kidneys.yaml"
    file.write_text(text)
    small = [
        "model={backbone: vit_t, image_size: 32}",
        "rank=4",
        "learning={local_steps: 2, batch_size: 4}",
        "federation.rounds=1",
        "engine.kind=in-process",
        f"storage.prepared={tmp_path / 'prepared'}",
        f"work_dir={tmp_path / 'work'}",
    ]
    for stage in ("prepare", "federate"):
        with pytest.raises(SystemExit) as ended:
            import_module(f"pipelines.{stage}").STAGE.main(["--config", str(file), *small])
        said = capsys.readouterr()
        assert not ended.value.code, said.err
        if stage == "prepare":
            assert "15 cases, classes kidney, tumour" in said.out
            low, high = map(float, re.search(r"HU (-?\d+) to (-?\d+) become", said.out).groups())  # type: ignore[union-attr]
            assert -20 < low < high < 200  # of the structures, by a secure sum: not the default window
    (location,) = (tmp_path / "prepared").iterdir()
    shares = [PreparedCohort.open(LocalStore(location / site)) for site in SITES]
    for share in shares:
        assert share.config.ct_window == (low, high)
        case = share.load(f"{share.cohort.sites[0]}_p000")  # the DICOM series
        assert case.spacing == pytest.approx((3, 1.5, 1.5), rel=0.2)  # whole slices fill the field of view
        assert set(np.unique(case.label)) == {0, 1, 2}
