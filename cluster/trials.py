"""Many trials on one cluster: Ray Tune places each as a whole, as many at once as fit, and stops hopeless ones early.

A trial is a plain function that tells of every round it has finished. Its processes (a driver and its actors) get their
places together or not at all. Processes are kept for the next trial: starting one takes longer than a short round.
"""

import logging
import os
import queue
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when Tune is imported: its own tables and log files say nothing that a study does not.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

from pydantic import Field
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from fedsam_core.errors import FedsamError
from fedsam_core.federation.engine import describe_failure
from fedsam_core.settings import Settings

_log = logging.getLogger(__name__)

Tell = Callable[[int, Mapping[str, float]], None]
"""Told after each round: its number, and numbers such as "dice"; does not return where the trial is to stop."""

Work = Callable[[Any, Tell, dict[str, Any]], Any]
"""Runs a trial: what it is, `Tell`, and a dictionary whose content is kept for the next trial of this process. What has
a method `close` in there is closed in the end. Picklable; returns what is picklable."""

_LOST_TRIES = 2  # a trial whose node is lost begins anew so often


class EarlyStop(Settings):
    """Asynchronous successive halving (ASHA; Li et al., MLSys 2020): at rounds `grace`, `grace` x `keep_one_in`, ... a
    trial goes on only if it is among the best of all that came so far."""

    grace: int = Field(2, ge=1, description="rounds that every trial gets")
    keep_one_in: int = Field(3, ge=2, description="at each rung one trial in so many goes on")


@dataclass(frozen=True)
class Placed:
    """A trial and what it books.

    Attributes:
        id: unique.
        what: goes to `Work`; picklable.
        bundles: resources of the trial's process first, then of each of its actors.
    """

    id: str
    what: Any
    bundles: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class Ended:
    """How a trial ended.

    Attributes:
        id: of the trial.
        result: what `Work` returned; None unless it came to its end.
        error: the reason in a line, "" if there is none.
        stopped: whether it was stopped early.
        told: the numbers of its rounds, in their order.
    """

    id: str
    result: Any
    error: str
    stopped: bool
    told: tuple[tuple[int, Mapping[str, float]], ...]


class StoppedEarly(BaseException):
    """Raised inside a trial that is to go on no further; no error, and nothing on the way may take it for one."""


def run_trials(
    trials: Sequence[Placed],
    work: Work,
    on_round: Callable[[str, int, Mapping[str, float]], None],
    on_end: Callable[[Ended], None],
    folder: Path,
    rounds: int,
    early_stop: EarlyStop | None = None,
    at_once: int | None = None,
) -> None:
    """Runs all trials on the connected cluster; returns when none is left.

    Args:
        on_round, on_end: called in this process.
        folder: for Tune's own notes; nothing in it is needed afterwards.
        rounds: of the longest trial.
        early_stop: on "dice" as the trials tell it; the larger, the better.
        at_once: trials that run at the same time; None: as many as the cluster holds.
    """
    if not trials:
        return
    by_id = {trial.id: trial for trial in trials}
    # With one rung more than rounds ASHA never stops a trial that has done its last one: it is still to be scored.
    scheduler = None
    if early_stop is not None:
        scheduler = ASHAScheduler(
            time_attr="round",
            metric="dice",
            mode="max",
            max_t=rounds + 1,
            grace_period=min(early_stop.grace, rounds),
            reduction_factor=early_stop.keep_one_in,
        )
    trainable: Any = tune.with_parameters(_Trainable, work=work, trials={t.id: t.what for t in trials})
    tuner = tune.Tuner(
        tune.with_resources(
            trainable, lambda config: tune.PlacementGroupFactory([dict(b) for b in by_id[config["trial"]].bundles])
        ),
        param_space={"trial": tune.grid_search([trial.id for trial in trials])},
        tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=True, max_concurrent_trials=at_once),
        run_config=tune.RunConfig(
            storage_path=str(folder),
            name="tune",
            verbose=0,
            callbacks=[_Listener(on_round, on_end)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=_LOST_TRIES),
        ),
    )
    tuner.fit()


class _Trainable(tune.Trainable):
    """A trial in Tune's terms: a step is a round. The work is done in a thread that waits after each round until Tune
    asks for the next: nothing is computed for a trial that is stopped."""

    def setup(self, config: dict[str, Any], work: Work, trials: Mapping[str, Any]) -> None:  # type: ignore[override]
        self._work, self._trials = work, trials
        self._kept: dict[str, Any] = {}
        self._begin(config["trial"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end()
        self._begin(new_config["trial"])
        return True

    def step(self) -> dict[str, Any]:
        self._go.put(True)
        said: dict[str, Any] = self._said.get()
        return {"round": self._round, "dice": self._dice, "done": False} | said

    def cleanup(self) -> None:
        self._end()
        for kept in self._kept.values():
            if hasattr(kept, "close"):
                kept.close()

    def _begin(self, trial: str) -> None:
        self._go: queue.Queue[bool] = queue.Queue()
        self._said: queue.Queue[dict[str, Any]] = queue.Queue()
        self._round, self._dice = 0, 0.0
        self._thread = threading.Thread(target=self._run, args=(self._trials[trial],), daemon=True)
        self._thread.start()

    def _end(self) -> None:
        """Stops what is still at work; a trial that has ended is not touched."""
        self._go.put(False)
        self._thread.join()

    def _run(self, what: Any) -> None:
        if not self._go.get():
            return
        ended: dict[str, Any] = {"done": True, "result": None, "error": ""}
        try:
            ended["result"] = self._work(what, self._tell, self._kept)
        except StoppedEarly:
            return
        except FedsamError as error:
            ended["error"] = describe_failure(error)
        except Exception as error:
            _log.exception("a trial failed")  # a bug keeps its traceback, in this process's log
            ended["error"] = f"{describe_failure(error)} ({_where(error)})"
        self._said.put(ended)

    def _tell(self, number: int, numbers: Mapping[str, float]) -> None:
        self._round = number
        self._dice = numbers.get("dice", self._dice)
        self._said.put({"round": number, "dice": self._dice, "numbers": dict(numbers)})
        if not self._go.get():
            raise StoppedEarly(f"stopped after round {number}: others do better")


class _Listener(tune.Callback):
    """Hands on what Tune hears."""

    def __init__(
        self, on_round: Callable[[str, int, Mapping[str, float]], None], on_end: Callable[[Ended], None]
    ) -> None:
        self._on_round, self._on_end = on_round, on_end
        self._told: dict[str, list[tuple[int, Mapping[str, float]]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy of itself on disk, where a study's own listeners are of no use

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if "numbers" in result and not result["done"]:
            self._heard(trial.config["trial"], result)

    def _heard(self, name: str, result: Mapping[str, Any]) -> None:
        told = self._told.setdefault(name, [])
        if told and told[-1][0] >= result["round"]:
            told.clear()  # begun anew after its node was lost
        told.append((result["round"], result["numbers"]))
        self._on_round(name, result["round"], result["numbers"])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        name, last = trial.config["trial"], trial.last_result
        finished = "result" in last
        if not finished:
            self._heard(name, last)  # of the round that a trial is stopped after, Tune tells nobody else
        told = tuple(self._told.get(name, ()))
        self._on_end(Ended(name, last.get("result"), last.get("error", ""), not finished, told))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        error = "its processes were lost, and lost again (see the cluster's log)"
        self._on_end(Ended(name, None, error, False, tuple(self._told.get(name, ()))))


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
