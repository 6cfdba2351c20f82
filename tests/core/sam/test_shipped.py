"""The weights that come with the package, and the format that they are in."""

from pathlib import Path

import pytest
import torch

from fedsam_core.errors import CheckpointError
from fedsam_core.hashing import file_sha256
from fedsam_core.pretraining.scoring import mean_iou
from fedsam_core.pretraining.trainer import PretrainConfig, new_sam, packed_sam
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.sam.shipped import SHIPPED, facts_of, pack, unpack
from fedsam_core.selection import preset
from pipelines.config import load_config

FILE = SHIPPED["vit_t"]
SMALL = {"backbone": "vit_t", "image_size": 64}


def test_a_packed_file_loses_half_a_step_at_most(tmp_path: Path) -> None:
    state = new_sam(0).state_dict()
    for name in ("a.safetensors", "b.safetensors"):
        pack(tmp_path / name, state, {"b": 1, "a": [2]})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert facts_of(tmp_path / "a.safetensors") == {"a": [2], "b": 1}
    found = unpack(tmp_path / "a.safetensors")
    assert found.keys() == state.keys()
    for name, value in state.items():
        if value.dim() < 2:
            assert torch.equal(found[name], value)
        else:
            step = value.flatten(1).abs().amax(dim=1, keepdim=True) / 127
            assert ((found[name] - value).flatten(1).abs() <= 0.5001 * step).all(), name


def test_what_is_no_packed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(FILE.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        unpack(path)
    from safetensors.torch import save_file

    save_file({"image_encoder.pos_embed": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not written by `fedsam pretrain`"):
        unpack(path)


def test_the_shipped_weights_are_what_their_card_says() -> None:
    assert FILE.stat().st_size <= 12_000_000
    card = FILE.with_suffix(".md").read_text()
    facts = facts_of(FILE)
    assert file_sha256(FILE) in card
    assert facts["command"] in card
    PretrainConfig.model_validate(facts["config"])  # the command still means something
    scores = mean_iou(packed_sam(FILE), 64, seed=1, batches=1, count=16, device=torch.device("cpu"))
    assert scores["box"] > 0.4, scores
    assert scores["box and point"] > scores["point"], scores


def test_auto_random_and_a_path() -> None:
    auto, random, given = (
        build_segmenter(ModelConfig.model_validate({**SMALL, "checkpoint": value}), 2, preset("flap", 4), seed=3)
        for value in ("auto", "random", str(FILE))
    )
    assert auto.weights == given.weights == f"fedsam:{file_sha256(FILE)[:12]}"
    assert random.weights == "random(seed=3)"
    name = "image_encoder.blocks.0.attn.q_proj.weight"
    assert torch.equal(auto.state_dict()[name], given.state_dict()[name])
    assert not torch.equal(auto.state_dict()[name], random.state_dict()[name])
    assert torch.equal(auto.state_dict()[name], unpack(FILE)["image_encoder.blocks.0.attn.qkv.weight"][:192])
    assert ModelConfig(backbone="vit_b").weights_file is None
    assert ModelConfig.model_validate({"checkpoint": None}).checkpoint == "random"  # as runs wrote it once


def test_runs_from_other_weights_are_other_runs() -> None:
    hashes = [
        load_config("demo", more).science_hash("cohort")
        for more in ([], ["model.checkpoint=random"], [f"model.checkpoint={FILE}"])
    ]
    assert hashes[0] == hashes[2] != hashes[1]
