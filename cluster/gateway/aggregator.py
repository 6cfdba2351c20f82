"""The aggregator's end of the gateway: hospitals dial in, and an engine puts its calls to them.

Sites are told apart by their certificates alone. Of a site there is one connection, the newest: an older one may be a
dead link that nobody has noticed yet, and whoever opens a new one holds the site's certificate all the same. A call is
put to one process of a site and answered by that process or not at all: one that was restarted has lost its memory.

Everything below `Gateway` and `GatewayEngine` runs in one event loop, in a thread of its own.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any, Self, TypeVar

from aiohttp import web
from pydantic import Field

from cluster.gateway.messages import Kind, Message, answered, decode, encode, line
from cluster.gateway.transport import (
    FRAME_LIMIT,
    HEARTBEAT_SECONDS,
    MAX_MESSAGE_BYTES,
    PROCESS_HEADER,
    RECEIVED_HEADER,
    REFUSED,
    REPLACED,
    LinkLost,
    receive,
    send,
    server_context,
    site_of,
)
from fedsam_core.errors import ClusterError, ConfigError, FedsamError
from fedsam_core.federation.engine import OnAnswer, describe_wait
from fedsam_core.secagg.refusals import MalformedMessage
from fedsam_core.settings import Settings

_log = logging.getLogger(__name__)

_END_SECONDS = 5.0  # what a site has to take note that a run is over
_AGAIN_SECONDS = 0.5  # from a lost connection to the next try of a call that nobody waits for

T = TypeVar("T")


class GatewayConfig(Settings):
    """Where hospitals dial in, and who vouches for them. See docs/gateway.md."""

    listen: str = Field("0.0.0.0:8443", description="address and port that sites dial")
    certificate: Path | None = Field(None, description="the aggregator's certificate (`fedsam gateway`), PEM")
    key: Path | None = Field(None, description="its private key, PEM, mode 0600")
    authority: Path | None = Field(None, description="certificate of whoever signed the sites' certificates, PEM")
    wait_s: float = Field(3600.0, gt=0, description="seconds to wait for all sites before a run")
    patience_s: float = Field(
        30.0, gt=0, description="seconds in which a site whose link was lost may come back and still be asked"
    )
    max_message_bytes: int = Field(
        MAX_MESSAGE_BYTES, ge=1 << 16, description="a longer message is refused before any of it is kept"
    )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `listen`. Raises ConfigError."""
        host, _, port = self.listen.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"engine.gateway.listen={self.listen} is no address: write HOST:PORT")
        return host.strip("[]"), int(port)

    def files(self) -> tuple[Path, Path, Path]:
        """Certificate, key, authority. Raises ConfigError where one is not given."""
        given = {"certificate": self.certificate, "key": self.key, "authority": self.authority}
        if missing := [name for name, path in given.items() if path is None]:
            raise ConfigError(
                f"engine.kind=gateway needs engine.gateway.{missing[0]}: `fedsam gateway --help` says how it is made"
            )
        return self.certificate, self.key, self.authority  # type: ignore[return-value]


@dataclass
class _Pending:
    """A call that a process of a site has yet to answer."""

    message: Message
    parts: tuple[bytes, ...]
    reply: "asyncio.Future[Any]"


@dataclass
class _Link:
    """A site as the aggregator knows it. `process` is the one that was last connected, even when the link is lost."""

    site: str
    process: str = ""
    socket: web.WebSocketResponse | None = None
    pending: _Pending | None = None
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)  # of this socket: messages are not mixed
    connected: asyncio.Event = field(default_factory=asyncio.Event)
    patient_until: float = 0.0  # of the loop's clock: how long a lost link is waited for
    given_up: asyncio.TimerHandle | None = None


class _Lost(Exception):
    """Why a call has no answer, in a line."""


class _Gone(_Lost):
    """It is the connection or the process that is lost: the site itself has said nothing."""


class Gateway:
    """Listens for sites from `with` on, until the end of it."""

    def __init__(self, config: GatewayConfig, sites: Sequence[str]) -> None:
        """`sites`: whose connections are taken. Nothing is opened yet."""
        self._config = config
        self.sites = tuple(sorted(sites))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway", daemon=True)
        self._links = {site: _Link(site) for site in self.sites}
        self._tasks: set[asyncio.Task[None]] = set()
        self._runner: web.AppRunner | None = None
        self.address = ("", 0)

    def __enter__(self) -> Self:
        """Starts to listen.

        Raises:
            ConfigError: a certificate, its key or the authority is not given or cannot be used.
            ClusterError: the address cannot be listened on.
        """
        host, port = self._config.address
        context = server_context(*self._config.files())
        self._thread.start()
        try:
            self._in_loop(self._listen(host, port, context))
        except OSError as error:
            self.__exit__()
            raise ClusterError(
                f"cannot listen on {self._config.listen} ({error.strerror}): free it, or set engine.gateway.listen"
            ) from error
        return self

    def __exit__(self, *exc: object) -> None:
        if self._runner is not None:
            self._in_loop(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def wait(self, progress: Callable[[Sequence[str]], None]) -> None:
        """Waits until all sites are connected; `progress` is told which are missing, whenever that changes.

        Raises:
            ClusterError: some are not within `wait_s`.
        """
        end = time.monotonic() + self._config.wait_s
        told: tuple[str, ...] | None = None
        while missing := tuple(site for site, link in self._links.items() if not link.connected.is_set()):
            if missing != told:
                progress(missing)
                told = missing
            if time.monotonic() > end:
                raise ClusterError(
                    f"site {', '.join(missing)} did not dial in within {self._config.wait_s:g} s: have "
                    "`fedsam site serve` started there, and see this log and the site's for what was refused"
                )
            time.sleep(0.1)
        progress(())

    def engine(self, kind: Kind, beginnings: Mapping[str, Mapping[str, Any]]) -> "GatewayEngine":
        """An engine whose sites are begun for a run, or for preparing, before the first call that reaches them.

        Args:
            beginnings: by site the keywords of `begin` beside the kind.
        """
        return GatewayEngine(self, kind, {site: {"kind": kind, **beginnings[site]} for site in sorted(beginnings)})

    async def _listen(self, host: str, port: int, context: Any) -> None:
        app = web.Application()
        app.router.add_get("/v1/sites/{site}", self._admit)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port, ssl_context=context).start()
        bound = self._runner.addresses[0]
        self.address = (bound[0], bound[1])

    async def _admit(self, request: web.Request) -> web.StreamResponse:
        """Takes a connection whose certificate is that of the site it speaks for; reads it until it ends."""
        claimed = request.match_info["site"]
        ssl_object = request.transport.get_extra_info("ssl_object") if request.transport else None
        owner = site_of(ssl_object.getpeercert()) if ssl_object else None
        process = request.headers.get(PROCESS_HEADER, "")
        if owner != claimed or claimed not in self._links or not process.isalnum() or len(process) > 64:
            why = (
                f"it holds the certificate of {line(owner or 'no site')!r}"
                if owner != claimed
                else "it names no process"
                if claimed in self._links
                else "it is no site of this run"
            )
            _log.warning("refused a connection of %s as site %r: %s", request.remote, line(claimed)[:128], why)
            raise web.HTTPForbidden(text=why)
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT_SECONDS, compress=False, max_msg_size=FRAME_LIMIT)
        await socket.prepare(request)
        link = self._links[claimed]
        before, link.socket, link.sending = link.socket, socket, asyncio.Lock()
        if before is not None:
            _log.warning("site %s has connected anew: its older connection is closed", claimed)
            self._start(self._close(before, REPLACED))
        self._connected(link, process, request.headers.get(RECEIVED_HEADER, ""))
        try:
            while True:
                self._received(link, socket, decode(await receive(socket, self._config.max_message_bytes)))
        except MalformedMessage as error:
            _log.warning("refused a message of site %s: %s", claimed, error)
            if link.socket is socket:
                self._fail(link, _Lost(describe(error)))
            await self._close(socket, REFUSED)
        except LinkLost as error:
            _log.warning("the link to site %s was lost (%s)", claimed, error)
        finally:
            if link.socket is socket:
                self._disconnected(link)
        return socket

    def _connected(self, link: _Link, process: str, received: str) -> None:
        if link.given_up is not None:
            link.given_up.cancel()
            link.given_up = None
        if process != link.process:
            link.process = process
            self._fail(link, _Gone("its process was restarted"))
        link.connected.set()
        if (pending := link.pending) is not None:
            # The link was lost in the middle of a call. The process may have it, or even have answered it.
            has_it = received == "{}:{}".format(*pending.message.id)
            again = Message("again", *pending.message.id, pending.message.kind, pending.message.method, {})
            self._start(self._send(link, encode(again) if has_it else pending.parts))

    def _disconnected(self, link: _Link) -> None:
        link.socket = None
        link.connected.clear()
        patience = self._config.patience_s
        link.patient_until = self._loop.time() + patience
        link.given_up = self._loop.call_at(
            link.patient_until,
            self._fail,
            link,
            _Gone(f"its link was lost, and it did not come back within {patience:g} s"),
        )

    async def _present(self, link: _Link, end: float) -> bool:
        """Whether the site is connected, or comes back while it is waited for."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(min(end, link.patient_until)):
                await link.connected.wait()
        return link.connected.is_set()

    def _received(self, link: _Link, socket: web.WebSocketResponse, message: Message) -> None:
        pending = link.pending
        if message.type not in ("reply", "failure"):
            raise MalformedMessage(f"a site sends no {message.type}")
        if link.socket is not socket or pending is None or message.id != pending.message.id:
            return  # an answer that nobody waits for any more, or a second copy of one
        if (message.kind, message.method) != (pending.message.kind, pending.message.method):
            raise MalformedMessage(f"an answer to {message.method}, where {pending.message.method} was asked")
        link.pending = None
        if message.type == "reply":
            _resolve(pending.reply, answered(message))
        else:
            _resolve(pending.reply, _Lost(line(message.body["reason"])))

    def _fail(self, link: _Link, why: _Lost) -> None:
        if link.pending is not None:
            pending, link.pending = link.pending, None
            _resolve(pending.reply, why)

    async def _ask(self, link: _Link, message: Message, end: float) -> Any:
        """The answer to a call. Raises _Lost; until `end` (of the loop's clock) it is waited for."""
        while link.pending is not None:  # nothing else is asked before
            await asyncio.wait([link.pending.reply])
        if not await self._present(link, end):
            raise _Gone("is not connected")
        link.pending = pending = _Pending(message, encode(message), self._loop.create_future())
        self._start(self._send(link, pending.parts))
        await asyncio.wait([pending.reply])
        result = pending.reply.result()
        if isinstance(result, _Lost):
            raise result
        return result

    async def _send(self, link: _Link, parts: tuple[bytes, ...]) -> None:
        """Sends on the present connection; one that ends meanwhile is made up for when the site is back."""
        if (socket := link.socket) is not None:
            async with link.sending:
                with suppress(ConnectionError):
                    await send(socket, parts)

    async def _close(self, socket: web.WebSocketResponse, code: int) -> None:
        with suppress(ConnectionError, RuntimeError):
            await socket.close(code=code)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _in_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs in the gateway's loop, and waits for it."""
        running: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return running.result()


class GatewayEngine:
    """Carries calls to hospitals that have dialled in; fulfills `fedsam_core.federation.engine.Engine`."""

    def __init__(self, gateway: Gateway, kind: Kind, beginnings: Mapping[str, Mapping[str, Any]]) -> None:
        self._gateway, self._kind, self._beginnings = gateway, kind, dict(beginnings)
        self._id = token_hex(8)
        self._number = 0
        self._begun: dict[str, str] = {}  # the process of each site that knows what the run is about
        self._polls: dict[str, asyncio.Task[Any]] = {}  # calls that nobody waits for

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self._beginnings)

    def share(self, value: Any) -> Any:
        return value

    def call(
        self,
        method: str,
        args: Mapping[str, Mapping[str, Any]],
        deadline: float,
        on_answer: OnAnswer | None = None,
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Calls `method` at the sites named in `args` at once; see the protocol.

        A site that misses the deadline is lost for this call only: its late answer is ignored, and it is asked nothing
        else until then. One that is not connected, or whose link is lost, has `patience_s` to come back.
        """
        return self._gateway._in_loop(self._call(method, args, deadline, on_answer))

    def poll(
        self, method: str, args: Mapping[str, Mapping[str, Any]], seconds: float
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Calls sites that nobody waits for, once they are connected; see the protocol."""
        return self._gateway._in_loop(self._poll(method, args, seconds))

    def silent(self, site: str) -> bool:
        link = self._gateway._links[site]
        return link.pending is not None or not link.connected.is_set()

    def restart(self, site: str) -> None:
        """Nothing: a hospital's process is the hospital's to end."""

    def close(self) -> None:
        """Tells the sites that they are done; they stay connected for what may come next."""
        done: dict[str, dict[str, Any]] = {
            site: {} for site in self._begun if self._gateway._links[site].connected.is_set()
        }
        for poll in self._polls.values():
            self._gateway._loop.call_soon_threadsafe(poll.cancel)
        self._polls.clear()
        if done:
            self.call("end", done, _END_SECONDS)
        self._begun.clear()

    async def _call(
        self, method: str, args: Mapping[str, Mapping[str, Any]], deadline: float, on_answer: OnAnswer | None
    ) -> tuple[dict[str, Any], dict[str, str]]:
        loop, first = self._gateway._loop, self._number
        begun = loop.time()
        end = begun + deadline
        asked = {
            loop.create_task(self._call_one(site, method, args[site], end, self._polls.pop(site, None))): site
            for site in sorted(args)
        }
        replies: dict[str, Any] = {}
        lost: dict[str, str] = {}
        while asked:
            left = max(0.0, end - loop.time())
            done, _ = await asyncio.wait(asked, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            for site, task in sorted((asked.pop(task), task) for task in done):
                _sort(site, task, replies, lost)
                if site in replies and on_answer is not None:
                    end = min(end, begun + on_answer(site, loop.time() - begun))
        allowed = describe_wait(begun, end, deadline)
        for task, site in asked.items():
            task.cancel()
            lost[site] = self._missed(site, first, allowed)
        return {site: replies[site] for site in sorted(replies)}, {site: lost[site] for site in sorted(lost)}

    async def _call_one(
        self,
        site: str,
        method: str,
        keywords: Mapping[str, Any],
        end: float,
        poll: "asyncio.Task[Any] | None" = None,
    ) -> Any:
        """The site's answer, after that to a poll. Raises _Lost; ended from outside where it comes too late."""
        gateway, link = self._gateway, self._gateway._links[site]
        if poll is not None:
            await asyncio.wait([poll])
        if await gateway._present(link, end) and self._begun.get(site) != (process := link.process):
            await gateway._ask(link, self._message("begin", self._beginnings[site]), end)
            self._begun[site] = process
        return await gateway._ask(link, self._message(method, keywords), end)

    def _missed(self, site: str, first: int, allowed: str) -> str:
        """Why a site has not answered a call whose messages have numbers from `first` on."""
        pending = self._gateway._links[site].pending
        if pending is None:
            return "is not connected"
        method = pending.message.method
        if pending.message.engine == self._id and pending.message.number > first:
            return f"no answer to {method} within {allowed}"
        return f"still busy with an earlier {method} after {allowed}"

    async def _poll(
        self, method: str, args: Mapping[str, Mapping[str, Any]], seconds: float
    ) -> tuple[dict[str, Any], dict[str, str]]:
        for site in sorted(args):
            if site not in self._polls:
                self._polls[site] = self._gateway._loop.create_task(self._poll_one(site, method, args[site]))
        asked = {self._polls[site]: site for site in args}
        replies: dict[str, Any] = {}
        lost: dict[str, str] = {}
        done, _ = await asyncio.wait(asked, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            del self._polls[asked[task]]
            _sort(asked[task], task, replies, lost)
        return replies, lost

    async def _poll_one(self, site: str, method: str, keywords: Mapping[str, Any]) -> Any:
        """The site's answer, however often its link or process is lost meanwhile."""
        while True:
            await self._gateway._links[site].connected.wait()
            try:
                return await self._call_one(site, method, keywords, math.inf)
            except _Gone:
                await asyncio.sleep(_AGAIN_SECONDS)

    def _message(self, method: str, keywords: Mapping[str, Any]) -> Message:
        self._number += 1
        return Message("call", self._id, self._number, self._kind, method, dict(keywords))


def describe(error: MalformedMessage) -> str:
    """As the driver's tables have refusals."""
    return f"{type(error).__name__}: {error}"


def _resolve(reply: "asyncio.Future[Any]", result: Any) -> None:
    if not reply.done():
        reply.set_result(result)


def _sort(site: str, task: "asyncio.Task[Any]", replies: dict[str, Any], lost: dict[str, str]) -> None:
    """Puts what came of a call into one of the two."""
    try:
        replies[site] = task.result()
    except (_Lost, FedsamError) as error:
        lost[site] = str(error)
