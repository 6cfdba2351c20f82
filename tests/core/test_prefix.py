"""What makes training faster changes nothing that it computes: cached activations, checkpointing, weights cast once."""

import logging
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from support.federations import small_cohort

from fedsam_core.data.slices import SliceConfig, SliceDataset
from fedsam_core.learning.config import LearningConfig
from fedsam_core.learning.learner import Fit, Learner
from fedsam_core.sam import onednn
from fedsam_core.sam.adapters import adapt, shared_state
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.sam.casting import frozen_in
from fedsam_core.selection import LayerSelection, preset

LAST = LayerSelection.model_validate(
    {"name": "last", "lora": {"encoder": ["q", "v"], "encoder_blocks": [4, 5], "rank": 2}, "train": ["head"]}
)
SELECTIONS = {"last": LAST, "decoder": preset("decoder"), "flap": preset("flap", rank=2), "full": preset("full")}
# Stages before the first trained one: patches, six blocks, neck.
STAGES = {"last": 5, "decoder": 8, "flap": 0, "full": 0}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    prepared = small_cohort(tmp_path_factory.mktemp("cohort"))
    return [prepared.load(case.id) for case in prepared.cohort.select("site-a", "train")][:1]


def learner(cases: list[Any], selection: str, augment: bool = True, **settings: Any) -> Learner:
    segmenter = build_segmenter(ModelConfig(backbone="vit_t", image_size=32), 2, SELECTIONS[selection], seed=0)
    manifest = adapt(segmenter, SELECTIONS[selection])
    dataset = SliceDataset(cases, 32, SliceConfig(augment=augment))
    config = LearningConfig(**{"local_steps": 3, "batch_size": 4, "precision": "fp32", **settings})
    return Learner("site-a", segmenter, manifest, dataset, config, torch.device("cpu"))


def fit(site: Learner, round_number: int = 1, seed: int = 7) -> Fit:
    """A round from the state that the model was built with."""
    return site.fit(start(site.manifest.selection.name), round_number, 4, seed)


@cache
def start(selection: str) -> dict[str, np.ndarray[Any, Any]]:
    segmenter = build_segmenter(ModelConfig(backbone="vit_t", image_size=32), 2, SELECTIONS[selection], seed=0)
    return shared_state(segmenter, adapt(segmenter, SELECTIONS[selection]))


def counting(site: Learner) -> list[int]:
    """Slices that go through the first block, as they do."""
    seen: list[int] = []
    site.segmenter.image_encoder.blocks[0].register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize("selection", list(SELECTIONS))
def test_every_switch_gives_the_same_update(cases: list[Any], selection: str) -> None:
    plain = fit(learner(cases, selection, augment=False))
    assert np.abs(plain.update).max() > 1e-4
    for switch in ({"cache_views": 1}, {"checkpointing": True}, {"cache_views": 1, "checkpointing": True}):
        site = learner(cases, selection, augment=False, **switch)
        assert site.prefix is None or site.prefix.stages == STAGES[selection]
        found = fit(site)
        # AdamW divides by the gradient's own size, so that its last bits show most where it is nearly zero.
        apart = np.linalg.norm(found.update - plain.update) / np.linalg.norm(plain.update)
        assert apart < 1e-3, switch
        assert found.loss == pytest.approx(plain.loss, rel=1e-4)


def test_frozen_weights_held_in_bf16_give_the_bits_that_autocast_gives(cases: list[Any]) -> None:
    site = learner(cases, "last", precision="bf16")
    images, labels = site.dataset.batch([0, 1, 2], seed=1, train=True)
    held = {name: (value.data_ptr(), value.dtype) for name, value in site.segmenter.named_parameters()}
    gradients = []
    for dtype in (None, torch.bfloat16):
        site.segmenter.zero_grad()
        with frozen_in(site.segmenter, dtype), torch.autocast("cpu", torch.bfloat16):
            logits = site.segmenter(images)
        site.loss(logits.float(), labels[:, None]).backward()
        gradients.append([p.grad for p in site.segmenter.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert held == {name: (value.data_ptr(), value.dtype) for name, value in site.segmenter.named_parameters()}


@pytest.mark.parametrize("selection", ["last", "flap"])
def test_packed_weights_change_no_update(cases: list[Any], selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []
    reordered = onednn._reordered
    monkeypatch.setattr(onednn, "_reordered", lambda weight: made.append(weight.shape) or reordered(weight))
    exact = fit(learner(cases, selection, augment=False)).update
    settings: dict[str, Any] = {"augment": False, "precision": "bf16"}
    switches: list[dict[str, Any]] = [{}, {"checkpointing": True}, {"cache_views": 1}]
    packed = [fit(learner(cases, selection, **settings, **switch)).update for switch in switches]
    assert bool(made) == onednn.multiplies_bf16()
    monkeypatch.setattr(onednn, "multiplies_bf16", lambda: False)
    for update, switch in zip(packed, switches, strict=True):
        plain = fit(learner(cases, selection, **settings, **switch)).update
        # AdamW divides by the gradient's own size: where that is nearly zero, its last bits decide the step's sign.
        assert np.linalg.norm(update - plain) < 0.4 * np.linalg.norm(plain - exact), switch
        assert np.linalg.norm(plain - exact) < 0.2 * np.linalg.norm(exact), switch


@pytest.mark.parametrize("selection", ["last", "flap"])
def test_gradients_of_packed_weights_are_as_near_to_fp32s_as_plain_bf16s(
    cases: list[Any], selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = learner(cases, selection)
    torch.manual_seed(0)
    for name, parameter in site.segmenter.named_parameters():
        if "lora_B" in name:  # zero at the start, and so is the gradient of A
            torch.nn.init.normal_(parameter, std=0.1)
    images, labels = site.dataset.batch([0, 1, 2], seed=1, train=True)

    def gradients(dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        site.segmenter.zero_grad()
        on = torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None)
        with frozen_in(site.segmenter, dtype, pack=True), on:
            logits = site.segmenter(images)
        site.loss(logits.float(), labels[:, None]).backward()
        return {name: p.grad for name, p in site.segmenter.named_parameters() if p.grad is not None}

    exact, packed = gradients(None), gradients(torch.bfloat16)
    monkeypatch.setattr(onednn, "multiplies_bf16", lambda: False)
    plain = gradients(torch.bfloat16)
    assert exact.keys() == packed.keys() == plain.keys()

    def each_apart(found: dict[str, torch.Tensor]) -> list[float]:
        return [float((value - exact[name]).norm() / exact[name].norm()) for name, value in found.items()]

    def apart(found: dict[str, torch.Tensor]) -> float:
        return float(np.median(each_apart(found)))

    assert max(each_apart(packed)) < 0.5
    assert apart(packed) < 2 * apart(plain) < 0.1  # over other draws of B, now one is nearer and now the other


def test_bf16_with_a_cache_stays_close_to_fp32(cases: list[Any]) -> None:
    exact = fit(learner(cases, "decoder", augment=False, optimizer="sgd", learning_rate=0.1))
    site = learner(cases, "decoder", augment=False, optimizer="sgd", learning_rate=0.1, precision="bf16", cache_views=1)
    found = fit(site)
    assert np.linalg.norm(found.update - exact.update) < 0.05 * np.linalg.norm(exact.update)
    assert site.prefix is not None
    assert {entry.activation.dtype for entry in site.prefix._kept.values()} == {torch.bfloat16}


def test_no_view_is_encoded_twice(cases: list[Any]) -> None:
    site = learner(cases, "last", cache_views=2, local_steps=12)
    seen = counting(site)
    fit(site)
    first = sum(seen)
    drawn = len(site.prefix._kept) if site.prefix else 0
    assert first == drawn <= 2 * len(site.dataset)
    for number in (1, 2, 3):
        fit(site, number)
    assert sum(seen) <= 2 * len(site.dataset)
    before = sum(seen)
    fit(site, 3)
    assert sum(seen) == before


def test_a_round_does_not_depend_on_what_is_kept(cases: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    site = learner(cases, "decoder", cache_views=3)
    fit(site, 1)
    second = fit(site, 2)
    restarted = learner(cases, "decoder", cache_views=3)
    assert np.array_equal(fit(restarted, 2).update, second.update)
    with caplog.at_level(logging.WARNING):
        small = learner(cases, "decoder", cache_views=3, cache_gib=20_000 / 2**30)
        fit(small, 1)
        assert np.array_equal(fit(small, 2).update, second.update)
    assert small.prefix is not None
    assert 0 < small.prefix.nbytes <= 20_000
    assert [record.message.count("learning.cache_gib") for record in caplog.records] == [1]


def test_other_weights_or_another_seed_are_noticed(cases: list[Any]) -> None:
    site = learner(cases, "decoder", cache_views=2)
    first = fit(site)
    other = fit(site, seed=8)
    assert not np.array_equal(other.update, first.update)
    assert np.array_equal(fit(learner(cases, "decoder", cache_views=2), seed=8).update, other.update)
    assert np.array_equal(fit(site).update, first.update)
    with torch.no_grad():
        site.segmenter.image_encoder.blocks[2].mlp.lin1.weight.mul_(1.5)
    assert not np.array_equal(fit(site).update, first.update)


def test_all_selections_see_the_same_views(cases: list[Any]) -> None:
    seen = {}
    for selection in ("flap", "full"):
        site = learner(cases, selection, cache_views=2)
        assert site.prefix is not None
        site.prefix.open(3)
        steps = [site.prefix.batch(range(4), seed, train=True)[0] for seed in range(12)]
        seen[selection] = torch.stack(steps)
    assert torch.equal(seen["flap"], seen["full"])
    for slices in seen["flap"].unbind(1):
        assert len(slices.flatten(1).unique(dim=0)) == 2
