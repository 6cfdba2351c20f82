"""What rides in the masked vector of each sum, and how the weights make the sum a mean.

A site scales its update by w = slices / total, where the total comes from a first secure sum over the slice counts.
The sum of w * update over the contributing sites, divided by the sum of w, is the weighted mean (FedAvg, McMahan et al.
2017, arXiv 1602.05629, Algorithm 1), and no weight is ever seen in the open.
"""

import json
from dataclasses import asdict
from typing import Literal

from pydantic import Field

from fedsam_core.errors import SecureSumError
from fedsam_core.hashing import stable_hash
from fedsam_core.secagg.attempt import Attempt
from fedsam_core.secagg.quantize import Lane, VectorLayout
from fedsam_core.selection import ParameterManifest
from fedsam_core.settings import Settings

Purpose = Literal["weights", "update", "scores"]


class Task(Settings):
    """What a sum asks of every site; the same for all."""

    purpose: Purpose
    total_slices: float | None = Field(None, gt=0, description="for updates: training slices of all sites together")
    split: Literal["val", "test"] | None = Field(None, description="for scores: which cases")


# A lane's clip is the largest value of one site; the quantiser refuses what is beyond, so that nothing saturates.
MAX_SLICES = 2.0**20
MAX_LOSS = 64.0
MAX_CASES = 4096.0


def layout_of(purpose: Purpose, sites: int, shared_size: int, classes: int, clip: float) -> VectorLayout:
    """The lanes of a sum.

    Args:
        purpose: "weights", the first sum of a run: how many training slices all sites have together;
            "update", a round's sum: weighted updates, weights, weighted training losses;
            "scores": per class the Dice summed over cases, and how many cases had one.
        sites: largest number of contributors.
        shared_size: values in an update.
        classes: foreground classes.
        clip: largest change of one parameter in a round.
    """
    lanes = {
        "weights": (Lane("slices", 1, MAX_SLICES),),
        "update": (Lane("update", shared_size, clip), Lane("weight", 1, 1.0), Lane("loss", 1, MAX_LOSS)),
        "scores": (Lane("dice", classes, MAX_CASES), Lane("cases", classes, MAX_CASES)),
    }
    return VectorLayout(lanes[purpose], max_sites=sites)


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
    """The inverse of `attempt_to_json`. Raises SecureSumError for anything else."""
    try:
        fields = json.loads(data)
        return Attempt(**{**fields, "sites": tuple(fields["sites"])})
    except (ValueError, TypeError, KeyError) as error:
        raise SecureSumError(f"the announcement of a sum is malformed ({error})") from error
