"""LiteMedSAM's image encoder: a TinyViT whose embeddings lie four pixels apart, made for being adapted.

TinyViT (Wu et al., ECCV 2022, arXiv 2207.10666) as MobileSAM and LiteMedSAM (the MedSAM repository, branch LiteMedSAM)
use it: convolutions at the image's own resolution, then three stages of attention in windows at S/2, S/4 and S/4.
Equal to theirs in evaluation mode, with three differences in how it is written:

- Each batch norm is folded into the convolution before it. Its running statistics would be a second, unsendable way
  in which sites drift apart; so nothing here depends on the batch, in training as in evaluation.
- q, k and v are layers of their own, so that LoRA can adapt each by itself.
- Pixels keep their channels last throughout: windows, convolutions and norms all read them as they lie. Attention runs
  in PyTorch's fused kernel, and frozen convolutions go over a few rows of an image at a time.
"""

import itertools

import torch
from segment_anything.modeling.common import MLPBlock
from torch import Tensor, nn
from torch.nn import functional as F

from fedsam_core.sam.decoder import CHANNELS, ChannelNorm

EMBED = 64  # channels of the convolutions at the image's own resolution
CONVOLUTIONS = 2
EXPANSION = 4  # of inverted bottlenecks and MLPs
ROWS = 32  # of an image that go through a frozen inverted bottleneck at a time
# Of each stage of attention: channels, blocks, heads, side of a window, stride of the merging before it.
STAGES = ((128, 2, 4, 7, 2), (160, 6, 5, 14, 2), (320, 2, 10, 7, 1))


class TinyViT(nn.Module):
    """Images [B, 3, S, S] to embeddings [B, 256, S/4, S/4]; S is a multiple of 4.

    There is no absolute position and a window knows only distances, so that every size takes the same weights. They
    were trained at 256 px, where windows are padded; at multiples of 56 none is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(Convolution(3, EMBED // 2, 1), nn.GELU(), Convolution(EMBED // 2, EMBED, 1))
        self.convolutions = nn.ModuleList(InvertedBottleneck(EMBED) for _ in range(CONVOLUTIONS))
        widths = itertools.pairwise((EMBED, *(dim for dim, *_ in STAGES)))
        self.merges = nn.ModuleList(
            Merging(before, after, stage[-1]) for (before, after), stage in zip(widths, STAGES, strict=True)
        )
        self.blocks = nn.ModuleList(
            Block(dim, heads, window) for dim, depth, heads, window, _ in STAGES for _ in range(depth)
        )
        self.neck = nn.Sequential(
            Convolution(STAGES[-1][0], CHANNELS, 1, bias=False),
            ChannelNorm(CHANNELS),
            Convolution(CHANNELS, CHANNELS, 3, bias=False),
            ChannelNorm(CHANNELS),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], best in channels-last memory, to embeddings [B, 256, S/4, S/4] in it."""
        x = self.patch_embed(images.permute(0, 2, 3, 1))
        for convolution in self.convolutions:
            x = convolution(x)
        blocks = iter(self.blocks)
        for merge, (_, depth, *_) in zip(self.merges, STAGES, strict=True):
            x = merge(x)
            for block in itertools.islice(blocks, depth):
                x = block(x)
        return self.neck(x).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class Convolution(nn.Conv2d):
    """A convolution whose channels come last, padded to keep the size; a view is all that the way in and out costs."""

    def __init__(self, before: int, after: int, size: int, stride: int = 1, groups: int = 1, bias: bool = True) -> None:
        super().__init__(before, after, size, stride=stride, padding=size // 2, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [B, H, W, before] to [B, H/stride, W/stride, after]."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class InvertedBottleneck(nn.Module):
    """MBConv: through a depthwise convolution of four times the channels, beside a shortcut."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        wide = EXPANSION * dim
        self.conv1 = Convolution(dim, wide, 1)
        self.conv2 = Convolution(wide, wide, 3, groups=wide)
        self.conv3 = Convolution(wide, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [B, H, W, dim] to the same shape."""
        learns = x.requires_grad or any(value.requires_grad for value in self.parameters())
        if x.device.type != "cpu" or torch.compiler.is_compiling() or (learns and torch.is_grad_enabled()):
            return F.gelu(self.conv3(self._widened(x)) + x)
        # At the image's own resolution the wide pixels are tens of megabytes, whose pages the system would hand out
        # anew for every layer. A few rows at a time stay where they are; what comes out is the same.
        out = torch.empty_like(x)
        for image in range(len(x)):
            for top in range(0, x.shape[1], ROWS):
                rows = slice(top, min(top + ROWS, x.shape[1]))
                before = min(top, 1)  # the row above, which the depthwise convolution sees; and the one below
                wide = self._widened(x[image : image + 1, top - before : rows.stop + 1])
                wide = wide[:, before : before + rows.stop - top]
                out[image, rows] = F.gelu(self.conv3(wide)[0] + x[image, rows])
        return out

    def _widened(self, x: Tensor) -> Tensor:
        return F.gelu(self.conv2(F.gelu(self.conv1(x))))


class Merging(nn.Module):
    """From one stage to the next: other channels, and with stride 2 a quarter of the pixels."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Convolution(before, after, 1)
        self.conv2 = Convolution(after, after, 3, stride=stride, groups=after)
        self.conv3 = Convolution(after, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [B, H, W, before] to [B, H/stride, W/stride, after]."""
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention within windows, a depthwise convolution across them, and an MLP; SAM's names where SAM has the part."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.local_conv = Convolution(dim, dim, 3, groups=dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLPBlock(dim, EXPANSION * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [B, H, W, dim] to the same shape."""
        batch, height, width, dim = x.shape
        size = self.window
        # Padding comes before the norm, as in the original: padded pixels are keys like all others.
        padded = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
        down, across = padded.shape[1] // size, padded.shape[2] // size
        windows = self.norm1(padded).view(batch, down, size, across, size, dim).transpose(2, 3)
        attended = self.attn(windows.reshape(-1, size * size, dim))
        attended = attended.view(batch, down, across, size, size, dim).transpose(2, 3).reshape(padded.shape)
        x = self.local_conv(x + attended[:, :height, :width])
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class WindowAttention(nn.Module):
    """Multi-head self-attention with a learned bias for each distance (rows apart, columns apart) and head.

    Args:
        dim: channels of a token.
        heads: number of heads; divides `dim`.
        size: tokens per side of the window.
    """

    distances: Tensor

    def __init__(self, dim: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos = nn.Parameter(torch.zeros(heads, size * size))
        # Row i, column j: where the table holds the distance of tokens i and j.
        steps = torch.arange(size)
        apart = (steps[:, None] - steps[None, :]).abs()
        distances = (apart[:, None, :, None] * size + apart[None, :, None, :]).reshape(size * size, size * size)
        self.register_buffer("distances", distances, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [windows, size * size, dim] to the same shape."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        bias = self.rel_pos[None, :, self.distances].to(q.dtype)  # four axes, or the CPU's fused kernel is not taken
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
