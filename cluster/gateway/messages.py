"""The closed set of messages between aggregator and hospitals, and their binary form. Nothing here is ever unpickled.

A message is a head in JSON, then the byte strings that it names, one after the other:

    4 bytes "FSGW", u8 version, u32 length of the head (big endian)
    head: {"type", "engine", "number", "method", "body": {...}, "bytes": [[name, length], ...]}

`call` asks a site for a method, `reply` and `failure` answer it, and `again` asks for an answer that was lost on its
way. Which methods there are, what they are asked with and what they answer stands in `METHODS`; all else is refused
here, before a site or the driver sees it. `decode` raises MalformedMessage and nothing else, whatever the bytes.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from fedsam_core.data.cohort import Cohort
from fedsam_core.data.preprocess import PreprocessConfig
from fedsam_core.data.sources import Modality, Problem, Split
from fedsam_core.data.survey import BINS, PLANES
from fedsam_core.federation.tasks import Task
from fedsam_core.secagg.refusals import MalformedMessage

MAGIC, VERSION = b"FSGW", 1
HEAD_LIMIT = 1 << 20  # bytes of JSON
DEPTH_LIMIT = 16  # levels of lists and tables in it
LINE_LIMIT = 500  # characters of a reason

_PREFIX = struct.Struct(">4sBI")

Kind = Literal["federate", "prepare"]
"""What a site is begun for: a run's rounds, or the preparation of its share."""


class _Fields(BaseModel):
    """Keywords or an answer: unknown fields, other types, infinity and NaN are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Nothing(_Fields):
    """No keyword, or an answer of None."""


class Value(_Fields):
    """An answer that is a byte string."""

    value: bytes


class Begin(_Fields):
    """What a site is to take part in. Places are the site's own: none of them stands in the settings."""

    kind: Kind
    settings: dict[str, JsonValue]
    share: str = Field(pattern=r"^\w[\w.-]{0,200}$")
    """Names the prepared share below the site's own folder of shares."""
    checkpoint: bool
    """Whether the model begins with the weights of a file."""


class Enroll(_Fields):
    roster: dict[str, str]


class Advertise(_Fields):
    attempt: bytes
    task: Task


class Share(_Fields):
    advertised: bytes


class Delivered(_Fields):
    delivered: bytes


class Answered(_Fields):
    state_hash: str


class Known(_Fields):
    attempt: int = Field(ge=0)
    opened: dict[str, list[str]]
    kept: list[int] | None


class FromState(Delivered):
    state: bytes | None
    step: bytes | None = None
    counted: int | None = Field(None, ge=0)


class Project(Delivered):
    basis: bytes


class Confirm(_Fields):
    survivors: bytes


class Unmask(_Fields):
    confirmations: bytes


class Disclose(_Fields):
    picture: bool


class Disclosed(_Fields):
    summary: dict[str, JsonValue] | None
    picture: bytes | None


class Opened(_Fields):
    identity: str
    layout_hash: str
    weights_hash: str
    state_hash: str
    roster_hash: str
    device: str = Field(max_length=200)
    precision: Literal["bf16", "fp32"]


class Pinned(_Fields):
    identity: str
    roster_hash: str


class Advance(_Fields):
    seconds: float = Field(ge=0, le=60)


class Advanced(_Fields):
    finished: bool
    stage: str = Field(max_length=200)
    done: int
    total: int


class Prepare(_Fields):
    config: PreprocessConfig


class LeaveOut(_Fields):
    problems: list[Problem]


class Scan(_Fields):
    """As `fedsam_core.data.findings.Compared`."""

    id: str
    site: str
    split: Split | None
    content: str
    label_content: str


class Contents(_Fields):
    value: list[Scan]


class PreparedState(_Fields):
    modality: Modality
    config: PreprocessConfig | None


class Told(_Fields):
    planes: list[int] = Field(min_length=len(PLANES), max_length=len(PLANES))
    histogram: list[int] = Field(min_length=BINS, max_length=BINS)


class Described(_Fields):
    described: Cohort
    config: PreprocessConfig
    hash: str
    cases: dict[str, int]
    spacing: list[float] = Field(min_length=3, max_length=3)
    url: Literal[""]
    """Where a site keeps its share is its own affair."""


_SUM: dict[str, tuple[type[_Fields], type[_Fields]]] = {
    "enroll": (Enroll, Nothing),
    "advertise": (Advertise, Value),
    "share": (Share, Value),
    "confirm": (Confirm, Value),
    "unmask": (Unmask, Value),
}
_LIFE: dict[str, tuple[type[_Fields], type[_Fields]]] = {"begin": (Begin, Nothing), "end": (Nothing, Nothing)}

METHODS: dict[Kind, dict[str, tuple[type[_Fields], type[_Fields]]]] = {
    "federate": {
        **_LIFE,
        **_SUM,
        "open": (Nothing, Opened),
        "answered": (Answered, Known),
        "weigh": (Delivered, Value),
        "fit": (FromState, Value),
        "project": (Project, Value),
        "score": (FromState, Value),
        "disclose": (Disclose, Disclosed),
    },
    "prepare": {
        **_LIFE,
        **_SUM,
        "open": (Nothing, Pinned),
        "survey": (Delivered, Value),
        "read": (Nothing, Nothing),
        "count": (Nothing, Nothing),
        "prepare": (Prepare, Nothing),
        "advance": (Advance, Advanced),
        "stop": (Nothing, Nothing),
        "state": (Nothing, PreparedState),
        "contents": (Nothing, Contents),
        "leave_out": (LeaveOut, Nothing),
        "tell": (Nothing, Told),
        "describe": (Nothing, Described),
    },
}
"""By kind and method: what it is asked with, and what it answers."""


@dataclass(frozen=True)
class Message:
    """A message between aggregator and site.

    Attributes:
        type: "call", "reply", "failure" or "again".
        engine: id of the aggregator's engine, 16 hex digits, drawn for each run.
        number: of the call, counted upwards by the engine.
        kind: what the site is begun for.
        method: of the call, in all its answers too.
        body: keywords of a call, an answer as `answer` gives it, or {"reason": LINE} of a failure; checked.
    """

    type: Literal["call", "reply", "failure", "again"]
    engine: str
    number: int
    kind: Kind
    method: str
    body: Mapping[str, Any]

    @property
    def id(self) -> tuple[str, int]:
        """Tells calls apart: an engine counts its own, and its id is drawn."""
        return self.engine, self.number


class _Head(_Fields):
    type: Literal["call", "reply", "failure", "again"]
    engine: str = Field(pattern=r"^[0-9a-f]{16}$")
    number: int = Field(ge=1)
    kind: Kind
    method: str = Field(max_length=40)
    body: dict[str, JsonValue]
    bytes: list[tuple[str, int]]


class _Reason(_Fields):
    reason: str = Field(max_length=LINE_LIMIT)


def encode(message: Message) -> tuple[bytes, ...]:
    """The bytes of a message, in parts: its byte strings are not copied. Raises MalformedMessage for one that the other
    side would refuse."""
    strings = {name: value for name, value in message.body.items() if isinstance(value, bytes)}
    rest = {name: value for name, value in message.body.items() if name not in strings}
    about = {name: getattr(message, name) for name in ("type", "engine", "number", "kind", "method")}
    head = {**about, "body": rest, "bytes": [(name, len(value)) for name, value in strings.items()]}
    try:
        text = json.dumps(head, default=_plain, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise MalformedMessage(f"{message.method} has values that no message carries ({error})") from error
    _head(text)
    _check(message)
    return (_PREFIX.pack(MAGIC, VERSION, len(text)) + text, *strings.values())


def decode(data: bytes) -> Message:
    """The message of exactly these bytes.

    Raises:
        MalformedMessage: what is wrong with it, in a line that quotes nothing of it.
    """
    view = memoryview(data)
    if len(view) < _PREFIX.size:
        raise MalformedMessage("a message is cut off")
    magic, version, size = _PREFIX.unpack(view[: _PREFIX.size])
    if magic != MAGIC or version != VERSION:
        raise MalformedMessage(f"no message of version {VERSION} of the gateway: both sides must run one version")
    if size > len(view) - _PREFIX.size:
        raise MalformedMessage("the head of a message is cut off")
    at = _PREFIX.size + size
    head = _head(bytes(view[_PREFIX.size : at]))
    body: dict[str, Any] = dict(head.body)
    for name, length in head.bytes:
        if name in body or not 0 <= length <= len(view) - at:
            raise MalformedMessage("a message is cut off, or names a byte string twice")
        body[name] = bytes(view[at : at + length])
        at += length
    if at != len(view):
        raise MalformedMessage("a message has bytes left over")
    message = Message(head.type, head.engine, head.number, head.kind, head.method, body)
    _check(message)
    return message


def answer(value: Any) -> dict[str, Any]:
    """What a site's method returned, as the body of a reply."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {"value": value}


def answered(message: Message) -> Any:
    """The inverse of `answer`."""
    if METHODS[message.kind][message.method][1] is Nothing:
        return None
    return message.body["value"] if set(message.body) == {"value"} else dict(message.body)


def line(text: str) -> str:
    """A reason as it may stand in a log: one line, printable, bounded."""
    flat = " ".join(text.split())
    return "".join(char if char.isprintable() else "?" for char in flat)[:LINE_LIMIT]


def _head(text: bytes) -> _Head:
    if len(text) > HEAD_LIMIT:
        raise MalformedMessage(f"the head of a message has {len(text)} bytes, over the limit of {HEAD_LIMIT}")
    try:
        tree = json.loads(text)
        if _depth(tree) > DEPTH_LIMIT:
            raise ValueError("nested too deeply")
        tree["bytes"] = [tuple(pair) for pair in tree["bytes"]]  # JSON has no tuples, which strict types ask for
        return _Head.model_validate(tree)
    except (ValueError, TypeError, KeyError, RecursionError) as error:  # pydantic's and json's are ValueErrors
        raise MalformedMessage(f"the head of a message is malformed ({_why(error)})") from None


def _check(message: Message) -> None:
    """Refuses a method that is not in the list, and a body that does not fit it."""
    known = METHODS[message.kind].get(message.method)
    if known is None:
        raise MalformedMessage(f"{message.kind} has no method {line(message.method)!r}")
    by_type: dict[str, type[_Fields]] = {"call": known[0], "reply": known[1], "failure": _Reason, "again": Nothing}
    try:
        by_type[message.type].model_validate(_listed(message.body))
    except (ValidationError, RecursionError) as error:
        raise MalformedMessage(f"a message about {message.method} is malformed ({_why(error)})") from None


def _listed(body: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays as the lists that they travel as."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in body.items()}


def _plain(value: Any) -> Any:
    """Counts are arrays where they are made."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu":
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is carried by no message")


def _depth(tree: Any) -> int:
    """Levels of lists and tables, without recursion: what is measured may be made to overflow it."""
    deepest, level = 0, [tree]
    while level and deepest <= DEPTH_LIMIT:
        inner = [one for one in level if isinstance(one, (dict, list))]
        deepest += bool(inner)
        level = [value for one in inner for value in (one.values() if isinstance(one, dict) else one)]
    return deepest


def _why(error: Exception) -> str:
    """What is wrong, and where; never the value, which may be anything."""
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        return line(f"{'.'.join(str(part) for part in first['loc'])}: {first['type']}")[:120]
    return type(error).__name__
