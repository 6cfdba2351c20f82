"""Images to class logits: SAM's encoder and decoder, prompt-free."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from segment_anything.modeling import ImageEncoderViT, PromptEncoder
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedsam_core.sam.decoder import ClassDecoder, HeadLayout
from fedsam_core.sam.geometry import LITE_MEDSAM
from fedsam_core.selection import ParameterManifest

# SAM's input statistics (RGB, 0 to 255), from segment_anything.build_sam.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Stage:
    """A step of the image encoder: its function, and the parameters that it reads."""

    run: Callable[[Tensor], Tensor]
    parameters: tuple[nn.Parameter, ...]


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
        checkpointing: while gradients are wanted, an encoder stage keeps its input alone and is computed again in the
            backward pass.
    """

    input_scale: Tensor
    input_shift: Tensor

    def __init__(
        self,
        image_encoder: nn.Module,
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
        self.checkpointing = False
        # (255 x - mean) / std as one multiplication and one addition. LiteMedSAM learned from x in [0, 1] as it is.
        statistics = ((0.0,) * 3, (255.0,) * 3) if backbone == LITE_MEDSAM else (PIXEL_MEAN, PIXEL_STD)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
        self.register_buffer("input_scale", 255 / std, persistent=False)
        self.register_buffer("input_shift", -mean / std, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where it is, and where its images have to be."""
        return self.input_scale.device

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], float in [0, 1], to logits [B, classes + 1, S, S]; channel 0 is background."""
        return self.decode(self.encode(images))

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], float in [0, 1], to embeddings [B, 256, g, g]; g is S/16, with lite_medsam S/4."""
        if self.checkpointing and torch.is_grad_enabled():
            return self.begin(images, len(self.stages()))
        return self.image_encoder(self._pixels(images))  # type: ignore[no-any-return]

    def stages(self) -> list[Stage]:
        """The encoder in order: patches and their positions, each block, the neck; or, of an encoder that is no ViT of
        SAM's, all of it."""
        encoder = self.image_encoder
        if not isinstance(encoder, ImageEncoderViT):
            return [Stage(encoder, tuple(encoder.parameters()))]
        patches = Stage(
            lambda x: encoder.patch_embed(x) + encoder.pos_embed, (encoder.pos_embed, *encoder.patch_embed.parameters())
        )
        blocks = [Stage(block, tuple(block.parameters())) for block in encoder.blocks]
        neck = Stage(lambda x: encoder.neck(x.permute(0, 3, 1, 2)), tuple(encoder.neck.parameters()))
        return [patches, *blocks, neck]

    def frozen_stages(self) -> int:
        """How many stages come before the first one with a parameter that requires a gradient."""
        stages = self.stages()
        trained = (n for n, stage in enumerate(stages) if any(one.requires_grad for one in stage.parameters))
        return next(trained, len(stages))

    def begin(self, images: Tensor, stages: int) -> Tensor:
        """Images [B, 3, S, S], float in [0, 1], through the first `stages` stages, at least one of them.

        Returns:
            embeddings [B, 256, g, g] after all stages, before that tokens [B, g, g, width].
        """
        return self.advance(self._pixels(images), 0, stages)

    def finish(self, x: Tensor, stages: int) -> Tensor:
        """What `begin` gave, to the logits that `forward` gives."""
        return self.decode(self.advance(x, stages, len(self.stages())))

    def advance(self, x: Tensor, first: int, end: int) -> Tensor:
        """What enters stage `first`, to what stage `end - 1` gives."""
        again = self.checkpointing and torch.is_grad_enabled()
        for stage in self.stages()[first:end]:
            # No stage draws a random number, so none has to be put back for the second pass.
            x = checkpoint(stage.run, x, use_reentrant=False, preserve_rng_state=False) if again else stage.run(x)
        return x

    def _pixels(self, images: Tensor) -> Tensor:
        # With channels last the patches come out as rows of tokens, and no block has to copy them into that order.
        return (images * self.input_scale + self.input_shift).contiguous(memory_format=torch.channels_last)

    def decode(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, 256, g, g] to logits [B, classes + 1, S, S]."""
        masks: Tensor = self.mask_decoder(embeddings, self._positions(), self.prompt_encoder.no_mask_embed.weight)
        if self.head == "pretrained":
            masks = F.pad(masks, (0, 0, 0, 0, 1, 0))
        if masks.shape[-1] != self.image_size:
            masks = F.interpolate(masks, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)
        return masks

    def _positions(self) -> Tensor:
        """The grid's positional encoding [1, 256, g, g], in fp32: sines of large angles do not survive bf16."""
        with torch.autocast(self.device.type, enabled=False):
            return self.prompt_encoder.get_dense_pe()  # type: ignore[no-any-return]
