"""The sizes of the image encoders. No torch here."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Backbone:
    """A SAM image encoder (ViTDet): widths, and which blocks attend to the whole grid instead of windows."""

    embed_dim: int
    depth: int
    heads: int
    window: int
    global_blocks: tuple[int, ...]
    checkpoint: str | None


# vit_b, vit_l and vit_h as in segment_anything.build_sam; vit_t, which a laptop's CPU can train, has no official file.
BACKBONES: dict[str, Backbone] = {
    "vit_t": Backbone(192, 6, 3, 7, (2, 5), None),
    "vit_b": Backbone(768, 12, 12, 14, (2, 5, 8, 11), "sam_vit_b_01ec64.pth"),
    "vit_l": Backbone(1024, 24, 16, 14, (5, 11, 17, 23), "sam_vit_l_0b3195.pth"),
    "vit_h": Backbone(1280, 32, 16, 14, (7, 15, 23, 31), "sam_vit_h_4b8939.pth"),
}
PATCH = 16
LITE_MEDSAM = "lite_medsam"  # a TinyViT with weights of medical images; its sizes are fixed, see `tinyvit`
BackboneName = Literal["vit_t", "vit_b", "vit_l", "vit_h", "lite_medsam"]


def encoder_blocks(backbone: str) -> int:
    """Blocks of the image encoder, by whose number a selection names them."""
    return 10 if backbone == LITE_MEDSAM else BACKBONES[backbone].depth


def checkpoint_name(backbone: str) -> str | None:
    """What the authors call the file with the weights, if there is one."""
    return "lite_medsam.pth" if backbone == LITE_MEDSAM else BACKBONES[backbone].checkpoint


def stride(backbone: str) -> int:
    """Pixels of the image from one of its embeddings to the next."""
    return 4 if backbone == LITE_MEDSAM else PATCH
