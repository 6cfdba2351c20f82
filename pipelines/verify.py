"""`fedsam verify RUN`: replays the record of a run and says what holds, what does not, and what it cannot tell."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
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
    lines = _bytes(run / "record.jsonl").splitlines()
    try:
        manifest = ParameterManifest.from_json(_bytes(run / "manifest.json").decode())
    except (UnicodeDecodeError, FedsamError) as error:
        raise CheckpointError(f"{run / 'manifest.json'}: {error}") from error
    initial, final = run / "initial.safetensors", run / "state.safetensors"
    stored = Stored(
        manifest=manifest,
        initial=lambda: _state(manifest, initial)[0] if _exists(initial) else None,
        final=lambda: _state(manifest, final),
        read_sum=lambda entry: _bytes(run / sum_file(entry)) if _exists(run / sum_file(entry)) else None,
    )
    found = verify(lines, stored, pinned)
    if all(check.status != "failed" for check in found):
        found.append(_configuration(run / "config.yaml", json.loads(lines[0])))
    return found


def show(found: Sequence[Check], as_json: bool) -> None:
    """Prints the findings."""
    if as_json:
        print(json.dumps([asdict(check) for check in found], indent=1))
        return
    rows = [(check.what, check.status, check.detail) for check in found]
    console.out.print(console.table("Record of the run", ("check", "", "finding"), rows))
    failed = [check.what for check in found if check.status == "failed"]
    console.out.print(f"wrong: {', '.join(failed)}" if failed else "nothing that could be checked is wrong")


def _configuration(path: Path, begun: dict[str, Any]) -> Check:
    """Whether config.yaml is what the sites signed for."""
    what = "configuration"
    try:
        config = Config.model_validate(yaml.safe_load(_bytes(path)))
        (spec, *_) = site_specs(config, begun["sites"], begun["run"], begun["config_hash"])
        found = {
            "config_hash": config.science_hash(begun["about"]["cohort_hash"]),
            "settings_hash": spec.settings_hash(begun["weights_hash"], begun["roster_hash"]),
        }
    except (ValidationError, ValueError, yaml.YAMLError, FedsamError) as error:
        reason = " ".join(str(error).split())[:200]
        return Check(what, "failed", f"{path.name} is not the configuration of a run ({reason})")
    except OSError as error:
        return Check(what, "not checked", f"its hash needs a file that is not here ({error})")
    for key, value in found.items():
        if begun[key] != value:
            return Check(what, "failed", f"{path.name} has {key} {value[:16]}, the sites signed for {begun[key][:16]}")
    return Check(what, "ok", f"{path.name} is what the sites signed for ({found['settings_hash'][:16]})")


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
