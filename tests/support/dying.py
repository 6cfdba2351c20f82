"""A worker that is lost, for the tests of baselines: in a module that Ray's processes can import by name."""

import os
import time
from dataclasses import replace
from typing import Any

from cluster.trainer import Place
from pipelines import baselines
from pipelines.baseline_record import Baseline
from pipelines.baselines import Task

train_pooled = baselines._train_pooled


def dying(task: Task, place: Place) -> Baseline | None:
    """Pooled training in a process that is gone in its second round, once."""
    mark = task.config.work_dir / "died"

    class Dying:
        def __init__(self, layout_hash: str) -> None:
            self._kept = place.checkpoints(layout_hash)
            self.latest = self._kept.latest

        def save(self, number: int, arrays: Any) -> None:
            if number == 2 and not mark.exists():
                mark.touch()
                time.sleep(5)  # Ray Train takes note of the first round's checkpoint
                os._exit(1)
            self._kept.save(number, arrays)

    return train_pooled(task, replace(place, checkpoints=Dying))
