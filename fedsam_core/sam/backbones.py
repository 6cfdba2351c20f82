"""A segmenter from its configuration: official building blocks, random or official weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from segment_anything.modeling import ImageEncoderViT, PromptEncoder
from torch import nn

from fedsam_core.errors import SelectionError
from fedsam_core.hashing import derive_seed
from fedsam_core.sam.attention import SplitAttention
from fedsam_core.sam.checkpoints import load_official
from fedsam_core.sam.decoder import CHANNELS, SAM_TOKENS, ClassDecoder, HeadLayout
from fedsam_core.sam.geometry import BACKBONES, LITE_MEDSAM, PATCH, Backbone, BackboneName, stride
from fedsam_core.sam.litemedsam import packaged_checkpoint
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.sam.shipped import SHIPPED
from fedsam_core.sam.tinyvit import TinyViT
from fedsam_core.selection import LayerSelection, ParameterManifest, resolve
from fedsam_core.settings import Settings


class ModelConfig(Settings):
    """Which SAM is adapted."""

    backbone: BackboneName = Field(
        default="vit_b",
        description="image encoder; vit_t is the small one that a laptop CPU can train, lite_medsam one that has seen "
        "medical images (pip install 'fedsam[lite-medsam]')",
    )
    image_size: int = Field(
        default=224,
        description="side of the square input in pixels, a multiple of 16; 224, 448, 672 and 896 need no padding. "
        "lite_medsam was trained at 256",
    )
    checkpoint: Literal["auto", "random"] | Path = Field(
        default="auto",
        description="official SAM .pth file, or one that `fedsam pretrain` made; auto: for vit_t the weights that come "
        "with fedsam, for lite_medsam those of its package, random ones for the others; random: random ones",
    )
    head: Literal["auto", "flap", "sam"] = Field(
        default="auto",
        description="mask head: flap (four stages), sam (SAM's two stages) or auto (flap where the selection trains "
        "all of it, otherwise sam). lite_medsam has sam only",
    )

    @property
    def weights_file(self) -> Path | None:
        """The file that weights are loaded from; None where they are random.

        Raises:
            CheckpointError: they are lite_medsam's, and its package is missing or has another file.
        """
        if isinstance(self.checkpoint, Path):
            return self.checkpoint
        if self.checkpoint == "random":
            return None
        return packaged_checkpoint() if self.backbone == LITE_MEDSAM else SHIPPED.get(self.backbone)

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _once_null(cls, value: Any) -> Any:
        return "random" if value is None else value  # as runs before "auto" wrote it

    @field_validator("image_size")
    @classmethod
    def _multiple_of_patch(cls, value: int) -> int:
        if value < PATCH or value % PATCH:
            below = max(value // PATCH, 1) * PATCH
            raise ValueError(f"{value} is not a positive multiple of {PATCH}: use {below} or {below + PATCH}")
        return value


def build_segmenter(model: ModelConfig, classes: int, selection: LayerSelection, seed: int) -> SamSegmenter:
    """A segmenter with its weights, every parameter frozen: `adapt` decides what is trained.

    Raises:
        SelectionError: the head does not suit the selection (see `head_layout`).
        CheckpointError: the file is not a checkpoint of this backbone, or the package is missing.
    """
    segmenter = random_segmenter(model, classes, selection, seed)
    if (file := model.weights_file) is not None:
        load_official(segmenter, file)
    return segmenter


def random_segmenter(model: ModelConfig, classes: int, selection: LayerSelection, seed: int) -> SamSegmenter:
    """A segmenter with random weights, every parameter frozen; `model.checkpoint` is not read.

    Random weights are torch's defaults, and the encoder's position table from a normal of deviation 0.02 (ViT's), not
    official SAM's zeros, so that frozen random features know where they are. Equal seeds give equal encoders and
    decoder transformers whatever the head. The global random state is left alone.

    Raises:
        SelectionError: the head does not suit the selection (see `head_layout`).
    """
    head = head_layout(model, classes, selection)
    with seeded(derive_seed(seed, "segmenter")):
        return _assemble(model, classes, head, seed).requires_grad_(False)


def manifest_for(model: ModelConfig, classes: int, selection: LayerSelection) -> ParameterManifest:
    """The manifest that `adapt` would give on this model, without allocating or reading a weight.

    Raises:
        SelectionError: as `build_segmenter` and `resolve`.
    """
    segmenter = unallocated_segmenter(model, classes, selection)
    return resolve(selection, {name: tuple(value.shape) for name, value in segmenter.named_parameters()})


def unallocated_segmenter(model: ModelConfig, classes: int, selection: LayerSelection) -> SamSegmenter:
    """A segmenter of shapes alone, on torch's meta device.

    Raises:
        SelectionError: the head does not suit the selection (see `head_layout`).
    """
    with torch.device("meta"), seeded(0):
        return _assemble(model, classes, head_layout(model, classes, selection), seed=0)


def head_layout(model: ModelConfig, classes: int, selection: LayerSelection) -> HeadLayout:
    """Which head a selection gets. New weights are never left frozen at random.

    A selection that does not train mask tokens and hypernetworks keeps SAM's own head with its four tokens.
    LiteMedSAM's embeddings lie so close that SAM's two stages end at the image's own size: it has no use for FLAP's.

    Raises:
        SelectionError: the FLAP head would stay frozen or makes no sense, or SAM's own has too few tokens.
    """
    if classes < 1:
        raise SelectionError(f"{classes} classes: give at least one foreground class")
    tokens = selection.trains("mask_tokens") and selection.trains("hypernetworks")
    everything = tokens and selection.trains("upscaling")
    if model.head == "flap" and model.backbone == LITE_MEDSAM:
        raise SelectionError(
            "model.head flap doubles four times, from embeddings 16 pixels apart; those of lite_medsam are 4 apart, "
            "and SAM's two stages do: set model.head to auto"
        )
    if model.head == "flap" and not everything:
        raise SelectionError(
            f"selection {selection.name!r} would leave FLAP's new head frozen at random: add 'head' to train, or set "
            "model.head to auto"
        )
    if model.head == "flap" or (model.head == "auto" and everything and model.backbone != LITE_MEDSAM):
        return "flap"
    if tokens:
        return "sam"
    if classes > SAM_TOKENS:
        raise SelectionError(
            f"selection {selection.name!r} keeps SAM's own head, whose {SAM_TOKENS} mask tokens cannot hold {classes} "
            "classes: add 'head' to train"
        )
    return "pretrained"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw CPU random numbers from `seed` inside, and put the global state back after; CUDA's is not touched."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _assemble(model: ModelConfig, classes: int, head: HeadLayout, seed: int) -> SamSegmenter:
    grid = model.image_size // stride(model.backbone)
    if model.backbone == LITE_MEDSAM:
        encoder: nn.Module = TinyViT()
    else:
        encoder = _image_encoder(BACKBONES[model.backbone], model.image_size)
    prompt_encoder = PromptEncoder(
        embed_dim=CHANNELS,
        image_embedding_size=(grid, grid),
        input_image_size=(model.image_size, model.image_size),
        mask_in_chans=16,
    )
    if head == "pretrained":
        decoder = ClassDecoder(tokens=SAM_TOKENS, head=head, outputs=classes, side=grid)
    else:
        decoder = ClassDecoder(tokens=classes + 1, head=head, outputs=classes + 1, side=grid)
    return SamSegmenter(
        encoder,
        prompt_encoder,
        decoder,
        backbone=model.backbone,
        image_size=model.image_size,
        classes=classes,
        head=head,
        seed=seed,
    )


def _image_encoder(backbone: Backbone, image_size: int) -> ImageEncoderViT:
    """The official encoder with split attention."""
    encoder = ImageEncoderViT(
        img_size=image_size,
        patch_size=PATCH,
        embed_dim=backbone.embed_dim,
        depth=backbone.depth,
        num_heads=backbone.heads,
        out_chans=CHANNELS,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=backbone.window,
        global_attn_indexes=backbone.global_blocks,
    )
    grid = image_size // PATCH
    for block in encoder.blocks:
        block.attn = SplitAttention(backbone.embed_dim, backbone.heads, block.window_size or grid)
        if block.window_size == grid:
            # One window covers the grid exactly: the block attends to all of it, without cutting and pasting.
            block.window_size = 0
    nn.init.trunc_normal_(encoder.pos_embed, std=0.02)
    return encoder
