"""The made-up cohort: the same every time, different between sites, honest about itself."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydantic import ValidationError
from scipy.ndimage import label as components

from fedsam_core.data.cohort import Cohort, CohortConfig, read_cohort
from fedsam_core.data.preprocess import PreprocessConfig, prepare
from fedsam_core.data.sources.phantom import PhantomConfig, list_phantom, make_scan
from fedsam_core.errors import DataError
from fedsam_core.store import LocalStore

SMALL = PhantomConfig(cases_per_site=3, test_per_site=1, shape=(24, 48, 48))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


@pytest.fixture(scope="module")
def cohort(work: Path) -> Cohort:
    return read_cohort(CohortConfig(name="phantom", source="phantom", phantom=SMALL), work)


def voxels(path: str) -> np.ndarray:
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)


def test_says_that_it_is_synthetic(cohort: Cohort) -> None:
    assert cohort.synthetic
    assert cohort.classes == ("kidney", "tumour")
    assert cohort.modality == "ct"
    for case in cohort.cases:
        assert b"SYNTHETIC" in nib.load(case.image).header["descrip"].tobytes()
        assert b"SYNTHETIC" in nib.load(case.label).header["descrip"].tobytes()
    assert '"synthetic": true' in (Path(cohort.cases[0].image).parents[1] / "dataset.json").read_text()


def test_default_cohort_is_the_one_the_demo_speaks_of() -> None:
    config = PhantomConfig()
    assert (config.sites, config.cases_per_site, config.test_per_site) == (3, 9, 2)
    image, label = make_scan(config, 0, 0)
    assert image.shape == label.shape == (96, 96, 48)


def test_anatomy(cohort: Cohort) -> None:
    """Two kidneys of the size of kidneys, tumours beside them, in Hounsfield units, in the right place."""
    sided = 0
    for case in cohort.cases:
        scan, label = voxels(case.image), voxels(case.label)  # RAS
        assert (scan.dtype, label.dtype) == (np.int16, np.uint8)
        assert (scan[0, -1] < -850).all()  # air beside the patient's chest, noise and all
        assert case.label_values == (0, 1, 2)
        voxel_ml = np.prod(case.spacing) / 1000
        organs, count = components(label > 0)
        sizes = [int((organs == k).sum()) * voxel_ml for k in range(1, count + 1)]
        sided += sum(size > 60 for size in sizes) == 2  # a tumour may join both to one at this resolution
        assert 120 < (label == 1).sum() * voxel_ml < 500
        assert 0.5 < (label == 2).sum() * voxel_ml < 200
        kidney, tumour = scan[label == 1].mean(), scan[label == 2].mean()
        assert 80 < kidney < 200
        assert 10 < tumour < kidney - 15
        body = scan > -300
        middle = np.array([axis.mean() for axis in np.nonzero(body)])
        for side in (label[: round(middle[0])], label[round(middle[0]) :]):
            assert (side == 1).sum() * voxel_ml > 50  # one on each side
        assert np.nonzero(label == 1)[1].mean() < middle[1]  # RAS: behind the middle
    assert sided >= 6


def test_neighbours_are_as_bright_as_kidneys_and_tumours(cohort: Cohort) -> None:
    """A threshold is not enough: most voxels in the kidneys' range of HU are something else."""
    for case in cohort.cases:
        scan, label = voxels(case.image), voxels(case.label)
        for value in (1, 2):
            low, high = np.percentile(scan[label == value], (10, 90))
            bright = (scan >= low) & (scan <= high)
            assert (label[bright] == value).mean() < 0.6


def test_sites_differ_as_scanners_do(cohort: Cohort) -> None:
    first = [cohort.select(site)[0] for site in cohort.sites]
    assert len({case.orientation for case in first}) == 3
    thickness = [max(case.spacing) if case.orientation != "IPL" else case.spacing[0] for case in first]
    assert max(thickness) > 1.9 * min(thickness)
    kidney = [np.mean([voxels(c.image)[voxels(c.label) == 1].mean() for c in cohort.select(s)]) for s in cohort.sites]
    assert max(kidney) - min(kidney) > 20
    for site in cohort.sites:
        assert len({(case.orientation, case.spacing) for case in cohort.select(site)}) == 1


def test_prepared_phantom_is_upright_in_every_site(cohort: Cohort, tmp_path: Path) -> None:
    prepared = prepare(cohort, PreprocessConfig(), LocalStore(tmp_path))
    assert prepared.config.slice_axis == "axial"
    for case in cohort.cases:
        loaded = prepared.load(case.id)
        bone = np.argwhere(loaded.image[len(loaded.image) // 4 : len(loaded.image) // 2] >= 0.999)
        assert bone[:, 1].mean() > loaded.image.shape[1] / 2  # the spine is below the middle of the picture


def test_made_once_and_the_same_anywhere(cohort: Cohort, work: Path, tmp_path: Path) -> None:
    config = CohortConfig(name="phantom", source="phantom", phantom=SMALL)
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    read_cohort(config, work)
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before
    assert read_cohort(config, tmp_path).hash == cohort.hash


def test_patients_do_not_depend_on_how_many_there_are() -> None:
    more = SMALL.model_copy(update={"sites": 5, "cases_per_site": 30})
    np.testing.assert_array_equal(make_scan(SMALL, 1, 2)[0].dataobj, make_scan(more, 1, 2)[0].dataobj)
    other = SMALL.model_copy(update={"seed": 8})
    assert (np.asarray(make_scan(SMALL, 1, 2)[1].dataobj) != np.asarray(make_scan(other, 1, 2)[1].dataobj)).any()


def test_interrupted_making_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        assert (stage, total) == ("phantom", 9)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list_phantom(SMALL, tmp_path, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write.*working folder"):
        list_phantom(SMALL, tmp_path / "file", None)


@pytest.mark.parametrize("wrong", [{"test_per_site": 9}, {"shape": (4, 96, 96)}, {"sites": 0}])
def test_impossible_configuration_is_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        PhantomConfig(**wrong)
