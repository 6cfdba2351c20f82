"""Study files: what trials follow from them, and what is refused."""

from pathlib import Path

import pytest

from fedsam_core.errors import ConfigError, FedsamError
from fedsam_core.selection import PRESETS, LayerSelection, LoraTargets
from pipelines.study import candidates, load_study, trials, trials_of, union

BASE = "overrides: {cohort.name: phantom, cohort.source: phantom, model.backbone: vit_t, model.image_size: 32, rank: 4}"


def study(tmp_path: Path, text: str, *overrides: str):  # type: ignore[no-untyped-def]
    path = tmp_path / "study.yaml"
    path.write_text(f"name: which\n{BASE}\n{text}\n")
    return load_study(str(path), overrides)


def test_presets_and_seeds(tmp_path: Path) -> None:
    found = trials(study(tmp_path, "selections: [presets]\nseeds: [0, 1, 2]"))
    assert [(t.group, t.config.seed) for t in found] == [(name, seed) for name in PRESETS for seed in (0, 1, 2)]
    assert {t.config.rank for t in found} == {4}
    assert {t.config.tracking.experiment for t in found} == {"which"}


def test_a_grid_is_every_combination_and_groups_say_what_varies(tmp_path: Path) -> None:
    text = "selections: [flap, lora]\ngrid: {rank: [2, 4], federation.rule: [factors, ffa], federation.bits: [16]}"
    found = trials(study(tmp_path, text))
    assert len(found) == 8
    assert len({t.group for t in found}) == 8
    one = next(t for t in found if t.group == "lora rank=2 rule=ffa")
    assert (one.config.layers.lora.rank, one.config.federation.rule, one.config.federation.bits) == (2, "ffa", 16)


def test_a_selection_has_settings_of_its_own(tmp_path: Path) -> None:
    text = """selections: [flap, lora]
grid: {rank: [2, 4]}
selection_overrides: {lora: {learning.learning_rate: 1.0e-3}}
baselines: {centralized: [flap, lora]}"""
    rates = {t.group: t.config.learning.learning_rate for t in trials(study(tmp_path, text))}
    assert {group for group, rate in rates.items() if rate == 1e-3} == {
        *("centralized lora", "lora rank=2", "lora rank=4")
    }
    assert len(rates) == 6
    searching = study(
        tmp_path, "selections: [{blocks: 6}]\nselection_overrides: {blocks-0-5: {learning.local_steps: 7}}"
    )
    assert trials_of(searching, candidates(searching)[0])[0].config.learning.local_steps == 7


def test_blocks_and_components(tmp_path: Path) -> None:
    text = """selections:
  - {blocks: 4, with: [head]}
  - {components: [lora.encoder.q, lora.decoder.v, hypernetworks], with: [mask_tokens]}"""
    found = {t.config.layers.name: t.config.layers for t in trials(study(tmp_path, text))}
    assert list(found) == [
        "blocks-0-3.with.head",
        "blocks-4-5.with.head",
        "lora.encoder.q.with.mask_tokens",
        "lora.decoder.v.with.mask_tokens",
        "hypernetworks.with.mask_tokens",
    ]
    last = found["blocks-4-5.with.head"]
    assert last.lora == LoraTargets(encoder=("q", "v"), encoder_blocks=(4, 5), rank=4)
    assert last.train == ("head",)
    assert found["lora.decoder.v.with.mask_tokens"].lora == LoraTargets(decoder=("v",), rank=4)
    assert found["hypernetworks.with.mask_tokens"].train == ("hypernetworks", "mask_tokens")


def test_what_asks_for_the_same_is_one_trial_and_ids_follow_what_decides(tmp_path: Path) -> None:
    assert len(trials(study(tmp_path, "selections: [flap, presets]"))) == 7
    (one,) = trials(study(tmp_path, "selections: [flap]"))
    (elsewhere,) = trials(study(tmp_path, "selections: [flap]", f"work_dir={tmp_path}"))
    (other,) = trials(study(tmp_path, "selections: [flap]", "learning.local_steps=7"))
    assert one.id("cohort", "code") == elsewhere.id("cohort", "code")
    ids = {one.id("cohort", "code"), other.id("cohort", "code"), one.id("cohort2", "code"), one.id("cohort", "code2")}
    assert len(ids) == 4


def test_baselines_come_first(tmp_path: Path) -> None:
    found = trials(study(tmp_path, "selections: [flap]\nbaselines: {local: [flap], zero-shot: [lora]}\nseeds: [3]"))
    assert [(t.group, t.kind) for t in found] == [
        ("local flap", "local"),
        ("zero-shot lora", "zero-shot"),
        ("flap", "federated"),
    ]


def test_a_study_given_as_text(tmp_path: Path) -> None:
    text = f"{{name: which, {BASE}, selections: [flap]}}"
    assert [t.group for t in trials(load_study(text))] == ["flap"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("selections: []", "selections"),
        ("selections: [flop]", "did you mean flap"),
        ("selections: [flap]\nseed: [0]", "unknown key seed"),
        ("selections: [flap]\ngrid: {seed: [0, 1]}", "seed is given by the study's own seeds"),
        ("selections: [flap]\ngrid: {federation.rool: [factors]}", "federation.rool"),
        ("selections: [flap]\ngrid: {federation.bits: []}", "federation.bits has no value"),
        ("selections: [{components: [lora.encoder.x]}]", "unknown component 'lora.encoder.x'"),
        ("selections: [{name: mine, train: [head]}]\ngrid: {rank: [2]}", "grid.rank does not apply to selection mine"),
        (
            "selections: [flap]\nselection_overrides: {lora: {federation.bits: 8}}",
            "names lora, which study which does not",
        ),
        ("selections: [flap]\nselection_overrides: {flap: {seed: 8}}", "flap: seed is given by"),
        ("selections: [flap]\nselection_overrides: {flap: {federation.bitz: 8}}", "federation.bitz"),
        (
            "selections: [flap]\ngrid: {federation.bits: [8]}\nselection_overrides: {flap: {federation.bits: 16}}",
            "gives flap federation.bits, which the grid gives all of them",
        ),
        ("selections: [flap]\nbaselines: {pooled: [flap]}", "pooled"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FedsamError) as error:
        trials(study(tmp_path, text))
    assert message in str(error.value)


def test_a_missing_study_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no configuration nowhere\.yaml: give a YAML file, or one of the studies"):
        load_study("nowhere.yaml")


def test_unions(tmp_path: Path) -> None:
    first, second, third = candidates(study(tmp_path, "selections: [{blocks: 2}]"))
    both = union(first, third, "both")
    assert both.lora == LoraTargets(encoder=("q", "v"), encoder_blocks=(0, 1, 4, 5), rank=4)
    head = LayerSelection(name="head", train=("head",))
    assert union(union(both, head, "x"), head, "more").train == ("head",)
    assert union(second, head, "x").lora == second.lora
    decoder = LayerSelection(name="d", lora=LoraTargets(decoder=("v",), rank=4))
    grown = union(second, decoder, "x").lora
    assert grown == LoraTargets(encoder=("q", "v"), encoder_blocks=(2, 3), decoder=("v",), rank=4)
    q = LayerSelection(name="q", lora=LoraTargets(encoder=("q",), encoder_blocks=(5,), rank=4))
    with pytest.raises(ConfigError, match="other layers of other blocks"):
        union(first, q, "x")
    wide = LayerSelection(name="wide", lora=LoraTargets(encoder=("q", "v"), rank=8))
    with pytest.raises(ConfigError, match="other ranks"):
        union(first, wide, "x")
