"""SAM's encoder attention with q, k and v as layers of their own, so that LoRA can adapt each by itself."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedsam_core.sam import onednn


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
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))  # once, not by each of the projections
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        rows, columns, places = self.rel_pos_h[self.offsets], self.rel_pos_w[self.offsets], self.places.to(q.dtype)
        if written_out(q, rows, columns):
            tables = ((table / self.scale).to(q.dtype) for table in (rows, columns))
            out = _Folded.apply(q, k, v, *tables, places, self.scale)
        else:
            out = folded(q, k, v, rows, columns, places, self.scale)
        return self.proj(out)  # type: ignore[no-any-return]


def folded(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, places: Tensor, scale: float) -> Tensor:
    """Attention with positions in one product.

    Args:
        q, k, v: [B, h, w, heads, c].
        rows, columns: of each offset, [h, h, c] and [w, w, c].
        places: [h w, h + w].
        scale: of q k.

    Returns:
        [B, h, w, heads c].
    """
    batch, height, width, heads, _ = q.shape
    q = q.permute(0, 3, 1, 2, 4)
    # As torch.einsum("bnhwc,hkc->bnhwk", q, rows) would, whose own way to bring h to the front takes much longer.
    by_row = _products(q.movedim(2, 0), rows).movedim(0, 2)
    by_column = _products(q.movedim(3, 0), columns).movedim(0, 3)
    query = torch.cat([q * scale, by_row, by_column], dim=-1).flatten(2, 3)
    key = torch.cat([_by_head(k), places.expand(batch, heads, -1, -1)], dim=-1)
    out = attend(query, key, _by_head(v))
    return out.transpose(1, 2).reshape(batch, height, width, -1)


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


def written_out(q: Tensor, rows: Tensor, columns: Tensor) -> bool:
    """Whether `_Folded` takes the place of `folded`: in bf16 on a CPU for it, where no gradient of a table is asked."""
    learned = torch.is_grad_enabled() and (rows.requires_grad or columns.requires_grad)
    return q.dtype is torch.bfloat16 and q.is_cpu and onednn.multiplies_bf16() and not learned


class _Folded(torch.autograd.Function):
    """`folded` with its backward pass written out: less is copied, scaled and added, and softmax is oneDNN's.

    The scale goes into the product of longer vectors, so that the tables, which get no gradient, come divided by it.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, places: Tensor, scale: float
    ) -> Tensor:
        batch, height, width, heads, channels = q.shape
        query = q.new_empty(batch, heads, height, width, channels + height + width)
        to_q, to_row, to_column = torch.split(query, [channels, height, width], dim=-1)
        to_q.copy_(q.permute(0, 3, 1, 2, 4))
        to_row.copy_(_products(q.movedim(1, 0), rows).permute(1, 3, 0, 2, 4))
        to_column.copy_(_products(q.movedim(2, 0), columns).permute(1, 3, 2, 0, 4))
        key = torch.cat([_by_head(k), places.expand(batch, heads, -1, -1)], dim=-1).flatten(0, 1)
        query, value = query.flatten(0, 1).flatten(1, 2), _by_head(v).flatten(0, 1)
        shares = onednn.softmax_(_scaled(query, key.transpose(1, 2), scale))
        ctx.save_for_backward(query, key, value, shares, rows, columns)
        ctx.shape, ctx.scale = q.shape, scale
        return _by_token(shares @ value, q.shape).flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, shares, rows, columns = ctx.saved_tensors
        _, height, width, _, channels = ctx.shape
        gradient = _by_head(gradient.reshape(ctx.shape)).flatten(0, 1)
        to_q = to_k = to_v = None
        if ctx.needs_input_grad[2]:
            to_v = _by_token(shares.transpose(1, 2) @ gradient, ctx.shape)
        if any(ctx.needs_input_grad[:2]):
            to_shares = gradient @ value.transpose(1, 2)
            to_scores = torch._softmax_backward_data(to_shares, shares, -1, shares.dtype)
        if ctx.needs_input_grad[1]:
            to_k = _by_token(_scaled(to_scores.transpose(1, 2), query[..., :channels], ctx.scale), ctx.shape)
        if ctx.needs_input_grad[0]:
            to_query = _by_token(_scaled(to_scores, key, ctx.scale), ctx.shape)
            direct, by_row, by_column = torch.split(to_query, [channels, height, width], dim=-1)
            to_q = direct.contiguous()
            to_q += _products(by_row.movedim(1, 0), rows.transpose(1, 2)).movedim(0, 1)
            to_q += _products(by_column.movedim(2, 0), columns.transpose(1, 2)).movedim(0, 2)
        return to_q, to_k, to_v, None, None, None, None


def _by_head(x: Tensor) -> Tensor:
    """[B, h, w, heads, c] to [B, heads, h w, c]."""
    return x.flatten(1, 2).transpose(1, 2)


def _by_token(x: Tensor, shape: torch.Size) -> Tensor:
    """[B heads, h w, n] to [B, h, w, heads, n], where the first four are those of the shape."""
    batch, height, width, heads, _ = shape
    return x.view(batch, heads, height, width, -1).permute(0, 2, 3, 1, 4)


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Scale times the product of [N, i, j] and [N, j, k]; what beta weighs, here with nothing, has to be given."""
    return torch.baddbmm(left.new_zeros(1), left, right, beta=0, alpha=scale)
