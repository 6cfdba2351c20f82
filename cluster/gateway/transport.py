"""What aggregator and hospitals share of the wire: TLS contexts, whose certificate it is, messages in pieces.

A message of any size goes over a WebSocket as its length (u64, big endian) and pieces of at most 1 MiB. The length is
looked at before a byte is kept, and between pieces there is room for the pings that tell a dead link from a slow one.
"""

import logging
import ssl
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiohttp import ClientWebSocketResponse, WSMsgType
from aiohttp.web import WebSocketResponse

from fedsam_core.errors import ClusterError
from fedsam_core.secagg.keyfiles import read_private
from fedsam_core.secagg.refusals import MalformedMessage

Socket = ClientWebSocketResponse | WebSocketResponse

PIECE = 1 << 20
FRAME_LIMIT = PIECE + 1  # for aiohttp, which refuses what reaches it
HEARTBEAT_SECONDS = 30.0
MAX_MESSAGE_BYTES = 1 << 30
SITE_URN = "urn:fedsam:site:"
PROCESS_HEADER, RECEIVED_HEADER = "Fedsam-Process", "Fedsam-Received"
REPLACED, REFUSED = 4001, 4002  # close codes: another connection of the site took over; a message was refused

_LENGTH = struct.Struct(">Q")

_log = logging.getLogger(__name__)


class LinkLost(Exception):
    """The connection ended."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"closed with code {code}")
        self.code = code


class _LoggedHandshake(ssl.SSLObject):
    """Who fails to identify itself leaves a line: asyncio says nothing of it."""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", None) or (error.reason or str(error)).replace("_", " ").lower()
            _log.warning("refused a connection without a valid certificate: %s", reason)
            raise


def server_context(certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """TLS 1.3 that asks everybody for a certificate of `authority`. Raises ClusterError naming the file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.sslobject_class = _LoggedHandshake
    return _loaded(context, certificate, key, authority)


def client_context(certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """TLS 1.3 that shows a certificate, and trusts hosts that `authority` vouches for. Raises ClusterError."""
    return _loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, key, authority)


def _loaded(context: ssl.SSLContext, certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    read_private(key)  # refuses a key that others may read
    try:
        context.load_verify_locations(cafile=authority)
    except (OSError, ssl.SSLError) as error:
        raise ClusterError(f"{authority} is no certificate of an authority ({_reason(error)})") from error
    try:
        # A key that asks for a passphrase would otherwise stop at a prompt that nobody sees.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except (OSError, ssl.SSLError) as error:
        raise ClusterError(f"{certificate} and {key} are no certificate and its key ({_reason(error)})") from error
    return context


def site_of(certificate: Any) -> str | None:
    """The site that a verified certificate (`getpeercert()`) names; None where it names none, or several."""
    names = [value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind == "URI"]
    sites = [name.removeprefix(SITE_URN) for name in names if name.startswith(SITE_URN)]
    return sites[0] if len(sites) == 1 else None


async def send(socket: Socket, parts: Sequence[bytes]) -> None:
    """Sends one message, which comes in parts. Raises ConnectionError where the link is lost."""
    await socket.send_bytes(_LENGTH.pack(sum(map(len, parts))))
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(part), PIECE):
            await socket.send_bytes(bytes(view[start : start + PIECE]))


async def receive(socket: Socket, limit: int) -> bytes:
    """The next message.

    Raises:
        MalformedMessage: it is larger than `limit`, or is none.
        LinkLost: the connection ended.
    """
    first = await _piece(socket)
    if len(first) != _LENGTH.size:
        raise MalformedMessage("a message does not begin with its length")
    (length,) = _LENGTH.unpack(first)
    if length > limit:
        raise MalformedMessage(f"a message of {length} bytes is over the limit of {limit} (max_message_bytes)")
    pieces, size = [], 0
    while size < length:
        pieces.append(await _piece(socket))
        size += len(pieces[-1])
        if not pieces[-1] or size > length:
            raise MalformedMessage("a message is longer than it says, or has an empty piece")
    return b"".join(pieces)


async def _piece(socket: Socket) -> bytes:
    message = await socket.receive()
    if message.type is WSMsgType.BINARY:
        return bytes(message.data)
    if message.type is WSMsgType.TEXT:
        raise MalformedMessage("a message is text")
    # What the other side said as it closed; aiohttp's own code is of how the closing went.
    raise LinkLost(message.data if message.type is WSMsgType.CLOSE else socket.close_code)


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
