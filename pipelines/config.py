"""One typed configuration tree: YAML, then dotted `key=value` overrides. Unknown keys and wrong types are errors."""

import difflib
import os
from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from cluster.gateway.aggregator import GatewayConfig
from cluster.placement import SiteNeeds
from cluster.tracking import TrackingConfig
from fedsam_core.data.cohort import CohortConfig
from fedsam_core.data.preprocess import PreprocessConfig
from fedsam_core.data.slices import SliceConfig
from fedsam_core.errors import ConfigError
from fedsam_core.federation.config import FederationConfig
from fedsam_core.hashing import file_sha256, stable_hash
from fedsam_core.learning.config import LearningConfig
from fedsam_core.sam.backbones import ModelConfig
from fedsam_core.selection import LayerSelection, preset
from fedsam_core.settings import Settings


class EngineConfig(Settings):
    """What carries the calls to sites."""

    kind: Literal["ray", "in-process", "gateway"] = Field(
        "ray",
        description="ray: an actor a site; in-process: no Ray at all; gateway: hospitals dial in",
    )
    site: SiteNeeds = Field(SiteNeeds(), description="what a site's actor books")
    workers: int = Field(
        1, ge=1, description="for `centralize`: processes that share each batch; each books what a site does"
    )
    gateway: GatewayConfig = Field(GatewayConfig(), description="where hospitals dial in")


class StorageConfig(Settings):
    """Where prepared cohorts, runs and studies are kept. Keys come from the environment (AWS_ACCESS_KEY_ID, ...), an
    AWS profile or an instance's role."""

    prepared: str | None = Field(
        None, description="folder or s3://bucket/prefix for prepared cohorts; unset: <work_dir>/cohorts"
    )
    results: str | None = Field(
        None, description="folder or s3://bucket/prefix that keeps runs and studies; unset: work_dir"
    )
    s3_endpoint: str | None = Field(
        None, description="address of an S3 server that is not Amazon's (http://host:port), of MLflow's files too"
    )


class EvaluationConfig(Settings):
    """How volumes are scored."""

    batch_size: int = Field(16, ge=1, description="slices encoded at once")
    adapter: Path | None = Field(
        None, description="for `evaluate`: folder of a run or of its adapter; default: the newest run of this name"
    )
    split: Literal["val", "test"] = Field("test", description="for `evaluate`: which cases")
    save_masks: bool = Field(True, description="for `evaluate`: write the predicted masks as NIfTI")
    nsd_tolerance_mm: float = Field(
        2.0, ge=0, description="for `evaluate`: how far a surface may be off to count as right in NSD"
    )


class Config(Settings):
    """Everything that a stage can be told."""

    name: str = Field("fedsam", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run")
    run: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=150,
        description="for `federate`: id of the run; called again with it, an unfinished run goes on. Unset: "
        "NAME-DATE-HASH, a new run with each call",
    )
    seed: int = Field(0, ge=0, description="seed of the whole run; equal seeds give equal results")
    work_dir: Path = Field(
        Path("~/.fedsam"), description="prepared cohorts, runs and the local MLflow database; shared by all nodes"
    )
    cohort: CohortConfig = Field(description="which scans, of which sites")
    preprocess: PreprocessConfig = Field(PreprocessConfig(), description="how scans become slices")
    model: ModelConfig = Field(ModelConfig(), description="which SAM")
    selection: str | LayerSelection = Field("flap", description="a preset's name, or a written selection")
    rank: int | None = Field(None, ge=1, description="LoRA rank of the preset; default 32")
    slices: SliceConfig = Field(SliceConfig(), description="how a slice enters the model")
    learning: LearningConfig = Field(LearningConfig(), description="how a site trains in a round")
    federation: FederationConfig = Field(FederationConfig(), description="rounds, secure sum, disclosure")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="how volumes are scored")
    engine: EngineConfig = Field(EngineConfig(), description="Ray or one process")
    storage: StorageConfig = Field(StorageConfig(), description="where cohorts, runs and studies are kept")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow")

    @model_validator(mode="after")
    def _one_rank(self) -> Self:
        if self.rank is not None and isinstance(self.selection, LayerSelection):
            raise ValueError("rank is for presets; with a written selection set rank=null and selection.lora.rank")
        return self

    @field_validator("work_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return Path(os.path.abspath(value.expanduser()))

    @property
    def layers(self) -> LayerSelection:
        """The selection itself."""
        return preset(self.selection, self.rank) if isinstance(self.selection, str) else self.selection

    def science_hash(self, cohort_hash: str) -> str:
        """SHA-256 (hex) of what decides the result, and of nothing else: not folders, names, tracking or engine."""
        kept = self.model_dump(mode="json", include=_SCIENCE)
        file = self.model.weights_file
        kept["model"]["checkpoint"] = None if file is None else file_sha256(file)
        return stable_hash({**kept, "selection": self.layers.hash, "cohort": cohort_hash})


_SCIENCE: Any = {
    "seed": True,
    "preprocess": True,
    "model": True,
    "slices": True,
    "learning": True,
    "federation": {
        "rounds",
        "rule",
        "oversampling",
        "power_iterations",
        "weights",
        "normalize_steps",
        "scaffold",
        "strategy",
        "site_ranks",
        "privacy",
        "personal_steps",
        "bits",
        "broadcast_bits",
        "update_clip",
        "clip_quantile",
        "clip_headroom",
        "min_contributors",
    },  # the rest changes who waits for whom and who sees what
}
_WEIGHTS = ("auto", "random")  # what model.checkpoint may say instead of a path
_PATHS = ("cohort.path", "cohort.sites_csv", "model.checkpoint", "evaluation.adapter", "federation.roster")


def load_config(source: str | None, overrides: list[str] | None = None) -> Config:
    """The configuration of a stage.

    Args:
        source: a YAML file, or the name of a committed experiment (pipelines/configs/NAME.yaml), or None for overrides
            alone.
        overrides: `dotted.key=value` with the value in YAML; they win over the file.

    Raises:
        ConfigError: a file that is missing or no YAML, an unknown key, a wrong value; names the key and the fix.
    """
    tree = config_tree(source, overrides)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(explain(e, source) for e in error.errors())) from error
    _ = config.layers  # a preset that does not exist is an error now, not after hours of preparing
    return config


def config_tree(source: str | None, overrides: list[str] | None = None) -> dict[str, Any]:
    """What `load_config` validates: the file's keys, overridden, its paths absolute.

    Raises:
        ConfigError: a file that is missing or no YAML, or an override that is none.
    """
    tree = read_tree(configs().get(source, Path(source)), f"experiments {', '.join(configs())}") if source else {}
    for override in overrides or []:
        _apply(tree, override)
    _absolute_paths(tree)
    return tree


def configs() -> dict[str, Path]:
    """The committed experiments by name."""
    folder = Path(str(resources.files("pipelines") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def as_overrides(config: Config) -> list[str]:
    """The overrides that make this configuration from nothing, for a process that shares no files with this one."""
    return [f"{key}={inline(value)}" for key, value in flatten(_differences(config)).items()]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary with dotted keys. Lists and empty dictionaries are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def flat_settings(settings: BaseModel, prefix: str = "", exclude: Collection[str] = ()) -> dict[str, Any]:
    """Every setting by its dotted name, with JSON values. The names depend on the kind of settings alone, not on what
    is set: a section that is unset has all its keys, as None, and a table (such as ranks by site) is one value."""
    return _flat_fields(type(settings), settings.model_dump(mode="json"), prefix, exclude)


def _flat_fields(
    section: type[BaseModel], values: dict[str, Any] | None, prefix: str, exclude: Collection[str]
) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if name in exclude:
            continue
        value = None if values is None else values[name]
        if (nested := _nested(field)) is not None:
            flat |= _flat_fields(nested, value, f"{prefix}{name}.", ())
        else:
            flat[prefix + name] = value
    return flat


def _nested(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field is, or may be."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)), None)


def describe(
    section: type[BaseModel] = Config, prefix: str = "", required: str = "required"
) -> list[tuple[str, str, str]]:
    """Rows (key, default, meaning) of every setting, for --help."""
    rows: list[tuple[str, str, str]] = []
    for name, field in section.model_fields.items():
        nested = _nested(field)
        if nested is not None and nested is not LayerSelection:
            rows += describe(nested, f"{prefix}{name}.", "unset" if field.default is None else "required")
        else:
            default = required if field.is_required() else inline(field.get_default(call_default_factory=True))
            rows.append((prefix + name, default, field.description or ""))
    return rows


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but a key that stands twice is an error: the first would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for position, key in enumerate(keys) if key in keys[:position]), None):
            raise yaml.MarkedYAMLError(problem=f"key {twice!r} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_tree(path: Path, committed: str) -> dict[str, Any]:
    """A YAML file of keys; `committed` says what there is instead where it does not exist.

    Raises:
        ConfigError: no such file, or it is no YAML, or holds no keys.
    """
    try:
        tree = yaml.load(path.read_text(), _Loader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError as error:
        raise ConfigError(f"no configuration {path}: give a YAML file, or one of the {committed}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no keys: write `key: value` lines, see pipelines/configs")
    return tree


def read_override(override: str) -> tuple[str, Any]:
    """Key and value of `dotted.key=value`. Raises ConfigError where it is none, or the value no YAML."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise ConfigError(f"{override!r} is no override: write dotted.key=value, like learning.batch_size=8")
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {text!r} is not a YAML value ({' '.join(str(error).split())})") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, value = read_override(override)
    parts = key.split(".")
    for part in parts[:-1]:
        if not isinstance(tree.setdefault(part, {}), dict):
            raise ConfigError(f"{key}: {part} is a single value, it has no key below it")
        tree = tree[part]
    tree[parts[-1]] = value


def _absolute_paths(tree: dict[str, Any]) -> None:
    """Relative paths are meant from where the person is, not from wherever a job or an actor runs later."""
    for dotted in _PATHS:
        section, key = dotted.split(".")
        if dotted == "model.checkpoint" and isinstance(tree.get(section), dict) and tree[section].get(key) in _WEIGHTS:
            continue
        if isinstance(tree.get(section), dict) and isinstance(tree[section].get(key), str):
            tree[section][key] = os.path.abspath(os.path.expanduser(tree[section][key]))
    cohort = tree.get("cohort")
    if isinstance(cohort, dict) and isinstance(cohort.get("sites"), dict):
        folders: dict[str, Any] = cohort["sites"]
        for site, folder in folders.items():
            folders[site] = os.path.abspath(os.path.expanduser(folder)) if isinstance(folder, str) else folder
    storage = tree.get("storage")
    for key in ("prepared", "results"):
        if isinstance(storage, dict) and isinstance(storage.get(key), str) and "://" not in storage[key]:
            storage[key] = os.path.abspath(os.path.expanduser(storage[key]))
    tracking = tree.get("tracking")
    if isinstance(tracking, dict):
        uri, root = tracking.get("uri"), tracking.get("artifact_root")
        if isinstance(uri, str) and uri.startswith("sqlite:///"):
            tracking["uri"] = "sqlite:///" + os.path.abspath(os.path.expanduser(uri.removeprefix("sqlite:///")))
        if isinstance(root, str) and "://" not in root:
            tracking["artifact_root"] = os.path.abspath(os.path.expanduser(root))


def explain(error: Any, source: str | None) -> str:
    """One of pydantic's errors in a line that names the key, what is wrong with it, and where it was given."""
    place = [str(part) for part in error["loc"] if not str(part).startswith(("function-", "LayerSelection", "str"))]
    key = ".".join(place)
    where = f" (in {source})" if source else ""
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(place[-1], _siblings(place[:-1]), n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*place[:-1], close[0]])}?" if close else "`fedsam STAGE --help` lists the keys"
        return f"unknown key {key}{where}: {hint}"
    if error["type"] == "missing":
        return f"key {key} is missing{where}: give {key}=VALUE or write it in the file"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = "" if isinstance(error["input"], dict) else f" (given: {error['input']!r})"
    return f"{key or 'configuration'}: {message[:1].lower()}{message[1:]}{given}{where}"


def _siblings(place: list[str]) -> list[str]:
    section: type[BaseModel] = Config
    for part in place:
        field = section.model_fields.get(part)
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        nested = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if nested is None:
            return []
        section = nested
    return list(section.model_fields)


def _differences(config: BaseModel) -> dict[str, Any]:
    """What was set, as JSON values; defaults that were only filled in are left out."""
    return config.model_dump(mode="json", exclude_unset=True)


def inline(value: Any) -> str:
    """A value as YAML on one line, as an override has it."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    return text.removesuffix("...").strip()
