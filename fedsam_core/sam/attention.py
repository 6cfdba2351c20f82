"""SAM's encoder attention with q, k and v as layers of their own, so that LoRA can adapt each by itself."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SplitAttention(nn.Module):
    """Multi-head self-attention with decomposed relative positions, equal to `segment_anything`'s encoder attention.

    The official layer computes q, k and v in one fused `qkv` Linear; LoRA on that would share A between them and adapt
    k too. The position tables fit the token grid exactly, so nothing is interpolated in the forward pass.

    Positions cost no pass of their own over the tokens x tokens matrix: what a query's row and column make of every
    row and column of keys is appended to the query, and to each key where it stands, one-hot. One product of the longer
    vectors is then q k + position.

    Args:
        dim: channels of a token.
        heads: number of heads; divides `dim`.
        size: tokens per side of the square that attends to itself (window, or the whole grid).
    """

    offsets: Tensor
    places: Tensor

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
        # Token t stands in row and column: [size * size, 2 size] of zeros and two ones.
        eye = torch.eye(size)
        places = torch.cat([eye.repeat_interleave(size, dim=0), eye.repeat(size, 1)], dim=1)
        self.register_buffer("places", places, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, size, size, dim] to tokens of the same shape."""
        batch, height, width, dim = x.shape
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))  # once, not by each of the projections
        q, k, v = (
            layer(x).view(batch, height, width, self.heads, -1) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = q.permute(0, 3, 1, 2, 4)
        # As torch.einsum("bnhwc,hkc->bnhwk", q, rows) would, whose own way to bring h to the front takes much longer.
        by_row = _products(q.movedim(2, 0), self.rel_pos_h[self.offsets]).movedim(0, 2)
        by_column = _products(q.movedim(3, 0), self.rel_pos_w[self.offsets]).movedim(0, 3)
        query = torch.cat([q * self.scale, by_row, by_column], dim=-1).flatten(2, 3)
        places = self.places.to(k.dtype).expand(batch, self.heads, -1, -1)
        key = torch.cat([k.flatten(1, 2).transpose(1, 2), places], dim=-1)
        out = attend(query, key, v.flatten(1, 2).transpose(1, 2))
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, dim))  # type: ignore[no-any-return]


def _products(vectors: Tensor, tables: Tensor) -> Tensor:
    """Of vectors [h, ..., c], each with every one of the k of its table in [h, k, c]: [h, ..., k]."""
    return (vectors.flatten(1, -2) @ tables.transpose(1, 2)).view(*vectors.shape[:-1], -1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T) value, with query and key [B, heads, T, d] and value [B, heads, T, c]: [B, heads, T, c].

    A GPU has one kernel for it that never holds the T x T matrix (it asks for d a multiple of 8). On a CPU torch's
    kernel of that kind takes twice the time of the two products in bf16: `benchmarks/train.py --attention`.
    """
    if query.is_cuda:
        missing = -query.shape[-1] % 8
        query, key = F.pad(query, (0, missing)), F.pad(key, (0, missing))
        return F.scaled_dot_product_attention(query, key, value, scale=1.0)
    return (query @ key.transpose(2, 3)).softmax(dim=-1) @ value
