"""SAM's encoder attention with q, k and v as layers of their own, so that LoRA can adapt each by itself."""

import torch
from torch import Tensor, nn


class SplitAttention(nn.Module):
    """Multi-head self-attention with decomposed relative positions, equal to `segment_anything`'s encoder attention.

    The official layer computes q, k and v in one fused `qkv` Linear; LoRA on that would share A between them and adapt
    k too. The position tables fit the token grid exactly, so nothing is interpolated in the forward pass.

    Args:
        dim: channels of a token.
        heads: number of heads; divides `dim`.
        size: tokens per side of the square that attends to itself (window, or the whole grid).
    """

    offsets: Tensor

    def __init__(self, dim: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, dim // heads))
        # Row i, column j: where the table holds the offset i - j.
        steps = torch.arange(size)
        self.register_buffer("offsets", steps[:, None] - steps[None, :] + size - 1, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, size, size, dim] to tokens of the same shape."""
        batch, height, width, dim = x.shape
        tokens = height * width
        q = self.q_proj(x).view(batch, tokens, self.heads, -1).transpose(1, 2).reshape(batch * self.heads, tokens, -1)
        k = self.k_proj(x).view(batch, tokens, self.heads, -1).transpose(1, 2).reshape(batch * self.heads, tokens, -1)
        v = self.v_proj(x).view(batch, tokens, self.heads, -1).transpose(1, 2).reshape(batch * self.heads, tokens, -1)

        by_row = torch.einsum("bhwc,hkc->bhwk", q.view(-1, height, width, q.shape[-1]), self.rel_pos_h[self.offsets])
        by_column = torch.einsum("bhwc,wkc->bhwk", q.view(-1, height, width, q.shape[-1]), self.rel_pos_w[self.offsets])
        position = (by_row[..., :, None] + by_column[..., None, :]).reshape(-1, tokens, tokens)

        weights = torch.baddbmm(position, q, k.transpose(1, 2), alpha=self.scale).softmax(dim=-1)
        out = (weights @ v).view(batch, self.heads, tokens, -1).transpose(1, 2).reshape(batch, height, width, dim)
        return self.proj(out)  # type: ignore[no-any-return]
