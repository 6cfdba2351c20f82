"""Official SAM on batches: many images at once, many prompts an image, any image size.

`segment_anything`'s own forward code takes one image at a time. Its modules do the work here too, called in its order
(segment_anything/modeling/{sam,prompt_encoder,mask_decoder}.py, Kirillov et al. 2023, arXiv 2304.02643); only what is
repeated for whom differs. Coordinates are (x, y) in pixels, counted from the middle of the upper left one.
"""

import torch
from segment_anything.modeling import Sam
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from fedsam_core.sam.checkpoints import resize_table

# Labels of prompt tokens, as in segment_anything's ONNX export: nothing, a point outside, a point inside, a box's upper
# left and lower right corner.
NOTHING, OUTSIDE, INSIDE, UPPER_LEFT, LOWER_RIGHT = -1, 0, 1, 2, 3


def encode(sam: Sam, images: Tensor) -> Tensor:
    """Images [B, 3, S, S], float in [0, 1], to embeddings [B, 256, S/16, S/16].

    The table of absolute positions is fitted to the grid (gradients pass), as `load_official` does it once; SAM's
    attention fits the relative ones by itself, in the same way.
    """
    pixels = (255 * images - sam.pixel_mean) / sam.pixel_std
    encoder = sam.image_encoder
    grid = images.shape[-1] // encoder.patch_embed.proj.kernel_size[0]
    table = encoder.pos_embed
    if table.shape[1] != grid:
        table = resize_table(table, torch.Size((1, grid, grid, table.shape[-1])))
    return functional_call(encoder, {"pos_embed": table}, (pixels,))  # type: ignore[no-any-return]


def embed_prompts(sam: Sam, coordinates: Tensor, labels: Tensor, size: int) -> Tensor:
    """Prompt tokens [N, T, 256] of coordinates [N, T, 2] and labels int [N, T], on images of `size` pixels."""
    encoder = sam.prompt_encoder
    with torch.autocast(coordinates.device.type, enabled=False):  # sines of large angles do not survive bf16
        places = encoder.pe_layer.forward_with_coords(coordinates + 0.5, (size, size))
    kinds = torch.cat([encoder.not_a_point_embed.weight, *(table.weight for table in encoder.point_embeddings)])
    tokens: Tensor = places * (labels != NOTHING)[..., None] + kinds[labels + 1]
    return tokens


def decode(sam: Sam, embeddings: Tensor, prompts: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masks for prompts, each with the embeddings of its own image.

    Args:
        embeddings: [N, 256, g, g].
        prompts: tokens [N, T, 256]; T = 0 asks without any.
        masks: earlier logits [N, 1, 4 g, 4 g] as a further prompt; None where there are none.

    Returns:
        logits [N, 4, 4 g, 4 g]: the single mask, then the three for a prompt that may mean several things;
        predicted IoU of each [N, 4].
    """
    decoder = sam.mask_decoder
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(len(embeddings), -1, -1)
    tokens, pixels = two_way(sam, embeddings, torch.cat([own, prompts], dim=1), masks)
    networks = enumerate(decoder.output_hypernetworks_mlps, start=1)
    hyper = torch.stack([network(tokens[:, place]) for place, network in networks], dim=1)
    logits = (hyper @ pixels.flatten(2)).view(len(hyper), -1, *pixels.shape[2:])
    return logits, decoder.iou_prediction_head(tokens[:, 0])


def two_way(sam: Sam, embeddings: Tensor, tokens: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The decoder up to its heads: tokens [N, T, 256] after attention, and pixels [N, 32, 4 g, 4 g].

    Args:
        embeddings, masks: as in `decode`.
        tokens: [N, T, 256].
    """
    decoder, encoder = sam.mask_decoder, sam.prompt_encoder
    grid = embeddings.shape[-1]
    dense = encoder.no_mask_embed.weight[:, :, None, None] if masks is None else encoder.mask_downscaling(masks)
    with torch.autocast(embeddings.device.type, enabled=False):
        positions = encoder.pe_layer((grid, grid))[None].expand(len(embeddings), -1, -1, -1)
    tokens, pixels = decoder.transformer(embeddings + dense, positions, tokens)
    return tokens, decoder.output_upscaling(pixels.transpose(1, 2).reshape(embeddings.shape))


def enlarge(logits: Tensor, size: int) -> Tensor:
    """Logits [N, C, h, h] to the image's own size, as SAM does it: float32 [N, C, S, S]."""
    return F.interpolate(logits.float(), size=(size, size), mode="bilinear", align_corners=False)
