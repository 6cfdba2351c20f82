"""A site's part in secure sums, whatever is summed: whose keys count, what it was asked, and its answers.

An engine calls a site by method name: `enroll` first; then, for each sum, `advertise`, `share`, a contribution (a
subclass's own), `confirm`, `unmask`. Every method takes and returns bytes, numbers or plain dictionaries.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from fedsam_core.errors import RoundError, SecureSumError
from fedsam_core.federation.answered import Answered
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.engine import describe_failure
from fedsam_core.federation.policy import read_policy
from fedsam_core.federation.tasks import Task, attempt_from_json, task_from_dict
from fedsam_core.hashing import derive_seed
from fedsam_core.secagg.attempt import Attempt, default_threshold
from fedsam_core.secagg.keyfiles import passphrase_from_environment, read_identity, read_roster
from fedsam_core.secagg.keys import Identity, Roster
from fedsam_core.secagg.layout import VectorLayout
from fedsam_core.secagg.plain import plain_input
from fedsam_core.secagg.quantize import Encoder
from fedsam_core.secagg.refusals import ForgedKeys, OtherAttempt, OutOfTurn, UnfitValues, UnknownSite
from fedsam_core.secagg.site import SiteSession
from fedsam_core.settings import Settings

_log = logging.getLogger(__name__)

Fill = Callable[[Encoder, VectorLayout], None]
"""Puts a site's values into the lanes of a sum."""


class SumSpec(Settings):
    """What a site needs to take part in sums."""

    run: str = Field(pattern=r"^\w[\w.-]*$")
    site: str
    sites: tuple[str, ...]
    """All sites of the run: this one refuses a sum over fewer."""
    seed: int
    federation: FederationConfig


class SummingSite(ABC):
    """The secure sums of one site."""

    spec: SumSpec

    def __init__(self, spec: SumSpec) -> None:
        self.spec = spec
        self._identity = Identity.generate()  # a development identity, unless the configuration names a roster
        self._answered = Answered()
        self._roster: Roster | None = None
        self._attempt: Attempt | None = None
        self._task = Task(purpose="weights")
        self._session: SiteSession | None = None
        self._layout: VectorLayout | None = None

    @abstractmethod
    def _lanes(self, task: Task, round_number: int) -> VectorLayout:
        """The lanes of the sum that the task asks for in a round."""

    @abstractmethod
    def _signed(self, task: Task, layout: VectorLayout) -> dict[str, str]:
        """What this site signs for beside run, sites and threshold: its own `config_hash` and `layout_hash`."""

    def _identify(self) -> str:
        """Reads this node's policy and, with a roster, its key; gives the roster's hash, "" for a development roster.

        Raises:
            SecureSumError: the roster or this site's key cannot be used, or the site's policy forbids the run.
        """
        federation = read_policy().tighten(self.spec.federation)
        self.spec = self.spec.model_copy(update={"federation": federation})
        return self._pin(federation.roster) if federation.roster else ""

    def enroll(self, roster: Mapping[str, str]) -> None:
        """Takes the public identity keys (hex, by site) of everyone in the run from the driver: a development roster.

        Raises:
            UnknownSite: this site pins a roster, and the driver's is another.
        """
        with self._logged("enroll"):
            path, pinned = self.spec.federation.roster, self._roster
            if path is None:
                self._roster = _told_roster(roster)
            elif pinned is None or any(
                site not in pinned.keys or pinned.key(site).hex() != roster[site] for site in roster
            ):
                raise UnknownSite(
                    f"site {self.spec.site} was told other keys than those of {path}, which it pins: compare the "
                    "rosters (`fedsam keys show`)"
                )

    def advertise(self, attempt: bytes, task: Mapping[str, Any]) -> bytes:
        """Starts a sum with fresh keys.

        Raises:
            OtherAttempt: run, sites, threshold, configuration or layout are not the ones this site was opened with.
            OutOfTurn: the attempt, or a later one, was entered before.
        """
        with self._logged("advertise"):
            announced = attempt_from_json(attempt)
        with self._logged("advertise", announced):
            asked = task_from_dict(task)
            layout = self._lanes(asked, announced.round)
            self._compare(announced, asked, layout)
            self._answered.enter(announced)
            self._end_sum()
            self._attempt, self._task, self._layout = announced, asked, layout
            if self.spec.federation.secure_sum == "plain":
                return b""
            if self._roster is None:
                raise UnknownSite(f"site {self.spec.site} was asked for a secure sum before it knew its peers' keys")
            self._session = SiteSession(announced, self.spec.site, self._identity, self._roster, layout)
            return self._session.advertise()

    def share(self, advertised: bytes) -> bytes:
        """Sends every peer its encrypted shares of this site's keys."""
        with self._logged("share"):
            return self._running().share(advertised)

    def confirm(self, survivors: bytes) -> bytes:
        """Signs whose contributions are in the sum."""
        with self._logged("confirm"):
            session = self._running()
            message = session.confirm(survivors)
            self._answered.check(self._current(), self._task.about, session.survivors, self._task.follows)
            return message

    def unmask(self, confirmations: bytes) -> bytes:
        """Opens the sum, and only the sum; the attempt's keys are wiped afterwards."""
        with self._logged("unmask"):
            session = self._running()
            message = session.unmask(confirmations)
            # Before the shares leave, for whom they are is noted for good.
            self._answered.open(self._current(), self._task.about, session.survivors, self._task.follows)
            self._contributed()
            self._end_sum()
            return message

    def _contributed(self) -> None:  # noqa: B027
        """This site's values are in a sum that is being opened."""

    def _current(self) -> Attempt:
        if self._attempt is None:
            raise RoundError(f"site {self.spec.site} has no sum under way (it may have been restarted)")
        return self._attempt

    def _running(self) -> SiteSession:
        if self._session is None:
            raise RoundError(f"site {self.spec.site} has no sum under way (it may have been restarted)")
        return self._session

    def _pin(self, path: Path) -> str:
        """Takes the roster and this site's own key from this node's files; gives the roster's hash."""
        spec = self.spec
        self._roster = read_roster(path)
        folder = spec.federation.key_dir.expanduser()
        key_file = folder / f"{spec.site}.key"
        self._identity = read_identity(key_file, passphrase_from_environment())
        if self._roster.key(spec.site) != self._identity.public:
            raise ForgedKeys(f"{key_file} is not the key that {path} pins for site {spec.site}: exchange keys again")
        self._answered = Answered(folder / f"{spec.site}.answered" / f"{spec.run}.json")
        return self._roster.hash

    def _compare(self, attempt: Attempt, task: Task, layout: VectorLayout) -> None:
        """Refuses an attempt that is not about what this site was opened for."""
        spec = self.spec
        own = {
            "run": spec.run,
            "sites": spec.sites,
            "threshold": default_threshold(len(spec.sites)),
            **self._signed(task, layout),
        }
        for key, value in own.items():
            if (theirs := getattr(attempt, key)) != value:
                raise OtherAttempt(
                    f"site {spec.site} refuses the {task.purpose} sum of round {attempt.round}: its {key} is {value}, "
                    f"the driver's {theirs}. Start all with the same configuration and code"
                )

    @contextmanager
    def _logged(self, what: str, announced: Attempt | None = None) -> Iterator[None]:
        """Every refusal is in the log of the site, by name, whatever the driver makes of it, and ends the sum."""
        try:
            yield
        except SecureSumError as error:
            attempt = announced or self._attempt
            place = f"run {attempt.run}, round {attempt.round}, attempt {attempt.attempt}" if attempt else "no attempt"
            about: dict[str, str | int] = {"run": self.spec.run, "site": self.spec.site}
            about |= {"round": attempt.round, "attempt": attempt.attempt} if attempt else {}
            why = describe_failure(error)
            _log.warning("site %s refused %s (%s): %s", self.spec.site, what, place, why, extra=about)
            if not isinstance(error, OutOfTurn):  # whoever asks out of turn does not end what is under way
                self._end_sum()
            raise

    @contextmanager
    def _masks_ahead(self, delivered: bytes) -> Iterator[None]:
        """Makes the masks of the vector in another thread while the caller trains or segments."""
        if self.spec.federation.secure_sum == "plain":
            yield
            return
        session = self._running()
        with ThreadPoolExecutor(1, thread_name_prefix="masks") as pool:
            making = pool.submit(session.deliver, delivered)
            try:
                yield
                making.result()
            except OutOfTurn:
                raise  # ends nothing that is under way
            except BaseException:
                making.exception()  # has ended, before its secrets are wiped
                self._end_sum()
                raise

    def _contribute(self, fill: Fill) -> bytes:
        attempt, layout = self._current(), self._layout
        assert layout is not None  # set with the attempt
        # Not of the attempt: a repeated attempt of a round gives the same bits.
        encoder = Encoder(layout, derive_seed(self.spec.seed, "rounding", layout.hash, attempt.round, self.spec.site))
        try:
            fill(encoder, layout)
        except UnfitValues as error:
            # What exactly is the site's own business: even how far a value is beyond its clip says something of it.
            _log.warning("site %s sends nothing in round %d: %s", self.spec.site, attempt.round, error)
            raise UnfitValues(
                f"site {self.spec.site} sends nothing in round {attempt.round}: its values do not fit their clips (its "
                "log says which). Where an update is too large, lower learning.learning_rate or raise "
                f"federation.update_clip ({self.spec.federation.update_clip:g})"
            ) from None
        if self.spec.federation.secure_sum == "plain":
            self._contributed()
            return plain_input(attempt, self.spec.site, self._identity, layout, encoder.vector())
        return self._running().masked_input(encoder.vector())

    def _end_sum(self) -> None:
        """Keys do not outlive their sum, however it ended."""
        if self._session is not None:
            self._session.close()
            self._session = None


def _told_roster(keys: Mapping[str, str]) -> Roster:
    try:
        return Roster({site: bytes.fromhex(key) for site, key in keys.items()})
    except ValueError as error:
        raise ForgedKeys("the driver told keys that are not written in hex") from error
