"""The configuration tree: files, overrides, and the way to a job's command line and back."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedsam_core.errors import ConfigError
from pipelines.config import as_overrides, configs, describe, load_config
from pipelines.submit import stage_command


@pytest.mark.parametrize("name", ["demo", "hippocampus"])
def test_committed_experiments_survive_the_way_to_a_job(name: str) -> None:
    config = load_config(name, ["cohort.path=scans with space/x", "learning.learning_rate=1e-3", "work_dir=~/w"])
    again = load_config(None, as_overrides(config))
    assert again == config
    assert config.learning.learning_rate == 1e-3
    assert config.cohort.path is not None
    assert config.cohort.path.is_absolute()
    assert str(config.work_dir) == str(Path.home() / "w")


def test_a_written_selection_survives_too() -> None:
    text = "selection={name: mine, lora: {encoder: [q, v], rank: 2, block_ranks: {3: 4}}, train: [head]}"
    config = load_config("demo", [text, "rank=null"])
    assert config.layers.name == "mine"
    assert config.layers.lora is not None
    assert config.layers.lora.block_ranks == {3: 4}
    assert load_config(None, as_overrides(config)) == config


def test_entrypoint_is_one_shell_safe_line() -> None:
    config = load_config("demo", ["cohort.name=phantom", "work_dir=/tmp/a b;c"])
    assert "'work_dir=/tmp/a b;c'" in shlex.join(stage_command("federate", config))


def test_the_hash_is_of_what_decides_the_result() -> None:
    base = load_config("demo")
    assert base.science_hash("x") == load_config("demo", ["work_dir=/elsewhere", "name=other"]).science_hash("x")
    assert base.science_hash("x") != load_config("demo", ["learning.local_steps=3"]).science_hash("x")
    assert base.science_hash("x") != base.science_hash("y")
    assert base.science_hash("x") != load_config("demo", ["rank=4"]).science_hash("x")


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ncohort: {name: phantom, source: phantom}\nlearning: {local_steps: 5}\n")
    config = load_config(str(path), ["learning.local_steps=9"])
    assert (config.name, config.learning.local_steps) == ("mine", 9)


@pytest.mark.parametrize("text", ["- a list", "key: [unclosed", "\x00", "name: a\nname: b"])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(str(path))


def test_every_setting_says_what_it_means() -> None:
    rows = describe()
    assert len(rows) > 40
    assert not [key for key, _, meaning in rows if len(meaning) < 8]


def test_help_names_stages_experiments_and_keys() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "pipelines.federate", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for word in ("--config", *configs(), "learning.batch_size", "federation.secure_sum"):
        assert word in shown


def test_selections_prints_the_papers_counts() -> None:
    command = ["selections", "--backbone", "vit_b", "--image-size", "224", "--classes", "2", "--rank", "32", "--json"]
    shown = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *command], capture_output=True, text=True, check=True
    )
    rows = {row["name"]: row for row in json.loads(shown.stdout)}
    assert {name: row["trainable"] for name, row in rows.items()} == {
        "full": 90_532_927,
        "attention": 31_681_152,
        "decoder": 3_902_195,
        "partial-decoder": 478_320,
        "lora": 1_368_064,
        "lora-decoder": 5_270_259,
        "flap": 1_846_384,
    }
    assert all(row["bytes_per_site_round"] == 4 * row["trainable"] for row in rows.values())
    assert rows["full"]["paper_gb"] == pytest.approx(67.45, abs=0.01)
    assert rows["flap"]["paper_gb"] == pytest.approx(1.38, abs=0.01)


def test_stores_that_are_folders_are_meant_from_where_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("demo", ["storage.prepared=here", "storage.results=s3://bucket/x"])
    assert (config.storage.prepared, config.storage.results) == (str(tmp_path / "here"), "s3://bucket/x")
    assert load_config("demo", ["storage.results=../kept"]).storage.results == str(tmp_path.parent / "kept")
