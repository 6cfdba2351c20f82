"""The driver actor: runs a federation inside the cluster while whoever started it looks on."""

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError

from fedsam_core import logs
from fedsam_core.errors import ClusterError, FedsamError

Emit = Callable[[Any], None]
"""Takes a progress event: any small picklable value."""

Run = Callable[[Emit], Any]
"""A whole run as a plain picklable function of where its progress goes; site actors are created inside it."""

_LONG_POLL_SECONDS = 0.5
_LONGEST_REASON = 600

# What Ray says of a dead actor beside why it died: what the person knows already, and guesses at reasons.
_NO_REASON = re.compile(
    r"(class_name|actor_id|namespace|name): \S+ ?|(There are some potential root|Some common) causes.*"
)


class FederationDriver:
    """Runs a plain function; `events` answers while `run` is at work (two threads of one actor)."""

    def __init__(self, run: Run) -> None:
        logs.set_up()
        self._run = run
        self._events: list[Any] = []
        self._news = threading.Condition()

    def run(self) -> Any:
        """What the run returns."""
        return self._run(self._emit)

    def events(self, after: int) -> list[Any]:
        """The events beyond the first `after`; waits a moment for news before answering that there are none."""
        with self._news:
            self._news.wait_for(lambda: len(self._events) > after, timeout=_LONG_POLL_SECONDS)
            return self._events[after:]

    def _emit(self, event: Any) -> None:
        with self._news:
            self._events.append(event)
            self._news.notify_all()


def drive(run: Run, emit: Emit, cpus: float = 0.0) -> Any:
    """Runs `run` in a driver actor and hands its events to `emit` as they come: `run(emit)`, but inside the cluster.

    However this ends (result, error, Ctrl-C), the driver ends with it, and with the driver the site actors it created.

    Args:
        run: see `Run`.
        emit: called in this process, in the order of the events.
        cpus: CPUs that the driver actor reserves; none by default, so that it fits beside the sites.

    Raises:
        FedsamError: as the run raised it.
        ClusterError: the driver's process or node died.
    """
    remote: Any = ray.remote(FederationDriver)
    driver = remote.options(num_cpus=cpus, max_concurrency=2, max_restarts=0, name=f"driver/{time.time_ns():x}").remote(
        run
    )
    try:
        result = driver.run.remote()
        seen = 0
        done = False
        while not done:
            # Asked before the events are: those of the last moment are then still fetched.
            done = bool(ray.wait([result], timeout=0)[0])
            events = ray.get(driver.events.remote(seen))
            seen += len(events)
            for event in events:
                emit(event)
        return ray.get(result)
    except RayTaskError as error:
        if isinstance(error.cause, FedsamError):
            raise error.cause from None
        raise  # a bug: Ray's message carries the traceback from the driver
    except (RayActorError, OutOfMemoryError, NodeDiedError) as error:
        raise ClusterError(
            f"the federation's driver died ({_why(error)}): see its log in the Ray dashboard; `fedsam resume RUN` goes "
            "on from the last finished round"
        ) from error
    finally:
        ray.kill(driver, no_restart=True)


def _why(error: Exception) -> str:
    """Ray's own reason in a line: how the worker ended, or its node, on which machine, and who killed it."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {_NO_REASON.sub('', said).strip()[:_LONGEST_REASON]}"
