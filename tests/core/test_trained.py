"""A model from a run, an adapter or a merged checkpoint; and one line of advice for everything that is none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import CLASSES, PREPROCESS, image_batch, trained_adapter

from fedsam_core.errors import CheckpointError
from fedsam_core.export import export
from fedsam_core.federation.state import weights_hash
from fedsam_core.hashing import file_sha256
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.sam.checkpoints import save_official
from fedsam_core.selection import preset
from fedsam_core.trained import load_trained

FLAP = preset("flap", 4)
IMAGES = image_batch()
RANDOM = ModelConfig(backbone="vit_t", image_size=64, checkpoint="random")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder whose adapter stands on random weights."""
    trained_adapter(tmp_path / "run" / "adapter", FLAP)
    return tmp_path / "run"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """An official SAM file of vit_t's size."""
    file = tmp_path / "sam_vit_t.pth"
    save_official(build_segmenter(RANDOM, 4, preset("lora", 4), seed=9), file)
    return file


def change(card: Path, **values: Any) -> None:
    """Writes a card again with some values changed; None takes a key out."""
    content = {**json.loads(card.read_text()), **values}
    card.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refused(path: Path, reason: str, checkpoint: Path | None = None) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_trained(path, checkpoint)
    assert "\n" not in str(caught.value)


def test_a_run_and_its_adapter_are_the_same_model(run: Path) -> None:
    trained, again = load_trained(run), load_trained(run / "adapter")
    assert trained.folder == again.folder == run / "adapter"
    assert trained.card == again.card
    with torch.no_grad():
        assert torch.equal(trained.segmenter(IMAGES), again.segmenter(IMAGES))
    assert not trained.segmenter.training
    card = trained.card
    assert (card.classes, card.modality, card.synthetic, card.dice) == (CLASSES, "ct", True, 0.75)
    assert card.preprocess == PREPROCESS
    assert (trained.slices.context, trained.slices.context_mm, trained.slices.augment) == ("2.5d", 3.0, False)
    assert card.frozen_hash == weights_hash(trained.segmenter, trained.segmenter.manifest)  # type: ignore[arg-type]


def test_a_colleague_on_the_machine_can_read_an_adapter(run: Path) -> None:
    assert {file.stat().st_mode & 0o777 for file in (run / "adapter").iterdir()} == {0o644}


def test_weights_that_another_torch_draws_are_noticed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uniform = torch.nn.init.kaiming_uniform_
    monkeypatch.setattr(
        torch.nn.init, "kaiming_uniform_", lambda tensor, **how: uniform(tensor, **how).data.mul_(1.0000002)
    )
    refused(run, r"the random weights .* are drawn differently here \(PyTorch .*--format merged")


def test_a_model_on_a_sam_checkpoint_needs_that_file(tmp_path: Path, checkpoint: Path) -> None:
    folder = trained_adapter(tmp_path / "adapter", FLAP, checkpoint=checkpoint)
    digest = file_sha256(checkpoint)
    trained = load_trained(folder, checkpoint)
    assert trained.card.model.weights == f"sam:{digest[:12]}"
    refused(folder, rf"a vit_t checkpoint whose SHA-256 begins with {digest[:12]}: give that file with --checkpoint")
    refused(folder, f"there is no file {tmp_path / 'no.pth'}", tmp_path / "no.pth")
    other = tmp_path / "other.pth"
    save_official(build_segmenter(RANDOM, 4, preset("lora"), seed=8), other)
    refused(folder, rf"other.pth is another file \(its SHA-256 begins with {file_sha256(other)[:12]}\)", other)


def test_an_official_file_is_called_by_its_name(run: Path) -> None:
    card = json.loads((run / "adapter" / "card.json").read_text())
    change(run / "adapter" / "card.json", model={**card["model"], "backbone": "vit_b", "weights": "sam:01ec64d29a2f"})
    refused(run, r"begins with 01ec64d29a2f, which is sam_vit_b_01ec64.pth: give that file")


def test_a_checkpoint_that_nobody_needs_is_refused(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    refused(run, "is not needed, as the model was trained from random weights", checkpoint)
    export(load_trained(run), tmp_path, ["merged"])
    refused(tmp_path / "merged", r"is not needed: .*sam.pth holds all weights", checkpoint)


@pytest.mark.parametrize(
    ("selection", "classes"), [("flap", CLASSES), ("lora-decoder", CLASSES), ("lora", ("one",)), ("decoder", CLASSES)]
)
def test_a_merged_checkpoint_is_the_same_model(selection: str, classes: tuple[str, ...], tmp_path: Path) -> None:
    folder = trained_adapter(
        tmp_path / "adapter", preset(selection, 4), classes=classes, dice_by_class={}, scored_as={}
    )
    trained = load_trained(folder)
    with torch.no_grad():
        expected = trained.segmenter(IMAGES)
    export(trained, tmp_path, ["merged"])
    for path in (tmp_path / "merged", tmp_path / "merged" / "sam.pth"):
        merged = load_trained(path)
        with torch.no_grad():
            found = merged.segmenter(IMAGES)
        assert float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))
        # LoRA is added in another order: the last bits differ, and with them a pixel where two classes are even.
        assert float((found.argmax(dim=1) != expected.argmax(dim=1)).float().mean()) < 1e-3
    assert merged.card.merged_sha256 == file_sha256(tmp_path / "merged" / "sam.pth")
    assert merged.card.model_copy(update={"merged_sha256": None}) == trained.card


def test_cards_that_do_not_do_are_named_by_key(run: Path) -> None:
    card = run / "adapter" / "card.json"
    written = card.read_text()
    change(card, modality=None)
    refused(run, r"card.json lacks modality: an older fedsam wrote it")
    card.write_text(written)
    change(card, preprocess={**json.loads(written)["preprocess"], "slice_axis": "auto"})
    refused(run, r"preprocess has an 'auto' in it")
    card.write_text(written)
    change(card, future=1)
    refused(run, r"card.json has a key future that fedsam .* does not know")
    card.write_text(written)
    change(card, classes=["one"])
    refused(run, r"model.classes is 2, but 1 classes have a name")
    card.write_text(written)
    change(card, run="../../elsewhere")
    refused(run, r"card.json: run: string should match pattern")
    card.write_text(written)
    change(card, layout_hash="0" * 64)
    refused(run, r"card.json and manifest.json are of two models")
    card.write_text(written)
    change(card, model={**json.loads(written)["model"], "head": "pretrained"})
    refused(run, r"model.head is pretrained, but selection flap gives sam")
    card.write_text(written[:100])
    refused(run, r"card.json is not a model's card")
    card.write_text("[" * 100_000)
    refused(run, r"card.json is not a model's card")


def test_an_adapter_of_other_values_is_refused(run: Path, tmp_path: Path) -> None:
    weights = run / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(run, "is not a complete adapter")
    other = trained_adapter(tmp_path / "other", preset("lora-decoder", 4))
    shutil.copy(other / "adapter_model.safetensors", weights)
    refused(run, r"run/adapter: its values are not those of its manifest \(.*which is not selected")
    weights.unlink()
    refused(run, "is not a complete adapter")


def test_a_merged_file_that_is_not_the_cards_is_refused(run: Path, tmp_path: Path, checkpoint: Path) -> None:
    export(load_trained(run), tmp_path, ["merged"])
    file = tmp_path / "merged" / "sam.pth"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(tmp_path / "merged", r"sam.pth is damaged, or not the one that card.json beside it is about")
    change(tmp_path / "merged" / "card.json", merged_sha256=file_sha256(checkpoint))
    refused(checkpoint, r"sam_vit_t.pth has no card.json beside it")
    shutil.copy(checkpoint, file)
    refused(file, r"sam.pth does not fit card.json \(.* has another shape\)")
    change(tmp_path / "merged" / "card.json", merged_sha256=None)
    refused(tmp_path / "merged", r"card.json is not the card of sam.pth, but of an adapter")


def test_what_is_no_model_is_told_what_is(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"empty holds no model: give the folder of a run that came to its end, an adapter's")
    refused(tmp_path / "missing", r"missing is no model: give the folder of a run")
    (tmp_path / "scan.nii.gz").write_bytes(b"scan")
    refused(tmp_path / "scan.nii.gz", r"scan.nii.gz is no model")
    refused(checkpoint, r"has no card.json beside it, which says what a scan must go through")


def test_nothing_but_tensors_is_unpickled(run: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return (tmp_path / "executed").write_text, ("yes",)

    export(load_trained(run), tmp_path, ["merged"])
    file = tmp_path / "merged" / "sam.pth"
    torch.save({"image_encoder.pos_embed": Evil()}, file)
    change(tmp_path / "merged" / "card.json", merged_sha256=file_sha256(file))
    refused(file, "is truncated or not a checkpoint")
    assert not (tmp_path / "executed").exists()
