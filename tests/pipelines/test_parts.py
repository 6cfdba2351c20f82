"""What a selection trains, by place and component."""

import pytest

from fedsam_core.sam.backbones import ModelConfig, manifest_for
from fedsam_core.selection import GROUPS, LORA_SCALE, PRESETS, LayerSelection, LoraTargets, preset
from pipelines.parts import by_place, columns, parts_of

MODEL = ModelConfig(backbone="vit_t", image_size=64)


@pytest.mark.parametrize("selection", [preset(name, 4) for name in PRESETS], ids=list(PRESETS))
def test_every_trainable_value_is_counted_once_and_has_a_name(selection):
    manifest = manifest_for(MODEL, 2, selection)
    parts = parts_of(manifest)
    assert sum(parts.values()) == manifest.trainable
    assert not [part for part in parts if "other" in part]


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_of_the_model_has_a_place(group):
    parts = parts_of(manifest_for(MODEL, 2, LayerSelection(name="one", train=(group,))))
    assert parts
    assert not [part for part in parts if "other" in part]


def test_lora_is_named_by_its_projection_and_block():
    lora = LoraTargets(encoder=("q", "k", "v", "o", "mlp"), encoder_blocks=(1,), rank=2)
    parts = parts_of(manifest_for(MODEL, 2, LayerSelection(name="one", lora=lora, local=(LORA_SCALE,))))
    assert set(parts) == {f"encoder.1.lora_{name}" for name in ("q", "k", "v", "o", "mlp", "scale")}
    assert parts["encoder.1.lora_scale"] == 6
    assert parts["encoder.1.lora_q"] == 2 * (192 + 192)


def test_lora_of_the_decoder_is_in_its_layers():
    lora = LoraTargets(decoder=("v", "o", "mlp"), rank=2)
    parts = parts_of(manifest_for(MODEL, 2, LayerSelection(name="one", lora=lora)))
    assert by_place(parts) == {
        "decoder.0": ("lora_mlp", "lora_o", "lora_v"),
        "decoder.1": ("lora_mlp", "lora_o", "lora_v"),
        "decoder.final": ("lora_o", "lora_v"),
    }


def test_columns_are_in_the_order_of_the_model_without_gaps():
    assert columns(["decoder.head", "encoder.2", "encoder.10", "encoder.stem"]) == [
        "encoder.stem",
        *(f"encoder.{block}" for block in range(11)),
        "decoder.0",
        "decoder.1",
        "decoder.final",
        "decoder.head",
    ]
