"""Frozen linear layers in oneDNN's order: the products and gradients of plain ones."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from fedsam_core.sam.casting import frozen_in, multiplies_bf16

if not multiplies_bf16():
    pytest.skip("NOT CHECKED: packed weights, as this CPU has no unit for bf16", allow_module_level=True)


@contextmanager
def autocast(model: nn.Module):
    with torch.autocast("cpu", torch.bfloat16), frozen_in(model, torch.bfloat16, pack=True):
        yield


def passed(model: nn.Module, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What the model makes of x, and the gradient that x gets."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(weights.to(y.dtype).expand_as(y))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("before", "after"), [(48, 96), (96, 48), (7, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_gives_what_autocast_gives(bias: bool, before: int, after: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(before, after, bias=bias).requires_grad_(False)
    x, weights = torch.randn(2, 5, 5, before, dtype=dtype), torch.randn(after)  # an expanded gradient is not contiguous
    exact = passed(layer, x.float(), weights)
    with torch.autocast("cpu", torch.bfloat16):
        plain = passed(layer, x, weights)
    with autocast(layer):
        assert "forward" in vars(layer)
        found = passed(layer, x, weights)
    for one, other, true in zip(found, plain, exact, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one.float(), true, rtol=2e-2, atol=2e-2)


def test_only_frozen_layers_are_packed_and_none_is_left_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight.requires_grad_(False)
    held: list[torch.dtype] = []
    packed: list[bool] = []

    def fail() -> None:
        with frozen_in(model, torch.bfloat16, pack=True):
            held.extend(layer.weight.dtype for layer in model)
            packed.extend("forward" in vars(layer) for layer in model)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert packed == [True, False, False]
    assert held == [torch.float32, torch.float32, torch.bfloat16]
    assert not any("forward" in vars(layer) for layer in model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with frozen_in(model, None, pack=True):
        assert not any("forward" in vars(layer) for layer in model)


def test_a_packed_layer_is_left_alone_by_whoever_comes_after() -> None:
    layer = nn.Linear(8, 8).requires_grad_(False)
    with frozen_in(layer, torch.bfloat16, pack=True):
        outer = vars(layer)["forward"]
        with frozen_in(layer, torch.bfloat16, pack=True):
            assert vars(layer)["forward"] == outer
        assert vars(layer)["forward"] == outer
    assert "forward" not in vars(layer)


def test_a_torch_without_the_operations_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    layer = nn.Linear(8, 8).requires_grad_(False)
    with frozen_in(layer, torch.bfloat16, pack=True):
        assert "forward" not in vars(layer)
        assert layer.weight.dtype is torch.bfloat16


def test_a_gradients_gradient_is_refused() -> None:
    layer = nn.Linear(8, 8).requires_grad_(False)
    x = torch.ones(1, 8, requires_grad=True)
    with frozen_in(layer, torch.bfloat16, pack=True):
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_a_layer_whose_input_needs_no_gradient_is_packed_for_one_direction() -> None:
    layer = nn.Linear(8, 8).requires_grad_(False)
    with frozen_in(layer, torch.bfloat16, pack=True):
        layer(torch.ones(1, 8))
        packed = vars(layer)["forward"].__self__
        assert packed._packed is not None
        assert packed._transposed is None


def test_weights_that_change_between_two_times_are_packed_anew() -> None:
    layer = nn.Linear(4, 4, bias=False).requires_grad_(False)
    for value in (1.0, 3.0):
        layer.weight.fill_(value)
        with frozen_in(layer, torch.bfloat16, pack=True):
            assert torch.equal(layer(torch.ones(1, 4)), torch.full((1, 4), 4 * value, dtype=torch.bfloat16))
