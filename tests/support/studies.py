"""Made-up results of studies: what a sweep over selections, with its baselines, would have written."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedsam_core.hashing import stable_hash
from fedsam_core.sam.backbones import ModelConfig, manifest_for
from fedsam_core.selection import PRESETS, LayerSelection, LoraTargets, preset
from fedsam_core.store import Store
from pipelines.parts import parts_of
from pipelines.results import StudyAbout, TrialResult, about_key, trial_key

SITES = ("A", "B", "C", "D")
CLASSES = ("kidney", "tumour")
ROUNDS = 12
LEVELS = {
    "full": 0.53,
    "attention": 0.57,
    "decoder": 0.55,
    "partial-decoder": 0.47,
    "lora": 0.40,
    "lora-decoder": 0.598,
    "flap": 0.602,
}


def study_trials(seeds: int = 3, blocks: bool = False) -> list[TrialResult]:
    """Seven presets, with `blocks` also LoRA by block and a head without it, and the three baselines; by seed."""
    model = ModelConfig(backbone="vit_t", image_size=64)
    selections = [(preset(name, 4), LEVELS[name]) for name in PRESETS]
    if blocks:
        selections += [(_lora(f"block-{n}", (n,)), 0.25 + 0.02 * n) for n in range(6)]
        selections += [(_lora("blocks-3-5", (3, 4, 5)), 0.37), (_lora("blocks-0-2", (0, 1, 2)), 0.29)]
        selections += [(LayerSelection(name=name, train=(name,)), 0.3) for name in ("hypernetworks", "encoder.norms")]
    trials = []
    for selection, level in selections:
        manifest = manifest_for(model, len(CLASSES), selection)
        size = 4 * manifest.shared_size * len(SITES) * ROUNDS
        for seed in range(seeds):
            more = {"bytes_up": size + 90_000, "bytes_down": size + 40_000, "trainable": manifest.trainable}
            more |= {"layers": selection.model_dump(mode="json"), "parts": parts_of(manifest), "rounds": ROUNDS}
            trials.append(made(selection.name, level, seed, **more))
    for seed in range(seeds):
        trials.append(made("centralized", 0.63, seed, kind="centralized", selection="flap", rounds=ROUNDS))
        cross = {m: {s: 0.52 - 0.06 * i if s == m else 0.31 - 0.02 * i for i, s in enumerate(SITES)} for m in SITES}
        trials.append(made("local", 0.50, seed, kind="local", selection="flap", cross=cross))
        trials.append(made("zero-shot", 0.14, seed, kind="zero-shot", selection="flap"))
    return trials


def made(group: str, level: float, seed: int = 0, **more: Any) -> TrialResult:
    """A trial whose Dice is about `level`: seeds share their luck in part, as they do in truth."""
    rng = np.random.default_rng([seed, len(group), int(1000 * level)])
    luck = 0.012 * np.random.default_rng(seed).standard_normal()
    dice = level + luck + 0.006 * rng.standard_normal()
    kind = more.get("kind", "federated")
    curve = [(n, 0.1 + (dice - 0.1) * (1 - np.exp(-n / 3)) + 0.008 * rng.standard_normal()) for n in range(ROUNDS + 1)]
    given: dict[str, Any] = {
        "id": stable_hash([group, seed])[:16],
        "group": group,
        "selection": group,
        "seed": seed,
        "rank": 4,
        "curve": curve if kind in ("federated", "centralized") else (),
        "before": _summary(0.1),
        "test": _summary(dice, 0.01 * rng.standard_normal(len(SITES))),
        "minutes": 3.5,
        "run": f"run-{stable_hash([group, seed])[:6]}",
        "config_hash": stable_hash([group, seed]),
        "cohort_hash": stable_hash("cohort"),
        "code_hash": stable_hash("code"),
    }
    return TrialResult.model_validate(given | more)


def study_about(trials: list[TrialResult], name: str = "presets", **more: Any) -> StudyAbout:
    """What that study is about."""
    given: dict[str, Any] = {
        "name": name,
        "cohort": "kidneys",
        "cohort_hash": stable_hash("cohort"),
        "classes": CLASSES,
        "sites": SITES,
        "synthetic": False,
        "command": f"fedsam ablate {name}.yaml",
        "planned": [trial.id for trial in trials],
    }
    return StudyAbout.model_validate(given | more)


def write_study(store: Store, about: StudyAbout, trials: list[TrialResult]) -> None:
    """As `fedsam ablate` leaves it."""
    store.write_bytes(about_key(about.name), about.model_dump_json().encode())
    store.write_bytes(f"studies/{about.name}/study.yaml", f"name: {about.name}\nseeds: 3\n".encode())
    for trial in trials:
        store.write_bytes(trial_key(about.name, trial.id), trial.model_dump_json().encode())


def _lora(name: str, blocks: tuple[int, ...]) -> LayerSelection:
    return LayerSelection(name=name, lora=LoraTargets(encoder=("q", "v"), encoder_blocks=blocks, rank=4))


def _summary(dice: float, luck: Sequence[float] = (0, 0, 0, 0)) -> dict[str, Any]:
    return {
        "dice": dice,
        "per_class": {name: {"dice": dice + 0.1 * (1 - 2 * i)} for i, name in enumerate(CLASSES)},
        "per_site": {
            site: {"dice": dice + 0.05 - 0.04 * i + luck[i], "cases": 3 + i, "per_class": {}}
            for i, site in enumerate(SITES)
        },
        "macro_dice": dice - 0.01,
        "cases": 18,
    }
