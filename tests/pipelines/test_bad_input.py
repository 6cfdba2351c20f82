"""Bad input ends with one line that names the thing and the fix, a status that is not 0, and nothing half-written."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.sam.checkpoints import official_state_dict
from fedsam_core.selection import preset

Stage = Callable[..., Any]


def refused(ended: Any, *words: str) -> None:
    """One line on stderr with all of `words`, and a status that is not 0."""
    assert ended.status == 2, ended
    lines = [line for line in ended.error.splitlines() if line.strip()]
    assert len(lines) == 1, ended.error
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in ended.error


def nothing_written(folder: Path) -> None:
    """No manifest of a prepared cohort, no run, no temporary file."""
    assert not list(folder.rglob("cohort.json"))
    assert not list(folder.rglob("runs/*"))
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".")]


def spoil_label(cohort: Path, case: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = cohort / "labelsTr" / f"{case}.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)), image.affine), path)


def test_a_truncated_scan(stage: Stage, cohort_folder: Path, tmp_path: Path) -> None:
    path = cohort_folder / "imagesTr" / "south_2.nii.gz"
    path.write_bytes(path.read_bytes()[:-400])
    refused(stage("prepare", "--strict"), str(path), "again")
    nothing_written(tmp_path / "work")


def test_a_bad_scan_is_left_out_and_said_so(stage: Stage, cohort_folder: Path) -> None:
    path = cohort_folder / "imagesTr" / "south_2.nii.gz"
    path.write_bytes(path.read_bytes()[:-400])
    ended = stage("prepare")
    assert ended.status == 0
    assert "17 cases" in ended.out
    said = " ".join(ended.out.split())
    assert f"left out: south_2: {path}: truncated or not a NIfTI file; copy or download it again" in said


@pytest.mark.parametrize("length", [0, 200])
def test_a_scan_that_ends_in_its_header(stage: Stage, cohort_folder: Path, length: int) -> None:
    path = cohort_folder / "imagesTr" / "south_2.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:length]))
    refused(stage("prepare", "--strict"), str(path))


def test_a_mask_of_another_shape(stage: Stage, cohort_folder: Path, tmp_path: Path) -> None:
    spoil_label(cohort_folder, "west_1", lambda label: label[:, :, :-1])
    refused(stage("prepare", "--strict"), "west_1.nii.gz", "(20, 22, 5)", "(20, 22, 6)")
    nothing_written(tmp_path / "work")


def test_a_label_beyond_the_classes(stage: Stage, cohort_folder: Path, tmp_path: Path) -> None:
    spoil_label(cohort_folder, "north_0", lambda label: np.where(label == 2, 7, label).astype(np.uint8))
    refused(stage("prepare", "cohort.strict=true"), "north_0.nii.gz", "7")
    nothing_written(tmp_path / "work")


def test_a_site_without_a_training_case(stage: Stage, cohort_folder: Path, tmp_path: Path) -> None:
    table = cohort_folder / "sites.csv"
    table.write_text(
        "\n".join(r.replace(",train", ",test") if "west" in r else r for r in table.read_text().split("\n"))
    )
    refused(stage("prepare"), "west", "no training case", "sites.csv")
    refused(stage("federate"), "west", "no training case", "sites.csv")
    nothing_written(tmp_path / "work")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learning.batchsize=8", ("learning.batchsize", "learning.batch_size")),
        ("lerning.batch_size=8", ("lerning", "learning")),
        ("learning.batch_size=many", ("learning.batch_size", "integer", "many")),
        ("model.image_size=100", ("model.image_size", "96", "112")),
        ("selection=flip", ("flip", "flap")),
        ("cohort.source=kits", ("cohort.source", "kits")),
        ("rounds", ("rounds", "key=value")),
        ("learning.learning_rate=.inf", ("learning.learning_rate", "finite")),
        ("preprocess.spacing=[1.0e-9, 1, 1]", ("preprocess", "spacing", "0.01")),
        ("selection={name: mine, train: [head]}", ("rank", "null", "selection.lora.rank")),
    ],
)
def test_a_wrong_setting(stage: Stage, tmp_path: Path, override: str, words: tuple[str, ...]) -> None:
    refused(stage("federate", override), *words)
    assert not (tmp_path / "work" / "runs").exists()


def test_rules_and_ranks_that_do_not_fit(stage: Stage) -> None:
    whole = "selection={name: mine, train: [head]}"
    refused(stage("federate", "rank=null", whole, "federation.rule=rolora"), "mine", "no LoRA", "federation.rule")
    refused(
        stage("federate", "federation.site_ranks={north: 99}", "federation.weights=equal"),
        "federation.site_ranks", "north", "99", "at most",
    )  # fmt: skip
    refused(
        stage("federate", "federation.site_ranks={north: 1}", "federation.weights=equal"),
        "federation.site_ranks", "2 sites", "federation.rule=product-sketch",
    )  # fmt: skip
    refused(
        stage("federate", "federation.site_ranks={nowhere: 2}", "federation.weights=equal"),
        "site_ranks",
        "nowhere",
        "no site",
    )
    refused(stage("federate", "federation.min_sites=4"), "federation.min_sites=4", "3 sites")
    refused(stage("federate", "federation.privacy.clip=1.0"), "federation.privacy.noise_multiplier")
    private = ("federation.privacy={clip: 1.0, noise_multiplier: 1.0}", "federation.bits=24")
    refused(stage("federate", *private), "weights=equal")


@pytest.mark.parametrize(
    ("ranked", "min_sites", "fits"),
    [
        ({"s1": 1}, None, True),  # of five sites one may be lost: three of the four others are left
        ({}, None, True),
        ({"s1": 1, "s2": 1}, None, False),
        ({"s1": 1, "s2": 1}, 5, True),  # no site may be lost then
        ({"s1": 1, "s2": 1, "s3": 1}, 5, False),  # two sites alone have the band
    ],
)
def test_a_band_of_ranks_must_outlive_as_many_losses_as_a_round(
    ranked: dict[str, int], min_sites: int | None, fits: bool
) -> None:
    from fedsam_core.errors import ConfigError
    from pipelines.config import load_config
    from pipelines.federate import check_ranks, initial_model

    asked = ["selection=lora", "rank=2", "model.image_size=32", "federation.weights=equal"]
    config = load_config("demo", asked)
    federation = config.federation.model_copy(update={"site_ranks": ranked, "min_sites": min_sites})
    config = config.model_copy(update={"federation": federation})
    _, manifest, _ = initial_model(config, 2)
    sites = ["s1", "s2", "s3", "s4", "s5"]
    if fits:
        check_ranks(config, manifest, sites)
    else:
        with pytest.raises(ConfigError, match=r"site_ranks leaves .* to [23] sites|a round may lose"):
            check_ranks(config, manifest, sites)


def test_a_checkpoint_for_another_backbone(stage: Stage, tmp_path: Path) -> None:
    other = build_segmenter(ModelConfig(backbone="vit_t", image_size=32), 1, preset("lora", 4), seed=0)
    state = official_state_dict(other)
    wider = {  # blocks of another width and number, as another backbone has
        name: torch.zeros(*value.shape[:-1], 256) if "image_encoder.blocks" in name else value
        for name, value in state.items()
        if "blocks.5" not in name
    }
    path = tmp_path / "sam_other.pth"
    torch.save(wider, path)
    refused(stage("federate", f"model.checkpoint={path}"), str(path), "vit_t")
    assert not list((tmp_path / "work").rglob("runs/*"))


def test_a_file_that_is_no_checkpoint(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    path.write_bytes(b"not a checkpoint")
    refused(stage("federate", f"model.checkpoint={path}"), str(path))


def test_a_missing_configuration_names_the_known_ones() -> None:
    from pipelines.config import load_config

    with pytest.raises(Exception, match=r"no configuration nowhere\.yaml.*demo.*hippocampus"):
        load_config("nowhere.yaml")


def test_no_adapter_to_evaluate(stage: Stage) -> None:
    refused(stage("evaluate"), "no adapter", "fedsam federate")


def test_a_tracking_folder_is_refused_before_training(stage: Stage, tmp_path: Path) -> None:
    refused(stage("federate", f"tracking.uri={tmp_path / 'mlruns'}"), "mlruns", "sqlite:///")
    assert not (tmp_path / "work" / "runs").exists()
