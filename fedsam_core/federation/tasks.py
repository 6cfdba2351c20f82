"""What a sum asks of every site, how that is announced, and the hash that binds a sum to it."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from fedsam_core.errors import SecureSumError
from fedsam_core.hashing import stable_hash
from fedsam_core.secagg.attempt import Attempt
from fedsam_core.secagg.layout import VectorLayout
from fedsam_core.secagg.refusals import MalformedMessage
from fedsam_core.selection import ParameterManifest
from fedsam_core.settings import Settings

Purpose = Literal["weights", "magnitudes", "update", "scores", "survey"]  # the last before a run, see `preparation`


class Task(Settings):
    """What a sum asks of every site; the same for all."""

    purpose: Purpose
    total: float | None = Field(
        None, gt=0, description="for updates and magnitudes: weight of all sites together, such as their slices"
    )
    clips: dict[str, float] | None = Field(
        None, description="for updates: clip by group; None where none is known and the ring is wide"
    )
    stage: int = Field(0, ge=0, description="for updates and magnitudes: which sum of the round, see `lora_rules`")
    basis: str | None = Field(None, description="for stages after the first: SHA-256 (hex) of what they project on")
    split: Literal["val", "test"] | None = Field(None, description="for scores: which cases")
    personal: bool = Field(False, description="for scores: of each site's own fine-tuned model")

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        # What a site has answered is known by purpose, stage and split: the same question has no second name.
        trains = self.purpose in ("update", "magnitudes")
        if (self.split is not None) != (self.purpose == "scores"):
            raise ValueError("a split is given for scores, and for nothing else")
        if self.personal and self.purpose != "scores":
            raise ValueError("a site's own model is scored, and asked nothing else")
        if (self.total is not None) != trains:
            raise ValueError("the total weight is given for updates and their magnitudes, and for nothing else")
        if self.clips is not None and self.purpose != "update":
            raise ValueError("clips are for updates")
        if self.stage and not trains:
            raise ValueError("stages are for updates")
        if (self.basis is not None) != (self.stage > 0):
            raise ValueError("a basis is given for the stages after the first, and for nothing else")
        return self

    @property
    def about(self) -> str:
        """What the sum is about, whatever attempt it is."""
        parts = (
            self.purpose,
            self.split,
            "personal" if self.personal else None,
            str(self.stage) if self.stage else None,
        )
        return "/".join(part for part in parts if part)

    def kind_of_call(self, method: str) -> str:
        """Calls of one kind take about as long: training, whatever is summed of it; the scoring of one split."""
        if self.purpose in ("update", "magnitudes"):
            return method
        return "/".join(filter(None, (self.purpose, self.split, "personal" if self.personal else None, method)))

    @property
    def follows(self) -> str | None:
        """The sum whose sites must be exactly this one's: a second look at the same updates without one of them would
        show that one's as the difference."""
        return "update" if self.stage else None


def sum_hash(manifest: ParameterManifest, layout: VectorLayout, task: Task) -> str:
    """Hash (hex) that binds a sum to the parameters it is about, to its lanes and to the task.

    It is part of what every site signs: sites that were told different tasks refuse each other, so nobody can have one
    site's update counted fully and the others' not at all.
    """
    return stable_hash([manifest.layout_hash, layout.hash, task.model_dump()])


def attempt_to_json(attempt: Attempt) -> bytes:
    """An attempt as the driver announces it."""
    return json.dumps(asdict(attempt), sort_keys=True).encode()


def attempt_from_json(data: bytes) -> Attempt:
    """The inverse of `attempt_to_json`. Raises MalformedMessage for anything else."""
    try:
        attempt = _ATTEMPT.validate_json(data, strict=True)
        if set(json.loads(data)) != set(asdict(attempt)):
            raise ValueError("it has other fields than an attempt")
    except (ValueError, SecureSumError, RecursionError) as error:  # pydantic's are ValueErrors
        raise MalformedMessage(f"the announcement of a sum is malformed ({' '.join(str(error).split())})") from error
    return attempt


def attempt_from_dict(fields: Mapping[str, Any]) -> Attempt:
    """An attempt from its fields. Raises MalformedMessage where one is missing, unknown or of another type."""
    return attempt_from_json(json.dumps(fields).encode())


def task_from_dict(fields: Mapping[str, Any]) -> Task:
    """A task from its fields. Raises MalformedMessage where one is missing, unknown or of another type."""
    try:
        return Task.model_validate(fields)
    except ValidationError as error:
        raise MalformedMessage(f"the task of a sum is malformed ({' '.join(str(error).split())})") from error


_ATTEMPT = TypeAdapter(Attempt)
