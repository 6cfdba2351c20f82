"""LoRA by PEFT: starts at nothing, trains exactly its manifest, travels, is written, loaded and merged."""

import copy
import errno
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

from fedsam_core.errors import CheckpointError, DataError, SelectionError
from fedsam_core.federation.state import weights_hash
from fedsam_core.sam import adapters
from fedsam_core.sam.adapters import (
    adapt,
    has_peft_layout,
    load_adapter,
    load_local_state,
    load_shared_state,
    local_state,
    merge,
    save_adapter,
    shared_state,
)
from fedsam_core.sam.backbones import ModelConfig, build_segmenter, manifest_for
from fedsam_core.sam.segmenter import SamSegmenter
from fedsam_core.selection import PRESETS, LayerSelection, ParameterManifest, preset

MODEL = ModelConfig(backbone="vit_t", image_size=112, checkpoint="random")
RANKS = LayerSelection.model_validate(
    {
        "name": "ranks",
        "lora": {
            "encoder": ["q", "o", "mlp"],
            "decoder": ["k", "v", "o", "mlp"],
            "rank": 4,
            "block_ranks": {1: 2, 5: 8},
        },
        "train": ["encoder.norms", "head"],
    }
)
ALPHA = LayerSelection.model_validate(
    {"name": "alpha", "lora": {"encoder": ["q"], "rank": 4, "alpha": 6, "block_ranks": {1: 2}}, "train": ["head"]}
)
BARE = LayerSelection.model_validate(
    {"name": "bare", "lora": {"encoder": ["q"], "rank": 2}, "train": ["encoder.rel_pos", "head"]}
)
LOCAL = LayerSelection.model_validate(
    {"name": "personal", "lora": {"encoder": ["v"], "rank": 2}, "train": ["head"], "local": ["encoder.norms"]}
)
SCALED = LayerSelection.model_validate(
    {
        "name": "scaled",
        "lora": {"encoder": ["q", "mlp"], "decoder": ["v"], "rank": 4, "alpha": 6, "block_ranks": {1: 2}},
        "train": ["head"],
        "local": ["lora.scale"],
    }
)
ALL = [*(preset(name, 4) for name in PRESETS), RANKS, ALPHA, BARE, LOCAL, SCALED]
IMAGES = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))


def fresh(selection: LayerSelection, seed: int = 1) -> SamSegmenter:
    return build_segmenter(MODEL, 2, selection, seed).eval()


def trained(selection: LayerSelection) -> tuple[SamSegmenter, ParameterManifest]:
    """An adapted segmenter whose trainable values have all moved."""
    segmenter = fresh(selection)
    manifest = adapt(segmenter, selection)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in segmenter.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return segmenter, manifest


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES)


def tell(selection: LayerSelection) -> str:
    return selection.name


@pytest.mark.parametrize("selection", ALL, ids=tell)
def test_adapting_changes_no_logit_and_frees_exactly_the_manifest(selection: LayerSelection) -> None:
    segmenter = fresh(selection)
    before = logits(segmenter)
    state = torch.get_rng_state()
    manifest = adapt(segmenter, selection)
    assert torch.equal(torch.get_rng_state(), state)
    # Not bit for bit: where a weight may get a gradient, torch multiplies by it in another way.
    torch.testing.assert_close(logits(segmenter), before, atol=1e-6, rtol=0)
    assert manifest == manifest_for(MODEL, 2, selection)
    free = {adapters._canonical(n): p for n, p in segmenter.named_parameters() if p.requires_grad}
    entries = (*manifest.shared, *manifest.local)
    assert {name: tuple(p.shape) for name, p in free.items()} == {entry.name: entry.shape for entry in entries}
    assert sum(p.numel() for p in free.values()) == manifest.trainable
    for name in free:
        assert "base_layer" not in name
        assert "default" not in name


@pytest.mark.parametrize("selection", ALL, ids=tell)
def test_folder_gives_the_same_logits_back(selection: LayerSelection, tmp_path: Path) -> None:
    segmenter, manifest = trained(selection)
    expected = logits(segmenter)
    assert (logits(fresh(selection)) - expected).abs().max() > 1e-3
    save_adapter(segmenter, manifest, tmp_path / "adapter", {"dice": 0.5})
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    as_peft = has_peft_layout(segmenter, manifest)
    files = {"adapter_config.json", "adapter_model.safetensors"} if as_peft else {"trained.safetensors"}
    assert names == files | {"manifest.json", "card.json"}
    assert as_peft == (selection.lora is not None and selection.name not in ("bare", "scaled"))
    assert json.loads((tmp_path / "adapter" / "card.json").read_text())["dice"] == 0.5

    again = fresh(selection)
    assert load_adapter(again, tmp_path / "adapter") == manifest
    assert torch.equal(logits(again), expected)
    if as_peft:
        model = peft.PeftModel.from_pretrained(fresh(selection), tmp_path / "adapter").eval()
        torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("selection", [preset("lora", 4), preset("lora-decoder", 4), RANKS, ALPHA, SCALED], ids=tell)
def test_merging_keeps_the_logits_and_removes_lora(selection: LayerSelection) -> None:
    segmenter, _ = trained(selection)
    expected = logits(segmenter)
    assert merge(segmenter) is segmenter
    torch.testing.assert_close(logits(segmenter), expected, atol=1e-5, rtol=1e-5)
    assert segmenter.state_dict().keys() == fresh(selection).state_dict().keys()
    assert not any(isinstance(module, LoraLayer) for module in segmenter.modules())
    assert not any(parameter.requires_grad for parameter in segmenter.parameters())
    assert adapt(segmenter, selection).selection == selection


def test_the_update_is_alpha_over_rank_b_a() -> None:
    segmenter, _ = trained(ALPHA)
    layer = segmenter.image_encoder.blocks[1].attn.q_proj
    plain = fresh(ALPHA).image_encoder.blocks[1].attn.q_proj
    x = torch.randn(3, 192)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (2, 192)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x) + 6 / 2 * (x @ a.T @ b.T))


def scales(segmenter: SamSegmenter) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in segmenter.named_parameters() if name.endswith(".lora_scale")}


def test_lora_scale_multiplies_the_branch_of_its_layer() -> None:
    segmenter, _ = trained(SCALED)
    layer = segmenter.image_encoder.blocks[1].attn.q_proj
    plain = fresh(SCALED).image_encoder.blocks[1].attn.q_proj
    x = torch.randn(3, 192)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        for factor in (1.0, 0.5, -2.0, 0.0):
            layer.lora_scale.fill_(factor)
            torch.testing.assert_close(layer(x), plain(x) + factor * 6 / 2 * (x @ a.T @ b.T))
    layer(x).sum().backward()
    assert layer.lora_scale.grad.shape == (1,)
    torch.testing.assert_close(layer.lora_scale.grad, (6 / 2 * (x @ a.T @ b.T)).sum().detach()[None])


def test_lora_scale_starts_at_one_and_leaves_the_draws_alone() -> None:
    segmenter, plain = fresh(SCALED), fresh(SCALED)
    manifest = adapt(segmenter, SCALED)
    without = adapt(plain, SCALED.model_copy(update={"local": ()}))
    assert len(scales(segmenter)) == len(manifest.local) == 6 * 3 + 7
    assert all(value.tolist() == [1.0] for value in scales(segmenter).values())
    for name, value in shared_state(plain, without).items():
        assert np.array_equal(value, shared_state(segmenter, manifest)[name])
    # A factor of 1 changes no bit: such a site computes what the others do.
    load_shared_state(segmenter, manifest, shared_state(trained(SCALED)[0], manifest))
    load_shared_state(plain, without, shared_state(segmenter, manifest))
    assert torch.equal(logits(segmenter), logits(plain))


def test_lora_scale_is_local_state_and_no_frozen_weight() -> None:
    segmenter, manifest = trained(SCALED)
    other = fresh(SCALED)
    adapt(other, SCALED)
    assert weights_hash(other, manifest) == weights_hash(segmenter, manifest)
    load_shared_state(other, manifest, shared_state(segmenter, manifest))
    assert not torch.allclose(logits(other), logits(segmenter))
    state = local_state(segmenter, manifest)
    assert state.keys() == scales(segmenter).keys()
    load_local_state(other, manifest, state)
    assert torch.equal(logits(other), logits(segmenter))
    assert len({value.item() for value in state.values()}) == len(state)


def test_lora_scale_of_a_copy_is_the_copys_own() -> None:
    segmenter, _ = trained(SCALED)
    before = logits(segmenter)
    other = copy.deepcopy(segmenter)
    assert torch.equal(logits(other), before)
    with torch.no_grad():
        for value in scales(other).values():
            value.zero_()
    assert torch.equal(logits(segmenter), before)
    assert not torch.allclose(logits(other), before)


def test_lora_scale_under_bf16_is_not_rounded_itself() -> None:
    segmenter, _ = trained(SCALED)
    layer = segmenter.image_encoder.blocks[0].attn.q_proj
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(512, 192)
        layer.lora_scale.fill_(1.0)
        plain = layer.lora_A["default"](x)
        layer.lora_scale.fill_(1.003)  # bf16 knows 1 and 1.0078
        scaled = layer.lora_A["default"](x)
    assert plain.dtype == scaled.dtype == torch.bfloat16
    ratio = float(scaled.double().norm() / plain.double().norm())
    assert ratio == pytest.approx(1.003, abs=1e-3)


def test_lora_scale_learns() -> None:
    """Frozen where the shared values are: a site that may only turn its factors still fits better."""
    segmenter, _ = trained(SCALED)
    factors = scales(segmenter)
    labels = (IMAGES[:, 0] > 0.5).long()
    optimizer = torch.optim.SGD(factors.values(), lr=0.1)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(segmenter(IMAGES), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(value.grad is not None and value.grad.abs().item() > 0 for value in factors.values())


def test_shared_and_local_state_travel_apart() -> None:
    segmenter, manifest = trained(LOCAL)
    shared, local = shared_state(segmenter, manifest), local_state(segmenter, manifest)
    assert list(shared) == [entry.name for entry in manifest.shared]
    assert len(local) == 6 * 4
    assert {value.dtype for value in (*shared.values(), *local.values())} == {np.dtype(np.float32)}
    other = fresh(LOCAL)
    adapt(other, LOCAL)
    expected = logits(segmenter)
    for value in shared.values():
        value.setflags(write=False)
    load_shared_state(other, manifest, shared)
    assert not torch.allclose(logits(other), expected)
    load_local_state(other, manifest, local)
    assert torch.equal(logits(other), expected)
    np.testing.assert_array_equal(manifest.flatten(shared_state(other, manifest)), manifest.flatten(shared))
    local["image_encoder.blocks.0.norm1.weight"][...] = 9
    assert torch.equal(logits(segmenter), expected)

    name = manifest.shared[0].name
    with pytest.raises(SelectionError, match=f"lacks {name}"):
        load_shared_state(other, manifest, {n: v for n, v in shared.items() if n != name})
    with pytest.raises(SelectionError, match="has shape"):
        load_shared_state(other, manifest, {**shared, name: shared[name].T})
    with pytest.raises(SelectionError, match="not selected"):
        load_local_state(other, manifest, {**local, **shared})


def test_lora_starts_equal_for_equal_seeds() -> None:
    first, again, other = fresh(RANKS, 1), fresh(RANKS, 1), fresh(RANKS, 2)
    states = []
    for segmenter in (first, again, other):
        torch.rand(3)
        states.append(shared_state(segmenter, adapt(segmenter, RANKS)))
    a = "image_encoder.blocks.0.attn.q_proj.lora_A.weight"
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
    assert not np.array_equal(states[0][a], states[2][a])
    assert not states[0][a.replace("lora_A", "lora_B")].any()
    assert states[0][a].any()


def test_training_moves_what_is_selected_and_nothing_else() -> None:
    selection = preset("flap", 4)
    segmenter = fresh(selection)
    manifest = adapt(segmenter, selection)
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    labels = (IMAGES[:, 0] > 0.5).long()
    optimizer = torch.optim.AdamW([p for p in segmenter.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(segmenter(IMAGES), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    selected = {entry.name for entry in manifest.shared}
    for name, value in segmenter.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved == (adapters._canonical(name) in selected), name


def test_adapting_twice_is_refused() -> None:
    segmenter = fresh(LOCAL)
    adapt(segmenter, LOCAL)
    with pytest.raises(SelectionError, match="already carries selection 'personal': build a fresh one"):
        adapt(segmenter, LOCAL)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter, manifest = trained(LOCAL)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    save_adapter(segmenter, manifest, tmp_path / "kept", {"round": 1})
    monkeypatch.setattr(adapters, "save_file", full)
    for name in ("adapter", "kept"):
        with pytest.raises(DataError, match=f"{name}: the disk is full"):
            save_adapter(segmenter, manifest, tmp_path / name, {"round": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert json.loads((tmp_path / "kept" / "card.json").read_text())["round"] == 1


def test_an_adapter_is_replaced_but_no_other_folder(tmp_path: Path) -> None:
    segmenter, manifest = trained(LOCAL)
    folder = tmp_path / "adapter"
    save_adapter(segmenter, manifest, folder, {"round": 1})
    save_adapter(segmenter, manifest, folder, {"round": 2})
    assert json.loads((folder / "card.json").read_text())["round"] == 2
    assert list(tmp_path.iterdir()) == [folder]
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not an adapter: choose another folder"):
        save_adapter(segmenter, manifest, mine, None)
    assert [path.name for path in mine.iterdir()] == ["chapter.txt"]


def test_a_folder_for_another_model_or_damaged_is_refused(tmp_path: Path) -> None:
    segmenter, manifest = trained(LOCAL)
    folder = tmp_path / "adapter"
    save_adapter(segmenter, manifest, folder, None)
    with pytest.raises(CheckpointError, match=r"trained with weights random\(seed=1\) but .* random\(seed=7\)"):
        load_adapter(fresh(LOCAL, seed=7), folder)
    with pytest.raises(CheckpointError, match="trained with classes 2 but the segmenter has 1"):
        load_adapter(build_segmenter(MODEL, 1, LOCAL, 1), folder)
    with pytest.raises(CheckpointError, match="is not a complete adapter"):
        load_adapter(fresh(LOCAL), tmp_path / "nothing")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is not a complete adapter") as caught:
        load_adapter(fresh(LOCAL), folder)
    assert "\n" not in str(caught.value)
