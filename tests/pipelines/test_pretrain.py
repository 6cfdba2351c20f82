"""`fedsam pretrain`: a folder with weights that the other stages take."""

from pathlib import Path

import pytest
import torch

from fedsam_core.hashing import file_sha256
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.sam.shipped import facts_of
from fedsam_core.selection import preset
from pipelines import pretrain

TINY = ["steps=2", "sizes={32: 1.0}", "batch_pixels=2048"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        pretrain.main([*arguments])
    return int(ended.value.code or 0)


def test_weights_card_and_picture(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("--out", str(out), *TINY) == 0
    assert {file.name for file in out.iterdir()} == {"checkpoint.pt", "vit_t.safetensors", "vit_t.md", "vit_t.png"}
    weights = out / "vit_t.safetensors"
    digest = file_sha256(weights)
    assert digest in (out / "vit_t.md").read_text()
    assert facts_of(weights)["command"] == f"fedsam pretrain {' '.join(TINY)}"
    model = ModelConfig(backbone="vit_t", image_size=32, checkpoint=weights)
    segmenter = build_segmenter(model, 1, preset("flap", 2), seed=0)
    assert segmenter.weights == f"fedsam:{digest[:12]}"
    assert torch.isfinite(segmenter(torch.rand(1, 3, 32, 32))).all()


def test_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, told in (("speed=3", "speed"), ("sizes={30: 1.0}", "multiples of 16")):
        assert run("--out", str(tmp_path), given) == 2
        assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
