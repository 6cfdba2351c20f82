"""Images to class logits: SAM's encoder and decoder, prompt-free."""

import torch
from segment_anything.modeling import ImageEncoderViT, PromptEncoder
from torch import Tensor, nn
from torch.nn import functional as F

from fedsam_core.sam.decoder import ClassDecoder, HeadLayout
from fedsam_core.selection import ParameterManifest

# SAM's input statistics (RGB, 0 to 255), from segment_anything.build_sam.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class SamSegmenter(nn.Module):
    """SAM as a semantic segmenter: one logit map a class and one for background, softmax over them.

    With SAM's own pretrained head (`head == "pretrained"`) the background logit is the constant 0 and class k (1-based)
    reads SAM's mask token k-1: softmax over [0, x] is sigmoid(x), which is how SAM itself reads a mask.

    Attributes:
        backbone, image_size (pixels), classes (foreground classes), head: what was built.
        seed: what new weights are drawn from, LoRA's A included.
        weights: "random(seed=..)", or "sam:" (an official file) or "fedsam:" (one of `fedsam pretrain`, such as the one
            that comes with the package) and the first 12 hex digits of the file's SHA-256.
        manifest: what is trained, once `adapt` was called.
    """

    input_scale: Tensor
    input_shift: Tensor

    def __init__(
        self,
        image_encoder: ImageEncoderViT,
        prompt_encoder: PromptEncoder,
        mask_decoder: ClassDecoder,
        *,
        backbone: str,
        image_size: int,
        classes: int,
        head: HeadLayout,
        seed: int,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.backbone = backbone
        self.image_size = image_size
        self.classes = classes
        self.head = head
        self.seed = seed
        self.weights = f"random(seed={seed})"
        self.manifest: ParameterManifest | None = None
        # (255 x - mean) / std as one multiplication and one addition.
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        self.register_buffer("input_scale", 255 / std, persistent=False)
        self.register_buffer("input_shift", -mean / std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], float in [0, 1], to logits [B, classes + 1, S, S]; channel 0 is background."""
        return self.decode(self.encode(images))

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], float in [0, 1], to embeddings [B, 256, S/16, S/16]."""
        # With channels last the patches come out as rows of tokens, and no block has to copy them into that order.
        pixels = (images * self.input_scale + self.input_shift).contiguous(memory_format=torch.channels_last)
        return self.image_encoder(pixels)  # type: ignore[no-any-return]

    def decode(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, 256, S/16, S/16] to logits [B, classes + 1, S, S]."""
        masks: Tensor = self.mask_decoder(embeddings, self._positions(), self.prompt_encoder.no_mask_embed.weight)
        if self.head == "pretrained":
            masks = F.pad(masks, (0, 0, 0, 0, 1, 0))
        if masks.shape[-1] != self.image_size:
            masks = F.interpolate(masks, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)
        return masks

    def _positions(self) -> Tensor:
        """The grid's positional encoding [1, 256, g, g], in fp32: sines of large angles do not survive bf16."""
        with torch.autocast(self.input_scale.device.type, enabled=False):
            return self.prompt_encoder.get_dense_pe()  # type: ignore[no-any-return]
