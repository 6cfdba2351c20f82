"""The sizes of the image encoders. No torch here."""

from dataclasses import dataclass


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
