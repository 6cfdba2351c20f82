"""`fedsam verify RUN`: replays the record of a run and says what holds, what does not, and what it cannot tell."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fedsam_core.errors import CheckpointError, FedsamError
from fedsam_core.federation.rounds import State
from fedsam_core.federation.state import read_note, unpack_state
from fedsam_core.federation.verify import Check, Stored, verify
from fedsam_core.secagg.keyfiles import read_roster
from fedsam_core.selection import ParameterManifest
from pipelines import console
from pipelines.config import Config
from pipelines.federate import site_specs
from pipelines.run_folder import sum_file
from pipelines.stage import guarded

WRONG = 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table, or JSON. Exit status: 0 nothing is wrong, 1 a check failed, 2 the run cannot be read."""
    parser = argparse.ArgumentParser(
        prog="fedsam verify",
        description="Replays the record of a run: the hash chain, every site's signatures, the survivors they "
        "confirmed, the sums, and the global states that follow from them, up to the stored checkpoint.",
        epilog="example: fedsam verify ~/.fedsam/runs/hippocampus-20261123-141500-ab12cd-9f3e --roster roster.txt. "
        "Exit status: 0 nothing is wrong, 1 a check failed, 2 the run cannot be read.",
    )
    parser.add_argument("run", type=Path, help="a run's folder (work_dir/runs/NAME-DATE-HASH)")
    parser.add_argument(
        "--roster", type=Path, help="the consortium's public keys, from somewhere else than the run (`fedsam keys`)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    found: list[Check] = []
    status = guarded(lambda: found.extend(checks(options.run, options.roster)))
    if status == 0:
        show(found, options.json)
        status = WRONG if any(check.status == "failed" for check in found) else 0
    sys.exit(status)


def checks(run: Path, roster: Path | None) -> list[Check]:
    """All findings on a run's folder.

    Raises:
        CheckpointError: a file that the checks cannot do without is missing or unreadable.
        SecureSumError: the roster cannot be read.
    """
    pinned = None if roster is None else read_roster(roster)
    record = _bytes(run / "record.jsonl")
    lines = record.split(b"\n")
    if lines.pop():
        lines.append(b"")  # the last line was cut off: no entry
    data = _bytes(run / "manifest.json")
    try:
        manifest = ParameterManifest.from_json(data.decode())
    except (UnicodeDecodeError, RecursionError, FedsamError) as error:
        raise CheckpointError(f"{run / 'manifest.json'}: {error}") from error
    initial, final = run / "initial.safetensors", run / "state.safetensors"
    stored = Stored(
        manifest=manifest,
        initial=lambda: _first_state(manifest, initial) if _exists(initial) else None,
        final=lambda: _state(manifest, final),
        read_sum=lambda entry: _bytes(run / sum_file(entry)) if _exists(run / sum_file(entry)) else None,
    )
    found = verify(lines, stored, pinned)
    if all(check.status != "failed" for check in found):
        begun = json.loads(lines[0])
        found += [*_configuration(run / "config.yaml", begun, manifest), _end(run / "summary.json", lines[-1])]
    return found


def show(found: Sequence[Check], as_json: bool) -> None:
    """Prints the findings."""
    if as_json:
        print(json.dumps([asdict(check) for check in found], indent=1))
        return
    # A record may hold anything: nothing in it is markup, or moves the cursor.
    rows = [tuple(console.plain(_printable(text)) for text in (c.what, c.status, c.detail)) for c in found]
    console.out.print(console.table("Record of the run", ("check", "", "finding"), rows))
    failed = [check.what for check in found if check.status == "failed"]
    console.out.print(f"wrong: {', '.join(failed)}" if failed else "nothing that could be checked is wrong")


def _end(path: Path, last: bytes) -> Check:
    """Whether the record ends as the run did."""
    if not _exists(path):
        return Check("end", "not checked", f"there is no {path.name}: the run did not come to its end")
    try:
        noted = json.loads(_bytes(path))["record_head"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return Check("end", "failed", f"{path.name} is not that of a run ({type(error).__name__})")
    if noted != sha256(last).hexdigest():
        return Check(
            "end", "failed", f"{path.name} notes another head of the record: what came last was changed or cut"
        )
    return Check("end", "ok", f"the record's head is the one that {path.name} notes")


def _configuration(path: Path, begun: dict[str, Any], manifest: ParameterManifest) -> list[Check]:
    """Whether config.yaml and the manifest's selection are what the sites signed for."""
    what = "configuration"
    try:
        config = Config.model_validate(yaml.safe_load(_bytes(path)))
        (spec, *_) = site_specs(config, begun["sites"], begun["run"], begun["config_hash"])
        signed = spec.settings_hash(begun["weights_hash"], begun["roster_hash"])
    except (ValidationError, LookupError, TypeError, ValueError, RecursionError, yaml.YAMLError, FedsamError) as error:
        reason = " ".join(str(error).split())[:200]
        return [Check(what, "failed", f"{path.name} is not the configuration of the run ({reason})")]
    if signed != begun["settings_hash"]:
        return [Check(what, "failed", f"{path.name} says something else than the sites signed for")]
    if manifest.selection != config.layers:
        return [Check(what, "failed", f"manifest.json has selection {manifest.selection.name}, not the run's")]
    found = [Check(what, "ok", f"{path.name} is what the sites signed for ({signed[:16]})")]
    try:
        cohort = config.science_hash(begun["about"]["cohort_hash"])
    except (LookupError, TypeError, ValueError) as error:
        return [Check(what, "failed", f"the record does not say of which cohort the run is ({type(error).__name__})")]
    except OSError as error:
        return [*found, Check("backbone", "not checked", f"that model.checkpoint is still the same file ({error})")]
    if cohort != begun["config_hash"]:
        return [Check(what, "failed", "model.checkpoint, or the cohort's hash, is not that of the run")]
    return found


def _first_state(manifest: ParameterManifest, path: Path) -> State:
    state, note = _state(manifest, path)
    if note.get("layout_hash") != manifest.layout_hash:
        raise CheckpointError(f"{path.name} is of another layout than manifest.json")
    return state


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _state(manifest: ParameterManifest, path: Path) -> tuple[State, dict[str, str]]:
    """A stored global state and the notes in its header."""
    data = _bytes(path)
    try:
        return unpack_state(manifest, data), read_note(data)
    except FedsamError as error:
        raise CheckpointError(f"{path.name}: {error}") from error


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): give the folder of a run, with all its files"
        ) from error


if __name__ == "__main__":
    main()
