"""The byte ledger: what crossed the wire, counted on the serialized messages."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Direction = Literal["up", "down"]


@dataclass(frozen=True)
class Entry:
    """Bytes of one message.

    Attributes:
        site: the site that sent or received it.
        direction: "up" from the site, "down" to it.
        round: 0 before the first round.
        purpose: what it carried, such as "update/masked_input" or "update/state".
        bytes: length of the serialized message.
    """

    site: str
    direction: Direction
    round: int
    purpose: str
    bytes: int


class Ledger:
    """Every message of a run."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def add(self, site: str, direction: Direction, round_number: int, purpose: str, size: int) -> None:
        """Counts one message of `size` bytes."""
        self._entries.append(Entry(site, direction, round_number, purpose, size))

    def total(
        self, direction: Direction | None = None, round_number: int | None = None, purpose: str | None = None
    ) -> int:
        """Bytes of the entries that match; `purpose` matches by prefix."""
        return sum(
            e.bytes
            for e in self._entries
            if (direction is None or e.direction == direction)
            and (round_number is None or e.round == round_number)
            and (purpose is None or e.purpose.startswith(purpose))
        )

    def rows(self) -> list[dict[str, str | int]]:
        """The entries as flat dictionaries, for a table."""
        return [vars(e).copy() for e in self._entries]  # `asdict` takes ten times as long, and rounds add up

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Goes on from the rows of a run that was left off. Raises TypeError for others."""
        self._entries = [Entry(**row) for row in rows]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
