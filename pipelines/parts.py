"""What a selection trains, by place and component: `encoder.3.lora_q` is LoRA on q in image encoder block 3.

Places are those of the model, in the order of an atlas's columns: encoder.stem, encoder.0 ..., decoder.0, decoder.1,
decoder.final (the last attention), decoder.head, encoder.neck, prompt.
"""

import re
from collections.abc import Iterable

from fedsam_core.selection import ManifestEntry, ParameterManifest

_ATTENTION = r"(?:attn|self_attn|cross_attn_\w+|final_attn_token_to_image)"

# The first pattern that a parameter's name begins with says where it is; {} takes the number of a block or layer.
_PLACES = {
    r"image_encoder\.blocks\.(\d+)\.": "encoder.{}",
    r"image_encoder\.(?:patch_embed|pos_embed|convolutions|merges)\b": "encoder.stem",
    r"image_encoder\.neck\.": "encoder.neck",
    r"mask_decoder\.transformer\.layers\.(\d+)\.": "decoder.{}",
    r"mask_decoder\.transformer\.": "decoder.final",
    r"mask_decoder\.": "decoder.head",
    r"prompt_encoder\.": "prompt",
}

# The first pattern found in the name of a parameter that is trained whole says what it is; order matters.
_COMPONENTS = {
    r"rel_pos(?:_[hw])?$": "rel_pos",
    rf"\.{_ATTENTION}\.": "attention",
    r"\.transformer\.(?:layers\.\d+\.norm\d|norm_final_attn)\.|\.blocks\.\d+\.norm\d\.": "norms",
    r"\.(?:blocks|layers)\.\d+\.mlp\.": "mlp",
    r"patch_embed": "patch_embed",
    r"\.(?:convolutions|merges|local_conv)\.": "convolutions",
    r"pos_embed": "pos_embed",
    r"^image_encoder\.neck\.": "neck",
    r"output_upscaling": "upscaling",
    r"output_hypernetworks_mlps": "hypernetworks",
    r"mask_tokens": "mask_tokens",
    r"iou_prediction_head": "iou_head",
    r"iou_token": "iou_token",
    r"^prompt_encoder\.": "prompt_encoder",
}

# The same for the layer that a parameter of LoRA belongs to.
_LORA = {r"\.q_proj\.": "q", r"\.k_proj\.": "k", r"\.v_proj\.": "v", r"\.(?:out_)?proj\.": "o", r"\.mlp\.": "mlp"}


def parts_of(manifest: ParameterManifest) -> dict[str, int]:
    """Trainable values by PLACE.COMPONENT, in the order of the manifest: what is sent, then what stays at the site."""
    parts: dict[str, int] = {}
    for entry in (*manifest.shared, *manifest.local):
        part = f"{_place(entry.name)}.{_component(entry)}"
        parts[part] = parts.get(part, 0) + entry.numel
    return parts


def by_place(parts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The components of each place, sorted, in the order of an atlas's columns."""
    found: dict[str, set[str]] = {}
    for part in parts:
        place, _, component = part.rpartition(".")
        found.setdefault(place, set()).add(component)
    return {place: tuple(sorted(found[place])) for place in sorted(found, key=_order)}


def columns(places: Iterable[str]) -> list[str]:
    """Places as an atlas's columns: no encoder block up to the last that is used, and no decoder layer, is left out."""
    used = set(places)
    last = max((int(found[1]) for place in used if (found := re.fullmatch(r"encoder\.(\d+)", place))), default=-1)
    always = {f"encoder.{block}" for block in range(last + 1)} | {"decoder.0", "decoder.1", "decoder.final"}
    return sorted(used | always, key=_order)


def _order(place: str) -> tuple[int, int, str]:
    floor, _, name = place.partition(".")
    if name.isdigit():
        return (1 if floor == "encoder" else 2, int(name), place)
    return ({"encoder.stem": 0, "decoder.final": 3, "decoder.head": 4, "encoder.neck": 5}.get(place, 6), 0, place)


def _place(name: str) -> str:
    for pattern, place in _PLACES.items():
        if found := re.match(pattern, name):
            return place.format(*found.groups())
    return "other"


def _component(entry: ManifestEntry) -> str:
    if entry.name.endswith(".lora_scale"):
        return "lora_scale"
    lora = entry.kind != "whole"
    for pattern, component in (_LORA if lora else _COMPONENTS).items():
        if re.search(pattern, entry.name):
            return f"lora_{component}" if lora else component
    return "other"
