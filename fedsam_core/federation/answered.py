"""What a site has answered, so that it answers nothing twice, not even after a restart.

Attempts of a run are numbered upwards, and so are its rounds: the last ones entered are enough to refuse a repetition.
And what a sum is about (the slices, the scores of one global state, or a round's update of it) is opened for one set of
survivors only: an attempt that seemed to fail may have been opened all the same, and a second one without some site,
whose contributions are equal to the bit, would show that site's values as the difference.

A site with a lasting identity (a roster) keeps this in a file a run, beside its key; a development identity ends with
the process, and so may this.
"""

from pathlib import Path

from pydantic import Field, ValidationError

from fedsam_core.data.files import write_atomic
from fedsam_core.errors import SecureSumError
from fedsam_core.secagg.attempt import Attempt
from fedsam_core.secagg.refusals import OpenedBefore, OutOfTurn
from fedsam_core.settings import Settings


class _Run(Settings):
    attempt: int = Field(-1, description="the last one entered")
    round: int = Field(0, description="of that attempt")
    opened: dict[str, tuple[str, ...]] = Field({}, description="survivors, by what the sum was about")


class Answered:
    """The attempts of a run that a site has entered, and the sums that it has helped to open."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: a JSON file, made when it is missing; None for memory only.

        Raises:
            SecureSumError: the file is there and is not what this class writes.
        """
        self._path = path
        self._run = _Run()
        if path is not None and path.exists():
            try:
                self._run = _Run.model_validate_json(path.read_bytes())
            except (OSError, ValidationError) as error:
                reason = " ".join(str(error).split())[:200]
                raise SecureSumError(
                    f"{path}, which keeps this site from answering twice, is unreadable ({reason}): restore it, or "
                    "remove it once the run is over"
                ) from error

    @property
    def last(self) -> int:
        """The number of the last attempt that was entered; 0 before the first."""
        return max(0, self._run.attempt)

    def opened_of(self, state_hash: str) -> dict[str, list[str]]:
        """The survivors of the sums of a state, and of those of none, that were opened: by `topic`."""
        wanted = ("", state_hash[:32])
        return {name: list(sites) for name, sites in self._run.opened.items() if name.split(" ")[1] in wanted}

    def enter(self, attempt: Attempt) -> None:
        """Notes the attempt before anything is answered in it.

        Raises:
            OutOfTurn: the site has entered it, a later one, or a later round of the run before.
            DataError: the file cannot be written.
        """
        known = self._run
        if attempt.attempt <= known.attempt or attempt.round < known.round:
            raise OutOfTurn(
                f"attempt {attempt.attempt} in round {attempt.round} of run {attempt.run} was asked for, but attempt "
                f"{known.attempt} in round {known.round} was entered before"
            )
        self._note(_Run(attempt=attempt.attempt, round=attempt.round, opened=known.opened))

    def check(self, attempt: Attempt, about: str, survivors: tuple[str, ...], follows: str | None = None) -> None:
        """Raises OpenedBefore where a sum about the same, or the one that this one `follows`, was opened for other
        survivors, or the latter not at all."""
        if follows is not None and self._run.opened.get(topic(attempt, follows)) != survivors:
            raise OpenedBefore(
                f"the {about} sum goes on from the {follows} sum of this state, which was not opened for just "
                f"{', '.join(survivors)}: the two would show the difference"
            )
        before = self._run.opened.get(topic(attempt, about))
        if before is not None and before != survivors:
            raise OpenedBefore(
                f"the {about} sum of this state was opened for {', '.join(before)} before: opening it for "
                f"{', '.join(survivors)} would show the difference"
            )

    def open(self, attempt: Attempt, about: str, survivors: tuple[str, ...], follows: str | None = None) -> None:
        """Notes that this site helps to open a sum, before it does. Raises as `check`."""
        self.check(attempt, about, survivors, follows)
        opened = {**self._run.opened, topic(attempt, about): survivors}
        self._note(self._run.model_copy(update={"opened": opened}))

    def _note(self, entry: _Run) -> None:
        if self._path is not None:
            write_atomic(self._path, entry.model_dump_json(indent=1).encode())
        self._run = entry


def topic(attempt: Attempt, about: str) -> str:
    """What a sum is about. Training is another in every round, as its draws are; all else is of the state alone."""
    trained = about.startswith(("update", "magnitudes"))
    return f"{about} {attempt.model_hash[:32]}" + (f" {attempt.round}" if trained else "")
