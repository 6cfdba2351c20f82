"""Preparation at the sites: the same as pooled, statistics from a secure sum, resumed, and clear when it fails."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fedsam_core.data.cohort import CohortConfig, read_cohort
from fedsam_core.data.preprocess import PreparedCohort, PreprocessConfig, prepare
from fedsam_core.data.survey import BINS, Survey, take_survey
from fedsam_core.errors import ConfigError, DataError, RoundError
from fedsam_core.federation import preparation
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.engine import InProcessEngine, in_process
from fedsam_core.federation.preparation import CohortSite, CohortSpec, PreparedSites, prepare_shares
from fedsam_core.federation.tasks import attempt_to_json
from fedsam_core.secagg.attempt import Attempt
from fedsam_core.secagg.refusals import OtherAttempt
from fedsam_core.store import LocalStore

SITES = ("north", "south", "west")
AUTO = PreprocessConfig(ct_window="auto")


@pytest.fixture
def hospitals(tmp_path: Path) -> Path:
    """Three sites' own folders, six CT scans each; organ and scanner differ, the mask is where the organ is."""
    root = tmp_path / "hospitals"
    rng = np.random.default_rng(3)
    for number, site in enumerate(SITES):
        (root / site).mkdir(parents=True)
        for index in range(6):
            image = rng.normal(-60, 30, (14, 12, 6)).astype(np.int16)
            label = np.zeros(image.shape, np.uint8)
            label[3:9, 2:8, 1:5] = 1
            label[5:7, 4:6, 2:4] = 2
            image[label > 0] += 150 + 25 * number
            affine = np.diag([1.0, 1.0, 4.0 if number else 2.0, 1.0])
            nib.save(nib.Nifti1Image(image, affine), root / site / f"case{index}.nii.gz")
            nib.save(nib.Nifti1Image(label, affine), root / site / f"case{index}_seg.nii.gz")
    return root


def config_of(root: Path, sites: tuple[str, ...] = SITES, **settings: Any) -> CohortConfig:
    folders = {site: root / site for site in sites}
    return CohortConfig(name="t", sites=folders, modality="ct", classes=("organ", "lesion"), **settings)


def specs_of(
    cohort: CohortConfig, work: Path, preprocess: PreprocessConfig = AUTO, run: str = "t", **federation: Any
) -> list[CohortSpec]:
    sites = tuple(sorted(cohort.sites or {}))
    return [
        CohortSpec(
            run=run,
            site=site,
            sites=sites,
            seed=1,
            federation=FederationConfig(**federation),
            cohort=cohort,
            preprocess=preprocess,
            work_dir=work,
            prepared=str(work / "prepared"),
        )
        for site in sites
    ]


def prepared_by(specs: list[CohortSpec], progress: Any = None) -> PreparedSites:
    return prepare_shares(in_process(specs, CohortSite), specs, progress)


def opened(sites: PreparedSites) -> PreparedCohort:
    return PreparedCohort.open(*(LocalStore(Path(share["url"])) for share in sites.shares.values()))


class Listening(InProcessEngine):
    """Notes which methods were called, and what came back from them."""

    def __init__(self, specs: list[CohortSpec]) -> None:
        super().__init__({spec.site: CohortSite(spec) for spec in specs})
        self.heard: list[tuple[str, Any]] = []

    def call(self, method: str, args: Any, deadline: float, *rest: Any) -> Any:
        replies, lost = super().call(method, args, deadline, *rest)
        self.heard.append((method, replies))
        return replies, lost


def test_shares_are_what_pooled_scans_would_have_become(hospitals: Path, tmp_path: Path) -> None:
    config = config_of(hospitals)
    steps: list[tuple[str, int, int]] = []
    sites = prepared_by(specs_of(config, tmp_path), lambda *step: steps.append(step))
    cohort = read_cohort(config, tmp_path)
    pooled = prepare(cohort, AUTO, LocalStore(tmp_path / "pooled"))
    assert sites.sites == SITES
    assert sites.hash == cohort.hash
    assert sites.config == pooled.config
    assert sites.config.is_resolved("ct")
    assert sites.described.cases == ()
    assert {stage: done for stage, done, _ in steps} == {"read": 18, "survey": 12, "prepare": 18}
    together = opened(sites)
    assert together.cohort.cases == cohort.cases
    for case in cohort.cases:
        np.testing.assert_array_equal(together.load(case.id).image, pooled.load(case.id).image)
        np.testing.assert_array_equal(together.load(case.id).label, pooled.load(case.id).label)


@pytest.mark.parametrize("scale", [1, 70_000])
def test_federated_statistics_are_the_pooled_ones(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: int
) -> None:
    """To the last voxel: rounding in the ring stays below one half. Also where counts need more than 16 bits."""

    def scaled(*args: Any) -> Survey:
        counts = take_survey(*args)
        return Survey(counts.planes, counts.histogram * scale)

    monkeypatch.setattr(preparation, "take_survey", scaled)
    specs = specs_of(config_of(hospitals), tmp_path)
    engine = Listening(specs)
    sites = prepare_shares(engine, specs)
    cohort = read_cohort(config_of(hospitals), tmp_path)
    pooled = take_survey(cohort, histogram=True)
    units = np.concatenate(
        [
            np.asarray(nib.load(case.image).dataobj)[np.asarray(nib.load(case.label).dataobj) > 0]
            for case in cohort.select(split="train")
        ]
    )
    assert pooled.histogram.sum() == units.size  # an independent count, and independent percentiles of it
    assert sites.config.ct_window == tuple(np.percentile(units, (0.5, 99.5), method="inverted_cdf"))
    summed = preparation.secure_survey(engine, specs[0].model_copy(update={"run": "t"}))
    np.testing.assert_array_equal(summed.histogram, pooled.histogram * scale)
    np.testing.assert_array_equal(summed.planes, pooled.planes)


def test_no_site_tells_its_histogram(hospitals: Path, tmp_path: Path) -> None:
    """What leaves a site is masked: it looks like noise, and no method that tells counts in the open is called."""
    specs = specs_of(config_of(hospitals), tmp_path)
    engine = Listening(specs)
    prepare_shares(engine, specs)
    methods = [method for method, _ in engine.heard]
    assert "survey" in methods
    assert "tell" not in methods
    (replies,) = (replies for method, replies in engine.heard if method == "survey")
    for message in replies.values():
        counts = np.bincount(np.frombuffer(message[-4 * BINS :], np.uint8), minlength=256)
        expected = 4 * BINS / 256
        assert ((counts - expected) ** 2 / expected).sum() < 400  # chi-square, 255 degrees: 400 is 6.4 sigma
    site = CohortSite(specs[0])
    site.read()
    site.advance(60)
    site.count()
    site.advance(60)
    with pytest.raises(RoundError, match="is not open"):
        site.tell()
    site.open()
    with pytest.raises(ConfigError, match="tells no histogram in the open"):
        site.tell()


def test_a_second_time_does_nothing(hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = specs_of(config_of(hospitals), tmp_path)
    first = prepared_by(specs)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "read_cohort", lambda *args: pytest.fail("opened a scan"))
        assert prepared_by(specs_of(config_of(hospitals), tmp_path, run="again")) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("*")} == before

    (hospitals / "west" / "case3.nii.gz").unlink()
    (hospitals / "west" / "case3_seg.nii.gz").unlink()
    changed = prepared_by(specs_of(config_of(hospitals), tmp_path, run="third"))
    assert sum(changed.shares["west"]["cases"].values()) == 5
    assert changed.shares["north"]["hash"] == first.shares["north"]["hash"]
    assert changed.hash != first.hash


def test_an_interrupted_preparation_goes_on(hospitals: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "prepare" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared_by(specs_of(config_of(hospitals), tmp_path), interrupt)
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("*.safetensors")}
    assert left
    opened(prepared_by(specs_of(config_of(hospitals), tmp_path, run="again"))).load("west_case1")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in left.items())


def test_a_bad_scan_is_left_out_and_named(hospitals: Path, tmp_path: Path) -> None:
    (hospitals / "south" / "case2.nii.gz").write_bytes(b"no scan")
    sites = prepared_by(specs_of(config_of(hospitals), tmp_path))
    (problem,) = [problem for problem in sites.described.problems if problem.quarantined]
    assert (problem.site, problem.case, problem.kind) == ("south", "south_case2", "unreadable")
    assert "case2.nii.gz" in problem.reason
    assert sum(sites.shares["south"]["cases"].values()) == 5
    assert problem in opened(sites).cohort.problems
    with pytest.raises(DataError, match=r"site south cannot be prepared: .*case2.nii.gz: truncated or not a NIfTI"):
        prepared_by(specs_of(config_of(hospitals, strict=True), tmp_path / "strict"))


def test_a_link_to_nowhere_is_left_out_too(hospitals: Path, tmp_path: Path) -> None:
    (hospitals / "south" / "case2.nii.gz").unlink()
    (hospitals / "south" / "case2.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    sites = prepared_by(specs_of(config_of(hospitals), tmp_path))
    assert [problem.case for problem in sites.described.problems if problem.quarantined] == ["south_case2"]


def test_a_site_reads_its_own_folder_only(hospitals: Path, tmp_path: Path) -> None:
    """On a hospital's node the folders of the others are not there."""
    shutil.rmtree(hospitals / "south")
    spec = specs_of(config_of(hospitals), tmp_path)[0]
    site = CohortSite(spec)
    site.read()
    while not site.advance(60)["finished"]:
        pass
    assert site.state()["modality"] == "ct"
    with pytest.raises(DataError, match=r"site south cannot be prepared: .*south: no such folder"):
        prepared_by(specs_of(config_of(hospitals), tmp_path))


@pytest.mark.parametrize("secure_sum", ["masked", "plain"])
def test_two_sites(hospitals: Path, tmp_path: Path, secure_sum: Any) -> None:
    """Too few for a secure sum: the plane is told in the open, the histogram only where sums in the open are asked."""
    config = config_of(hospitals, ("north", "south"))
    planes = prepared_by(specs_of(config, tmp_path / "a", PreprocessConfig(), secure_sum=secure_sum))
    assert planes.config.slice_axis == "axial"
    specs = specs_of(config, tmp_path / "b", secure_sum=secure_sum)
    if secure_sum == "plain":
        assert prepared_by(specs).config.ct_window[1] > planes.config.ct_window[0]
    else:
        with pytest.raises(
            ConfigError, match=r"ct_window=auto needs a secure sum over at least 3 sites.*\[-160, 240\]"
        ):
            prepared_by(specs)


def test_statistics_of_some_sites_do_not_settle_for_all(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., bytes] = CohortSite.survey

    def survey(self: CohortSite, delivered: bytes) -> bytes:
        if self.spec.site == "west":
            raise ConnectionError("the cable")
        return original(self, delivered)

    monkeypatch.setattr(CohortSite, "survey", survey)
    with pytest.raises(RoundError, match=r"statistics cannot be summed: .*west: ConnectionError: the cable"):
        prepared_by(specs_of(config_of(hospitals), tmp_path))


def test_a_sites_own_policy_holds_in_preparation_too(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "policy.yaml").write_text("masked_only: true")
    monkeypatch.setenv("FEDSAM_SITE_POLICY", str(tmp_path / "policy.yaml"))
    specs = specs_of(config_of(hospitals), tmp_path, secure_sum="plain")
    with pytest.raises(DataError, match="AgainstPolicy: this site takes part in masked sums only"):
        prepared_by(specs)


def test_a_survey_is_opened_for_all_sites_or_not_at_all(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that is late once: nothing is opened without it, and the second attempt goes through."""
    original: Callable[..., bytes] = CohortSite.survey
    late = []

    def survey(self: CohortSite, delivered: bytes) -> bytes:
        if self.spec.site == "west" and not late:
            late.append(True)
            raise TimeoutError("late")
        return original(self, delivered)

    monkeypatch.setattr(CohortSite, "survey", survey)
    opened_for: list[Any] = []
    unmask = CohortSite.unmask
    monkeypatch.setattr(
        CohortSite,
        "unmask",
        lambda self, confirmations: (opened_for.append(self.spec.site), unmask(self, confirmations))[1],
    )
    sites = prepared_by(specs_of(config_of(hospitals), tmp_path))
    assert late
    assert sorted(opened_for) == sorted(SITES)
    pooled = take_survey(read_cohort(config_of(hospitals), tmp_path), histogram=True)
    assert sites.config.ct_window == pooled.window((0.5, 99.5))


@pytest.mark.parametrize("other", [{"model_hash": "aa"}, {"round": 1}])
def test_the_same_survey_has_no_second_name(hospitals: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    """Else a driver could have it opened for other sites each time, and take the difference."""
    specs = specs_of(config_of(hospitals), tmp_path)
    site = CohortSite(specs[0])
    site.open()
    layout = preparation.survey_layout(len(SITES))
    fields = {"run": "t", "round": 0, "attempt": 1, "model_hash": "", "sites": SITES, "threshold": 3}
    fields |= {"config_hash": specs[0].settings_hash(""), "layout_hash": preparation._sum_hash(layout)}
    attempt = Attempt(**(fields | other))
    with pytest.raises(OtherAttempt, match="refuses a survey of a round or of a global state"):
        site.advertise(attempt_to_json(attempt), preparation.TASK.model_dump())


def test_a_scan_of_two_sites_is_noticed_where_all_lie_in_one_folder(hospitals: Path, tmp_path: Path) -> None:
    rows = [f"case{i},{site},{'test' if i == 5 else 'train'}" for site in SITES for i in range(6)]
    (hospitals / "sites.csv").write_text("\n".join(["case,site,split", *rows]))
    shutil.copy(hospitals / "west" / "case5.nii.gz", hospitals / "south" / "case0.nii.gz")
    config = CohortConfig(name="t", path=hospitals, modality="ct", classes=("organ", "lesion"), val_fraction=0)
    specs = [
        spec.model_copy(update={"cohort": config, "site": site, "sites": SITES})
        for spec, site in zip(specs_of(config_of(hospitals), tmp_path), SITES, strict=True)
    ]
    sites = prepared_by(specs)
    (leak,) = [problem for problem in sites.described.problems if problem.kind == "leakage"]
    assert (leak.site, leak.case, leak.quarantined) == ("south", "south_case0", True)
    assert sites.shares["south"]["cases"] == {"train": 4, "val": 0, "test": 1}
    assert sites.hash == read_cohort(config, tmp_path).hash
    again = prepared_by([spec.model_copy(update={"run": "again"}) for spec in specs])
    assert again == sites


def test_a_site_whose_every_case_is_faulty_is_named(hospitals: Path, tmp_path: Path) -> None:
    for mask in (hospitals / "south").glob("*_seg.nii.gz"):
        mask.unlink()
    with pytest.raises(DataError, match=r"site south cannot be prepared: site south: no training case.*no mask"):
        prepared_by(specs_of(config_of(hospitals), tmp_path))
    assert not (tmp_path / "prepared").exists()


def test_cases_of_one_name_at_two_sites_are_told_apart(hospitals: Path, tmp_path: Path) -> None:
    (hospitals / "west").rename(hospitals / "north_a")
    for file in (hospitals / "north").iterdir():
        file.rename(file.with_name(f"a_{file.name}"))
    sites = prepared_by(specs_of(config_of(hospitals, ("north", "north_a", "south")), tmp_path))
    with pytest.raises(DataError, match="two sites have a case north_a_case0: rename a site"):
        opened(sites)


def test_another_format_is_prepared_anew(hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = specs_of(config_of(hospitals), tmp_path)
    prepared_by(specs)
    assert preparation.prepared_before([CohortSite(spec) for spec in specs]) is not None
    monkeypatch.setattr(preparation, "FORMAT", preparation.FORMAT + 1)
    assert preparation.prepared_before([CohortSite(spec) for spec in specs]) is None


def test_sites_that_were_told_otherwise_refuse(hospitals: Path, tmp_path: Path) -> None:
    specs = specs_of(config_of(hospitals), tmp_path)
    specs[1] = specs[1].model_copy(update={"preprocess": PreprocessConfig(ct_window="auto", ct_percentiles=(10, 90))})
    with pytest.raises(RoundError, match="south refuses the survey sum"):
        prepared_by(specs)


def test_windows_that_cannot_be_told(tmp_path: Path) -> None:
    nothing = np.zeros(BINS, np.int64)
    planes = np.array([1, 0, 0])
    with pytest.raises(DataError, match="no training case has a labelled voxel"):
        Survey(planes, nothing).window((0.5, 99.5))
    one = nothing.copy()
    one[1034] = 9
    with pytest.raises(DataError, match="all labelled voxels are at 10 HU"):
        Survey(planes, one).window((0.5, 99.5))
