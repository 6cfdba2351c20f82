"""The site actor: a thin Ray shell around a plain site object, and the function that starts one per site."""

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from cluster.engine import RayEngine
from cluster.placement import ActorOptions
from fedsam_core import logs
from fedsam_core.errors import ClusterError, FedsamError
from fedsam_core.federation.engine import describe_failure

_log = logging.getLogger(__name__)


class SiteFailure(FedsamError):
    """A failure at a site, boiled down to its line: the original exception need not survive pickling."""


class SiteActor:
    """Owns `factory(spec)` and calls its public methods by name.

    Ray restarts the actor after a crash; the site then starts from its specification again, having lost its memory.
    """

    def __init__(self, name: str, factory: Callable[[Any], Any], spec: Any) -> None:
        logs.set_up()
        logs.about(site=name)
        self._name, self._factory, self._spec = name, factory, spec
        self._site: Any = None
        try:
            self._start()
        except Exception:
            # An actor whose constructor raises is dead to Ray for good. This one lives and tries again when called.
            _log.exception("site %s did not start", name)

    def __repr__(self) -> str:
        return f"site {self._name}"  # Ray's log prefix

    def assign(self, factory: Callable[[Any], Any], spec: Any) -> None:
        """Begins anew with another specification: what the site held of the run before is gone."""
        self._factory, self._spec, self._site = factory, spec, None

    def _start(self) -> None:
        if self._site is None:
            self._site = self._factory(self._spec)

    def call(self, method: str, **kwargs: Any) -> Any:
        """What the site's `method` returns.

        Raises:
            SiteFailure: whatever went wrong at the site, in one line.
        """
        try:
            if method.startswith("_"):
                raise AttributeError(f"{method} is not a public method of a site")
            self._start()
            return getattr(self._site, method)(**kwargs)
        except FedsamError as error:
            raise SiteFailure(describe_failure(error)) from None
        except Exception as error:
            _log.exception("%s failed at site %s", method, self._name)  # a bug keeps its traceback, at the site
            raise SiteFailure(describe_failure(error)) from None


def create_sites(
    specs: Sequence[Any],
    plan: Mapping[str, ActorOptions],
    factory: Callable[[Any], Any],
    deadline: float = 300.0,
    pool: "SitePool | None" = None,
) -> RayEngine:
    """One actor per specification, placed as planned; returns when all of them are up.

    Actors belong to the process that calls this, and end with it.

    Args:
        specs: picklable; `spec.site` names the site.
        plan: from `cluster.placement.plan`, by site.
        factory: makes the plain site object from its specification, inside the actor.
        deadline: seconds to wait for all actors to start.
        pool: gives actors of an earlier run that had the same sites in the same places, and keeps these for the next.

    Raises:
        ClusterError: an actor did not get its place in time, for instance because another run holds the GPUs.
    """
    if pool is not None and (kept := pool.take(plan)) is not None:
        for spec in specs:
            kept[spec.site].assign.remote(factory, spec)  # calls of one actor are done in their order
        return RayEngine(kept, pool.keep)
    run = uuid.uuid4().hex[:8]
    remote: Any = ray.remote(SiteActor)
    actors = {
        spec.site: remote.options(
            **plan[spec.site].to_ray(),
            name=f"{run}/{spec.site}",  # for people: what dashboard and `ray list actors` show
            max_restarts=-1,
            max_task_retries=0,  # a lost call is the round's to repeat, with fresh keys, never Ray's
        ).remote(spec.site, factory, spec)
        for spec in specs
    }
    engine = RayEngine(actors, None if pool is None else pool.keep)
    end = time.monotonic() + deadline
    pending = {actor.__ray_ready__.remote(): site for site, actor in actors.items()}
    try:
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise ClusterError(
                    f"the actors of site {', '.join(sorted(pending.values()))} did not start within {deadline:g} s: "
                    "other work holds their CPUs or GPUs (see `ray status`), stop it or wait for it"
                )
            site = pending.pop(ready[0])
            try:
                ray.get(ready[0])
            except ray.exceptions.RayError as error:
                raise ClusterError(
                    f"the actor of site {site} could not start ({type(error).__name__}): see the site's log on its node"
                ) from error
    except BaseException:
        engine.close()
        raise
    if pool is not None:
        pool.planned(plan)
    return engine


class SitePool:
    """Actors that outlive their run: the next one with the same sites and places need not start processes."""

    def __init__(self) -> None:
        self._plan: Mapping[str, ActorOptions] | None = None
        self._actors: Mapping[str, Any] = {}

    def planned(self, plan: Mapping[str, ActorOptions]) -> None:
        """How the actors that `keep` will be given were placed."""
        self._plan = plan

    def keep(self, actors: Mapping[str, Any]) -> None:
        """Takes the actors of a run that is over."""
        self._actors = actors

    def take(self, plan: Mapping[str, ActorOptions]) -> Mapping[str, Any] | None:
        """The kept actors, if all of the plan are there and idle; else they are ended, as their places are needed."""
        actors, self._actors = self._actors, {}
        if actors and self._plan == plan and set(actors) == set(plan):
            return actors
        _end(actors)
        return None

    def close(self) -> None:
        """Ends the kept actors."""
        _end(self._actors)
        self._actors = {}


def _end(actors: Mapping[str, Any]) -> None:
    for actor in actors.values():
        ray.kill(actor, no_restart=True)
