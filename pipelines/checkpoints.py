"""Checkpoints in a run's folder: one file a round, the two newest of them, and the folder as one of them has it.

A checkpoint is created, never replaced: once its name is there the round is finished, and of two drivers one wins. All
else in the folder that a round changes can be made anew from it, but for the record, which only grows.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from fedsam_core.errors import CheckpointError, RoundError, SecureSumError
from fedsam_core.federation.checkpoint import Checkpoint, unpack_checkpoint
from fedsam_core.federation.state import pack_state
from fedsam_core.secagg.record import Chain
from fedsam_core.selection import ParameterManifest
from fedsam_core.store import UNFINISHED, LocalStore
from pipelines.run_folder import RECORD, SUMS, RunFolder, sum_file

CHECKPOINTS = "checkpoints"
LOST_LINES = "record.lost.jsonl"
_KEPT = 2  # should the newest be damaged
_FILE = re.compile(r"(\d{6,})\.safetensors")


def checkpoint_file(number: int) -> str:
    """Name of a round's."""
    return f"{CHECKPOINTS}/{number:06d}.safetensors"


def put_checkpoint(folder: RunFolder, checkpoint: Checkpoint) -> None:
    """Finishes a round.

    Raises:
        RoundError: another driver has.
        StoreError: the disk refuses.
    """
    if not LocalStore(folder.path).create(checkpoint_file(checkpoint.round), checkpoint.pack()):
        raise RoundError(
            f"round {checkpoint.round} in {folder.path} was finished by another driver in the meantime: two drivers "
            "are at work on one run; stop one of them"
        )


def prune(folder: RunFolder) -> None:
    """Removes all but the newest checkpoints."""
    for number in finished_rounds(folder)[:-_KEPT]:
        folder.file(checkpoint_file(number)).unlink(missing_ok=True)


def finished_rounds(folder: RunFolder) -> list[int]:
    """Numbers of the rounds whose checkpoints are there, upwards."""
    names = [path.name for path in folder.file(CHECKPOINTS).glob("*.safetensors")]
    return sorted(int(match[1]) for match in map(_FILE.fullmatch, names) if match)


def read_checkpoint(folder: RunFolder, number: int) -> tuple[Checkpoint, list[bytes]]:
    """A round's checkpoint, and the lines of the record up to it.

    Raises:
        CheckpointError: one of the two is damaged.
    """
    path, record = folder.file(checkpoint_file(number)), folder.file(RECORD)
    try:
        checkpoint = unpack_checkpoint(path.read_bytes())
        about = checkpoint.facts["record"]
        lines = record.read_bytes().split(b"\n")[: about["lines"]]
    except CheckpointError as error:
        raise CheckpointError(f"{path} is {error}") from error
    except (OSError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} is unreadable ({error})") from error
    chain = Chain()
    try:
        chain.restore(lines)
    except SecureSumError as error:
        raise CheckpointError(f"{record} is damaged: {error}") from error
    if (len(lines), chain.head) != (about["lines"], about["head"]) or checkpoint.round != number:
        raise CheckpointError(f"{path} does not belong to {record}: one of them was changed")
    return checkpoint, lines


def unfold(folder: RunFolder, checkpoint: Checkpoint, lines: Sequence[bytes]) -> None:
    """Brings the folder to where a checkpoint has it: what a lost driver wrote since then is set aside or goes."""
    _sweep(folder)
    for number in finished_rounds(folder):
        if number > checkpoint.round:
            folder.file(checkpoint_file(number)).unlink(missing_ok=True)
    _cut_record(folder, lines)
    state = folder.file("state.safetensors")
    if checkpoint.round == 0:
        state.unlink(missing_ok=True)
    else:
        manifest = ParameterManifest.from_json(folder.file("manifest.json").read_text())
        tensors = manifest.unflatten(checkpoint.arrays["vector"])
        folder.write(state.name, pack_state(manifest, tensors, note_of(checkpoint)))
    for name, rows in {**checkpoint.facts["tables"], "ledger.csv": checkpoint.facts["ledger"]}.items():
        folder.write_table(name, rows)


def clear(folder: RunFolder) -> None:
    """Takes away what a driver has left that was lost before the first checkpoint."""
    _sweep(folder)
    _cut_record(folder, [])
    for name in (SUMS, CHECKPOINTS):
        shutil.rmtree(folder.file(name), ignore_errors=True)


def note_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What stands in the header of the round's state.safetensors."""
    facts = checkpoint.facts
    return {
        "round": str(checkpoint.round),
        "run": facts["run"],
        "state_hash": facts["state_hash"],
        "record_head": facts["record"]["head"],
    }


def _sweep(folder: RunFolder) -> None:
    """Removes what a killed process was writing."""
    for unfinished in (*folder.path.glob("**/.*.tmp"), *folder.path.glob(f"**/{UNFINISHED}*")):
        unfinished.unlink(missing_ok=True)


def _cut_record(folder: RunFolder, lines: Sequence[bytes]) -> None:
    """Ends the record with these lines; those after them go to a file beside it, as nobody can tell what they hide."""
    path = folder.file(RECORD)
    found = path.read_bytes() if path.is_file() else b""
    kept = b"".join(line + b"\n" for line in lines)
    if found != kept:
        folder.append(LOST_LINES, found[len(kept) :].rstrip(b"\n") + b"\n")
        folder.write(RECORD, kept)
    for stale in folder.file(SUMS).glob("*.bin"):
        if stale.relative_to(folder.path).as_posix() >= sum_file(len(lines)):
            stale.unlink(missing_ok=True)


def remove_checkpoints(path: Path) -> None:
    """The run has come to its end."""
    shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)
