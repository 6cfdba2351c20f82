"""The Ray engine: asks sites, keeps its own deadline, and says who answered and who is lost."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from fedsam_core.federation.engine import OnAnswer, describe_failure, describe_wait

# An actor that is being started anew refuses calls: for so long it is left alone.
_RESTART_PAUSE = 0.5
# A reply that was ready in time may still have to come over from the site's node after the deadline.
_FETCH_SECONDS = 30.0

Keep = Callable[[Mapping[str, ActorHandle[Any]]], None]
"""Takes the actors of a run that is over."""


class RayEngine:
    """Carries calls to site actors (`cluster.site.SiteActor`); fulfills `fedsam_core.federation.engine.Engine`.

    The deadline is kept here, not by Ray, which may take long to notice a dead node and never notices a silent one.
    Numpy arrays in replies and in shared values are read-only: they lie in Ray's shared memory.
    """

    def __init__(
        self,
        actors: Mapping[str, ActorHandle[Any]],
        keep: Keep | None = None,
    ) -> None:
        """`keep` is given the idle actors in the end; without it they are ended."""
        self._keep = keep
        self._actors = {site: actors[site] for site in sorted(actors)}
        # Calls that missed their deadline, and polls: the answer to come, and the method.
        self._busy: dict[str, tuple[ray.ObjectRef[Any], str]] = {}
        self._polled: set[str] = set()  # sites whose answer to come is a poll's

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self._actors)

    def share(self, value: Any) -> Any:
        """Puts `value` into the object store once; Ray hands it to every site that gets the handle as a keyword."""
        return ray.put(value)

    def call(
        self,
        method: str,
        args: Mapping[str, Mapping[str, Any]],
        deadline: float,
        on_answer: OnAnswer | None = None,
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Calls `method` at the sites named in `args` at once; see the protocol.

        A site that misses the deadline is lost for this call only. Its late answer is ignored, and the next call is
        held back until then: stale calls never pile up in front of a straggler.
        """
        begun = time.monotonic()
        end = begun + deadline
        replies: dict[str, Any] = {}
        lost: dict[str, str] = {}
        waiting: dict[ray.ObjectRef[Any], str] = {}

        def send(site: str) -> None:
            try:
                waiting[self._actors[site].call.remote(method, **args[site])] = site
            except Exception as error:  # keywords that cannot be serialized: this site's failure, not the others'
                lost[site] = describe_failure(error)

        for site in sorted(args):
            if site in self._busy:
                waiting[self._busy[site][0]] = site
            else:
                send(site)
        while waiting:
            # One at a time and not fetched: a larger num_returns can come back empty while one site straggles.
            ready, _ = ray.wait(
                list(waiting), num_returns=1, timeout=max(0.0, end - time.monotonic()), fetch_local=False
            )
            if not ready:
                break
            site = waiting.pop(ready[0])
            if site in self._busy:
                self._forget(site)
                send(site)
                continue
            try:
                replies[site] = ray.get(ready[0], timeout=max(_FETCH_SECONDS, end - time.monotonic()))
            except Exception as error:
                lost[site] = _reason(error)
                continue
            if on_answer is not None:
                end = min(end, begun + on_answer(site, time.monotonic() - begun))
        allowed = describe_wait(begun, end, deadline)
        for ref, site in waiting.items():
            if site in self._busy:
                lost[site] = f"still busy with an earlier {self._busy[site][1]} after {allowed}"
            else:
                lost[site] = f"no answer to {method} within {allowed}"
                self._busy[site] = (ref, method)
        return {site: replies[site] for site in sorted(replies)}, {site: lost[site] for site in sorted(lost)}

    def poll(
        self, method: str, args: Mapping[str, Mapping[str, Any]], seconds: float
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Calls sites that nobody waits for; see the protocol. The call stands behind whatever a site is still at, and
        is made again where the site's process has ended meanwhile."""
        end = time.monotonic() + seconds
        while True:
            for site in sorted(args):
                if site not in self._polled:
                    self._busy[site] = (self._actors[site].call.remote(method, **args[site]), method)
                    self._polled.add(site)
            waiting = {self._busy[site][0]: site for site in args}
            left = max(0.0, end - time.monotonic())
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=left, fetch_local=False)
            if not ready:
                return {}, {}
            site = waiting[ready[0]]
            self._forget(site)
            try:
                return {site: ray.get(ready[0], timeout=_FETCH_SECONDS)}, {}
            except RayActorError:
                left = end - time.monotonic()
                if left <= 0:
                    return {}, {}
                time.sleep(min(_RESTART_PAUSE, left))
            except Exception as error:
                return {}, {site: _reason(error)}

    def silent(self, site: str) -> bool:
        return site in self._busy

    def restart(self, site: str) -> None:
        """Ends the site's process; Ray starts another. Where its node cannot be reached, nothing comes of it."""
        ray.kill(self._actors[site], no_restart=False)

    def _forget(self, site: str) -> None:
        """The answer that was to come has come."""
        del self._busy[site]
        self._polled.discard(site)

    def close(self) -> None:
        """Ends the site actors for good, or hands on those that are idle."""
        idle = {site: actor for site, actor in self._actors.items() if self._keep and site not in self._busy}
        for site, actor in self._actors.items():
            if site not in idle:
                ray.kill(actor, no_restart=True)
        if self._keep and idle:
            self._keep(idle)
        self._actors = {}
        self._busy.clear()
        self._polled.clear()


def _reason(error: Exception) -> str:
    """Why a site is lost, in one line."""
    if isinstance(error, RayTaskError):
        return describe_failure(error.cause) if isinstance(error.cause, Exception) else describe_failure(error)
    if isinstance(error, GetTimeoutError):
        return "its answer could not be fetched from its node"
    if isinstance(error, RayError):
        return f"its actor or node died ({type(error).__name__})"
    return describe_failure(error)
