"""A study: one question put to many runs. What its file says, and the trials that follow from it.

    name: which-layers
    config: hippocampus                  # the experiment that all trials share: a file, or a committed one
    overrides: {federation.rounds: 8}    # settings of all trials
    selections:
      - presets                          # the seven of FLAP-SAM; or one by its name
      - {blocks: 4}                      # LoRA on q and v of encoder blocks 0-3, of 4-7, ... each alone
      - {components: [lora.encoder.q, lora.decoder.v, hypernetworks, upscaling], with: [mask_tokens]}
      - {name: last-blocks, lora: {encoder: [q, v], encoder_blocks: [8, 9, 10, 11]}, train: [head]}
    selection_overrides: {full: {learning.learning_rate: 1.0e-3}}  # settings of one selection
    grid: {rank: [4, 16], federation.rule: [factors, rolora]}      # every combination of these settings
    seeds: [0, 1, 2]
    baselines: {centralized: [flap], local: [flap], zero-shot: [lora]}

Nothing here runs anything.
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.trials import EarlyStop
from fedsam_core.errors import ConfigError
from fedsam_core.hashing import stable_hash
from fedsam_core.sam.geometry import encoder_blocks
from fedsam_core.selection import GROUPS, PRESETS, LayerSelection, LoraTargets, Projection, preset
from fedsam_core.settings import Settings
from pipelines.config import Config, config_tree, explain, flatten, inline, load_config, read_override, read_tree
from pipelines.results import Kind

Baseline = Literal["centralized", "local", "zero-shot"]


class Blocks(Settings):
    """LoRA on a window of image encoder blocks: a selection for each window."""

    blocks: int = Field(ge=1, description="blocks in a window; windows stand side by side")
    lora: tuple[Projection, ...] = Field(("q", "v"), min_length=1, description="layers of a block that get LoRA")
    also: tuple[str, ...] = Field((), alias="with", description="groups that each of them trains whole besides")


class Components(Settings):
    """A selection for each component: `lora.encoder.q` and the like, or a group trained whole."""

    components: tuple[str, ...] = Field(min_length=1)
    also: tuple[str, ...] = Field((), alias="with", description="groups that each of them trains whole besides")

    @field_validator("components")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if _lora_part(name) is None and name not in GROUPS:
                raise ValueError(
                    f"unknown component {name!r}: write lora.encoder.P or lora.decoder.P with P of q, k, v, o, mlp, or "
                    f"a group: {', '.join(GROUPS)}"
                )
        return names


class Search(Settings):
    """A greedy search: the selection grows by the candidate that brings most, step by step, within a budget."""

    budget_mb: float = Field(gt=0, description="bytes of a whole run, up and down, all sites, in MB of 10^6 bytes")
    by: Literal["gain", "gain_per_mb"] = Field("gain", description="what the best candidate has most of")
    steps: int = Field(8, ge=1, description="at most so many candidates are taken")
    min_gain: float = Field(0.0, ge=0, description="validation Dice that a step must bring, mean over the seeds")


class Study(Settings):
    """A study file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the study and its MLflow experiment")
    config: str | None = Field(None, description="experiment that all trials share: a file or a committed one's name")
    overrides: dict[str, Any] = Field({}, description="settings of all trials, by dotted key")
    selections: tuple[str | LayerSelection | Blocks | Components, ...] = Field(
        min_length=1, description="which layers: presets, one preset, blocks, components, or written out"
    )
    selection_overrides: dict[str, dict[str, Any]] = Field(
        {},
        description="settings of one selection by its name, such as its own learning rate; its baselines have them too",
    )
    grid: dict[str, tuple[Any, ...]] = Field({}, description="further settings by dotted key: every combination is run")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="every trial is run with each of these")
    baselines: dict[Baseline, tuple[str, ...]] = Field(
        {}, description="runs to compare with, each of the named presets: centralized, local, zero-shot"
    )
    early_stop: EarlyStop | None = Field(None, description="stop hopeless trials by validation Dice (Ray Tune's ASHA)")
    at_once: int | None = Field(None, ge=1, description="trials at the same time; unset: as many as the cluster holds")
    search: Search | None = Field(None, description="for --search: `selections` are then the candidates")

    @field_validator("grid")
    @classmethod
    def _not_the_others(cls, grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for key, values in grid.items():
            if key in ("selection", "seed"):
                raise ValueError(f"{key} is given by the study's own {key}s")
            if not values:
                raise ValueError(f"{key} has no value")
        return grid

    @field_validator("selection_overrides")
    @classmethod
    def _not_what_selects(cls, overrides: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, settings in overrides.items():
            if taken := {"selection", "seed", "rank"} & set(settings):
                raise ValueError(f"{name}: {taken.pop()} is given by the study's own selections and seeds, or the grid")
        return overrides

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        for name, settings in self.selection_overrides.items():
            if twice := sorted(set(settings) & set(self.grid)):
                raise ValueError(f"selection_overrides gives {name} {twice[0]}, which the grid gives all of them")
        for one in self.selections:
            if isinstance(one, LayerSelection) and "rank" in self.grid:
                raise ValueError(f"grid.rank does not apply to selection {one.name}, which is written out with its own")
        return self


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        group: what it is apart from the seed; rows of a table have this name.
        kind: a federation or a baseline.
        config: resolved.
    """

    group: str
    kind: Kind
    config: Config

    def id(self, cohort: str, code: str) -> str:
        """16 hex digits of what decides the result: configuration, hash of the prepared cohort, hash of the code."""
        return stable_hash([self.kind, self.config.science_hash(cohort), code])[:16]


def studies() -> dict[str, Path]:
    """The committed studies by name."""
    folder = Path(str(resources.files("pipelines") / "studies"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_study(source: str, overrides: Sequence[str] = ()) -> Study:
    """Reads a study: a file, the name of a committed one, or the YAML itself where it begins with a brace.

    Args:
        overrides: `dotted.key=value`, settings of all trials; they win over the file's.

    Raises:
        ConfigError: names the key and the fix.
    """
    path = studies().get(source, Path(source))
    tree = _inline_tree(source) if source.startswith("{") else read_tree(path, f"studies {', '.join(studies())}")
    if isinstance(named := tree.get("config"), str) and (path.parent / named).is_file():
        tree["config"] = os.path.abspath(path.parent / named)  # a study's own experiment lies beside it
    given = dict(tree.get("overrides") or {}) | dict(read_override(override) for override in overrides)
    try:
        study = Study.model_validate({**tree, "overrides": given})
    except ValidationError as error:
        # Of a selection that is none of the four ways to write one, pydantic tells what each of them lacks.
        raise ConfigError("; ".join(dict.fromkeys(explain(e, source) for e in error.errors()))) from error
    # From here on the study stands for itself, also where the experiment's file is not.
    settings = flatten(config_tree(study.config, [f"{key}={inline(value)}" for key, value in given.items()]))
    return study.model_copy(update={"config": None, "overrides": settings})


def trials(study: Study) -> tuple[Trial, ...]:
    """All trials, baselines first, seeds side by side; two that ask for the same are one.

    Raises:
        ConfigError: a setting is wrong, in words that name it.
    """
    found: dict[str, Trial] = {}
    for trial in _all(study):
        found.setdefault(trial.id("", ""), trial)
    names = {trial.config.layers.name for trial in found.values()}
    if unknown := sorted(set(study.selection_overrides) - names):
        raise ConfigError(f"selection_overrides names {unknown[0]}, which study {study.name} does not have")
    return tuple(found.values())


def candidates(study: Study) -> tuple[LayerSelection, ...]:
    """The selections of a study, written out."""
    config = _config(study, {}, study.seeds[0])
    return tuple(itertools.chain.from_iterable(_written(one, config) for one in study.selections))


def trials_of(study: Study, selection: LayerSelection) -> tuple[Trial, ...]:
    """A selection with every seed, without the grid."""
    settings = _chosen(selection) | _own(study, selection.name)
    return tuple(Trial(selection.name, "federated", _config(study, settings, seed)) for seed in study.seeds)


def union(first: LayerSelection, second: LayerSelection, name: str) -> LayerSelection:
    """Both selections as one.

    Raises:
        ConfigError: LoRA of both cannot be written as one, as it is layers times blocks.
    """
    lora = first.lora or second.lora
    if first.lora is not None and second.lora is not None:
        a, b = first.lora, second.lora
        if (a.rank, a.alpha, a.block_ranks) != (b.rank, b.alpha, b.block_ranks):
            raise ConfigError(f"{first.name} and {second.name} have LoRA of other ranks: give both the same")
        if a.encoder and b.encoder and a.encoder != b.encoder and a.encoder_blocks != b.encoder_blocks:
            raise ConfigError(
                f"{first.name} and {second.name} adapt other layers of other blocks, which no one selection can say: "
                "give candidates the same layers (lora) or the same blocks"
            )
        blocks = [one.encoder_blocks for one in (a, b) if one.encoder]
        every = not blocks or None in blocks
        lora = LoraTargets(
            encoder=tuple(sorted({*a.encoder, *b.encoder})),
            decoder=tuple(sorted({*a.decoder, *b.decoder})),
            encoder_blocks=None if every else tuple(sorted({n for some in blocks for n in some or ()})),
            rank=a.rank,
            alpha=a.alpha,
            block_ranks=a.block_ranks,
        )
    train = tuple(dict.fromkeys((*first.train, *second.train)))
    local = tuple(dict.fromkeys((*first.local, *second.local)))
    return LayerSelection(name=name, lora=lora, train=train, local=local)


def _all(study: Study) -> Iterator[Trial]:
    for kind, presets in study.baselines.items():
        for name, seed in itertools.product(presets, study.seeds):
            yield Trial(f"{kind} {name}", kind, _config(study, {"selection": name} | _own(study, name), seed))
    for values in itertools.product(*study.grid.values()):
        settings = dict(zip(study.grid, values, strict=True))
        varied = [f"{key.rpartition('.')[2]}={value}" for key, value in settings.items() if len(study.grid[key]) > 1]
        for one in study.selections:
            for selection in _written(one, _config(study, settings, study.seeds[0])):
                # A preset goes by its name: its rank is then a setting, as of any other run.
                chosen = {"selection": selection.name} if isinstance(one, str) else _chosen(selection)
                chosen |= _own(study, selection.name)
                group = " ".join([selection.name, *varied])
                for seed in study.seeds:
                    yield Trial(group, "federated", _config(study, settings | chosen, seed))


def _own(study: Study, selection: str) -> dict[str, Any]:
    """The settings that a selection alone has."""
    return study.selection_overrides.get(selection, {})


def _chosen(selection: LayerSelection) -> dict[str, Any]:
    return {"selection": selection, "rank": None}


def _config(study: Study, settings: Mapping[str, Any], seed: int) -> Config:
    merged = {"name": study.name, "tracking.experiment": study.name, **study.overrides, **settings, "seed": seed}
    return load_config(None, [f"{key}={inline(value)}" for key, value in merged.items()])


def _written(one: str | LayerSelection | Blocks | Components, config: Config) -> Iterator[LayerSelection]:
    rank = config.rank or LoraTargets().rank
    if isinstance(one, LayerSelection):
        yield one
    elif isinstance(one, str):
        for name in PRESETS if one == "presets" else (one,):
            yield preset(name, config.rank)
    elif isinstance(one, Blocks):
        depth = encoder_blocks(config.model.backbone)
        for first in range(0, depth, one.blocks):
            window = tuple(range(first, min(first + one.blocks, depth)))
            name = f"blocks-{window[0]}" if len(window) == 1 else f"blocks-{window[0]}-{window[-1]}"
            lora = LoraTargets(encoder=one.lora, encoder_blocks=window, rank=rank)
            yield LayerSelection(name=_with(name, one.also), lora=lora, train=one.also)
    else:
        for component in one.components:
            part = _lora_part(component)
            lora_part = None if part is None else LoraTargets.model_validate({part[0]: (part[1],), "rank": rank})
            train = one.also if part is not None else tuple(dict.fromkeys((component, *one.also)))
            yield LayerSelection(name=_with(component, one.also), lora=lora_part, train=train)


def _with(name: str, also: Sequence[str]) -> str:
    return ".with.".join([name, *also])


def _lora_part(name: str) -> tuple[str, str] | None:
    """("encoder", "q") of lora.encoder.q; None of anything else."""
    parts = name.split(".")
    fits = len(parts) == 3 and parts[0] == "lora" and parts[1] in ("encoder", "decoder")
    return (parts[1], parts[2]) if fits and parts[2] in ("q", "k", "v", "o", "mlp") else None


def _inline_tree(text: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the study given on the command line is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError("the study given on the command line holds no keys")
    return tree
