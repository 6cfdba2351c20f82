"""`fedsam runs`: the federations in work_dir, or in storage.results: which run, which stopped, how far, how good."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from typing import Any

from cluster.lease import is_over, last_beat, newest
from fedsam_core.store import Store
from pipelines import console
from pipelines.commits import BEGUN, last_committed, read_commit, read_run_file, results_store, round_place
from pipelines.config import Config
from pipelines.resume import ELSEWHERE, Begun, is_finished, places_of, read_begun
from pipelines.run_folder import RunFolder
from pipelines.stage import guarded
from pipelines.stop import last_round


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="fedsam runs",
        description=__doc__,
        epilog="example: fedsam runs storage.results=s3://fedsam/results. `fedsam resume RUN` goes on with one that is "
        "stopped, `fedsam stop RUN` ends one that is running.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"where they are: keys of {', '.join(ELSEWHERE)}"
    )
    options = parser.parse_args(arguments)
    sys.exit(guarded(lambda: show(places_of(options.overrides))))


def show(places: Config) -> None:
    """Prints a row a run, the newest last."""
    store = results_store(places)
    keys = [key for key in store.list("runs/") if key.endswith(f"/{BEGUN}") and key.count("/") == 2]
    found = [begun for key in keys if (begun := read_begun(store, key.split("/")[1])) is not None]
    rows = [row(places, store, begun) for begun in sorted(found, key=lambda one: one.time)]
    columns = ("run", "begun, UTC", "", "rounds", "Dice", "last seen, UTC")
    console.out.print(console.table(f"runs in {store.url}", columns, rows))


def row(places: Config, store: Store, begun: Begun) -> tuple[Any, ...]:
    """Of one run: state, finished rounds of all, Dice on the test cases once it is finished, else on the validation
    cases."""
    run, rounds, time = begun.run, begun.config["federation"]["rounds"], _short(begun.time)
    number, holder = newest(store, run)
    held = holder is not None and not is_over(store, run, number, holder)
    if is_finished(places, store, run):
        told = json.loads(read_run_file(store, run, "summary.json") or b"{}")
        return run, time, "finished", f"{rounds} of {rounds}", told.get("after", {}).get("dice"), "-"
    here = places.model_copy(update={"run": run})
    done = max(0, last_round(here))
    dice = _validation_dice(places, store, run)
    seen = _short(last_beat(store, run, number))
    return run, time, "running" if held else "stopped", f"{done} of {rounds}", dice, seen


def _short(time: str) -> str:
    return time[:16].replace("T", " ")


def _validation_dice(places: Config, store: Store, run: str) -> float | None:
    name = "rounds.csv"
    if places.storage.results is None:
        path = RunFolder(places.work_dir / "runs" / run).file(name)
        text = path.read_text() if path.is_file() else ""
    else:
        commit = read_commit(store, run, round_place(last_committed(store, run)))
        known = commit is not None and name in commit.files
        text = store.read_bytes(f"runs/{run}/{commit.key(name)}").decode() if commit and known else ""
    told = [one["val/dice"] for one in csv.DictReader(io.StringIO(text)) if one.get("val/dice")]
    return float(told[-1]) if told else None


if __name__ == "__main__":
    main()
