"""What carries calls to sites. The only thing that differs between one process and a cluster."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from fedsam_core.errors import FedsamError, SecureSumError

_log = logging.getLogger(__name__)

OnAnswer = Callable[[str, float], float]
"""Told of each answer as it comes, with the seconds since the call was made; gives the seconds after which the call is
to end, if that is before its deadline."""


class Engine(Protocol):
    """Carries a method call to sites and says who answered and who did not."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Ids of the sites, sorted."""
        ...

    def share(self, value: Any) -> Any:
        """A handle that is cheap to pass to many sites as a keyword value; the site receives `value` itself."""
        ...

    def call(
        self,
        method: str,
        args: Mapping[str, Mapping[str, Any]],
        deadline: float,
        on_answer: OnAnswer | None = None,
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Calls `method` at every site named in `args`, with that site's keywords.

        Args:
            method: name of a public method of the site.
            args: keywords by site.
            deadline: seconds to wait for all of them.
            on_answer: may end the call before.

        Returns:
            Replies by site, and by lost site the reason in a line. Every site in `args` is in exactly one of the two;
            a site's failure never raises here.
        """
        ...

    def poll(
        self, method: str, args: Mapping[str, Mapping[str, Any]], seconds: float
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """As `call`, for sites that nobody waits for: returns with the first answer, or after so many seconds.

        A site in neither of the two stays asked: the same poll, made again, goes on waiting for its answer.
        """
        ...

    def silent(self, site: str) -> bool:
        """Whether a site has not answered yet what it was asked last: it hangs, is slow, or cannot be reached."""
        ...

    def restart(self, site: str) -> None:
        """Ends whatever a site is at, if that is possible; it begins anew from its specification."""
        ...

    def close(self) -> None:
        """Frees the sites."""
        ...


class InProcessEngine:
    """All sites in this process, one after the other: tests, debuggers, notebooks, a bare GPU box.

    A call cannot be interrupted, so the deadline is not enforced here.
    """

    def __init__(self, sites: Mapping[str, Any]) -> None:
        self._sites = {site: sites[site] for site in sorted(sites)}

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self._sites)

    def share(self, value: Any) -> Any:
        return value

    def call(
        self,
        method: str,
        args: Mapping[str, Mapping[str, Any]],
        deadline: float,
        on_answer: OnAnswer | None = None,
    ) -> tuple[dict[str, Any], dict[str, str]]:
        replies: dict[str, Any] = {}
        lost: dict[str, str] = {}
        for site in sorted(args):
            begun = time.monotonic()
            try:
                replies[site] = getattr(self._sites[site], method)(**args[site])
                if on_answer is not None:
                    on_answer(site, time.monotonic() - begun)
            except Exception as error:  # whatever befalls a site must not befall the others
                if not isinstance(error, FedsamError):
                    _log.exception("%s failed at site %s", method, site)  # a bug keeps its traceback
                lost[site] = describe_failure(error)
        return replies, lost

    def poll(
        self, method: str, args: Mapping[str, Mapping[str, Any]], seconds: float
    ) -> tuple[dict[str, Any], dict[str, str]]:
        return self.call(method, args, seconds)

    def silent(self, site: str) -> bool:
        return False

    def restart(self, site: str) -> None:
        """Nothing: a site that has not answered yet is still being waited for."""

    def close(self) -> None:
        self._sites.clear()


def in_process(specs: Sequence[Any], factory: Callable[[Any], Any]) -> InProcessEngine:
    """An engine over `factory(spec)` for every spec; `spec.site` names the site."""
    return InProcessEngine({spec.site: factory(spec) for spec in specs})


def describe_failure(error: BaseException) -> str:
    """Why a site is lost, in one line: a `FedsamError` speaks for itself, anything else is named by its type. So is a
    refusal of the secure sum, which the logs of sites and driver can then be searched for."""
    text = " ".join(str(error).split())
    unnamed = isinstance(error, FedsamError) and (
        not isinstance(error, SecureSumError) or type(error) is SecureSumError
    )
    return text if unnamed else f"{type(error).__name__}: {text}"


def describe_wait(begun: float, end: float, deadline: float) -> str:
    """How long a call that began and ended at these times has waited, and why that was less than its deadline."""
    return f"{end - begun:.3g} s" + ("" if end == begun + deadline else ", when enough others had answered")
