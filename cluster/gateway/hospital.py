"""The hospital's end of the gateway: a process that dials out, and decides for itself what it takes part in.

What an aggregator sends is settings and protocol messages. Where scans, keys and shares lie, whose keys count, and what
the site agrees to stands in the site's own file. Read `Hospital.serve` first.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

import aiohttp
import yaml
from pydantic import Field, ValidationError, field_validator

from cluster.gateway.messages import Begin, Message, answer, decode, encode, line
from cluster.gateway.transport import (
    FRAME_LIMIT,
    HEARTBEAT_SECONDS,
    MAX_MESSAGE_BYTES,
    PROCESS_HEADER,
    RECEIVED_HEADER,
    REFUSED,
    REPLACED,
    LinkLost,
    client_context,
    receive,
    send,
)
from cluster.placement import SiteNeeds, cluster_nodes, plan, preflight
from cluster.site import create_sites
from fedsam_core.data.files import write_atomic
from fedsam_core.data.sources import Problem
from fedsam_core.errors import (
    ClusterError,
    ConfigError,
    FedsamError,
    RoundError,
    SecureSumError,
    SelectionError,
    TrainingError,
)
from fedsam_core.federation.engine import Engine, describe_failure, in_process
from fedsam_core.federation.policy import SitePolicy
from fedsam_core.federation.preparation import CohortSite, CohortSpec
from fedsam_core.federation.site import FederatedSite, SiteSpec
from fedsam_core.hashing import stable_hash
from fedsam_core.secagg.refusals import AgainstPolicy, MalformedMessage
from fedsam_core.settings import Settings

_log = logging.getLogger(__name__)

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0  # seconds between two attempts to dial
_MOST_CALLS = 8  # under way: an aggregator asks one thing at a time, and one that was started anew another
_FOREVER = 7 * 86400.0  # a site's own work has no deadline: the aggregator keeps its own
_TELLING = (SecureSumError, RoundError, SelectionError, TrainingError)
"""Errors whose line may leave the hospital: they speak of the protocol and the model. Others may name files, which are
often named after patients."""

_OWN: dict[str, Any] = {
    "federate": {
        "site": True,
        "cohort": True,
        "federation": {"roster", "key_dir", "site_dir"},
        "model": {"checkpoint"},
    },
    "prepare": {
        "site": True,
        "work_dir": True,
        "prepared": True,
        "cohort": {"path", "sites", "sites_csv"},
        "federation": {"roster", "key_dir"},
    },
}
"""What stands in no settings that travel: each site has its own."""


class HospitalPolicy(SitePolicy):
    """What the site insists on. Where nothing is said, more strictly than inside one cluster."""

    masked_only: bool = True
    share_site_scores: bool = False
    share_pictures: bool = False


class HospitalConfig(Settings):
    """A site's own file: who it is, where its things are, and what it agrees to."""

    site: str = Field(pattern=r"^\w[\w.-]{0,127}$", description="this site's name, as in roster and certificate")
    aggregator: str = Field(description="HOST or HOST:PORT that this site dials")
    certificate: Path = Field(description="this site's certificate, PEM")
    key: Path = Field(description="its private key, PEM, mode 0600")
    authority: Path = Field(description="certificate of the consortium's authority, PEM")
    proxy: str | None = Field(None, description="http://HOST:PORT of a proxy on the way out (CONNECT); unset: none")
    roster: Path = Field(description="the consortium's public keys, as this site has compared them")
    key_dir: Path = Field(Path("~/.fedsam/keys"), description="folder with this site's SITE.key")
    scans: Path | None = Field(None, description="folder of this site's scans; unset: a run on synthetic scans only")
    prepared: Path = Field(Path("~/.fedsam/cohorts"), description="where its prepared share goes")
    site_dir: Path = Field(Path("~/.fedsam/sites"), description="for what never leaves: local layers, its own model")
    work_dir: Path = Field(Path("~/.fedsam"), description="for synthetic scans, and for asked/: what was asked of it")
    checkpoint: Path | None = Field(None, description="official SAM .pth file, for runs that begin with one")
    policy: HospitalPolicy = Field(HospitalPolicy(), description="what the site insists on")
    accepts: Literal["any"] | tuple[str, ...] = Field(
        "any", description="any settings within the policy; or the hashes of those that somebody here has read"
    )
    ray: SiteNeeds | None = Field(
        None, description="what the site books on the hospital's own Ray cluster (RAY_ADDRESS); unset: no Ray"
    )
    max_message_bytes: int = Field(MAX_MESSAGE_BYTES, ge=1 << 16, description="a longer message is refused")

    @field_validator(
        *("certificate", "key", "authority", "roster", "key_dir", "scans"),
        *("prepared", "site_dir", "work_dir", "checkpoint"),
    )
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @property
    def url(self) -> str:
        """Where the site dials."""
        host = self.aggregator if ":" in self.aggregator else f"{self.aggregator}:8443"
        return f"wss://{host}/v1/sites/{self.site}"


def read_hospital(path: Path) -> HospitalConfig:
    """A site's file.

    Raises:
        ConfigError: it cannot be read, a key is missing, unknown or wrong; names the key.
    """
    try:
        return HospitalConfig.model_validate(yaml.safe_load(path.read_text()) or {})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {key}: {first['msg']}; `fedsam site --help` lists the keys") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is no readable YAML ({line(str(error))[:200]})") from error


def federate_beginning(spec: SiteSpec, share: str) -> dict[str, Any]:
    """The keywords of `begin` for a site of a run; `share` names its prepared share."""
    settings = spec.model_dump(mode="json", exclude=_OWN["federate"])
    return {"settings": settings, "share": share, "checkpoint": isinstance(spec.model.checkpoint, Path)}


def prepare_beginning(spec: CohortSpec, share: str) -> dict[str, Any]:
    """The same for preparing."""
    return {"settings": spec.model_dump(mode="json", exclude=_OWN["prepare"]), "share": share, "checkpoint": False}


def asked_hash(begin: Begin) -> str:
    """SHA-256 (hex) of what is asked: the same for every run of the same settings over the same sites."""
    settings = {key: value for key, value in begin.settings.items() if key not in ("run", "config_hash")}
    return stable_hash([begin.kind, settings, begin.share, begin.checkpoint])


def agreed_spec(own: HospitalConfig, begin: Begin) -> SiteSpec | CohortSpec:
    """What the site takes part in: the settings that were sent, with its own places, keys and disclosures.

    Raises:
        AgainstPolicy: the settings are weaker than the site's policy, or nobody here has read them.
        MalformedMessage: they are no settings.
        ConfigError: they need something that this site's file does not give.
    """
    if own.accepts != "any" and asked_hash(begin) not in own.accepts:
        raise AgainstPolicy(
            f"nobody at this site has agreed to these settings (hash {asked_hash(begin)}): they are in the "
            "site's folder asked/; whoever answers for the site adds the hash to `accepts`"
        )
    settings: dict[str, Any] = {**begin.settings, "site": own.site}
    if begin.kind == "federate":
        settings["cohort"] = str(own.prepared / begin.share / own.site)
        if begin.checkpoint and own.checkpoint is None:
            raise ConfigError("the run begins with SAM's weights: give `checkpoint` in this site's file")
        if begin.checkpoint and isinstance(settings.get("model"), dict):
            settings["model"] = {**settings["model"], "checkpoint": str(own.checkpoint)}
    else:
        settings |= {"work_dir": str(own.work_dir), "prepared": str(own.prepared / begin.share)}
        cohort = settings.get("cohort")
        if isinstance(cohort, dict) and cohort.get("source") != "phantom":
            if own.scans is None:
                raise ConfigError("real scans are asked for: give `scans` in this site's file")
            settings["cohort"] = {**cohort, "sites": {own.site: str(own.scans)}}
    try:
        spec = (SiteSpec if begin.kind == "federate" else CohortSpec).model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise MalformedMessage(f"these are no settings of this version: {line(place)}: {first['type']}") from None
    if own.site not in spec.sites:
        raise AgainstPolicy(f"site {own.site} is not among the sites of the run")
    pins = {"roster": own.roster, "key_dir": own.key_dir}
    # The roster is no matter of what the run asks: over the gateway every site pins its own.
    asked = spec.federation.model_copy(update=pins)
    federation = own.policy.model_copy(update=pins).tighten(asked)
    if begin.kind == "federate":
        federation = federation.model_copy(update={"site_dir": own.site_dir})
    return spec.model_copy(update={"federation": federation})


class DiscreetSite:
    """A plain site object of which no file or case name gets out: not in an error, not in a description."""

    def __init__(self, spec: SiteSpec | CohortSpec) -> None:
        self.spec = spec
        self._site = FederatedSite(spec) if isinstance(spec, SiteSpec) else CohortSite(spec)

    def ask(self, asked: str, keywords: dict[str, Any]) -> Any:
        """What the site's method `asked` returns.

        Raises:
            RoundError: what failed, in a line that may leave the hospital.
        """
        try:
            reply = getattr(self._site, asked)(**keywords)
        except _TELLING as error:
            raise RoundError(describe_failure(error)) from None
        except Exception as error:
            _log.exception("%s failed", asked)
            raise RoundError(f"{type(error).__name__}: the log of site {self.spec.site} says what it is") from None
        return self._without_names(reply) if asked == "describe" else reply

    def _without_names(self, reply: dict[str, Any]) -> dict[str, Any]:
        """How many cases were left out, and of what kind their faults are; which, and why, is in the site's log."""
        problems = [Problem.model_validate(problem) for problem in reply["described"]["problems"]]
        told = []
        for number, problem in enumerate(problems, start=1):
            _log.warning("%s: %s", problem.case or "the cohort", problem.reason)
            what = "a case was left out" if problem.quarantined else "a warning"
            reason = f"{number} of {len(problems)} at {self.spec.site}: {what} ({problem.kind}), its log says which"
            plain = problem.model_copy(update={"case": "", "site": self.spec.site, "reason": reason})
            told.append(plain.model_dump(mode="json"))
        spacing = list(reply["spacing"])
        return {**reply, "described": {**reply["described"], "problems": told}, "spacing": spacing, "url": ""}


Start = Callable[[SiteSpec | CohortSpec], Engine]
"""Makes the engine that a site's own work runs on: `DiscreetSite` in this process, or on the hospital's own cluster."""


class Hospital:
    """Serves one site until it is told to stop."""

    def __init__(self, own: HospitalConfig, start: Start, note: Callable[[str], None]) -> None:
        """
        Args:
            own: the site's file.
            start: see `Start`.
            note: is told what is asked of the site and what it does, in lines.

        Raises:
            FedsamError: certificate or key cannot be used.
        """
        self._own, self._start, self._note = own, start, note
        self._context = client_context(own.certificate, own.key, own.authority)
        self._process = token_hex(8)
        self._pause = _SHORTEST_PAUSE  # grows until a call gets through: a link that is made is no progress yet
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="site")  # one: torch's settings are a thread's
        self._engine: Engine | None = None
        self._received = ("", 0)  # the newest call, and what was answered to it
        self._answer: tuple[bytes, ...] | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._sending = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Dials, answers, dials again.

        Raises:
            ClusterError: another process of this site has taken over.
        """
        try:
            async with aiohttp.ClientSession() as session:
                while True:
                    try:
                        async with self._dial(session) as socket:
                            self._note(f"connected to {self._own.aggregator}")
                            await self._attend(socket)
                    except aiohttp.WSServerHandshakeError as error:
                        self._note(f"{self._own.aggregator} refuses site {self._own.site} ({error.status})")
                    except (aiohttp.ClientError, OSError) as error:
                        cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
                        self._note(f"no link to {self._own.aggregator}: {line(str(cause)) or type(cause).__name__}")
                    except MalformedMessage as error:
                        self._note(f"refused a message of the aggregator: {error}")
                    except LinkLost as lost:
                        if lost.code == REPLACED:
                            raise ClusterError(
                                f"another process serves site {self._own.site}: stop one of the two"
                            ) from None
                        self._note("the link to the aggregator was lost")
                    # Hospitals do not all come back in the same moment.
                    await asyncio.sleep(self._pause * random.uniform(0.5, 1.0))  # noqa: S311
                    self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        finally:
            self._worker.shutdown(wait=False, cancel_futures=True)

    def _dial(self, session: aiohttp.ClientSession) -> Any:
        return session.ws_connect(
            self._own.url,
            ssl=self._context,
            proxy=self._own.proxy,
            heartbeat=HEARTBEAT_SECONDS,
            max_msg_size=FRAME_LIMIT,
            headers={PROCESS_HEADER: self._process, RECEIVED_HEADER: "{}:{}".format(*self._received)},
        )

    async def _attend(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._sending = socket, asyncio.Lock()
        try:
            while True:
                message = decode(await receive(socket, self._own.max_message_bytes))
                if len(self._tasks) >= _MOST_CALLS:
                    raise MalformedMessage(f"more than {_MOST_CALLS} calls at once")
                if message.type == "call" and self._is_new(message):
                    self._received, self._answer = message.id, None
                    self._pause = _SHORTEST_PAUSE
                    self._begin_task(self._work(message))
                elif message.type in ("call", "again") and message.id == self._received:
                    self._begin_task(self._reply())  # the answer was lost on its way; if there is none yet, it comes
                else:
                    raise MalformedMessage(f"a {message.type} that is not due")
        except MalformedMessage:
            await socket.close(code=REFUSED)
            raise
        finally:
            self._socket = None

    def _is_new(self, message: Message) -> bool:
        """Whether a call was not seen before: another engine's, or a later one of the same."""
        engine, number = self._received
        return message.engine != engine or message.number > number

    async def _work(self, message: Message) -> None:
        """Does what is asked, in the worker's thread, and answers, unless something newer was asked meanwhile."""
        loop = asyncio.get_running_loop()
        kind, method = message.kind, message.method
        try:
            value = await loop.run_in_executor(self._worker, self._do, message)
            parts = encode(Message("reply", *message.id, kind, method, answer(value)))
        except FedsamError as error:
            parts = encode(Message("failure", *message.id, kind, method, {"reason": line(str(error))}))
        if message.id == self._received:
            self._answer = parts
            await self._reply()

    async def _reply(self) -> None:
        if (socket := self._socket) is not None and (parts := self._answer) is not None:
            async with self._sending:
                with suppress(ConnectionError):
                    await send(socket, parts)

    def _do(self, message: Message) -> Any:
        """The method itself. Raises FedsamError with a line that may leave the hospital."""
        site = self._own.site
        if message.method == "begin":
            return self._agree(Begin.model_validate(message.body))
        if message.method == "end":
            self._let_go()
            return self._note("the run is over; waiting for the next")
        if self._engine is None:
            raise RoundError(f"site {site} has no run under way (it may have been restarted)")
        asked = {site: {"asked": message.method, "keywords": dict(message.body)}}
        replies, lost = self._engine.call("ask", asked, _FOREVER)
        if lost:
            _log.warning("site %s does not answer %s: %s", site, message.method, lost[site])
            raise RoundError(lost[site])
        return replies[site]

    def _agree(self, begin: Begin) -> None:
        self._let_go()
        name = asked_hash(begin)
        path = self._own.work_dir / "asked" / f"{name}.yaml"
        text = yaml.safe_dump(begin.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
        self._note(f"asked to {begin.kind} run {line(str(begin.settings.get('run')))[:150]}: settings in {path}")
        try:
            spec = agreed_spec(self._own, begin)
            self._engine = self._start(spec)
        except FedsamError as error:
            self._note(f"refused: {error}")
            if isinstance(error, _TELLING):
                raise RoundError(describe_failure(error)) from None
            raise RoundError(f"{type(error).__name__}: the log of site {self._own.site} says what it is") from error
        self._note("agreed")

    def _let_go(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _begin_task(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def in_this_process(spec: SiteSpec | CohortSpec) -> Engine:
    """A plain site, without Ray."""
    return in_process([spec], DiscreetSite)


def on_own_cluster(needs: SiteNeeds, spec: SiteSpec | CohortSpec) -> Engine:
    """An actor on the Ray cluster that this process is connected to: the hospital's own."""
    nodes = cluster_nodes()
    preflight([spec.site], nodes, needs)
    return create_sites([spec], plan([spec.site], nodes, needs), DiscreetSite)
