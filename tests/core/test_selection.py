"""Selections and manifests: exact counts of the paper's rows, the written form, what is refused, the flat vector."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from segment_anything.modeling.common import LayerNorm2d, MLPBlock
from segment_anything.modeling.transformer import Attention
from torch import nn

from fedsam_core.errors import SelectionError
from fedsam_core.sam.backbones import ModelConfig, build_segmenter, manifest_for
from fedsam_core.selection import GROUPS, PRESETS, LayerSelection, LoraTargets, ParameterManifest, preset, resolve

VIT_B = ModelConfig(backbone="vit_b", image_size=224)
VIT_T = ModelConfig(backbone="vit_t", image_size=112)


@pytest.mark.parametrize(
    ("name", "trainable", "paper_gb"),
    [
        ("full", 90_532_927, 67.45),
        ("attention", 31_681_152, 23.60),
        ("decoder", 3_902_195, 2.91),
        ("partial-decoder", 478_320, 0.36),
        ("lora", 1_368_064, 1.02),
        ("lora-decoder", 5_270_259, 3.93),
        ("flap", 1_846_384, 1.38),
    ],
)
def test_presets_have_the_papers_sizes(name: str, trainable: int, paper_gb: float) -> None:
    manifest = manifest_for(VIT_B, classes=2, selection=preset(name, rank=32))
    assert manifest.trainable == trainable
    assert manifest.shared_size == sum(int(np.prod(entry.shape)) for entry in manifest.shared) == trainable
    assert manifest.bytes_per_site_round == 4 * trainable
    assert manifest.paper_gb == pytest.approx(paper_gb, abs=0.005)


@pytest.mark.parametrize(
    ("model", "classes", "name", "rank", "trainable"),
    [
        (VIT_B, 1, "full", None, 90_398_774),
        (VIT_B, 1, "decoder", None, 3_768_042),
        (VIT_B, 1, "partial-decoder", None, 344_424),
        (VIT_B, 1, "flap", 32, 1_712_488),
        (VIT_B, 2, "lora", 4, 171_008),
        (VIT_B, 2, "flap", 4, 649_328),
        (VIT_B, 2, "lora-decoder", 4, 4_073_203),
        (ModelConfig(head="sam"), 2, "flap", 32, 1_862_208),
        (ModelConfig(head="sam"), 2, "decoder", None, 3_918_019),
        (VIT_T, 2, "flap", 8, 562_288),
    ],
)
def test_other_published_sizes(model: ModelConfig, classes: int, name: str, rank: int | None, trainable: int) -> None:
    assert manifest_for(model, classes, preset(name, rank)).trainable == trainable


@pytest.mark.parametrize(("backbone", "width", "depth"), [("vit_l", 1024, 24), ("vit_h", 1280, 32)])
def test_lora_size_follows_width_and_depth(backbone: str, width: int, depth: int) -> None:
    model = ModelConfig.model_validate({"backbone": backbone})
    # q and v of every block, A and B each rank x width; the decoder's seven attentions hold 5,888 a rank.
    assert manifest_for(model, 2, preset("lora", 16)).trainable == 16 * (depth * 2 * 2 * width + 5_888)


def test_the_written_form() -> None:
    text = """
    name: late-blocks
    lora: {encoder: [q, v, mlp], encoder_blocks: [4, 5], rank: 4, alpha: 8, block_ranks: {5: 2}}
    train: [upscaling, hypernetworks, mask_tokens]
    local: [encoder.norms]
    """
    selection = LayerSelection.model_validate(yaml.safe_load(text))
    manifest = manifest_for(VIT_T, 2, selection)
    lora = {entry.name: entry.shape for entry in manifest.shared if entry.kind != "whole"}
    block = {"attn.q_proj": (192, 192), "attn.v_proj": (192, 192), "mlp.lin1": (192, 768), "mlp.lin2": (768, 192)}
    assert lora == {
        f"image_encoder.blocks.{i}.{layer}.lora_{part}.weight": (rank, inside) if part == "A" else (outside, rank)
        for i, rank in ((4, 4), (5, 2))
        for layer, (inside, outside) in block.items()
        for part in "AB"
    }
    assert sum(entry.numel for entry in manifest.local) == 6 * 4 * 192
    assert manifest.trainable == manifest.shared_size + 6 * 4 * 192
    again = LayerSelection.model_validate(json.loads(selection.model_dump_json()))
    assert again == selection
    assert again.hash == selection.hash
    assert again.hash != preset("flap").hash


def test_lora_scale_is_a_local_factor_for_each_layer_and_changes_nothing_else() -> None:
    lora = preset("flap", 8)
    plain = manifest_for(VIT_T, 2, lora)
    scaled = manifest_for(VIT_T, 2, lora.model_copy(update={"local": ("encoder.norms", "lora.scale")}))
    assert scaled.shared == plain.shared
    factors = [entry for entry in scaled.local if entry.group == "lora.scale"]
    layers = [entry.name.removesuffix(".lora_A.weight") for entry in plain.shared if entry.kind == "lora_A"]
    assert [entry.name for entry in factors] == [f"{layer}.lora_scale" for layer in layers]
    assert {(entry.shape, entry.numel, entry.kind) for entry in factors} == {((1,), 1, "whole")}
    assert len(scaled.local) == len(factors) + 6 * 4
    assert scaled.bytes_per_site_round == plain.bytes_per_site_round
    assert scaled.layout_hash != plain.layout_hash
    assert ParameterManifest.from_json(scaled.to_json()) == scaled


@pytest.mark.parametrize(
    ("name", "selection_hash", "layout_hash"),
    [
        ("full", "b7a6aaf91832dfc2", "4b9423a1f6114366"),
        ("attention", "4d1179aa93eca308", "250ec57f88ebedca"),
        ("decoder", "25278127c3e3c62c", "75c60590e6d9f98a"),
        ("partial-decoder", "03bd95b4a48d9252", "dbc9011a2ce0f9f6"),
        ("lora", "974510013d7ecfa1", "53e3c83b200c1d19"),
        ("lora-decoder", "07609eaf1e6ed1d8", "df598f76bede7821"),
        ("flap", "a3f16e3244d29a56", "3c1581906571ef3f"),
    ],
)
def test_hashes_stay_what_runs_have_recorded(name: str, selection_hash: str, layout_hash: str) -> None:
    selection = preset(name, 8)
    assert selection.hash[:16] == selection_hash
    assert manifest_for(VIT_T, 2, selection).layout_hash[:16] == layout_hash


def test_preset_takes_a_rank_and_lists_names() -> None:
    assert preset("flap", 8).lora == LoraTargets(encoder=("q", "v"), decoder=("q", "v"), rank=8)
    assert preset("full", 8) == PRESETS["full"]
    with pytest.raises(SelectionError, match=r"'flop'.*did you mean flap.*partial-decoder"):
        preset("flop")
    with pytest.raises(SelectionError, match="rank is 0"):
        preset("flap", 0)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"train": ["hed"]}, r"unknown group 'hed': did you mean head"),
        ({"local": ["norm"]}, r"unknown group 'norm': did you mean .*norms"),
        ({"train": ["head"], "local": ["head"]}, r"'head' is in both train and local"),
        ({}, r"trains nothing: set"),
        ({"lora": {}}, r"trains nothing: set"),
        ({"lora": {"encoder": ["q"], "rank": 0}}, r"lora.rank is 0: give at least 1"),
        ({"lora": {"encoder": ["q"], "rank": -3}}, r"lora.rank is -3"),
        ({"lora": {"encoder": ["q"], "block_ranks": {1: 0}}}, r"lora.block_ranks\[1\] is 0"),
        ({"lora": {"encoder": ["q"], "encoder_blocks": [0], "block_ranks": {1: 2}}}, r"blocks \[1\] that get no LoRA"),
        ({"lora": {"decoder": ["q"], "block_ranks": {1: 2}}}, r"blocks \[1\] that get no LoRA"),
        ({"lora": {"encoder": ["q"], "alpha": 0}}, r"lora.alpha is 0"),
        ({"lora": {"encoder": ["q"], "encoder_blocks": [-1]}}, r"block -1 does not exist"),
        ({"lora": {"encoder": ["q"]}, "train": ["lora.scale"]}, r"lora.scale is each site's own: list it in local"),
        ({"train": ["head"], "local": ["lora.scale"]}, r"lora.scale is a factor of LoRA layers and there are none"),
        ({"lora": {}, "local": ["lora.scale"]}, r"there are none: set lora.encoder or lora.decoder, or remove it"),
        ({"lora": {"encoder": ["q"]}, "local": ["lora.scales"]}, r"'lora.scales': did you mean lora.scale"),
        ({"name": "../x", "train": ["head"]}, r"use letters, digits"),
    ],
)
def test_what_cannot_be_meant_is_refused(written: dict[str, object], message: str) -> None:
    with pytest.raises(SelectionError, match=message) as caught:
        LayerSelection.model_validate({"name": "mine", **written})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"lora": {"encoder": ["q"], "encoder_blocks": [5, 6]}}, r"block 6 does not exist.*blocks 0 to 5"),
        ({"lora": {"encoder": ["q"], "block_ranks": {9: 2}}}, r"block 9 does not exist"),
        ({"lora": {"encoder": ["q"], "encoder_blocks": []}}, r"no layer gets LoRA"),
        ({"train": ["head"], "local": ["norms"]}, r"output_upscaling.1.weight is in train group 'head' and in local"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(written: dict[str, object], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        manifest_for(VIT_T, 2, LayerSelection.model_validate({"name": "mine", **written}))


def test_unknown_keys_and_projections_are_refused() -> None:
    with pytest.raises(ValidationError, match="trian"):
        LayerSelection.model_validate({"name": "mine", "trian": ["head"]})
    with pytest.raises(ValidationError, match=r"lora\.encoder"):
        LayerSelection.model_validate({"name": "mine", "lora": {"encoder": ["qkv"]}})


def test_groups_hold_what_their_names_say() -> None:
    """Against the modules' types, not their names."""
    segmenter = build_segmenter(VIT_T, 2, preset("flap"), seed=0)

    def size(*modules: nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    def kinds(root: nn.Module, *types: type) -> int:
        return size(*(module for module in root.modules() if isinstance(module, types)))

    encoder, decoder = segmenter.image_encoder, segmenter.mask_decoder
    rel_pos = sum(block.attn.rel_pos_h.numel() + block.attn.rel_pos_w.numel() for block in encoder.blocks)
    norms = (nn.LayerNorm, LayerNorm2d)
    expected = {
        "all": size(segmenter),
        "encoder": size(encoder),
        "encoder.patch_embed": size(encoder.patch_embed),
        "encoder.pos_embed": encoder.pos_embed.numel(),
        "encoder.attention": size(*(block.attn for block in encoder.blocks)),
        "encoder.rel_pos": rel_pos,
        "encoder.mlp": kinds(encoder, MLPBlock),
        "encoder.norms": kinds(encoder.blocks, *norms),
        "encoder.neck": size(encoder.neck),
        "prompt_encoder": size(segmenter.prompt_encoder),
        "decoder": size(decoder),
        "decoder.transformer": size(decoder.transformer),
        "decoder.attention": kinds(decoder.transformer, Attention),
        "decoder.mlp": kinds(decoder.transformer, MLPBlock),
        "decoder.norms": kinds(decoder.transformer, *norms),
        "head": size(decoder.output_upscaling, decoder.output_hypernetworks_mlps, decoder.mask_tokens),
        "upscaling": size(decoder.output_upscaling),
        "hypernetworks": size(decoder.output_hypernetworks_mlps),
        "mask_tokens": size(decoder.mask_tokens),
        "iou_head": size(decoder.iou_prediction_head),
        "iou_token": size(decoder.iou_token),
        "norms": kinds(encoder, *norms) + kinds(decoder, *norms),
    }
    assert expected.keys() == GROUPS.keys()
    shapes = {name: tuple(value.shape) for name, value in segmenter.named_parameters()}
    for group, numel in expected.items():
        assert resolve(LayerSelection(name="one", train=(group,)), shapes).trainable == numel > 0, group


def test_flatten_and_unflatten_are_inverse_and_strict() -> None:
    manifest = manifest_for(VIT_T, 1, preset("flap", 2))
    rng = np.random.default_rng(0)
    state = {entry.name: rng.normal(size=entry.shape).astype(np.float32) for entry in manifest.shared}
    vector = manifest.flatten(dict(reversed(state.items())))
    assert vector.dtype == np.float32
    np.testing.assert_array_equal(vector, np.concatenate([state[e.name].ravel() for e in manifest.shared]))
    back = manifest.unflatten(vector)
    assert list(back) == [entry.name for entry in manifest.shared]
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value)
    back[manifest.shared[0].name][...] = 7
    assert not (vector == 7).any()

    first = manifest.shared[0].name
    with pytest.raises(SelectionError, match=f"lacks {re.escape(first)}"):
        manifest.flatten({name: value for name, value in state.items() if name != first})
    with pytest.raises(SelectionError, match="has stranger, which is not selected"):
        manifest.flatten({**state, "stranger": np.zeros(1)})
    with pytest.raises(SelectionError, match=f"{re.escape(first)} has shape"):
        manifest.flatten({**state, first: state[first].T})
    with pytest.raises(SelectionError, match=f"shares {manifest.shared_size} values"):
        manifest.unflatten(vector[:-1])


def test_manifest_survives_json_and_notices_a_change() -> None:
    manifest = manifest_for(VIT_T, 2, LayerSelection(name="mine", train=("head",), local=("encoder.norms",)))
    text = manifest.to_json()
    again = ParameterManifest.from_json(text)
    assert again == manifest
    assert again.layout_hash == manifest.layout_hash
    content = json.loads(text)
    content["shared"][0]["shape"] = [1]
    with pytest.raises(SelectionError, match="altered"):
        ParameterManifest.from_json(json.dumps(content))
    for damaged in (text[:-20], "[]", "{}", '{"selection": {"name": "x"}, "shared": 3}'):
        with pytest.raises(SelectionError):
            ParameterManifest.from_json(damaged)


def test_layout_hash_covers_names_shapes_order_and_who_keeps_what() -> None:
    shapes = {"mask_decoder.mask_tokens.weight": (3, 256), "mask_decoder.iou_token.weight": (1, 256)}
    train = LayerSelection(name="a", train=("mask_tokens", "iou_token"))
    layouts = [
        resolve(train, shapes),
        resolve(train, dict(reversed(shapes.items()))),
        resolve(train, {**shapes, "mask_decoder.mask_tokens.weight": (2, 256)}),
        resolve(LayerSelection(name="a", train=("mask_tokens",)), shapes),
        resolve(LayerSelection(name="a", train=("mask_tokens",), local=("iou_token",)), shapes),
        resolve(LayerSelection(name="a", train=("iou_token",), local=("mask_tokens",)), shapes),
    ]
    assert len({layout.layout_hash for layout in layouts}) == len(layouts)
    renamed = LayerSelection(name="b", train=("decoder",))
    assert resolve(renamed, shapes).layout_hash == layouts[0].layout_hash


def test_a_manifest_costs_no_weights() -> None:
    state = torch.get_rng_state()
    assert manifest_for(ModelConfig(backbone="vit_h", image_size=1024), 2, preset("full")).trainable > 600_000_000
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rank_over_the_layers_own_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"rank 100000 is over the \d+ of .*: take at most"):
        manifest_for(ModelConfig(backbone="vit_t", image_size=112), 2, preset("lora", 100_000))
