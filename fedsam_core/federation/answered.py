"""Which attempts a site has entered: no attempt is answered twice, not even by a site that was restarted in it.

Attempts of a run are numbered upwards, so the last number a run is enough. A site with a lasting identity (a roster)
keeps it in a file beside its key; a development identity ends with the process, and so may this.
"""

import json
from pathlib import Path

from fedsam_core.data.files import write_atomic
from fedsam_core.errors import SecureSumError
from fedsam_core.secagg.attempt import Attempt
from fedsam_core.secagg.refusals import OutOfTurn


class Answered:
    """The last attempt of each run that a site has entered."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: a JSON file, made when it is missing; None for memory only.

        Raises:
            SecureSumError: the file is there and is not what this class writes.
        """
        self._path = path
        self._last: dict[str, int] = {}
        if path is not None and path.exists():
            try:
                self._last = {str(run): int(number) for run, number in json.loads(path.read_text()).items()}
            except (OSError, ValueError, AttributeError, TypeError) as error:
                raise SecureSumError(
                    f"{path}, which keeps this site from answering an attempt twice, is unreadable ({error}): restore "
                    "it, or remove it once no run is under way"
                ) from error

    def enter(self, attempt: Attempt) -> None:
        """Notes the attempt before anything is answered in it.

        Raises:
            OutOfTurn: the site has entered it, or a later one of the run, before.
            DataError: the file cannot be written.
        """
        last = self._last.get(attempt.run, -1)
        if attempt.attempt <= last:
            raise OutOfTurn(
                f"attempt {attempt.attempt} of run {attempt.run} was asked for again: the last one entered is {last}"
            )
        self._last[attempt.run] = attempt.attempt
        if self._path is not None:
            write_atomic(self._path, json.dumps(self._last, indent=1).encode())
