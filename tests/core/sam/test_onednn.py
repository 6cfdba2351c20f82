"""What oneDNN computes in bf16: the values and gradients of plain layers."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from fedsam_core.sam.attention import SplitAttention, _Folded, folded, written_out
from fedsam_core.sam.casting import frozen_in
from fedsam_core.sam.onednn import multiplies_bf16, softmax_

if not multiplies_bf16():
    pytest.skip("NOT CHECKED: oneDNN's functions, as this CPU has no unit for bf16", allow_module_level=True)


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


class Layers(nn.Module):
    """Two linear layers, the first of which LoRA adapts."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.adapted, self.last = nn.Linear(24, 40), nn.Linear(40, 8)
        config = {"r": 4, "lora_alpha": 6, "target_modules": ["adapted"], "init_lora_weights": False} | config
        inject_adapter_in_model(LoraConfig(**config), self, "default")
        self.adapted.cast_input_dtype_enabled = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.adapted(x))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients, by name, of a batch and of what is trained."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    found = {"y": y.detach().float(), "x": x.grad}
    return found | {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("resting", [None, "lora_A", "lora_B"])
def test_what_lora_adds_in_place_is_what_peft_adds(resting: str | None) -> None:
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(2, 3, 5, 24)
    if resting:
        getattr(model.adapted, resting)["default"].weight.requires_grad_(False)
    exact = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(model, x)
    with autocast(model):
        assert "forward" in vars(model.adapted)
        found = gradients(model, x)
    assert "forward" not in vars(model.adapted)
    assert found.keys() == plain.keys() == exact.keys()
    assert ("adapted.lora_A.default.weight" in found) == (resting != "lora_A")
    for name, value in found.items():
        other, true = plain[name], exact[name]
        assert (value.dtype, value.shape, value.stride()) == (other.dtype, other.shape, other.stride())
        assert (value - true).norm() < 1.2 * (other - true).norm() < 0.02 * true.norm(), name


def test_the_first_layers_input_gets_no_gradient_and_lora_does() -> None:
    model = Layers()
    with autocast(model):
        model(torch.randn(6, 24)).sum().backward()
        assert vars(model.adapted)["forward"].__self__.base._transposed is None
    assert model.adapted.lora_A["default"].weight.grad is not None


@pytest.mark.parametrize("case", ["dora", "dropout", "bias", "merged", "disabled", "two", "elsewhere", "hook"])
def test_lora_that_does_more_is_left_to_peft(case: str) -> None:
    torch.manual_seed(0)
    options = {"dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.5}, "bias": {"lora_bias": True}}
    model = Layers(**options.get(case, {}))
    layer: Any = model.adapted
    if case == "merged":
        layer.merge()
    elif case == "disabled":
        layer.enable_adapters(False)
    elif case == "two":
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["adapted"]), model, "other")
        layer.set_adapter(["default", "other"])
    elif case == "elsewhere":
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["last"]), model, "other")
        layer.set_adapter("other")
    elif case == "hook":
        layer.lora_A["default"].register_forward_hook(lambda module, inputs, output: 2 * output)
    with autocast(model):
        assert "forward" not in vars(layer)


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 12, 196, 196), (5, 400, 1000), (3, 600_000), (1, 1)])
def test_softmax_is_as_exact_as_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    scores = 4 * torch.randn(shape).bfloat16()
    plain, exact = scores.softmax(-1), scores.float().softmax(-1)
    found = softmax_(scores)
    assert found.data_ptr() == scores.data_ptr()
    assert (found.dtype, found.shape, found.stride()) == (plain.dtype, plain.shape, plain.stride())
    assert (found - exact).abs().max() <= 1.1 * (plain - exact).abs().max() < 0.02


def grads(function: Any, *inputs: Tensor) -> list[Tensor | None]:
    """Output, and gradients of those that want one."""
    inputs = tuple(one.detach().clone().requires_grad_(one.requires_grad) for one in inputs)
    out = function(*inputs)
    if out.requires_grad:
        (out.float() ** 3).sum().backward()
    return [out.detach(), *(one.grad for one in inputs)]


@pytest.mark.parametrize("wanted", ["qkv", "qv", "k", "v", ""])
def test_attentions_backward_pass_as_it_is_written_out(wanted: str) -> None:
    torch.manual_seed(0)
    layer = SplitAttention(48, 3, 5)
    for table in (layer.rel_pos_h, layer.rel_pos_w):
        nn.init.normal_(table)
    rows, columns = layer.rel_pos_h[layer.offsets].detach(), layer.rel_pos_w[layer.offsets].detach()
    exact_inputs = [torch.randn(2, 5, 5, 3, 16).bfloat16().float().requires_grad_(name in wanted) for name in "qkv"]
    inputs = [one.bfloat16() for one in exact_inputs]

    def autograds(*qkv: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=qkv[0].dtype is torch.bfloat16):
            return folded(*qkv, rows, columns, layer.places.to(qkv[0].dtype), layer.scale)

    def by_hand(*qkv: Tensor) -> Tensor:
        assert written_out(qkv[0], rows, columns)
        tables = ((one / layer.scale).bfloat16() for one in (rows, columns))
        result: Tensor = _Folded.apply(*qkv, *tables, layer.places.bfloat16(), layer.scale)
        return result

    exact, plain, found = grads(autograds, *exact_inputs), grads(autograds, *inputs), grads(by_hand, *inputs)
    for one, other, true in zip(found, plain, exact, strict=True):
        assert (one is None) == (other is None) == (true is None)
        if one is not None and other is not None and true is not None:
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert (one - true).norm() < 1.2 * (other - true).norm() < 0.05 * true.norm()


def test_attention_whose_tables_are_trained_is_left_to_autograd() -> None:
    layer, q = SplitAttention(16, 2, 3), torch.randn(1, 3, 3, 2, 8)
    assert not written_out(q.bfloat16(), layer.rel_pos_h, layer.rel_pos_w)
    with torch.no_grad():
        assert written_out(q.bfloat16(), layer.rel_pos_h, layer.rel_pos_w)
        assert not written_out(q, layer.rel_pos_h, layer.rel_pos_w)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, 3, 3, 16)).sum().backward()
    assert layer.rel_pos_h.grad is not None
