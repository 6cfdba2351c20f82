"""Frozen weights in the dtype and the order that they are multiplied in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


@contextmanager
def frozen_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, linear and convolution layers hold their frozen parameters in `dtype`; afterwards what they held before.

    Autocast would bring them to it anew in every step, to the same values: it keeps the casts of trained parameters
    only. On a CPU that multiplies bf16 natively, frozen linear layers are packed too: in the blocks that oneDNN reads,
    which it would else bring them into for every product, and with the bias added inside of it. Costs the memory of the
    copies: half the frozen weights, and as much again for the backward pass of packed ones. Not for two threads at once
    on one model.

    Args:
        model: its trained parameters, norms, tables and tokens are left alone.
        dtype: of the forward pass's autocast; None, for fp32, does nothing.
    """
    if dtype is None:
        yield
        return
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    packed = [layer for layer in layers if _can_be_packed(layer, dtype)]
    others = [layer for layer in layers if layer not in packed]
    frozen = [one for layer in others for one in layer.parameters(recurse=False) if not one.requires_grad]
    before = [parameter.data for parameter in frozen]
    try:
        for parameter, data in zip(frozen, before, strict=True):
            parameter.data = data.to(dtype)
        for layer in packed:
            layer.forward = _Packed(layer).forward  # type: ignore[method-assign]
        yield
    finally:
        for layer in packed:
            layer.__dict__.pop("forward", None)
        for parameter, data in zip(frozen, before, strict=True):
            parameter.data = data


def multiplies_bf16() -> bool:
    """Whether the CPU has a unit for products in bf16 (AMX or AVX512-BF16), so that they are no slower than in fp32."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _can_be_packed(layer: nn.Module, dtype: torch.dtype) -> TypeGuard[nn.Linear]:
    """Whether it is a frozen linear layer, as torch has it, for a CPU's bf16 products."""
    return (
        type(layer) is nn.Linear
        and dtype is torch.bfloat16
        and not any(one.requires_grad or one.device.type != "cpu" for one in layer.parameters())
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and multiplies_bf16()
    )


class _Packed:
    """The weights of a frozen linear layer in the order of oneDNN: of each direction, once it is asked for.

    torch has no public name for these two operations; its own compiler calls them.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.weight = layer.weight.data
        self.bias = None if layer.bias is None else layer.bias.data.to(torch.bfloat16)
        self._packed: Tensor | None = None
        self._transposed: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """The layer's forward pass, as autocast would have it: [..., in] to bf16 [..., out]."""
        product: Tensor = _Product.apply(input.to(torch.bfloat16), self)
        return product

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b: bf16 [..., in] to [..., out]."""
        if self._packed is None:
            self._packed = _reordered(self.weight)
        return _multiplied(x, self._packed, self.bias)

    def transposed_product(self, gradient: Tensor) -> Tensor:
        """g W, what x gets of the product's gradient: bf16 [..., out] to [..., in]."""
        if self._transposed is None:
            self._transposed = _reordered(self.weight.T)
        return _multiplied(gradient.contiguous(), self._transposed, None)


def _reordered(weight: Tensor) -> Tensor:
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.to(torch.bfloat16).contiguous())
    return made


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


class _Product(torch.autograd.Function):
    """Autograd's view of `_Packed`: nothing has to be kept for the backward pass, as only x gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: _Packed) -> Tensor:
        ctx.packed = packed
        return packed.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.packed.transposed_product(gradient), None
