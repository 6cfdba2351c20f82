"""`fedsam data check` as a person calls it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pipelines import cli, data
from pipelines.config import load_config


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    error: str

    @property
    def said(self) -> str:
        """Standard output on one line."""
        return " ".join(self.out.split())


Check = Callable[..., Ended]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Check:
    """run(PATH, "--strict", ...) calls `fedsam data check`."""

    def call(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            data.main(["check", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def faulty(cohort_folder: Path) -> Path:
    """The small cohort with a truncated scan, a missing mask and a scan that no row names."""
    scan = cohort_folder / "imagesTr" / "south_2.nii.gz"
    scan.write_bytes(scan.read_bytes()[:-400])
    for case in (0, 1):
        (cohort_folder / "labelsTr" / f"west_{case}.nii.gz").unlink()
    table = cohort_folder / "sites.csv"
    table.write_text(table.read_text().replace("north_1,north,train\n", ""))
    return cohort_folder


def test_a_sound_cohort_is_told_how_to_go_on(run: Check, cohort_folder: Path, tmp_path: Path) -> None:
    """What is printed as YAML is a configuration, and reads this cohort."""
    before = sorted(file.stat().st_mtime_ns for file in cohort_folder.rglob("*"))
    ended = run(cohort_folder)
    assert (ended.status, ended.error) == (0, "")
    assert "check: 18 of 18" in ended.out
    assert f"{cohort_folder}: nifti, 18 cases, classes outer, inner" in ended.said
    assert "every case can be used" in ended.out
    assert sorted(file.stat().st_mtime_ns for file in cohort_folder.rglob("*")) == before
    lines = ended.out.partition(".yaml:")[2].partition("then: fedsam prepare --config Task.yaml")[0]
    file = tmp_path / "Task.yaml"
    file.write_text(lines)
    config = load_config(str(file))
    assert (config.cohort.path, config.cohort.source) == (cohort_folder, "nifti")
    assert yaml.safe_load(lines)["name"] == "Task"


def test_the_table_has_every_site_with_its_figures(run: Check, faulty: Path) -> None:
    out = run(faulty).out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    sites = {row[0]: row for row in rows if row[0]}
    assert {site: (row[1], row[2]) for site, row in sites.items()} == {
        "north": ("4", "0"),
        "south": ("4", "1"),
        "west": ("3", "2"),
        "?": ("", "1"),  # only its row would say whose north_1 is
    }
    assert {tuple(row[3:]) for site, row in sites.items() if site != "?"} == {("3", "1", "RAS", "0 1 2", "20x22x6")}
    assert [row[1] for row in rows] == ["4", "0", "1", "4", "0", "1", "3", "0", "1", ""]  # train, val, test of each


def test_problems_end_with_what_to_do(run: Check, faulty: Path) -> None:
    ended = run(faulty)
    assert (ended.status, ended.error) == (0, "")
    said = ended.said
    assert (
        f"left out {faulty}/imagesTr/south_2.nii.gz: truncated or not a NIfTI file; copy or download it again" in said
    )
    assert f"left out {faulty}/imagesTr/west_0.nii.gz: no mask" in said
    assert "(and 1 more like it: west_1)" in said
    assert f"left out {faulty}/imagesTr/north_1.nii.gz: no row in" in said
    assert "to know" in said  # all masks of this made-up cohort are alike
    assert "can be used, without the cases that are left out" in said
    assert "- 4 left out, 14 used: mend what is listed, or go on without" in said


def test_exit_status(run: Check, faulty: Path, tmp_path: Path) -> None:
    assert run(faulty).status == 0
    assert run(faulty, "--strict").status == 1
    for file in (faulty / "labelsTr").iterdir():
        file.unlink()
    ended = run(faulty)
    assert ended.status == 1
    assert "cannot be used as it is" in ended.out
    assert "fedsam prepare" not in ended.out
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ((tmp_path / "empty",), "no layout that is known; looked for imagesTr"),
        ((tmp_path / "nowhere",), "no such folder"),
        ((tmp_path / "empty", "--source", "kits19"), "data/case_00000"),
        ((faulty, "--sites-csv", tmp_path / "no.csv"), "cannot read the table of sites"),
    ):
        for more in ((), ("--json",)):
            ended = run(*arguments, *more)
            assert (ended.status, ended.out) == (2, "")
            assert len(ended.error.splitlines()) == 1
            assert words in ended.error


def test_wrong_arguments(run: Check, cohort_folder: Path) -> None:
    for arguments, words in (
        (("--source", "dicom"), "invalid choice: 'dicom'"),
        (("--site", "a", "--source", "ixi"), "leave out --source"),
        (("--workers", "0"), "--workers must be 1 or more"),
    ):
        ended = run(cohort_folder, *arguments)
        assert ended.status == 2
        assert words in ended.error


def test_json_is_all_that_is_printed(run: Check, faulty: Path) -> None:
    ended = run(faulty, "--json", "--strict")
    assert (ended.status, ended.error) == (1, "")
    found = json.loads(ended.out)
    assert {"source", "path", "cases", "problems", "sites", "verdict", "advice", "cohort"} <= found.keys()
    assert len(found["cases"]) == 15  # those whose files are complete
    bad = next(case for case in found["cases"] if case["id"] == "south_2")
    assert (bad["quarantined"], bad["shape"]) == (True, None)
    good = next(case for case in found["cases"] if case["id"] == "south_1")
    assert (good["site"], good["split"], good["shape"], good["label_values"]) == (
        "south",
        "train",
        [20, 22, 6],
        [0, 1, 2],
    )
    assert {problem["case"] for problem in found["problems"] if problem["quarantined"]} == {
        "south_2",
        "west_0",
        "west_1",
        "north_1",
    }
    assert found["sites"]["west"]["cases"] == {"train": 3, "val": 0, "test": 1, "undecided": 0}
    assert found["verdict"] == "usable"


def test_one_sites_own_folder_and_names_that_are_markup(run: Check, cohort_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "[red]our scans"
    folder.mkdir()
    for part in ("imagesTr", "labelsTr"):
        (cohort_folder / part).rename(folder / part)
    ended = run(folder, "--site", "ucl", "--classes", "outer", "inner")
    assert ended.status == 0
    assert f"{folder}: nifti, 18 cases, classes outer, inner" in ended.said
    assert "undecided" in ended.out
    settings = yaml.safe_load(ended.out.partition(".yaml:")[2].partition("then:")[0])
    assert settings["cohort"]["sites"] == {"ucl": str(folder)}
    assert settings["cohort"]["classes"] == ["outer", "inner"]
    assert "cohort.sites" in ended.out
    assert run(folder).status == 2  # not a cohort


def test_it_is_a_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fedsam", "data", "check", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "fedsam data check /data/kits19" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["fedsam", "data"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2


@pytest.mark.real_data
def test_the_hippocampus(run: Check, real_data: Path) -> None:
    ended = run(real_data / "Task04_Hippocampus", "--strict")
    assert ended.status == 0
    assert "nifti, 66 cases, classes Anterior, Posterior" in ended.said
    assert "left out" not in ended.said
    assert "every case can be used" in ended.said
