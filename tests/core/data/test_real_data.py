"""The real scans: hippocampus in Decathlon layout with sites.csv, and KiTS masks with their true affines."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fedsam_core.data.cohort import Cohort, CohortConfig, read_cohort
from fedsam_core.data.preprocess import PreprocessConfig, prepare
from fedsam_core.data.slices import SliceConfig, SliceDataset
from fedsam_core.store import LocalStore

pytestmark = pytest.mark.real_data


def read_hippocampus(folder: Path, work: Path) -> Cohort:
    path = folder / "Task04_Hippocampus"
    return read_cohort(CohortConfig(name="hippocampus", source="nifti", path=path), work)


def test_hippocampus_counts(real_data: Path, tmp_path: Path) -> None:
    cohort = read_hippocampus(real_data, tmp_path)
    assert (len(cohort.cases), cohort.modality, cohort.classes) == (66, "mri", ("Anterior", "Posterior"))
    assert cohort.sites == ("site-a", "site-b", "site-c")
    counts = {s: [len(cohort.select(s, split)) for split in ("train", "val", "test")] for s in cohort.sites}
    assert counts == {"site-a": [14, 2, 6], "site-b": [20, 2, 8], "site-c": [9, 1, 4]}  # 16/22/10 before validation
    assert list(tmp_path.iterdir()) == []


def test_hippocampus_prepared(real_data: Path, tmp_path: Path) -> None:
    """Sites store intensities 0-255, 10^3 and 10^5: prepared, they are alike; masks come back voxel for voxel."""
    cohort = read_hippocampus(real_data, tmp_path)
    prepared = prepare(cohort, PreprocessConfig(), LocalStore(tmp_path))
    means: dict[str, list[float]] = {site: [] for site in cohort.sites}
    for case in cohort.cases:
        loaded = prepared.load(case.id)
        truth = np.asarray(nib.load(case.label).dataobj)
        np.testing.assert_array_equal(loaded.geometry.to_scan(loaded.label, 0), truth)
        assert 0 <= loaded.image.min() < 0.01 < 0.99 < loaded.image.max() <= 1
        means[case.site].append(float(loaded.image[loaded.label > 0].mean()))
    average = [np.mean(values) for values in means.values()]
    assert max(average) - min(average) < 0.15
    raw = [np.mean([case.intensity["mean"] for case in cohort.select(site)]) for site in cohort.sites]
    assert max(raw) > 1000 * min(raw)

    data = SliceDataset([prepared.load(case.id) for case in cohort.cases[:4]], 112, SliceConfig())
    images, labels = data.batch(np.flatnonzero(data.foreground_slices())[::9], seed=0, train=True)
    assert images.shape[1:] == (3, 112, 112)
    assert set(labels.unique().tolist()) == {0, 1, 2}


def test_kits_masks_come_back_voxel_for_voxel(real_data: Path, tmp_path: Path, save) -> None:
    """Axes I,P,L, 5 mm slices, one mask as uint16; scans are made to fit. At 2 x 2 mm pixels Dice >= 0.97."""
    rows = ["case,site,split"]
    names = ["case_00038", "case_00039"]
    for name, split in zip(names, ("train", "test"), strict=True):
        mask = nib.load(real_data / f"kits19/data/{name}/segmentation.nii.gz")
        assert nib.aff2axcodes(mask.affine) == ("I", "P", "L")
        label = np.asarray(mask.dataobj)[:40]
        noise = np.random.default_rng(0).integers(-20, 20, label.shape[1:], dtype=np.int16)
        save(tmp_path / f"c/imagesTr/{name}.nii.gz", (label.astype(np.int16) * 60 + noise), mask.affine)
        save(tmp_path / f"c/labelsTr/{name}.nii.gz", label, mask.affine)
        rows.append(f"{name},A,{split}")
    (tmp_path / "c/sites.csv").write_text("\n".join(rows))
    (tmp_path / "c/dataset.json").write_text('{"modality": {"0": "CT"}, "labels": {"0": "b", "1": "kidney", "2": "t"}}')
    cohort = read_cohort(CohortConfig(name="kits", source="nifti", path=tmp_path / "c"), tmp_path)
    assert [case.orientation for case in cohort.cases] == ["IPL", "IPL"]

    for config, least in ((PreprocessConfig(), 1.0), (PreprocessConfig(spacing=(None, 2.0, 2.0)), 0.97)):
        prepared = prepare(cohort, config, LocalStore(tmp_path / "p"))
        assert prepared.config.slice_axis == "axial"
        for case in cohort.cases:
            loaded = prepared.load(case.id)
            truth = np.asarray(nib.load(case.label).dataobj)
            assert loaded.spacing[0] == pytest.approx(5, rel=1e-4)
            assert len(loaded.image) == truth.shape[0]
            onehot = np.stack([loaded.label == value for value in range(3)]).astype(np.float32)
            back = loaded.geometry.to_scan(onehot, 1).argmax(0)
            assert back.shape == truth.shape
            dice = 2 * ((back > 0) & (truth > 0)).sum() / ((back > 0).sum() + (truth > 0).sum())
            assert dice >= least
