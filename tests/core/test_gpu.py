"""On a GPU (`make gpu-check`): what is computed there is what a CPU computes, to the arithmetic's tolerance."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.federations import small_cohort
from torch import Tensor

from fedsam_core.data.slices import CPU, SliceConfig, SliceDataset
from fedsam_core.estimates import training_memory
from fedsam_core.evaluation.inference import predict_volume, segment_scan
from fedsam_core.learning.config import LearningConfig
from fedsam_core.learning.device import autocast_dtype, pick_device
from fedsam_core.learning.learner import Assignment, Fit, Learner
from fedsam_core.pretraining.scenes import draw_scenes
from fedsam_core.pretraining.trainer import PretrainConfig, Pretraining
from fedsam_core.sam.adapters import adapt, shared_state
from fedsam_core.sam.attention import SplitAttention
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.selection import preset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="make gpu-check runs it, on a machine with a GPU")


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return pick_device()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    prepared = small_cohort(tmp_path_factory.mktemp("cohort"))
    return [prepared.load(case.id) for case in prepared.cohort.select("site-a", "train")]


def learner(cases: list[Any], device: torch.device, selection: str = "flap", **settings: Any) -> Learner:
    model, chosen = ModelConfig(backbone="vit_t", image_size=64), preset(selection, rank=2)
    segmenter = build_segmenter(model, 2, chosen, seed=0)
    slices = SliceConfig(augment=settings.pop("augment", True))
    config = LearningConfig(**{"local_steps": 4, "batch_size": 4, "precision": "fp32", **settings})
    return Learner("site-a", segmenter, adapt(segmenter, chosen), SliceDataset(cases, 64, slices), config, device)


def fit(site: Learner) -> Fit:
    return site.fit(shared_state(site.segmenter, site.manifest), 1, 4, 7)


def apart(found: Any, expected: Any) -> float:
    """Norm of the difference over the norm of what is expected."""
    found, expected = (np.asarray(one, np.float64) for one in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("size", [4, 14])
def test_attention_is_the_processors(gpu: torch.device, size: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    layer = SplitAttention(96, 3, size)
    torch.nn.init.normal_(layer.rel_pos_h, std=0.1)
    torch.nn.init.normal_(layer.rel_pos_w, std=0.1)
    x = torch.randn(2, size, size, 96)

    def both(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        own, into = layer.to(device).double() if dtype is torch.float64 else layer.float().to(device), x.to(device)
        into = into.to(torch.float64 if dtype is torch.float64 else torch.float32).detach().requires_grad_()
        own.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            out = own(into)
        out.float().pow(2).sum().backward()
        grads = into.grad, own.v_proj.weight.grad, own.q_proj.weight.grad
        return [one.detach().double().cpu() for one in (out, *grads)]

    expected = both(CPU, torch.float64)
    for found, wanted in zip(both(gpu, dtype), expected, strict=True):
        assert apart(found, wanted) < tolerance


def test_samples_are_the_processors_but_for_the_noise(cases: list[Any], gpu: torch.device) -> None:
    for settings in ({"augment": False}, {"noise": 0.0}):
        data = SliceDataset(cases, 64, SliceConfig(**settings))
        images, labels = data.batch(range(8), seed=3, train=True)
        found, masks = data.batch(range(8), seed=3, train=True, device=gpu)
        assert found.device == masks.device == gpu
        assert (found.dtype, masks.dtype) == (images.dtype, labels.dtype)
        assert (found.cpu() - images).abs().max() < (1e-4 if "noise" in settings else 1e-12)
        assert (masks.cpu() == labels).float().mean() > 0.999
    data = SliceDataset(cases, 64, SliceConfig())
    noisy, again = (data.batch(range(8), seed=3, train=True, device=gpu)[0] for _ in range(2))
    assert torch.equal(noisy, again)
    assert torch.equal(noisy[2:5], data.batch([2, 3, 4], seed=3, train=True, device=gpu)[0])
    assert not torch.equal(noisy, found)


@pytest.mark.parametrize("selection", ["flap", "decoder", "full"])
def test_a_round_of_training_is_the_processors(cases: list[Any], gpu: torch.device, selection: str) -> None:
    on_cpu, on_gpu = (fit(learner(cases, device, selection, augment=False)) for device in (CPU, gpu))
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-3)
    assert apart(on_gpu.update, on_cpu.update) < 0.1  # AdamW's first steps are signs: a gradient near 0 has either


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"cache_views": 2}, {"checkpointing": True}])
def test_a_round_is_repeated_bit_for_bit(cases: list[Any], gpu: torch.device, settings: dict[str, Any]) -> None:
    for selection in ("flap", "decoder"):
        first, again = (fit(learner(cases, gpu, selection, **settings)) for _ in range(2))
        assert np.array_equal(first.update, again.update), selection


@pytest.mark.parametrize("switch", [{"cache_views": 1}, {"checkpointing": True}])
@pytest.mark.parametrize("selection", ["flap", "decoder"])
def test_every_switch_gives_the_same_update(
    cases: list[Any], gpu: torch.device, selection: str, switch: dict[str, Any]
) -> None:
    plain, found = (fit(learner(cases, gpu, selection, augment=False, **one)) for one in ({}, switch))
    assert apart(found.update, plain.update) < 1e-2


def test_the_optimizer_goes_on_where_it_was(cases: list[Any], gpu: torch.device) -> None:
    for optimizer in ("adamw", "sgd"):
        site = learner(cases, gpu, keep_optimizer=True, optimizer=optimizer, momentum=0.9 if optimizer == "sgd" else 0)
        state = shared_state(site.segmenter, site.manifest)
        first = site.fit(state, 1, 4, 7)
        assert all(isinstance(value, np.ndarray) for value in first.kept.values())
        second = site.fit(state, 2, 4, 7, Assignment(kept=first.kept))
        control = Assignment(control=np.zeros(site.manifest.shared_size, np.float32))
        third = site.fit(state, 3, 4, 7, control)
        assert np.isfinite(second.update).all()
        assert third.control is not None


def test_a_scan_gets_the_processors_labels(cases: list[Any], gpu: torch.device) -> None:
    chosen = preset("flap", rank=2)
    segmenter = build_segmenter(ModelConfig(backbone="vit_t", image_size=64), 2, chosen, seed=0)
    adapt(segmenter, chosen)
    options: tuple[Any, ...] = (SliceConfig(), 64, 4)
    for function in (predict_volume, segment_scan):
        whole: Callable[..., Any] = function
        on_cpu = whole(segmenter.cpu(), cases[0], *options)
        on_gpu = whole(segmenter.to(gpu), cases[0], *options)
        assert on_gpu.dtype == on_cpu.dtype
        assert on_gpu.shape == on_cpu.shape
        if whole is predict_volume:
            np.testing.assert_allclose(on_gpu, on_cpu, atol=1e-4)
        else:
            assert (on_gpu == on_cpu).mean() > 0.999


def test_bf16_is_taken_where_the_gpu_has_it(gpu: torch.device) -> None:
    native = torch.cuda.get_device_capability(gpu) >= (8, 0)
    assert autocast_dtype("auto", gpu) is (torch.bfloat16 if native else None)


def test_pretraining_goes_on(gpu: torch.device, tmp_path: Path) -> None:
    assert torch.equal(*(draw_scenes(0, 1, 4, 64, gpu).images for _ in range(2)))
    config = PretrainConfig(steps=4, sizes={64: 1.0}, batch_pixels=2 * 64 * 64, warmup=1)
    begun, resumed = (Pretraining(config, gpu) for _ in range(2))
    for _ in range(2):
        begun.advance()
    begun.save(tmp_path / "checkpoint.pt")
    resumed.load(tmp_path / "checkpoint.pt")
    # Sums of its backward pass are taken in any order: no two runs on a GPU are equal to the last bit.
    assert resumed.advance().loss == pytest.approx(begun.advance().loss, rel=1e-3)
    assert resumed.advance().loss == pytest.approx(begun.advance().loss, rel=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_takes_the_memory_that_was_estimated(
    cases: list[Any], gpu: torch.device, precision: Any, checkpointing: bool
) -> None:
    model, chosen = ModelConfig(backbone="vit_b", image_size=224), preset("flap", rank=8)
    learning = LearningConfig(local_steps=2, batch_size=8, precision=precision, checkpointing=checkpointing)
    need = training_memory(model, 2, chosen, learning)
    segmenter = build_segmenter(model, 2, chosen, seed=0)
    manifest = adapt(segmenter, chosen)
    data = SliceDataset(cases, 224, SliceConfig())
    site = Learner("site-a", segmenter, manifest, data, learning, gpu)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - sum(p.nbytes for p in segmenter.parameters())
    site.fit(shared_state(segmenter, manifest), 1, 1, 0)
    taken, reserved = torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved()
    print(f"{precision} {checkpointing}: {taken / 2**30:.2f} GiB taken, {reserved / 2**30:.2f} reserved; {need}")
    assert taken < need.most if precision == "fp32" else taken < need.least * 1.05
