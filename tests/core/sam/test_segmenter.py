"""The segmenter computes what the official SAM computes, and builds the same thing from the same seed."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from torch import nn
from torch.nn import functional as F

from fedsam_core.errors import SelectionError
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.sam.checkpoints import fuse_qkv, official_state_dict
from fedsam_core.sam.decoder import _Reordered, raster_order
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.selection import LayerSelection, preset


def build(name: str = "flap", classes: int = 2, image_size: int = 112, seed: int = 1, **model: object) -> SamSegmenter:
    config = ModelConfig.model_validate(
        {"backbone": "vit_t", "image_size": image_size, "checkpoint": "random", **model}
    )
    return build_segmenter(config, classes, preset(name), seed).eval()


def randomize(segmenter: SamSegmenter) -> SamSegmenter:
    """Also what starts at zero or one, such as relative positions and norms."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in segmenter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return segmenter


# Grids of 6 (padded to one window), 7 (one window exactly), 10 (padded to four windows) and 14 (four windows) tokens.
@pytest.mark.parametrize("image_size", [96, 112, 160, 224])
def test_encoder_equals_the_official_one(image_size: int, sam_factory: Callable[[int], Sam]) -> None:
    segmenter = randomize(build(image_size=image_size))
    official = sam_factory(image_size).image_encoder
    state = fuse_qkv({k.removeprefix("image_encoder."): v for k, v in official_state_dict(segmenter).items()})
    official.load_state_dict({name: state[name] for name in official.state_dict()}, strict=True)
    images = torch.rand(2, 3, image_size, image_size)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    with torch.no_grad():
        expected = official((255 * images - mean[:, None, None]) / std[:, None, None])
        found = segmenter.encode(images)
    assert found.shape == (2, 256, image_size // 16, image_size // 16)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_encoder_gradients_equal_the_official_ones(sam_factory: Callable[[int], Sam]) -> None:
    segmenter = randomize(build(image_size=112)).requires_grad_(True)
    official = sam_factory(112)
    state = official_state_dict(segmenter)
    official.image_encoder.load_state_dict(
        {name: state[f"image_encoder.{name}"] for name in official.image_encoder.state_dict()}
    )
    images = torch.rand(2, 3, 112, 112)
    target = torch.randn(2, 256, 7, 7)
    (segmenter.encode(images) * target).mean().backward()
    pixels = torch.stack([official.preprocess(255 * image) for image in images])
    (official.image_encoder(pixels) * target).mean().backward()
    for ours, theirs in zip(segmenter.image_encoder.blocks, official.image_encoder.blocks, strict=True):
        qkv = torch.cat([ours.attn.q_proj.weight.grad, ours.attn.k_proj.weight.grad, ours.attn.v_proj.weight.grad])
        torch.testing.assert_close(qkv, theirs.attn.qkv.weight.grad, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(ours.attn.rel_pos_h.grad, theirs.attn.rel_pos_h.grad, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(ours.attn.rel_pos_w.grad, theirs.attn.rel_pos_w.grad, atol=1e-6, rtol=1e-4)


def test_decoder_in_a_batch_equals_the_official_one_image_by_image(
    checkpoint: Path, sam_factory: Callable[[int], Sam]
) -> None:
    segmenter = build("lora", classes=4, checkpoint=checkpoint)
    assert segmenter.head == "pretrained"
    official = sam_factory(112)
    official.load_state_dict(official_state_dict(segmenter), strict=True)
    embeddings = torch.randn(3, 256, 7, 7)
    with torch.no_grad():
        sparse, dense = official.prompt_encoder(points=None, boxes=None, masks=None)
        expected = torch.cat(
            [
                official.mask_decoder.predict_masks(
                    image_embeddings=one[None],
                    image_pe=official.prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                )[0]
                for one in embeddings
            ]
        )
        found = segmenter.decode(embeddings)
    assert expected.shape == (3, 4, 28, 28)
    expected = F.interpolate(expected, size=(112, 112), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[:, 1:], expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
    assert not found[:, 0].any()


def test_pretrained_head_reads_masks_as_sam_does(checkpoint: Path) -> None:
    segmenter = build("attention", classes=1, checkpoint=checkpoint)
    with torch.no_grad():
        logits = segmenter(torch.rand(1, 3, 112, 112))
    assert logits.shape == (1, 2, 112, 112)
    torch.testing.assert_close(logits.softmax(1)[:, 1], logits[:, 1].sigmoid())


@pytest.mark.parametrize(("head", "widths"), [("flap", (256, 64, 32, 16, 8)), ("sam", (256, 64, 32))])
def test_head_equals_plain_transposed_convolutions(head: str, widths: tuple[int, ...]) -> None:
    segmenter = randomize(build("partial-decoder", classes=2, head=head))
    decoder = segmenter.mask_decoder
    layers: list[nn.Module] = []
    for stage, (before, after) in enumerate(pairwise(widths)):
        layers.append(nn.ConvTranspose2d(before, after, kernel_size=2, stride=2))
        if stage < (3 if head == "flap" else 1):
            layers.append(LayerNorm2d(after))
        layers.append(nn.GELU())
    plain = nn.Sequential(*layers)
    plain.load_state_dict(decoder.output_upscaling.state_dict(), strict=True)
    embeddings = torch.randn(2, 256, 7, 7)
    with torch.no_grad():
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(2, -1, -1)
        source = embeddings + segmenter.prompt_encoder.no_mask_embed.weight[:, :, None, None]
        positions = segmenter.prompt_encoder.get_dense_pe().expand(2, -1, -1, -1)
        tokens, pixels = decoder.transformer(source, positions, tokens)
        upscaled = plain(pixels.transpose(1, 2).reshape(2, 256, 7, 7))
        hyper = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1)
        expected = torch.einsum("btc,bchw->bthw", hyper, upscaled)
        found = decoder(embeddings, positions[:1], segmenter.prompt_encoder.no_mask_embed.weight)
    assert found.shape == (2, 3, 7 * 2 ** (len(widths) - 1), 7 * 2 ** (len(widths) - 1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "head", "layout"),
    [
        ("flap", "auto", "flap"),
        ("full", "auto", "flap"),
        ("lora", "auto", "pretrained"),
        ("attention", "sam", "pretrained"),
        ("flap", "sam", "sam"),
    ],
)
def test_head_follows_the_selection(name: str, head: str, layout: str) -> None:
    segmenter = build(name, classes=2, head=head)
    assert segmenter.head == layout
    assert segmenter.mask_decoder.num_mask_tokens == (4 if layout == "pretrained" else 3)
    assert segmenter.mask_decoder.iou_prediction_head.layers[-1].out_features == segmenter.mask_decoder.num_mask_tokens
    with torch.no_grad():
        assert segmenter(torch.rand(1, 3, 112, 112)).shape == (1, 3, 112, 112)


def test_a_new_head_is_never_left_frozen() -> None:
    with pytest.raises(SelectionError, match=r"'lora' would leave FLAP's new head frozen at random: add 'head'"):
        build("lora", head="flap")
    partly = LayerSelection(name="partly", train=("mask_tokens",))
    assert build_segmenter(ModelConfig(backbone="vit_t", image_size=112), 2, partly, 0).head == "pretrained"


def test_too_many_classes_for_sams_own_tokens() -> None:
    assert build("lora", classes=4).classes == 4
    with pytest.raises(SelectionError, match=r"4 mask tokens cannot hold 5 classes: add 'head'"):
        build("lora", classes=5)
    assert build("flap", classes=5).mask_decoder.num_mask_tokens == 6


def test_building_depends_on_the_seed_alone_and_leaves_the_global_state() -> None:
    before = torch.get_rng_state()
    first = build(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, other = build(seed=4), build(seed=5)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.image_encoder.pos_embed, other.image_encoder.pos_embed)
    assert first.weights == "random(seed=4)"
    assert 0.01 < first.image_encoder.pos_embed.std() < 0.03
    # Selections are compared over the same frozen features, whatever their head.
    frozen = build("lora", seed=4).state_dict()
    for name, value in first.state_dict().items():
        if name.startswith(("image_encoder.", "prompt_encoder.", "mask_decoder.transformer.")):
            assert torch.equal(value, frozen[name]), name


def test_autocast_stays_close_to_fp32() -> None:
    segmenter = build()
    images = torch.rand(2, 3, 112, 112)
    with torch.no_grad():
        expected = segmenter(images)
        with torch.autocast("cpu", torch.bfloat16):
            found = segmenter(images).float()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max() + 0.05


@pytest.mark.parametrize("image_size", [0, 100, -16])
def test_image_size_must_fit_the_patches(image_size: int) -> None:
    with pytest.raises(ValidationError, match="multiple of 16: use"):
        ModelConfig(image_size=image_size)


def test_pixels_put_in_place_and_their_gradients_put_back() -> None:
    order = raster_order(3, 2)
    x, weights = torch.randn(2, len(order), 5, requires_grad=True), torch.randn(2, len(order), 5)
    found = []
    for placed in (_Reordered.apply(x, order, order.argsort()), x.index_select(1, order)):
        (gradient,) = torch.autograd.grad((placed * weights).sum(), x)
        found.append((placed.detach(), gradient))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
