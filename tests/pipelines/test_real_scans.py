"""The stages on real hippocampus scans: scores on the scans' own grid, as nibabel and numpy alone have them."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest


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
