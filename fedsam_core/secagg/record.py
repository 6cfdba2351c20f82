"""The record of a run: a chain of entries, each of which holds the hash of the one before.

An entry is one line of canonical JSON. Who changes a line must change all that follow, and the last hash, the *head*,
is kept elsewhere too (in the checkpoint, in MLflow, with anyone who cares to write it down). The entry of a sum holds
for each message a site's signature and what the signature is over, so that anyone can check who took part and what they
signed, without a message that would say more than the sum.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from fedsam_core.errors import SecureSumError
from fedsam_core.secagg.messages import Message

GENESIS = "0" * 64
"""What the first entry names as the one before it."""


class BrokenRecord(SecureSumError):
    """A record that was changed after it was written, or is none."""


@dataclass(frozen=True)
class Received:
    """A site's message as the aggregator took it.

    Attributes:
        site: who sent it.
        kind: the message's type.
        bytes: its length.
        header: hex; says kind, sender, attempt and length.
        digest: SHA-256 (hex) of the body.
        signature: of both (`messages.seal`), hex.
        message: all of it (hex) where the checks need more than its digest: keys and confirmations. Never of a vector
            or a share.
    """

    site: str
    kind: str
    bytes: int
    header: str
    digest: str
    signature: str
    message: str | None = None


def received(site: str, data: bytes, message: Message, keep: bool = False) -> Received:
    """What is recorded of a message."""
    return Received(
        site=site,
        kind=type(message.body).__name__,
        bytes=len(data),
        header=message.header.hex(),
        digest=message.digest.hex(),
        signature=message.signature.hex(),
        message=data.hex() if keep else None,
    )


class Chain:
    """The lines of a record, as they are added."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.head = GENESIS

    def restore(self, lines: Iterable[bytes]) -> None:
        """Goes on with the lines of a record. Raises BrokenRecord where they are none."""
        kept = list(lines)
        _, self.head = read_chain(kept)
        self.lines = kept

    def add(self, kind: str, **fields: Any) -> None:
        """One entry. `fields` are JSON values; a list of `Received` is taken as it is."""
        if "messages" in fields:
            fields["messages"] = [asdict(one) for one in fields["messages"]]
        entry = {"sequence": len(self.lines), "previous": self.head, "kind": kind, **fields}
        line = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
        self.lines.append(line)
        self.head = sha256(line).hexdigest()


def read_chain(lines: Iterable[bytes]) -> tuple[list[dict[str, Any]], str]:
    """The entries of a record, and its head.

    Raises:
        BrokenRecord: names the first line that is no entry, out of order, or does not continue the one before it.
    """
    entries: list[dict[str, Any]] = []
    head = GENESIS
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            sequence, previous, _ = entry["sequence"], entry["previous"], entry["kind"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BrokenRecord(f"line {number} of the record is no entry: it was damaged") from error
        if previous != head or sequence != number - 1:
            raise BrokenRecord(
                f"line {number} of the record does not continue line {number - 1}: one of them was changed, or a line "
                "is missing"
            )
        entries.append(entry)
        head = sha256(line).hexdigest()
    if not entries:
        raise BrokenRecord("the record is empty")
    return entries, head
