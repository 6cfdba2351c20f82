"""Official .pth files in and out: nothing lost, nothing silently new, tables resized, bad files named."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam

from fedsam_core.errors import CheckpointError
from fedsam_core.hashing import file_sha256
from fedsam_core.sam.adapters import adapt, merge
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.sam.checkpoints import load_official, official_state_dict, resize_table, save_official
from fedsam_core.selection import preset


def config(image_size: int, checkpoint: Path | None = None, **model: object) -> ModelConfig:
    return ModelConfig.model_validate(
        {"backbone": "vit_t", "image_size": image_size, "checkpoint": checkpoint, **model}
    )


def linear(table: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Resize along an axis in float64, pixel centers aligned (half-pixel), edges clamped."""
    old = table.shape[axis]
    where = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
    low = np.floor(where).astype(int)
    high = np.minimum(low + 1, old - 1)
    weight = (where - low).reshape([-1 if i == axis else 1 for i in range(table.ndim)])
    return np.take(table, low, axis) * (1 - weight) + np.take(table, high, axis) * weight


def test_tables_are_resized_linearly() -> None:
    rng = np.random.default_rng(0)
    for grid in (7, 14, 80):
        square = rng.normal(size=(1, 64, 64, 5))
        expected = linear(linear(square, grid, 1), grid, 2)
        found = resize_table(torch.from_numpy(square).float(), torch.Size((1, grid, grid, 5)))
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
        line = rng.normal(size=(127, 5))
        found = resize_table(torch.from_numpy(line).float(), torch.Size((2 * grid - 1, 5)))
        np.testing.assert_allclose(found.numpy(), linear(line, 2 * grid - 1, 0), atol=1e-4)


@pytest.mark.parametrize("image_size", [112, 160, 224])
def test_encoder_of_any_size_equals_the_official_one_with_resized_tables(
    image_size: int, checkpoint: Path, sam_factory: Callable[[int], Sam]
) -> None:
    segmenter = build_segmenter(config(image_size, checkpoint), 2, preset("flap"), seed=0)
    state = torch.load(checkpoint, weights_only=True)
    grid = image_size // 16
    for name, value in state.items():
        if name == "image_encoder.pos_embed":
            state[name] = torch.from_numpy(linear(linear(value.double().numpy(), grid, 1), grid, 2)).float()
        elif "rel_pos" in name and value.shape[0] == 127:
            state[name] = torch.from_numpy(linear(value.double().numpy(), 2 * grid - 1, 0)).float()
    official = sam_factory(image_size)
    official.load_state_dict(state, strict=True)
    images = torch.rand(2, 3, image_size, image_size)
    with torch.no_grad():
        expected = official.image_encoder(torch.stack([official.preprocess(255 * image) for image in images]))
        found = segmenter.encode(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_round_trip_at_1024_is_exact(checkpoint: Path, tmp_path: Path, sam_factory: Callable[[int], Sam]) -> None:
    segmenter = build_segmenter(config(1024), 2, preset("lora"), seed=0)
    report = load_official(segmenter, checkpoint)
    assert (report.new, report.resized, report.left_out) == ((), (), ())
    save_official(segmenter, tmp_path / "out" / "sam.pth")
    original, written = (torch.load(p, weights_only=True) for p in (checkpoint, tmp_path / "out" / "sam.pth"))
    assert written.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(written[name], value), name
    sam_factory(1024).load_state_dict(written, strict=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sam.pth"]


def test_adapted_and_merged_sam_is_an_official_one(
    checkpoint: Path, tmp_path: Path, sam_factory: Callable[[int], Sam]
) -> None:
    segmenter = build_segmenter(config(112, checkpoint), 4, preset("lora", 4), seed=0)
    adapt(segmenter, preset("lora", 4))
    with torch.no_grad():
        for parameter in segmenter.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    with pytest.raises(CheckpointError, match="merge it"):
        save_official(segmenter, tmp_path / "sam.pth")
    images = torch.rand(2, 3, 112, 112)
    with torch.no_grad():
        expected = segmenter(images)[:, 1:]
    save_official(merge(segmenter), tmp_path / "sam.pth")
    official = sam_factory(112)
    official.load_state_dict(torch.load(tmp_path / "sam.pth", weights_only=True), strict=True)
    with torch.no_grad():
        for image, masks in zip(images, expected, strict=True):
            sparse, dense = official.prompt_encoder(points=None, boxes=None, masks=None)
            low, _ = official.mask_decoder.predict_masks(
                image_embeddings=official.image_encoder(official.preprocess(255 * image)[None]),
                image_pe=official.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
            )
            found = official.postprocess_masks(low, (112, 112), (112, 112))[0]
            torch.testing.assert_close(found, masks, atol=1e-5 * float(masks.abs().max()), rtol=1e-5)


def test_report_names_what_is_new_resized_and_left_out(checkpoint: Path) -> None:
    segmenter = build_segmenter(config(112), 2, preset("flap"), seed=0)
    start = {name: value.clone() for name, value in segmenter.state_dict().items()}
    report = load_official(segmenter, checkpoint)
    assert report.sha256 == file_sha256(checkpoint)
    assert segmenter.weights == f"sam:{report.sha256[:12]}"
    assert set(report.resized) == {"image_encoder.pos_embed"} | {
        f"image_encoder.blocks.{block}.attn.rel_pos_{axis}" for block in (2, 5) for axis in "hw"
    }
    stages = [f"output_upscaling.{index}.{leaf}" for index in (4, 6, 7, 9) for leaf in ("weight", "bias")]
    hypernetworks = [
        f"output_hypernetworks_mlps.{token}.layers.{layer}.{leaf}"
        for token in range(3)
        for layer in range(3)
        for leaf in ("weight", "bias")
    ]
    iou = [f"iou_prediction_head.layers.{layer}.{leaf}" for layer in range(3) for leaf in ("weight", "bias")]
    assert set(report.new) == {f"mask_decoder.{n}" for n in ["mask_tokens.weight", *stages, *hypernetworks, *iou]}
    assert {name.split(".")[1] for name in report.left_out} == {
        "mask_tokens",
        "output_hypernetworks_mlps",
        "iou_prediction_head",
    }
    now, official = segmenter.state_dict(), torch.load(checkpoint, weights_only=True)
    assert set(report.new) | set(report.resized) | set(report.loaded) == now.keys()
    for name in report.new:
        assert torch.equal(now[name], start[name]), name
    for index in (0, 1, 3):
        name = f"mask_decoder.output_upscaling.{index}.weight"
        assert name in report.loaded
        assert torch.equal(now[name], official[name]), name


def test_a_merged_flap_model_is_read_back_whole(checkpoint: Path, tmp_path: Path) -> None:
    trained = build_segmenter(config(112, checkpoint), 2, preset("flap"), seed=0)
    save_official(trained, tmp_path / "flap.pth")
    segmenter = build_segmenter(config(112), 2, preset("flap"), seed=9)
    assert load_official(segmenter, tmp_path / "flap.pth").new == ()
    for name, value in trained.state_dict().items():
        assert torch.equal(segmenter.state_dict()[name], value), name


def altered(checkpoint: Path, path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    state = torch.load(checkpoint, weights_only=True)
    change(state)
    torch.save(state, path)
    return path


def test_bad_files_are_named_with_the_fix(checkpoint: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("executed",)

    path = tmp_path / "bad.pth"

    def refused(reason: str) -> None:
        with pytest.raises(CheckpointError, match=reason) as caught:
            build_segmenter(config(112, path), 2, preset("flap"), seed=0)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    refused("does not exist")
    path.write_bytes(checkpoint.read_bytes()[:100_000])
    refused("truncated or not a checkpoint")
    path.write_text("<html>404</html>")
    refused("truncated or not a checkpoint")
    path.write_bytes(b"")
    refused("truncated or not a checkpoint")
    path.write_bytes(pickle.dumps({"image_encoder.pos_embed": Evil()}))
    refused("not a checkpoint")
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": 3}, path)
    refused("holds model, epoch, not the parameters of SAM")
    torch.save({"conv.weight": torch.zeros(1)}, path)
    refused("not a SAM checkpoint")
    altered(checkpoint, path, lambda state: state.pop("image_encoder.blocks.3.attn.qkv.bias"))
    refused(r"lacks image_encoder.blocks.3.attn.k_proj.bias")
    altered(checkpoint, path, lambda state: state.update({"image_encoder.extra": torch.zeros(1)}))
    refused(r"unknown parameter image_encoder.extra")
    altered(checkpoint, path, lambda state: state.update({"image_encoder.neck.0.weight": torch.zeros(2, 2)}))
    refused(r"image_encoder.neck.0.weight has shape \(2, 2\), not \(256, 192, 1, 1\)")
    altered(
        checkpoint, path, lambda state: state.update({"image_encoder.blocks.0.attn.rel_pos_h": torch.zeros(27, 64)})
    )
    refused(r"blocks.0.attn.rel_pos_h has shape \(27, 64\)")


def test_a_head_that_must_be_sams_own_is_never_new(checkpoint: Path, tmp_path: Path) -> None:
    path = altered(checkpoint, tmp_path / "x.pth", lambda state: state.pop("mask_decoder.mask_tokens.weight"))
    with pytest.raises(CheckpointError, match=r"lacks mask_decoder.mask_tokens.weight"):
        build_segmenter(config(112, path), 2, preset("lora"), seed=0)


@pytest.mark.parametrize(
    ("width", "depth", "looks"),
    [(768, 12, "looks like vit_b"), (1280, 32, "looks like vit_h"), (100, 3, "is of no known backbone")],
)
def test_another_backbones_checkpoint_is_recognized(width: int, depth: int, looks: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    state = {f"image_encoder.blocks.{i}.norm1.weight": torch.zeros(width) for i in range(depth)}
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 4, 4, width), **state}, path)
    with pytest.raises(CheckpointError, match=rf"{looks} \(width {width}, {depth} blocks\), not vit_t") as caught:
        build_segmenter(config(112, path), 2, preset("flap"), seed=0)
    assert str(path) in str(caught.value)
    if "like" in looks:
        assert f"set model.backbone={looks[-5:]}" in str(caught.value)


def test_fused_state_is_a_copy_of_the_weights_it_came_from(checkpoint: Path) -> None:
    segmenter = build_segmenter(config(112, checkpoint), 2, preset("lora"), seed=0)
    before = official_state_dict(segmenter)["image_encoder.blocks.0.attn.qkv.weight"].clone()
    assert torch.equal(before[:192], segmenter.image_encoder.blocks[0].attn.q_proj.weight)
    assert torch.equal(before[192:384], segmenter.image_encoder.blocks[0].attn.k_proj.weight)
    assert torch.equal(before[384:], segmenter.image_encoder.blocks[0].attn.v_proj.weight)
