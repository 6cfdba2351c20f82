"""What a trial of a study gave, as one small JSON file: the only thing that tables, atlas and report are made from.

A study keeps its files under `studies/NAME/` of the results store (`work_dir` unless `storage.results` says otherwise):

about.json        name, cohort, classes, sites, the command and the hashes that made it
study.yaml        the study file, resolved              trials/ID.json  a `TrialResult`, written when the trial ends
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, ValidationError

from fedsam_core.errors import ConfigError
from fedsam_core.settings import Settings
from fedsam_core.store import Store

Kind = Literal["federated", "centralized", "local", "zero-shot"]


class TrialResult(Settings):
    """One run of a study.

    `test` is a summary: "dice" and "per_class" over all test cases, "per_site", "macro_dice" (sites alike), "cases".
    """

    id: str = Field(pattern=r"^[0-9a-f]{16}$", description="of the resolved configuration, cohort and code")
    group: str = Field(description="what the trial is, apart from its seed: a row of the table")
    kind: Kind = "federated"
    selection: str
    layers: dict[str, Any] = Field({}, description="the selection, written out")
    parts: dict[str, int] = Field(
        {}, description="trainable values by place and component, like encoder.3.lora_q; `pipelines.parts` makes it"
    )
    rule: str = "factors"
    rank: int = 0
    bits: int = 32
    seed: int = 0
    status: Literal["finished", "stopped", "failed"] = "finished"
    error: str = ""
    trainable: int = 0
    rounds: int = 0
    bytes_up: int = Field(0, description="serialized messages of the whole run, all sites")
    bytes_down: int = 0
    curve: tuple[tuple[int, float | None], ...] = Field((), description="(round, validation Dice); round 0 is before")
    before: dict[str, Any] = Field({}, description="as `test`, before the first round")
    test: dict[str, Any] = Field({}, description="after the last round")
    cross: dict[str, dict[str, float | None]] = Field(
        {}, description="kind local: Dice of each site's model (outer key) on each site's test cases"
    )
    minutes: float = 0.0
    run: str = Field("", description="id of the run; its folder is runs/RUN")
    mlflow_run: str = ""
    config_hash: str = ""
    cohort_hash: str = ""
    code_hash: str = ""

    @property
    def bytes_total(self) -> int:
        """Up and down."""
        return self.bytes_up + self.bytes_down


class StudyAbout(Settings):
    """What a study is about."""

    name: str
    cohort: str
    cohort_hash: str
    classes: tuple[str, ...]
    sites: tuple[str, ...]
    synthetic: bool
    command: str = Field(description="that ran it")
    mlflow_run: str = Field("", description="the parent run")
    experiment: str = ""
    planned: tuple[str, ...] = Field((), description="ids of all trials, in the order of the table")


def trial_key(study: str, trial: str) -> str:
    """Where a trial's result is in the results store."""
    return f"studies/{study}/trials/{trial}.json"


def about_key(study: str) -> str:
    """Where `StudyAbout` is in the results store."""
    return f"studies/{study}/about.json"


def study_key(study: str) -> str:
    """Where the study file, resolved, is in the results store."""
    return f"studies/{study}/study.yaml"


def search_key(study: str) -> str:
    """Where the steps of a greedy search are in the results store."""
    return f"studies/{study}/search.json"


def read_results(store: Store, study: str) -> Iterator[TrialResult]:
    """The trials that have ended, in the order of their ids.

    Raises:
        ConfigError: a file is none of this version's.
        StoreError: the store cannot be read.
    """
    for key in store.list(f"studies/{study}/trials/"):
        try:
            yield TrialResult.model_validate_json(store.read_bytes(key))
        except ValidationError as error:
            raise ConfigError(
                f"{store.url}/{key} is no result of this version of fedsam: delete it to have the trial run again"
            ) from error


def read_about(store: Store, study: str) -> StudyAbout:
    """What a study is about.

    Raises:
        ConfigError: there is no such study, or it was written by another version.
    """
    if not store.exists(about_key(study)):
        known = sorted({key.split("/")[1] for key in store.list("studies/") if key.endswith("/about.json")})
        there_is = ", ".join(known) or "none; run `fedsam ablate`"
        raise ConfigError(f"no study {study} in {store.url}: there is {there_is}")
    try:
        return StudyAbout.model_validate_json(store.read_bytes(about_key(study)))
    except ValidationError as error:
        raise ConfigError(f"{store.url}/{about_key(study)} was written by another version of fedsam") from error
