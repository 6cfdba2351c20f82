"""Frozen weights in the dtype and the order that they are multiplied in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@contextmanager
def frozen_in(model: nn.Module, dtype: torch.dtype | None, pack: bool = False) -> Iterator[None]:
    """Inside, linear and convolution layers have their frozen parameters in `dtype`; afterwards all is as before.

    Autocast would bring them to it anew in every step, to the same values: it keeps the casts of trained parameters
    only. Costs the memory of the copies, half the frozen weights. Not for two threads at once on one model.

    Args:
        model: its trained parameters, norms, tables and tokens are left alone.
        dtype: of the forward pass's autocast, which is on while the model is called; None, for fp32, does nothing.
        pack: frozen linear layers are packed instead, on a CPU that multiplies bf16 natively: into the blocks that
            oneDNN reads, which it would else make for every product, and with the bias added inside of the product.
            Each layer pays for it when it is first called, and once more in its first backward pass, which has a copy
            of its own: it is worth it from some dozen steps on.
    """
    if dtype is None:
        yield
        return
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    packed = [layer for layer in layers if _can_be_packed(layer)] if pack and _packs(dtype) else []
    others = set(layers).difference(packed)
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


def _packs(dtype: torch.dtype) -> bool:
    """Whether this CPU and this torch have products of packed weights in the dtype."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return dtype is torch.bfloat16 and multiplies_bf16() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _can_be_packed(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a frozen linear layer, as torch has it, on a CPU."""
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and not any(one.requires_grad or one.device.type != "cpu" for one in layer.parameters())
    )


class _Packed:
    """The weights of a frozen linear layer in the order of oneDNN: of each direction, once it is asked for.

    torch has no public name for the two operations, which its own compiler calls: without them nothing is packed.
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
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.packed.transposed_product(gradient), None
