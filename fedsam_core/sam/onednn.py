"""bf16 on a CPU: whether it multiplies it natively, and oneDNN's functions for it that torch's layers do not call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_PIECE = 2**19  # values of bf16: 1 MiB


def multiplies_bf16() -> bool:
    """Whether the CPU has a unit for products in bf16 (AMX or AVX512-BF16), and oneDNN to use it: as fast as fp32."""
    has_unit = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return bool(has_unit and torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@contextmanager
def packed(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Inside, the model's frozen linear layers hold their weights in bf16 and in the blocks that oneDNN reads.

    torch would make these blocks anew for every product. The bias is added inside of the product, and what LoRA adds to
    a frozen layer is added in place, to its outputs and to the gradient of its inputs.

    Each layer pays for the packing when it is first called, and once more in its first backward pass, which has a copy
    of its own: it is worth it from some dozen steps on. Where the CPU has no unit for bf16, and with a torch that lacks
    the two operations, nothing is done. Layers whose `forward` others have replaced are left alone. With gradient
    checkpointing the backward pass belongs inside too, as it calls the layers again.

    Yields:
        the linear layers that are packed.
    """
    modules = list(model.modules()) if _packs() else []
    layers = {module for module in modules if _can_be_packed(module)}
    adapted = [module for module in modules if _adds_in_place(module) and module.base_layer in layers]
    try:
        for layer in layers:
            layer.forward = _Packed(layer).forward  # type: ignore[method-assign]
        for adapter in adapted:
            adapter.forward = _Adapted(adapter).forward  # type: ignore[method-assign]
        yield set(layers)
    finally:
        for module in (*layers, *adapted):
            module.__dict__.pop("forward", None)


def softmax_(scores: Tensor) -> Tensor:
    """Of contiguous bf16 [..., T] over the last axis, in place, without a gradient.

    Takes 0.6 of the time of torch's own function at T = 196, 0.9 from 1,024 on. oneDNN's wants tensors of its layout:
    copies of pieces stay in the processor's cache, and no second matrix of that size is needed.
    """
    rows = scores.view(-1, scores.shape[-1])
    for piece in torch.split(rows, max(1, _PIECE // scores.shape[-1])):
        piece.copy_(piece.to_mkldnn().softmax(dim=-1).to_dense())
    return scores


def _packs() -> bool:
    """Whether this CPU and this torch have products of packed weights."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return multiplies_bf16() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _can_be_packed(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a frozen linear layer, as torch has it, on a CPU."""
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and not any(one.requires_grad or one.device.type != "cpu" for one in layer.parameters())
    )


def _adds_in_place(layer: nn.Module) -> TypeGuard[LoraLinear]:
    """Whether it is PEFT's layer with one LoRA that is y + scaling B A x and no more, as `adapt` puts it there.

    Hooks of its parts, which would not be called, are more: lora.scale is one.
    """
    if type(layer) is not LoraLinear or "forward" in vars(layer) or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A:
        return False
    parts = (layer.base_layer, layer.lora_A[name], layer.lora_B[name])
    return not (
        layer.merged
        or layer.disable_adapters
        or name in layer.lora_variant
        or layer.lora_bias[name]
        or not isinstance(layer.lora_dropout[name], nn.Identity)
        or any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    )


class _Packed:
    """The weights of a frozen linear layer in the order of oneDNN: of each direction, once it is asked for.

    torch has no public name for the two operations, which its own compiler calls.
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
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.to(torch.bfloat16))
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


class _Adapted:
    """PEFT's layer, whose frozen one is packed: its forward pass as autocast would have it."""

    def __init__(self, layer: LoraLinear) -> None:
        (name,) = layer.active_adapters
        self.base: _Packed = vars(layer.base_layer)["forward"].__self__
        self.down, self.up = (layer.get_parameter(f"{factor}.{name}.weight") for factor in ("lora_A", "lora_B"))
        self.scaling: float = layer.scaling[name]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to bf16 [..., out]."""
        operands = [one.to(torch.bfloat16).contiguous() for one in (x, self.down, self.up)]
        product: Tensor = _AdaptedProduct.apply(*operands, self.base, self.scaling)
        return product


class _AdaptedProduct(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T, with W and b frozen: bf16 [..., in] to [..., out], A [rank, in], B [out, rank]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, base: _Packed, scaling: float) -> Tensor:
        narrow = _rows(x) @ down.T
        ctx.save_for_backward(x, down, up, narrow)
        ctx.base, ctx.scaling = base, scaling
        y = base.product(x)
        _rows(y).addmm_(narrow, up.T, alpha=scaling)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, down, up, narrow = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_x = to_down = to_up = None
        if any(ctx.needs_input_grad[:2]):
            to_narrow = (_rows(gradient) @ up).mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            to_x = ctx.base.transposed_product(gradient)
            _rows(to_x).addmm_(to_narrow, down)
        if ctx.needs_input_grad[1]:
            to_down = to_narrow.T @ _rows(x)
        if ctx.needs_input_grad[2]:
            to_up = (_rows(gradient).T @ narrow).mul_(ctx.scaling)
        return to_x, to_down, to_up, None, None


def _rows(x: Tensor) -> Tensor:
    """Contiguous [..., n] as [N, n], on the same memory."""
    return x.view(-1, x.shape[-1])
