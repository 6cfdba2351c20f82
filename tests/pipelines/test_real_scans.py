"""The stages on real hippocampus scans: scores on the scans' own grid, as nibabel and numpy alone have them."""

import csv
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from agreement import agreement


@pytest.mark.real_data
def test_a_short_federation_is_scored_as_numpy_scores_it(
    stage: Callable[..., Any], real_data: Path, tmp_path: Path
) -> None:
    source = real_data / "Task04_Hippocampus"
    settings = [
        f"cohort.path={source}",
        "cohort.name=hippocampus",
        "model.image_size=64",
        "learning.learning_rate=3e-3",
        "learning.local_steps=50",
        "learning.batch_size=8",
        "slices.augment=false",
    ]
    ended = stage("federate", *settings)
    assert ended.status == 0, ended.error
    ended = stage("evaluate", *settings)
    assert ended.status == 0, ended.error
    (run,) = (tmp_path / "work" / "runs").iterdir()
    scores = list(csv.DictReader((run / "evaluation" / "test" / "scores.csv").open()))
    assert {site: sum(row["site"] == site for row in scores) for site in ("site-a", "site-b", "site-c")} == {
        "site-a": 6,
        "site-b": 8,
        "site-c": 4,
    }
    own = []
    for row in scores:
        mask = nib.load(run / "evaluation" / "test" / "masks" / f"{row['case']}.nii.gz")
        truth = nib.load(source / "labelsTr" / f"{row['case']}.nii.gz")
        assert mask.shape == truth.shape
        np.testing.assert_allclose(mask.affine, truth.affine)
        for value, name in ((1, "Anterior"), (2, "Posterior")):
            a, b = np.asarray(mask.dataobj) == value, np.asarray(truth.dataobj) == value
            own.append(2 * (a & b).sum() / (a.sum() + b.sum()))
            assert float(row[f"dice_{name}"]) == pytest.approx(own[-1], abs=1e-6)
    assert np.mean(own) > 0.05  # two rounds already find some of it

    # The same model, used in each of the ways that there are, on scans that it has never seen.
    for command, arguments in (
        ("predict", [str(scans_of(source, scores, tmp_path)), "--model", str(run), "-o", str(tmp_path / "masks")]),
        ("export", [str(run)]),
    ):
        with pytest.raises(SystemExit) as left:
            import_module(f"pipelines.{command}").main(arguments)
        assert not left.value.code
    for row in scores[:4]:
        evaluated = nib.load(run / "evaluation" / "test" / "masks" / f"{row['case']}.nii.gz")
        predicted = nib.load(tmp_path / "masks" / f"{row['case']}_seg.nii.gz")
        np.testing.assert_array_equal(np.asarray(predicted.dataobj), np.asarray(evaluated.dataobj))
        np.testing.assert_array_equal(predicted.affine, evaluated.affine)
    found = agreement(run, source / "imagesTr")
    assert found["sites_dice_off_by"] < 1e-9
    assert found["predict"] == {"voxels_that_differ": 0, "lowest_dice": 1.0}
    for way in ("merged", "merged, fp32", "onnx"):
        assert found[way]["voxels_that_differ"] <= found["labelled_voxels"] * (0.001 if "," in way else 0.01)


def scans_of(source: Path, scores: list[dict[str, str]], folder: Path) -> Path:
    """A folder with four of the scored scans."""
    scans = folder / "scans"
    scans.mkdir()
    for row in scores[:4]:
        shutil.copy(source / "imagesTr" / f"{row['case']}.nii.gz", scans)
    return scans
