"""What a site keeps from one round to the next, on its own node.

Local layers, optimiser state, a control variate (SCAFFOLD), what its noise is drawn from: such values belong to one
site, are never sent and are in no checkpoint of the driver's. So that a round that is repeated starts from what it
started from, the states after earlier rounds are kept beside the newest one. Three of them: a driver announces a round
when the one before is committed, and one that resumes goes back behind that round only if its checkpoint is damaged. A
round that is saved ends all later ones: they follow from a course that the run has left.

What a round's training gave is *held* before the update leaves, and kept once the update is in a sum: a site that is
lost in between does not know whether it is, and is told in the next round (`settle`).

    FOLDER/held-000005.safetensors     the same, of the round that is not settled
    FOLDER/settled.json                by round for which it was settled, the last round that counted then
    FOLDER/given.json                  by round, SHA-256 of the update that was given with noise
    FOLDER/round-000004.safetensors    mode 0600 in a folder of mode 0700; arrays by name, any dtype that numpy and
                                       safetensors share; in the header `layout_hash`, and `sha256` over it and names,
                                       dtypes, shapes and values

The values derive from the site's patients, as the keys do not: the folder is no place to share.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedsam_core.data.files import write_atomic, write_failed
from fedsam_core.errors import CheckpointError, DataError
from fedsam_core.federation.sealed import Array, seal, unseal

_log = logging.getLogger(__name__)

KEPT = 3  # rounds: the one under way, the one that it goes on from, and the one before, should that be damaged

_FILE = re.compile(r"round-(\d{6,})\.safetensors")
_SETTLED, _GIVEN = "settled.json", "given.json"
_HELD = re.compile(r"held-(\d{6,})\.safetensors")


class SiteMemory:
    """Named arrays by round, the newest rounds of them. Arrays are copied on their way in and out."""

    def __init__(self, folder: Path | None, layout_hash: str) -> None:
        """
        Args:
            folder: for one site in one run, and nothing else; made where it is missing, closed to other users. None
                keeps everything in RAM.
            layout_hash: of the manifest that the arrays belong to.

        Raises:
            CheckpointError: the folder holds a damaged file, or the memory of another layout.
            DataError: the folder cannot be used.
        """
        self._folder = folder
        self._layout_hash = layout_hash
        self._in_ram: dict[int, dict[str, Array]] = {}
        self._held_in_ram: dict[int, dict[str, Array]] = {}  # of one round, at most
        self._noted_in_ram: dict[str, dict[int, Any]] = {_SETTLED: {}, _GIVEN: {}}
        if folder is not None:
            try:
                close_folder(folder)
                for kind in ("round", "held"):
                    for unfinished in folder.glob(f".{kind}-*.tmp"):  # of a process that was killed while it wrote
                        unfinished.unlink()
            except OSError as error:
                raise write_failed(folder, error) from error
            for number in self.rounds:
                self._read(self._path(folder, number))

    @property
    def rounds(self) -> tuple[int, ...]:
        """Numbers of the rounds that are kept, upwards."""
        return self._numbers(_FILE) if self._folder is not None else tuple(sorted(self._in_ram))

    def save(self, round: int, arrays: Mapping[str, Array]) -> None:
        """Keeps the state after a round, in place of what was kept of it and of later rounds.

        Raises:
            DataError: the disk refuses; what was kept of this and earlier rounds is still there.
        """
        for later in self.rounds:
            if later > round:
                self._remove(later)
        if self._folder is None:
            self._in_ram[round] = _copies(arrays)
        else:
            self._write(self._path(self._folder, round), arrays)
        self._forget_old()

    def hold(self, round: int, arrays: Mapping[str, Array]) -> None:
        """Sets aside what a round's training gave, until it is known whether it counts. Raises as `save`."""
        for other in self._held:
            if other != round:
                self._remove_held(other)
        if self._folder is None:
            self._held_in_ram = {round: _copies(arrays)}
        else:
            self._write(self._path(self._folder, round, "held"), arrays)

    def keep(self, round: int) -> None:
        """What is held of a round counts, and is now the state after it; nothing where none is. Raises as `save`."""
        if round not in self._held:
            return
        for later in self.rounds:
            if later > round:
                self._remove(later)
        if self._folder is None:
            self._in_ram[round] = self._held_in_ram.pop(round)
        else:
            held = self._path(self._folder, round, "held")
            self._read(held)
            try:
                held.replace(self._path(self._folder, round))
            except OSError as error:
                raise write_failed(held, error) from error
        self._forget_old()

    def settle(self, counted: int, round: int) -> None:
        """Before `round` makes anything of it: of the rounds before, `counted` is the last whose sum has this site's
        update. What is held of that one is kept, and what later ones left is forgotten.

        What is told first for a round holds, and is written down before: else a driver that told something else after a
        restart would get a second update of the round, from another memory, and see by how much the two differ. Raises
        as `save`.
        """
        counted = int(self._note(_SETTLED, round, counted))
        self.keep(counted)
        for number in self._held:
            if number < round:
                self._remove_held(number)
        for number in self.rounds:
            if counted < number < round:
                self._remove(number)

    def given(self, round: int) -> str | None:
        """Hash of the update that was given in a round, with noise; None for none. Raises CheckpointError."""
        return self._noted(_GIVEN).get(round)

    def give(self, round: int, update: str) -> None:
        """Notes that hash, for good: a driver that resumes may go back behind any round. Raises as `save`."""
        self._note(_GIVEN, round, update)

    def _note(self, file: str, round: int, value: Any) -> Any:
        """What was noted first for a round: this value, unless there was one before."""
        noted = self._noted(file)
        if round not in noted:
            noted[round] = value
            if self._folder is not None:
                write_atomic(self._folder / file, json.dumps(sorted(noted.items())).encode())
        return noted[round]

    def _noted(self, file: str) -> dict[int, Any]:
        if self._folder is None:
            return self._noted_in_ram[file]
        path = self._folder / file
        try:
            return {int(round): value for round, value in json.loads(path.read_bytes())}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is unreadable ({type(error).__name__}): {_FIX}") from error

    @property
    def _held(self) -> tuple[int, ...]:
        return self._numbers(_HELD) if self._folder is not None else tuple(self._held_in_ram)

    def _numbers(self, kind: re.Pattern[str]) -> tuple[int, ...]:
        assert self._folder is not None
        try:
            found = [kind.fullmatch(path.name) for path in self._folder.iterdir()]
        except OSError as error:
            raise DataError(f"{self._folder}: cannot list the site's memory ({error.strerror})") from error
        return tuple(sorted(int(match[1]) for match in found if match))

    def _write(self, path: Path, arrays: Mapping[str, Array]) -> None:
        write_atomic(path, seal(arrays, self._layout_hash))
        try:
            path.chmod(0o600)
        except OSError as error:
            raise write_failed(path, error) from error

    def _forget_old(self) -> None:
        for old in self.rounds[:-KEPT]:
            self._remove(old)

    def before(self, round: int) -> tuple[int, dict[str, Array]] | None:
        """The newest state of an earlier round, with that round's number: what `round` starts from, however often.

        None where none is kept. Where later ones are (a run was taken back by more rounds than are kept), that is
        logged: the site goes on without what it had.

        Raises:
            CheckpointError: the file is damaged, or of another layout.
        """
        earlier = [number for number in self.rounds if number < round]
        if earlier:
            return earlier[-1], self._load(earlier[-1])
        if later := [number for number in self.rounds if number > round]:
            _log.warning(
                "round %d starts without the site's own values: only those after round %s are kept",
                round,
                " and ".join(map(str, later)),
            )
        return None

    def latest(self) -> tuple[int, dict[str, Array]] | None:
        """The newest state, with its round; None where none is kept. Raises as `before`."""
        rounds = self.rounds
        return (rounds[-1], self._load(rounds[-1])) if rounds else None

    def _load(self, number: int) -> dict[str, Array]:
        if self._folder is not None:
            return self._read(self._path(self._folder, number))
        return {name: value.copy() for name, value in self._in_ram[number].items()}

    def _read(self, path: Path) -> dict[str, Array]:
        """Raises CheckpointError."""
        try:
            arrays, layout = unseal(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path} is unreadable ({error.strerror}): {_FIX}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{path} is {error}: {_FIX}") from error
        if layout != self._layout_hash:
            raise CheckpointError(
                f"{path.parent} keeps a site's values for another selection or model (layout {layout[:12]}, not "
                f"{self._layout_hash[:12]}): give this run a folder of its own, or remove that one"
            )
        return arrays

    def _remove(self, number: int) -> None:
        if self._folder is None:
            del self._in_ram[number]
        else:
            _unlink(self._path(self._folder, number))

    def _remove_held(self, number: int) -> None:
        if self._folder is None:
            del self._held_in_ram[number]
        else:
            _unlink(self._path(self._folder, number, "held"))

    @staticmethod
    def _path(folder: Path, number: int, kind: str = "round") -> Path:
        return folder / f"{kind}-{number:06d}.safetensors"


def close_folder(folder: Path) -> None:
    """A folder that is there and closed to other users. Raises DataError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)  # one that was there may be open to others
    except OSError as error:
        raise write_failed(folder, error) from error


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise write_failed(path, error) from error


def _copies(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: np.array(value, order="C") for name, value in arrays.items()}


_FIX = "restore it, or remove it and let the site go on from an earlier round of its memory, or without any"
