"""SAM's mask decoder without prompts: a batch of image embeddings to one mask a token."""

import itertools
from typing import Any, Literal

import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 256
SAM_TOKENS = 4
# flap: four stages, a token a class and background. sam: SAM's two stages, a token a class and background.
# pretrained: SAM's two stages and its own four tokens, for selections that leave the head frozen.
HeadLayout = Literal["flap", "sam", "pretrained"]
_WIDTHS = {"flap": (CHANNELS, 64, 32, 16, 8), "sam": (CHANNELS, 64, 32), "pretrained": (CHANNELS, 64, 32)}


class Doubling(nn.ConvTranspose2d):
    """A transposed convolution of kernel 2 and stride 2, as what it is: a linear layer from a pixel to four children.

    Children stay beside their parent (an axis of 4: upper left, upper right, lower left, lower right), so that a chain
    of doublings is a chain of matrix products; `raster_order` puts the pixels in place once, at the end.
    """

    bias: nn.Parameter

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, kernel_size=2, stride=2)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Pixels [..., before] to children [..., 4, after]; `output_size` has no meaning here."""
        weight = self.weight.permute(2, 3, 1, 0).reshape(4 * self.out_channels, self.in_channels)
        return F.linear(x, weight, self.bias.repeat(4)).view(*x.shape[:-1], 4, self.out_channels)


class ChannelNorm(LayerNorm2d):  # type: ignore[misc]
    """SAM's LayerNorm2d for pixels whose channels come last: [..., C] to [..., C]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def raster_order(side: int, stages: int) -> Tensor:
    """Where each pixel of an image [side * 2^stages, same], row by row, lies in `Doubling`'s order: int64, flat."""
    tree = torch.arange(side * side * 4**stages).view(side, side, *[2, 2] * stages)
    return tree.permute(*range(0, tree.dim(), 2), *range(1, tree.dim(), 2)).flatten()


class _Reordered(torch.autograd.Function):
    """x [B, N, c] with row `order[n]` in place n. Autograd would add its gradient to zeros, as if rows could meet."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradient.index_select(1, back), None, None


class ClassDecoder(MaskDecoder):  # type: ignore[misc]
    """The official decoder (same modules and names) called for a batch at once, with FLAP's or SAM's own upscaling.

    FLAP's head (arXiv 2407.21739): four transposed convolutions of stride 2, 256-64-32-16-8, a layer norm and GELU
    after the first three, GELU after the last, and hypernetworks that end at 8 channels. It doubles four times, so the
    masks come out at the image's own size. SAM's head doubles twice, normalizes once and ends at 32 channels.

    Args:
        tokens: number of mask tokens, at least 2.
        head: which head; "sam" and "pretrained" have the same layers.
        outputs: how many tokens (the first ones) are turned into masks.
        side: g, the side of the image embeddings.
    """

    order: Tensor
    order_back: Tensor

    def __init__(self, tokens: int, head: HeadLayout, outputs: int, side: int) -> None:
        super().__init__(
            transformer_dim=CHANNELS,
            transformer=TwoWayTransformer(depth=2, embedding_dim=CHANNELS, mlp_dim=2048, num_heads=8),
            num_multimask_outputs=tokens - 1,
            iou_head_depth=3,
            iou_head_hidden_dim=CHANNELS,
        )
        self.outputs = outputs
        widths = _WIDTHS[head]
        self.side = side << (len(widths) - 1)
        normalized = 3 if head == "flap" else 1
        layers: list[nn.Module] = []
        for stage, (before, after) in enumerate(itertools.pairwise(widths)):
            layers.append(Doubling(before, after))
            if stage < normalized:
                layers.append(ChannelNorm(after))
            layers.append(nn.GELU())
        self.output_upscaling = nn.Sequential(*layers)
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(CHANNELS, CHANNELS, widths[-1], 3) for _ in range(tokens))
        order = raster_order(side, len(widths) - 1)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("order_back", order.argsort(), persistent=False)

    def forward(self, embeddings: Tensor, positions: Tensor, no_mask: Tensor) -> Tensor:
        """Masks of the first `outputs` tokens. The predicted quality (IoU) is not computed: nothing here asks for it.

        Args:
            embeddings: image embeddings [B, 256, g, g].
            positions: their positional encoding [1, 256, g, g].
            no_mask: SAM's embedding of "no mask prompt" [1, 256].

        Returns:
            logits [B, outputs, h, h] with h = 16 g (flap) or 4 g (SAM's head).
        """
        batch = embeddings.shape[0]
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(batch, -1, -1)
        tokens, pixels = self.transformer(embeddings + no_mask[:, :, None, None], positions, tokens)
        upscaled = self.output_upscaling(pixels).flatten(1, -2)
        hypernetworks = itertools.islice(self.output_hypernetworks_mlps, self.outputs)
        hyper = torch.stack([network(tokens[:, 1 + i]) for i, network in enumerate(hypernetworks)], dim=1)
        masks = _Reordered.apply(upscaled @ hyper.transpose(1, 2), self.order, self.order_back)
        return masks.transpose(1, 2).contiguous().unflatten(2, (self.side, self.side))  # type: ignore[no-any-return]
